"""Elastic checkpoints on the Hub: the real client against a server on this machine that counts what it sends."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from cases import BUDGETS
from compare import assert_same_weights
from transformers import PreTrainedModel

from hf_elastic import CheckpointError, ElasticConfig, ElasticForCausalLM
from hf_elastic.storage import fetching, retries
from hf_elastic.storage.checksums import CHECKSUMS_NAME

CONFIG, SMALL, MEDIUM = "config.json", "budgets/small/model.safetensors", "budgets/medium/added.safetensors"


@pytest.fixture
def folders(hub_folders):
    return hub_folders


@pytest.fixture
def load(pull):
    return pull


@pytest.fixture
def expected(pulled):
    return pulled


@pytest.fixture
def no_weights_placed(monkeypatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *args: pytest.fail("the loader was called"))


def weights(hub) -> dict[str, int]:
    return {name: count for name, count in hub.sent.items() if name.endswith(".safetensors")}


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def cached(folder: Path) -> list[Path]:
    """Everything in a cache that holds weights."""
    return [
        file for file in folder.rglob("*") if file.is_file() and not file.is_symlink() and file.stat().st_size > 9000
    ]


# The nested layout


def test_a_budget_fetches_its_files_and_the_next_one_the_difference(hub, load, expected, folders, monkeypatch):
    files = ElasticConfig.from_pretrained(folders / "nested").elastic["files"]
    assert_same_weights(load("org/nested", "small"), expected("small"))
    assert weights(hub) == files["small"]
    slice_bytes = sum(tensor.nbytes for tensor in expected("small").state_dict().values())
    assert sum(weights(hub).values()) == slice_bytes + header_bytes(folders / "nested" / SMALL)
    hub.reset()
    assert_same_weights(load("org/nested", "large"), expected("large"))
    assert weights(hub) == {**files["medium"], **files["large"]}
    hub.reset()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for budget in ("medium", {"hidden": 24}):
        load("org/nested", budget if budget == "medium" else {**BUDGETS["nano3"]["small"], "hidden": 24})
    with pytest.raises(
        CheckpointError,
        match="budgets/full/added.safetensors, which config.json of org/nested lists, cannot be fetched",
    ):
        load("org/nested")
    assert not hub.requests


def test_an_interrupted_file_goes_on_where_it_stopped(hub, load, expected, folders, monkeypatch):
    size = ElasticConfig.from_pretrained(folders / "nested").elastic["files"]["small"][SMALL]
    hub.cuts[SMALL] = [size // 2]
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what arrives in less is not kept
    assert_same_weights(load("org/nested", "small"), expected("small"))
    assert size <= weights(hub)[SMALL] < size + 2048
    assert sum(f"/{SMALL}" in request and request.startswith("GET /cdn") for request in hub.requests) == 2


def test_a_corrupt_file_is_refused_and_does_not_stay_in_the_cache(hub, load, expected, tmp_path):
    hub.corrupt.add(MEDIUM)
    with pytest.raises(
        CheckpointError, match=f"{MEDIUM} of org/nested arrived with other contents than the Hub says.*fetch it again"
    ):
        load("org/nested", "medium")
    assert [file.stat().st_size for file in cached(tmp_path / "cache")] == [hub.sent[SMALL]]
    hub.corrupt.clear()
    hub.reset()
    assert_same_weights(load("org/nested", "medium"), expected("medium"))
    assert list(weights(hub)) == [MEDIUM]


@pytest.mark.parametrize("repo", ["org/nested", "org/sharded"])
def test_what_the_hub_refuses(repo, hub, load, expected, tmp_path, no_weights_placed):
    with pytest.raises(OSError, match="no-such-branch is not a valid git identifier"):
        load(repo, "small", revision="no-such-branch")
    hub.repositories[repo].token = "hf_right"
    for token in (None, False, "hf_wrong"):
        with pytest.raises(OSError, match="(?s)not a valid model identifier.*pass a token"):
            load(repo, "small", token=token)
    with pytest.raises(OSError, match="is not a valid model identifier"):
        load("org/nothing", "small")
    assert not cached(tmp_path / "cache")


@pytest.mark.parametrize("repo", ["org/nested", "org/sharded"])
def test_a_private_repository_and_its_revisions(repo, hub, load, expected, folders):
    hub.repositories[repo].token = "hf_right"
    first = hub.repositories[repo].refs["main"]
    hub.repositories[repo].refs["v1"] = first
    hub.commit(repo, folders / "stock")  # main is another layout meanwhile
    for revision in ("v1", first):
        assert_same_weights(load(repo, "small", token="hf_right", revision=revision), expected("small"))
    assert "model.safetensors" not in hub.sent
    assert_same_weights(load(repo, "small", token="hf_right"), expected("small"))


@pytest.mark.parametrize(
    ("repo", "missing", "message"),
    [
        (
            "org/nested",
            MEDIUM,
            f"{MEDIUM}, which config.json of org/nested lists, cannot be fetched: org/nested has no such file",
        ),
        ("org/sharded", "model-00003", r"has no model-00003.*index.json lists it; the checkpoint is incomplete"),
        (
            "org/stock",
            "model.safetensors",
            "org/stock holds neither model.safetensors nor model.safetensors.index.json",
        ),
    ],
)
def test_half_uploaded_repositories(repo, missing, message, hub, load, no_weights_placed):
    files = hub.repositories[repo].commits[hub.repositories[repo].refs["main"]]
    hub.repositories[repo].add({name: file for name, file in files.items() if not name.startswith(missing)})
    with pytest.raises(CheckpointError, match=message):
        load(repo, "medium")


@pytest.mark.parametrize("repo", ["org/nested", "org/stock", "org/sharded"])
def test_weights_out_of_reach_are_not_called_missing(repo, hub, tmp_path, no_weights_placed):
    """The configuration is in the cache, and then the connection is gone."""
    ElasticConfig.from_pretrained(repo, cache_dir=tmp_path / "cache")
    hub.repositories[repo].token = "hf_now_private"
    for how, message in (
        ({}, "(?s)cannot be asked for: 401|not a valid model identifier.*pass a token"),
        ({"local_files_only": True}, "couldn't connect to|it is not in the cache, and this is offline"),
    ):
        with pytest.raises(OSError, match=message):
            ElasticForCausalLM.from_pretrained(repo, budget="small", cache_dir=tmp_path / "cache", **how)


def test_another_save_of_the_same_file_is_refused(hub, load, folders, no_weights_placed):
    files = dict(hub.repositories["org/nested"].commits[hub.repositories["org/nested"].refs["main"]])
    files[MEDIUM] = (folders / "nested/budgets/large/added.safetensors").read_bytes()
    hub.repositories["org/nested"].add(files)
    with pytest.raises(CheckpointError, match=r"has [\d,]+ bytes, config.json says"):
        load("org/nested", "medium")


# The stock layout: shards and rows


@pytest.mark.parametrize("repo", ["org/stock", "org/sharded"])
def test_only_the_rows_of_a_budget_are_fetched(repo, hub, load, expected, folders, monkeypatch):
    """Counted from the table: whole rows where a row is kept in part, nothing of what is dropped, and the headers."""
    config = ElasticConfig.from_pretrained(folders / "stock")
    headers = sum(header_bytes(file) for file in (folders / repo.removeprefix("org/")).glob("*.safetensors"))
    monkeypatch.setattr("hf_elastic.checkpoints.opening.MOSTLY", 1.0)
    rows = 0
    small = config.submodel("small")
    for rule in config.architecture.rules(config.parent_config):
        full = config.architecture.full(config.parent_config)
        if rule.layer is None or rule.layer in small.layers:
            whole, kept = rule.shape(full.at(rule.layer)), rule.shape(small.at(rule.layer))
            own = kept[0] * kept[1] * whole[2] if rule.stacked else kept[0] * torch.Size(whole[1:]).numel()
            rows += 4 * own
    assert_same_weights(load(repo, "small"), expected("small"))
    assert sum(weights(hub).values()) == rows + headers
    whole = sum(file.stat().st_size for file in (folders / repo.removeprefix("org/")).glob("*.safetensors"))
    assert rows + headers < 0.6 * whole
    first = sum(weights(hub).values())
    hub.reset()
    assert_same_weights(load(repo, "small"), expected("small"))
    assert not hub.sent
    assert_same_weights(load(repo), expected(None))
    assert sum(weights(hub).values()) == whole - first, "the second budget fetches the difference"
    hub.reset()
    assert_same_weights(load(repo, "medium", local_files_only=True), expected("medium"))
    assert not hub.requests


def test_files_that_are_needed_nearly_whole_go_into_the_ordinary_cache(hub, load, expected, folders, tmp_path):
    assert_same_weights(load("org/sharded"), expected(None))
    snapshot = next((tmp_path / "cache").glob("models--org--sharded/snapshots/*"))
    assert sorted(file.name for file in snapshot.glob("*.safetensors")) == sorted(
        file.name for file in (folders / "sharded").glob("*.safetensors")
    )
    hub.reset()
    assert_same_weights(load("org/sharded", "small"), expected("small"))
    assert not weights(hub)
    shutil.rmtree(tmp_path / "cache")
    load("org/sharded", "small", force_download=True)
    assert not (tmp_path / "cache/assets").exists()


def test_interrupted_ranges_go_on_with_the_next_load(hub, load, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_WORKERS", 1)
    monkeypatch.setattr(retries, "TRIES", 1)
    hub.limit = 100_000
    with pytest.raises(CheckpointError, match=r"could not be fetched.*What arrived is kept; load again to go on"):
        load("org/stock", "small")
    arrived = sum(weights(hub).values())
    assert arrived > 90_000
    hub.limit = None
    with pytest.raises(
        CheckpointError,
        match=r"bytes of model.safetensors of org/stock are needed and not in the cache, and this is offline",
    ):
        load("org/stock", "small", local_files_only=True)
    assert_same_weights(load("org/stock", "small"), expected("small"))
    (record,) = (tmp_path / "cache/assets").rglob("[0-9a-f]*[0-9a-f].json")
    needed = sum(stop - start for start, stop in json.loads(record.read_text())[0]["ranges"])
    assert needed > 1.5 * arrived
    assert needed <= sum(weights(hub).values()) <= needed + 300
    record.write_text("[[0, 99], broken")  # not believed
    commit = hub.repositories["org/stock"].refs["main"]
    file = fetching.PartialFile(
        "org/stock", "model.safetensors", {"revision": commit, "cache_dir": tmp_path / "cache"}
    )
    assert file.missing([(0, file.size)]) == file.size - header_bytes(file.path)


def test_a_server_without_ranges_sends_the_whole_file(hub, load, expected, tmp_path):
    hub.ranges = False
    assert_same_weights(load("org/stock", "small"), expected("small"))
    assert list((tmp_path / "cache").glob("models--org--stock/snapshots/*/model.safetensors"))


@pytest.mark.parametrize("length", [2**62, 10**8, 0])
def test_a_remote_header_that_lies_is_refused_before_anything_is_allocated(
    length, hub, load, expected, folders, no_weights_placed
):
    files = dict(hub.repositories["org/stock"].commits[hub.repositories["org/stock"].refs["main"]])
    data = files["model.safetensors"].read_bytes()
    hub.repositories["org/stock"].add({**files, "model.safetensors": length.to_bytes(8, "little") + data[8:]})
    with pytest.raises(
        CheckpointError, match=r"says that its header has [\d,]+ bytes, of 490,240 of the whole file: it is damaged"
    ):
        load("org/stock", "small")
    assert sum(weights(hub).values()) == 8


def test_progress_is_shown(hub, load, monkeypatch):
    bars = []

    class Bar(fetching.tqdm):
        def __init__(self, *args, **kwargs):
            bars.append({**kwargs, "done": 0})
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n=1):
            bars[-1]["done"] += n

    monkeypatch.setattr(fetching, "tqdm", Bar)
    load("org/stock", "small")
    shown = [bar for bar in bars if not bar["disable"]]
    assert [bar["desc"] for bar in shown] == ["model.safetensors"]
    assert shown[0]["done"] == shown[0]["total"] > 100_000


# Pushing


def test_push_and_pull(hub, load, expected, folders):
    def files(repo):
        return set(hub.repositories[repo].commits[hub.repositories[repo].refs["main"]])

    hub.commit("org/new", folders / "sharded")
    main = hub.repositories["org/new"].refs["main"]
    hub.repositories["org/new"].commits[main]["adapter_model.safetensors"] = b"mine"
    expected(None).push_to_hub("org/new")
    listed = {file for entry in ElasticConfig.from_pretrained("org/new").elastic["files"].values() for file in entry}
    beside = {f"budgets/small/{name}" for name in ("config.json", "generation_config.json")}
    always = {CONFIG, "generation_config.json", "modeling_elastic.py", "README.md", "adapter_model.safetensors"}
    always.add(CHECKSUMS_NAME)
    assert files("org/new") == always | listed | beside
    medium = load("org/new", "medium")
    assert_same_weights(medium, expected("medium"))
    medium.push_to_hub("org/new", layout="stock", token=False)
    assert files("org/new") == always | {"model.safetensors"}
    assert_same_weights(load("org/new"), expected("medium"))
    with pytest.raises(TypeError, match="'layuot'. Did you mean 'layout'"):
        medium.push_to_hub("org/other", layuot="stock")
    assert "org/other" not in hub.repositories


def test_save_and_push(hub, load, expected, tmp_path):
    expected("medium").save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="org/mine", private=True)
    assert (tmp_path / "mine/model.safetensors").exists()
    assert_same_weights(load("org/mine", "small"), expected("small"))
    assert re.fullmatch("budgets/small/model.safetensors", next(iter(weights(hub))))
    assert json.loads((tmp_path / "mine" / CONFIG).read_text())["elastic"]["version"] == 1
