"""What is at no path and what nobody can be asked for is said at once, with both readings, before any library tries again and again."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers.utils.hub
from transformers import AutoModelForCausalLM

from hf_elastic import CheckpointError, ElasticConfig, ElasticForCausalLM, UnreachableError, elastify, slice_adapter
from hf_elastic.cli import main
from hf_elastic.commands.elastify import load_calibration
from hf_elastic.storage import retries
from hf_elastic.storage.sources import pinned

NOBODY = "http://127.0.0.1:9"  # the port of `discard`, where nothing listens


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder with `out/family` in it, and no network. Seconds slept count, without being slept; the client's own tries are a failure."""
    slept: list[float] = []
    (tmp_path / "out" / "family").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("model: out/famly\ndataset: rows\nbf16: false\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOBODY)
    template = NOBODY + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(retries, "sleep", slept.append)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"a library waits {seconds} s"))
    return slept


PATHS = ["./famly", "../famly", "/famly/x", "~/famly", "out/famly/x", "outt/", "out//famly", "a\\b", ""]


@pytest.mark.parametrize("path", PATHS)
def test_what_can_only_be_a_path_is_not_asked_for(path, alone):
    for read in (ElasticForCausalLM.from_pretrained, ElasticConfig.from_pretrained, elastify, lambda p: pinned(p, {})):
        with pytest.raises(CheckpointError, match="there is no folder") as said:
            read(path)
        assert not isinstance(said.value, UnreachableError)
    assert not alone


@pytest.mark.parametrize("name", ["out/famly", "famly"])
def test_what_is_likely_a_folder_is_asked_for_once(name, alone):
    for read in (ElasticForCausalLM.from_pretrained, elastify, lambda p: slice_adapter(p, "small", "there")):
        with pytest.raises(
            UnreachableError, match=f"{name} is no folder here, and whether it is a repository"
        ) as said:
            read(name)
        assert ("Did you mean 'out/family'?" in str(said.value)) == (name == "out/famly")
    assert not alone


def test_what_may_be_a_repository_is_asked_for_a_few_times(alone):
    with pytest.raises(
        UnreachableError, match="If a folder is meant.*Did you mean 'out/family'.*If a repository is meant"
    ):
        ElasticForCausalLM.from_pretrained("outt/family")
    assert sum(alone) <= 2
    assert len(alone) == retries.CONNECTING - 1


COMMANDS = [
    ["plan", "out/famly"],
    ["generate", "out/famly", "x"],
    ["evaluate", "out/famly"],
    ["slice", "out/famly", "there"],
    ["export", "out/famly", "there"],
    ["push", "out/famly", "me/there"],
    ["elastify", "out/famly", "there", "--no-sort", "--budget", "half:hidden=0.5"],
    ["train", "recipe.yaml"],
    ["train", "recipe.yaml", "--model", "out/family", "--teacher", "out/famly"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:1] + command[3:5]))
def test_commands(command, alone, capsys):
    assert main(command) == 2
    assert "Did you mean 'out/family'?" in capsys.readouterr().err
    assert not alone
    assert not Path("there").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [("./rows", "there is no file or folder ./rows"), ("out/famly", "out/famly is no file or folder here")],
)
def test_calibration_and_data_sets(data, message, alone):
    with pytest.raises(CheckpointError, match=message):
        load_calibration(data, "train")
    assert not alone


def test_an_auto_class_that_is_asked_for_a_size(alone, monkeypatch):
    """It looks for an adapter first, which is not ours to shorten; what comes after is."""
    monkeypatch.setattr(transformers.models.auto.auto_factory, "find_adapter_config_file", lambda *a, **k: None)
    with pytest.raises(UnreachableError, match="Did you mean 'out/family'"):
        AutoModelForCausalLM.from_pretrained("out/famly", budget="12b")
    assert not alone
