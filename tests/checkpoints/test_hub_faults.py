"""The Hub on a bad day: bytes that change on the way or in the cache, errors that pass and errors that stay, a cache that cannot be written to."""

import errno
import itertools
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
from compare import assert_same_weights
from safetensors.torch import load_file

from hf_elastic import CheckpointError, ElasticConfig, ElasticForCausalLM
from hf_elastic.errors import UnreachableError
from hf_elastic.storage import checksums, fetching, retries
from hf_elastic.storage.checksums import CHECKSUMS_NAME, read_checksums, write_checksums
from hf_elastic.storage.fetching import PartialFile
from hf_elastic.storage.files import find_file
from hf_elastic.storage.sources import pinned

INDEX = "model.safetensors.index.json"
LAYOUTS = ["org/nested", "org/stock", "org/checked"]


@pytest.fixture
def load(hub, tmp_path):
    """Not through an AutoClass, which reads the config itself first."""

    def load(repo, budget="small", **kwargs):
        return ElasticForCausalLM.from_pretrained(repo, budget=budget, cache_dir=tmp_path / "cache", **kwargs)

    return load


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The client waits for nothing, and not long for an answer."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(fetching, "_SECONDS_OF_SILENCE", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)


def shards(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*.safetensors"))


def weights_files(hub, repo) -> list[str]:
    repository = hub.repositories[repo]
    return [name for name in repository.commits[repository.refs["main"]] if name.endswith(".safetensors")]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# Bytes that change on the way


@pytest.mark.parametrize(
    ("repo", "name", "what"),
    [
        ("org/nested", "budgets/small/model.safetensors", "arrived with other contents"),
        ("org/checked", "model-00001-of-00010.safetensors", "arrived "),
        ("org/checked", "model-00002-of-00010.safetensors", "arrived "),
    ],
)
def test_no_byte_that_changes_on_the_way_is_loaded(repo, name, what, hub, load, pulled, hub_folders, tmp_path):
    """Whatever changes, in the header or behind it, is not fetched, or found; the next load gets it right, from the same cache."""
    hub.flips_stay, found = True, 0
    size = (hub_folders / repo[4:] / name).stat().st_size
    for place in (0, 8, 100, size // 2, size - 1):
        hub.flips = {name: [place]}
        try:
            model = load(repo)
        except CheckpointError as error:
            found += f"{name} of {repo} {what}" in str(error)
            hub.flips = {}
            model = load(repo)
        assert_same_weights(model, pulled("small"))
        shutil.rmtree(tmp_path / "cache")
    assert found >= 3


def test_every_block_is_checked(hub, hub_folders, tmp_path):
    """A whole file, a byte of every block: each is found by itself, and nothing of the block is kept."""
    name = shards(hub_folders / "checked")[0]
    known = read_checksums(hub_folders / "checked" / CHECKSUMS_NAME)[name]
    data = (hub_folders / "checked" / name).read_bytes()
    where = pinned("org/checked", {"cache_dir": tmp_path / "cache"})
    hub.flips_stay = True
    for start in range(0, known.size, 256 * 9):
        place = min(start + start // 256 % 256, known.size - 1)
        hub.flips = {name: [place]}
        with pytest.raises(
            CheckpointError, match=f"{name} .*damaged, twice: the bytes from {place // 256 * 256:,} on"
        ):
            PartialFile("org/checked", name, where, known).fetch([(0, known.size)])
        record = json.loads(
            next((tmp_path / "cache").rglob(f"*/{'[0-9a-f]' * 64}.json"), Path(os.devnull)).read_text() or "[0]"
        )
        kept = record[0]["ranges"] if record[0] else []
        assert not any(first <= place < last for first, last in kept)
        hub.flips = {}
        file = PartialFile("org/checked", name, where, known)
        file.fetch([(0, known.size)])
        assert file.path.read_bytes() == data
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("repo", LAYOUTS)
def test_what_changes_once_is_fetched_again(repo, hub, load, pulled):
    how = {"verify": True} if repo == "org/stock" else {}
    hub.flips = {name: [20, 1000, 3000] for name in weights_files(hub, repo)} | {
        "config.json": [30],
        INDEX: [50],
        CHECKSUMS_NAME: [90],
        "generation_config.json": [9],
    }
    asked = {name: len(flips) for name, flips in hub.flips.items()}
    assert_same_weights(load(repo, **how), pulled("small"))
    assert hub.flips["config.json"] == hub.flips["generation_config.json"] == []
    assert sum(map(len, hub.flips.values())) < sum(asked.values()) - 4


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, CHECKSUMS_NAME])
def test_small_files_that_stay_damaged_are_refused(name, hub, load, pulled, hub_folders):
    hub.flips_stay = True
    size = (hub_folders / "checked" / name).stat().st_size
    for place in range(1, size, 1 + size // 5):
        hub.flips = {name: [place]}
        with pytest.raises(
            CheckpointError, match=f"{name} of org/checked arrived with other contents than the Hub says"
        ):
            find_file("org/checked", name, pinned("org/checked", {}))
    with pytest.raises(CheckpointError, match=f"{name} of org/checked arrived with other contents"):
        load("org/checked")
    hub.flips = {}
    assert_same_weights(load("org/checked"), pulled("small"))


def test_a_config_that_an_auto_class_read_damaged_is_refused(hub, pull, pulled, hub_folders):
    """One digit of a number: it parses, and says something else."""
    text = (hub_folders / "checked/config.json").read_text()
    hub.flips = {"config.json": [re.search(r'"routed_scaling_factor": (\d)', text).start(1)]}
    with pytest.raises(
        CheckpointError, match=r"config.json of org/checked was damaged, and was removed.*load it again"
    ):
        pull("org/checked", "small")
    model = pull("org/checked", "small")
    assert_same_weights(model, pulled("small"))
    assert model.config.routed_scaling_factor == pulled("small").config.routed_scaling_factor


def test_parts_without_checksums_are_taken_unless_verify_is_set(hub, load, pulled, hub_folders, monkeypatch):
    """What the README says of repositories of other programs."""
    monkeypatch.setattr("hf_elastic.checkpoints.opening.MOSTLY", 1.0)
    size = (hub_folders / "stock/model.safetensors").stat().st_size
    load("org/stock")
    assert hub.sent["model.safetensors"] < 0.9 * size
    hub.reset()
    assert_same_weights(load("org/stock", verify=True), pulled("small"))
    assert hub.sent["model.safetensors"] >= size


# Bytes that change in the cache, and in folders


@pytest.mark.parametrize("repo", LAYOUTS)
def test_verify_finds_what_changed_in_the_cache(repo, hub, load, pulled, tmp_path):
    load(repo)
    load(repo, verify=True)
    hub.reset()
    assert_same_weights(load(repo, verify=True), pulled("small"))
    assert not any(name.endswith(".safetensors") for name in hub.sent), "what is right is not fetched again"
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and not file.is_symlink()]
    weights = [file for file in files if file.stat().st_size > 9000 and file.suffix != ".json"]
    for file in weights:
        flip(file, 5000)
    assert_same_weights(load(repo, verify=True), pulled("small"))
    assert any(name.endswith(".safetensors") for name in hub.sent)


def test_a_damaged_record_is_not_believed(hub, load, pulled, tmp_path):
    """A digit of it says that more has arrived; there are zeros."""
    load("org/checked")
    load("org/stock")
    records = list((tmp_path / "cache/assets").rglob("[0-9a-f]*[0-9a-f].json"))
    assert len(records) > 2
    for record in records:
        text = record.read_text()
        for at in [found.start() for found in re.finditer(r"\d", text)][::7]:
            record.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
            with pytest.raises(ValueError, match="damaged|delimiter"):
                fetching._read(record)
    hub.reset()
    for repo in ("org/checked", "org/stock"):
        assert_same_weights(load(repo), pulled("small"))
    assert len([name for name in hub.sent if name.endswith(".safetensors")]) > 2


def test_verify_in_a_folder(hub_folders, pulled, tmp_path):
    for layout in ("nested", "checked"):
        folder = Path(shutil.copytree(hub_folders / layout, tmp_path / layout))
        if layout == "nested":
            write_checksums(folder)
        assert_same_weights(ElasticForCausalLM.from_pretrained(folder, budget="small", verify=True), pulled("small"))
        file = next(folder.rglob("model*.safetensors"))
        flip(file, file.stat().st_size - 300)
        at = (file.stat().st_size - 300) // 256 * 256 if layout == "checked" else r"\d[\d,]*"
        with pytest.raises(
            CheckpointError,
            match=f"{file.name} is damaged from byte {at:,} on" if layout == "checked" else "is damaged",
        ):
            ElasticForCausalLM.from_pretrained(folder, budget="small", verify=True)
    with pytest.raises(
        CheckpointError, match=f"cannot be verified: there is no {CHECKSUMS_NAME} .* Load it without verify=True"
    ):
        ElasticForCausalLM.from_pretrained(hub_folders / "stock", verify=True)


# Checksums


def test_checksums_of_another_save(hub, load, pulled, hub_folders, tmp_path):
    """Of other sizes: whole files are fetched. Of the same sizes: refused, and what the message says to do works."""
    folder = Path(shutil.copytree(hub_folders / "checked", tmp_path / "other"))
    written = json.loads((folder / CHECKSUMS_NAME).read_text())
    names = list(written["files"])
    other = {name: entry["bytes"] + (1 if entry["bytes"] % 256 else -1) for name, entry in written["files"].items()}
    longer = {name: {**entry, "bytes": other[name]} for name, entry in written["files"].items()}
    for files in (longer, {}):
        (folder / CHECKSUMS_NAME).write_text(json.dumps({**written, "files": files}))
        hub.commit("org/other", folder)
        hub.reset()
        assert_same_weights(load("org/other"), pulled("small"))
        assert all(hub.sent[name] >= (folder / name).stat().st_size for name in names)
        shutil.rmtree(tmp_path / "cache")
    changed = {name: {**entry, "digests": "AAAA" + entry["digests"][4:]} for name, entry in written["files"].items()}
    (folder / CHECKSUMS_NAME).write_text(json.dumps({**written, "files": changed}))
    hub.commit("org/other", folder)
    with pytest.raises(
        CheckpointError,
        match="the bytes from 0 on are not what .* verify=True and force_download=True.* delete it from the repository",
    ):
        load("org/other")
    assert_same_weights(load("org/other", verify=True, force_download=True), pulled("small"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "checksums of version 2, this hf_elastic reads 1; pip install --upgrade"),
        ({"block_bytes": 0}, "holds no checksums"),
        ({"block_bytes": 512}, "holds no checksums"),
        ({"block_bytes": True}, "holds no checksums"),
        ({"files": []}, None),
        ({"files": {"model.safetensors": None}}, "holds no checksums"),
        ({"files": {"model.safetensors": {"bytes": 256, "digests": "?"}}}, "holds no checksums"),
        ({"files": {"model.safetensors": {"bytes": -1, "digests": ""}}}, "holds no checksums"),
        ({"files": {"model.safetensors": {"bytes": 10**30, "digests": ""}}}, "is beyond 64 bits"),
        ("[]", r"holds a list, \[\], it must hold a JSON object"),
        ("null", "holds null, it must hold a JSON object"),
        ("{", "cannot be read as JSON"),
        ("[" * 3000, "cannot be read as JSON"),
    ],
)
def test_damaged_checksums(change, message, hub_folders, tmp_path):
    path = tmp_path / CHECKSUMS_NAME
    written = json.loads((hub_folders / "checked" / CHECKSUMS_NAME).read_text())
    path.write_text(change if isinstance(change, str) else json.dumps({**written, **change}))
    if message is None:
        assert read_checksums(path) == {}
        return
    with pytest.raises(CheckpointError, match=message):
        read_checksums(path)


def test_blocks_grow_with_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 16)
    monkeypatch.setattr(checksums, "_MOST_BLOCKS", 10)
    (tmp_path / "a.safetensors").write_bytes(bytes(range(200)))
    write_checksums(tmp_path)
    known = read_checksums(tmp_path / CHECKSUMS_NAME)["a.safetensors"]
    assert (known.size, known.block, len(known.digests)) == (200, 32, 7 * 8)
    assert known.covering([(0, 1), (31, 33), (199, 200)]) == [(0, 32), (0, 64), (192, 200)]
    assert known.first_wrong(tmp_path / "a.safetensors") is None
    flip(tmp_path / "a.safetensors", 199)
    assert known.first_wrong(tmp_path / "a.safetensors") == 192


def test_checksums_go_with_the_weights(hub_folders, tmp_path):
    """Every save writes those of its own files, in every layout; an export over it leaves none."""
    family = ElasticForCausalLM.from_pretrained(hub_folders / "stock")
    for how in ({"max_shard_size": "60KB"}, {"layout": "nested"}, {}, {"budget": "small"}):
        family.save_pretrained(tmp_path, **how)
        known = read_checksums(tmp_path / CHECKSUMS_NAME)
        assert sorted(known) == sorted(
            file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.safetensors")
        )
        assert all(known[name].first_wrong(tmp_path / name) is None for name in known)
    family.save_pretrained(tmp_path, variant="fp16")
    assert list(read_checksums(tmp_path / "weights.checksums.fp16.json")) == ["model.fp16.safetensors"]
    family.export(tmp_path, budget="small")
    assert not (tmp_path / CHECKSUMS_NAME).exists()


# Errors that pass, and errors that stay

SLOW = [pytest.param(status, marks=pytest.mark.slow) for status in (408, 500, 502, 504)]
PASSING = [429, 503, "hang up", "stall", *SLOW]
REQUESTS = {
    "the revision": "GET /api/models/",
    "the config": "HEAD .*/resolve/.*/config.json",
    "its contents": "GET .*/resolve/.*/config.json",
    "weights": "HEAD .*/resolve/.*.safetensors",
    "their contents": "GET /cdn/",
    "the generation config": "HEAD .*/resolve/.*/generation_config.json",
}


@pytest.mark.parametrize("repo", LAYOUTS)
@pytest.mark.parametrize("kind", PASSING)
def test_errors_that_pass_end_nothing(kind, repo, hub, load, pulled, hub_folders):
    """Each request fails once."""
    hub.faults = {pattern: iter([kind]) for pattern in REQUESTS.values()}
    if kind == "stall":  # the client gives an API call 10 seconds
        del hub.faults[REQUESTS["the revision"]]
    hub.cuts = {name: [700, 300] for name in weights_files(hub, repo)}
    model = load(repo)
    assert_same_weights(model, pulled("small"))
    assert model.generation_config.to_dict() == pulled("small").generation_config.to_dict()
    assert not any(next(faults, None) for faults in hub.faults.values())
    if repo != "org/nested":
        whole = sum(file.stat().st_size for file in (hub_folders / repo[4:]).glob("*.safetensors"))
        assert sum(count for name, count in hub.sent.items() if name.endswith(".safetensors")) < whole


@pytest.mark.parametrize("repo", ["org/nested", "org/checked"])
@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("the config", "hang up"),
        ("the config", 503),
        ("its contents", "hang up"),
        ("weights", 429),
        ("their contents", "hang up"),
        ("their contents", 503),
        ("the generation config", "hang up"),
    ],
)
def test_errors_that_stay_are_said_as_what_they_are(what, kind, repo, hub, load):
    hub.faults = {REQUESTS[what]: itertools.repeat(kind)}
    started = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        load(repo)
    assert time.monotonic() - started < 10
    said = str(error.value)
    assert re.search("429|503|disconnected|connection", said)
    assert not re.search("no config|does not appear|holds neither|has no|local directory", said)
    assert len(hub.requests) < 120


@pytest.mark.parametrize("name", ["config.json", INDEX, CHECKSUMS_NAME, "generation_config.json"])
def test_a_file_that_could_not_be_asked_for_is_not_called_missing(name, hub, load):
    hub.faults = {f"HEAD .*/{name}": itertools.repeat("hang up")}
    with pytest.raises(UnreachableError, match=f"{name} of org/checked could not be fetched, because the connection"):
        load("org/checked")


def test_the_router_and_the_tokenizer_are_not_called_missing(hub, load, hub_folders, tmp_path):
    from hf_elastic.errors import PhasePlanError
    from hf_elastic.generation.binding import find_tokenizer
    from hf_elastic.routing.router import ROUTER_FILE, BudgetRouter, read_router

    config = ElasticConfig.from_pretrained(hub_folders / "stock")
    config.elastic["router"] = BudgetRouter(config, {"half": 0.5}).describe()
    hub.faults = {f"HEAD .*/({ROUTER_FILE}|tokenizer)": itertools.repeat("hang up")}
    with pytest.raises(UnreachableError, match=f"{ROUTER_FILE} of org/stock could not be fetched"):
        read_router(config, "org/stock")
    model = load("org/stock")
    with pytest.raises(
        PhasePlanError, match=r"none was found.*tokenizer_config.json of org/stock could not be fetched"
    ):
        find_tokenizer(model)
    with pytest.raises(UnreachableError, match=r"tokenizer.* of org/stock could not be fetched"):
        model.export(tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_what_counts_as_passing():
    assert retries.passes(OSError("Consistency check failed: file should be of size 9 but has size 1"))
    assert not retries.passes(OSError(errno.ENOSPC, "No space left on device"))
    assert not retries.passes(PermissionError(errno.EACCES, "no"))
    assert not retries.passes(ValueError("no repository can be called that"))


def test_a_disk_that_is_full_is_said_at_once_and_nothing_is_taken_for_there(hub, load, pulled, monkeypatch, tmp_path):
    """The last write before takes a part only."""
    written = fetching._write_all
    room = itertools.count(20_000, -1000)

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if next(room) < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[: max(1, len(data) // 2)])

    monkeypatch.setattr(fetching, "_write_all", lambda file, data: written(Full(file), data))
    with pytest.raises(CheckpointError, match=r"cannot be kept in the cache \(.*No space left.*make room"):
        load("org/stock")
    monkeypatch.setattr(fetching, "_write_all", written)
    assert_same_weights(load("org/stock"), pulled("small"))


# A cache that cannot be written to

_frozen: list[Path] = []


def _refuse_writes(event, arguments):
    """An audit hook: unlike permissions it holds for root, too. It cannot be taken back, so it looks at what is frozen."""
    if not _frozen:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (
            mode is not None and any(c in mode for c in "wa+x")
        )
        paths = [path] if writes else []
    elif event in (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.utime",
    ):
        paths = arguments[:2]
    else:
        return
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).is_relative_to(_frozen[0]):
            raise OSError(errno.EROFS, "Read-only file system", os.fsdecode(path))


@pytest.fixture
def freeze():
    sys.addaudithook(_refuse_writes)
    yield _frozen.append
    _frozen.clear()


@pytest.mark.parametrize("repo", [*LAYOUTS, "org/sharded"])
def test_a_read_only_cache_that_holds_everything_is_enough(
    repo, hub, load, pulled, tmp_path, freeze, listing, monkeypatch
):
    load(repo)
    before = listing(tmp_path / "cache")
    freeze(tmp_path / "cache")
    hub.reset()
    for how in (
        {},
        {"local_files_only": True},
        {"verify": True} if repo != "org/stock" and repo != "org/sharded" else {},
    ):
        assert_same_weights(load(repo, **how), pulled("small"))
    assert not any(name.endswith(".safetensors") for name in hub.sent)
    assert listing(tmp_path / "cache") == before
    with pytest.raises(OSError, match=r"Read-only file system|cannot be kept|cannot be fetched"):
        load(repo, None)
    assert listing(tmp_path / "cache") == before


def test_a_read_only_cache_that_holds_whole_files(hub, load, pulled, tmp_path, freeze):
    """Filled by another program, which asked for no file that does not exist."""
    from huggingface_hub import snapshot_download

    snapshot_download("org/checked", cache_dir=tmp_path / "cache")
    freeze(tmp_path / "cache")
    assert_same_weights(load("org/checked"), pulled("small"))
    assert_same_weights(load("org/checked", local_files_only=True), pulled("small"))


def test_a_blob_that_is_a_link_itself(hub, load, pulled, tmp_path):
    """As where the client keeps what several repositories share in one place, under another name."""
    load("org/nested")
    commit = pinned("org/nested", {"cache_dir": tmp_path / "cache"})
    path = find_file("org/nested", "budgets/small/model.safetensors", commit)
    blob = path.resolve()
    store = tmp_path / "cache/blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    assert_same_weights(load("org/nested", verify=True), pulled("small"))
    assert load_file(path)
    assert_same_weights(ElasticForCausalLM.from_pretrained(path.parents[2], budget="small"), pulled("small"))
