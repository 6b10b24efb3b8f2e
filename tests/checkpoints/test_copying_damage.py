"""What copies weights on (push, slice, export, train) does not give damaged ones new checksums."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compare import assert_same_weights
from routed import routed
from safetensors.torch import load_file, save_file

from hf_elastic import CheckpointError, ElasticForCausalLM
from hf_elastic.cli import main
from hf_elastic.hub.publishing import prepare_upload
from hf_elastic.routing.router import ROUTER_FILE
from hf_elastic.storage.checksums import CHECKSUMS_NAME


@pytest.fixture
def folder(hub_folders, tmp_path) -> Path:
    """The stock layout in several files, with checksums."""
    return Path(shutil.copytree(hub_folders / "checked", tmp_path / "checked"))


def flip(file: Path) -> Path:
    """Change one bit of one weight; the file stays one that loads."""
    data = bytearray(file.read_bytes())
    data[-300] ^= 1
    file.write_bytes(data)
    return file


@pytest.fixture
def token(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")


@pytest.mark.parametrize(
    "arguments",
    [
        ["push", "org/z", "--upload"],
        ["push", "org/z", "--upload", "--layout", "stock"],
        ["push", "org/z", "--upload", "--budget", "small"],
        ["push", "org/z"],
        ["slice", "{out}", "--budget", "small"],
        ["export", "{out}", "--budget", "small", "--heterogeneous"],
    ],
    ids=" ".join,
)
def test_damaged_weights_are_not_copied_on(arguments, folder, hub, token, tmp_path, capsys):
    file = flip(sorted(folder.glob("*.safetensors"))[-1])
    command, *rest = [word.format(out=tmp_path / "out") for word in arguments]
    assert main([command, str(folder), *rest]) == 2
    assert f"{file} is damaged from byte" in capsys.readouterr().err
    assert "org/z" not in hub.repositories
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["nested", "stock"])
def test_a_push_that_sends_a_folder_as_it_is_reads_every_file(layout, hub, hub_folders, tmp_path):
    """Also the parts that only the whole family has, and the router."""
    folder = tmp_path / "family"
    routed("nano3").save_pretrained(folder, layout=layout)
    prepare_upload(folder, "org/z")
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        whole = file.read_bytes()
        flip(file)
        with pytest.raises(CheckpointError, match=f"{file} is damaged"):
            prepare_upload(folder, "org/z")
        file.write_bytes(whole)


def test_verify_compares_the_router(tmp_path):
    routed("nano3").save_pretrained(tmp_path)
    flip(tmp_path / ROUTER_FILE)
    ElasticForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{ROUTER_FILE} is damaged"):
        ElasticForCausalLM.from_pretrained(tmp_path, verify=True)


def test_a_slice_needs_only_its_own_files_sound(hub_folders, tmp_path):
    folder = Path(shutil.copytree(hub_folders / "nested", tmp_path / "nested"))
    flip(folder / "budgets/full/added.safetensors")
    assert main(["slice", str(folder), str(tmp_path / "out"), "--budget", "small"]) == 0
    assert_same_weights(
        ElasticForCausalLM.from_pretrained(tmp_path / "out"),
        ElasticForCausalLM.from_pretrained(folder, budget="small", verify=True),
    )


@pytest.mark.parametrize("listed", [True, False])
def test_checksums_of_an_earlier_save_are_said_and_deleting_them_helps(listed, hub, folder, tmp_path, capsys):
    """Another program wrote the weights since: the message says what to do, and it works."""
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    if not listed:
        path = folder / CHECKSUMS_NAME
        written = json.loads(path.read_text())
        del written["files"][file.name]
        path.write_text(json.dumps(written))
    assert main(["slice", str(folder), str(tmp_path / "out")]) == 2
    assert (
        f"belongs to an earlier save, and another program wrote the weights since: if they are as they have to be, delete {folder / CHECKSUMS_NAME}"
        in capsys.readouterr().err
    )
    (folder / CHECKSUMS_NAME).unlink()
    assert main(["slice", str(folder), str(tmp_path / "out")]) == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[key], tensor) for key, tensor in load_file(file).items())
    prepare_upload(folder, "org/z")
