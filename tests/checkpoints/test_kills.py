"""A save that is killed, at any of its file operations: what is there is the old checkpoint, the new one, or nothing that a program loads."""

from __future__ import annotations

import builtins
import copy
import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from routed import routed
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState

import hf_elastic
from hf_elastic import CheckpointError, ElasticConfig, ElasticForCausalLM
from hf_elastic.checkpoints.replacing import replacing
from hf_elastic.trainers.checkpoints import put_back, replaced
from hf_elastic.trainers.resuming import is_complete

Files = dict[str, str]
"""Names and what they hold, as a key of `contents`; folders end in `/`."""
contents: dict[str, bytes] = {}

Save = Callable[[ElasticForCausalLM, Path], None]

SAVES: dict[str, Save] = {
    "stock": lambda model, folder: model.save_pretrained(folder),
    "sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="120KB"),
    "nested": lambda model, folder: model.save_pretrained(folder, layout="nested"),
    "nested-sharded": lambda model, folder: model.save_pretrained(folder, layout="nested", max_shard_size="120KB"),
    "export": lambda model, folder: model.export(folder, "small"),
    "export-sharded": lambda model, folder: model.export(folder, "small", max_shard_size="120KB"),
}
OVER = [
    *((layout, layout) for layout in SAVES),
    *(("stock", "sharded"), ("sharded", "stock"), ("stock", "nested"), ("nested", "stock")),
    *(("sharded", "nested-sharded"), ("nested-sharded", "sharded"), ("export", "export-sharded")),
    *(("export-sharded", "export"), ("nested", "export"), ("export", "nested"), ("nothing", "nested-sharded")),
]


@pytest.fixture(scope="module")
def models() -> tuple[ElasticForCausalLM, ElasticForCausalLM]:
    """Two families of the same sizes; weights, generation config and router are others."""
    with torch.no_grad():
        old, new = routed("nano3"), routed("nano3")
        for tensor in (*new.parameters(), *new.router.parameters()):
            tensor.copy_(tensor * 1.25)
        old.generation_config.max_length, new.generation_config.max_length = 1111, 2222
    return old, new


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> dict[tuple[str, int], Path]:
    """Both families in every form; not to be changed."""
    root, made = tmp_path_factory.mktemp("saved"), {}
    for form, save in SAVES.items():
        for i, model in enumerate(models):
            made[form, i] = root / f"{form}-{i}"
            save(model, made[form, i])
    for i in range(2):
        made["nothing", i] = root / "nothing"
    made["nothing", 0].mkdir()
    return made


def everything(folder: Path) -> Files:
    """All files and folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, data = path.relative_to(folder).as_posix(), b""
        if path.is_dir():
            name += "/"
        else:
            data = path.read_bytes()
        found[name] = hashlib.sha1(data).hexdigest()
        contents[found[name]] = data
    return found


def visible(files: Files) -> Files:
    """All files but what savers keep for themselves."""
    return {name: key for name, key in files.items() if not name.startswith(".saving-") and name[-1] != "/"}


def write(files: Files, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in sorted(files):
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(contents[files[name]])
    return folder


@pytest.fixture
def states(monkeypatch) -> Callable[[Path, Callable[[], None]], list[Files]]:
    """What a folder holds before every file operation that something does, and after the last one: what a kill there would leave."""

    def record(folder: Path, do: Callable[[], None]) -> list[Files]:
        found, busy = [], []

        def note() -> None:
            if not busy:
                busy.append(True)
                found.append(everything(folder))
                busy.clear()

        def watched(real: Callable) -> Callable:
            def call(*args, **kwargs):
                note()
                return real(*args, **kwargs)

            return call

        def opened(real: Callable) -> Callable:
            def call(file, mode="r", *args, **kwargs):
                if set("wax+") & set(str(mode)):
                    note()
                return real(file, mode, *args, **kwargs)

            return call

        with monkeypatch.context() as patched:
            for name in ("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir"):
                patched.setattr(os, name, watched(getattr(os, name)))
            patched.setattr(builtins, "open", opened(builtins.open))
            patched.setattr("io.open", opened(builtins.open))
            do()
        return [*found, everything(folder)]

    return record


def unique(states: list[Files]) -> list[Files]:
    return list({frozenset(state.items()): state for state in states}.values())


Outcome = tuple[dict, int, dict]
Way = tuple[str, str, str | None]
"""How a program loads, the folder in a checkpoint that it loads, and the config that it brings along, if it does."""


@pytest.fixture(scope="module")
def tried() -> dict[tuple[Way, frozenset], Outcome | None]:
    """What every folder gave in every way: the pairs have many in common."""
    return {}


class Refused:
    """Tries every way in which a program could take a folder for a checkpoint: ours and stock ones, with a config of their own or not.

    What loads has to be one of the two checkpoints as a whole.
    """

    def __init__(self, wholes: list[Path], tried: dict[tuple[Way, frozenset], Outcome | None]):
        self.ways: dict[Way, Callable] = {
            ("elastic", "", None): ElasticForCausalLM.from_pretrained,
            ("auto", "", None): AutoModelForCausalLM.from_pretrained,
        }
        for root in wholes:
            for file in sorted(root.rglob("config.json")):
                place = file.parent.relative_to(root).as_posix().removeprefix(".")
                config = AutoConfig.from_pretrained(file.parent)
                auto = ElasticForCausalLM if isinstance(config, ElasticConfig) else AutoModelForCausalLM
                given = lambda folder, auto=auto, c=config: auto.from_pretrained(folder, config=copy.deepcopy(c))  # noqa: E731
                self.ways["given", place, file.read_text()] = given
                self.ways["auto", place, None] = AutoModelForCausalLM.from_pretrained
        self.tried = tried
        self.wholes = [o for root in wholes for way in self.ways if (o := self.outcome(way, root)) is not None]

    def __call__(self, folder: Path) -> None:
        for way in self.ways:
            loaded = self.outcome(way, folder)
            assert loaded is None or any(same(loaded, whole) for whole in self.wholes)

    def outcome(self, way: Way, folder: Path) -> Outcome | None:
        _, place, _ = way
        if not (folder / place).is_dir():
            return None
        key = way, frozenset(everything(folder / place).items())
        if key not in self.tried:
            try:
                model = self.ways[way](folder / place)
            except (OSError, ValueError):
                self.tried[key] = None
            else:
                router = getattr(model, "router", None)
                self.tried[key] = (
                    model.state_dict(),
                    model.generation_config.max_length,
                    {} if router is None else router.state_dict(),
                )
        return self.tried[key]


def same(left: Outcome, right: Outcome) -> bool:
    def equal(a: dict, b: dict) -> bool:
        return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)

    return equal(left[0], right[0]) and left[1] == right[1] and equal(left[2], right[2])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), OVER, ids=["-to-".join(pair) for pair in OVER])
def test_every_kill_point(before, after, models, saved, states, tried, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    work = Path(shutil.copytree(saved[before, 0], tmp_path / "work"))
    (work / "notes.txt").write_text("mine")
    old = everything(work)
    new = everything(saved[after, 1]) | {"notes.txt": old["notes.txt"]}
    found = unique(states(work, lambda: SAVES[after](models[1], work)))
    assert everything(work) == new

    # What programs see is one of the two, or nothing loads, whoever tries, unless it is one of them as a whole.
    seen = {frozenset(visible(state).items()): state for state in found}
    del seen[frozenset(visible(old).items())], seen[frozenset(visible(new).items())]
    assert len(seen) > 3
    check = Refused([saved[before, 0], saved[after, 1]], tried)
    for state in seen.values():
        folder = write(state, tmp_path / "state")
        with pytest.raises(CheckpointError, match=r"hf_elastic\.recover"):
            ElasticForCausalLM.from_pretrained(folder)
        check(folder)
        for scratch in folder.glob(".saving-*"):  # as a program that does not know of us
            shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()
        check(folder)

    # Nothing is lost, and nothing is left over.
    for state in found:
        recovered = everything(write(state, tmp_path / "state"))
        hf_elastic.recover(tmp_path / "state")
        recovered = everything(tmp_path / "state")
        assert recovered in (old, new)
        assert (
            visible(recovered) == visible(state)
            or visible(state) not in (visible(old), visible(new))
            or recovered == new
        )
        folder = write(state, tmp_path / "state")
        with replacing(folder) as scratch:
            shutil.copytree(saved[after, 1], scratch, dirs_exist_ok=True)
        assert everything(folder) == new


def test_every_kill_point_of_a_trainers_checkpoint(states, tmp_path):
    """Of a run that makes a checkpoint again: what was complete stays, and nothing half removed is taken for complete."""

    def make(folder: Path, text: str) -> None:
        folder.mkdir(exist_ok=True)
        for name in ("a", "model.safetensors", "z"):
            (folder / name).write_text(text)
        TrainerState().save_to_json(folder / "trainer_state.json")

    def again() -> None:
        with replaced(work / "checkpoint-4"):
            make(work / "checkpoint-4", "new")

    work = tmp_path / "work"
    work.mkdir()
    make(work / "checkpoint-4", "old")
    old = everything(work)
    found = unique(states(work, again))
    new = everything(work)
    for state in found:
        for first in (lambda: None, shutil.rmtree):  # nothing, or upstream's rotation of a checkpoint that is complete
            folder = write(state, tmp_path / "state")
            whole = is_complete(folder / "checkpoint-4")
            if first is shutil.rmtree and whole:
                first(folder / "checkpoint-4")
            put_back(folder)
            left = everything(folder)
            assert left in (old, new) or (first is shutil.rmtree and whole and left in ({}, old))

        def fail() -> None:
            with replaced(tmp_path / "state" / "checkpoint-4"):
                make(tmp_path / "state" / "checkpoint-4", "third")
                raise OSError(28, "No space left on device")

        write(state, tmp_path / "state")  # a run that does not resume, and has no room for its checkpoint
        with pytest.raises(CheckpointError, match="checkpoint-4 cannot be written: .*No space left"):
            fail()
        assert everything(tmp_path / "state") in (old, new)
