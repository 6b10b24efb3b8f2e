"""Saving: who saves, what is left over, links, full disks, and what is not saved over."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from compare import assert_same_weights
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import hf_elastic
from hf_elastic import CheckpointError, ElasticConfigError, ElasticForCausalLM, Scores
from hf_elastic.checkpoints.replacing import replacing, replacing_file
from hf_elastic.cli import main
from hf_elastic.storage.exchanging import JOURNAL, NEW, OLD, SCRATCH, Exchange
from hf_elastic.storage.locking import LOCK

load = AutoModelForCausalLM.from_pretrained
FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.fixture
def folder(own_folder) -> Path:
    return own_folder("nano3")


@pytest.fixture
def nested(family_folder, tmp_path) -> Path:
    load(family_folder("nano3")).save_pretrained(tmp_path / "nested", layout="nested")
    return tmp_path / "nested"


@pytest.fixture
def other(family_folder) -> ElasticForCausalLM:
    """The family with other weights, loaded from a folder that is not to be changed."""
    model = load(family_folder("nano3"))
    for parameter in model.parameters():
        parameter.mul_(1.5)
    return model


def interrupted(folder: Path, name: str = "config.json", text: str = "new") -> Path:
    """A folder as a kill in an exchange leaves it: the old file is away, the new one is not there yet."""
    scratch = folder / f"{SCRATCH}killed"
    for kind in (NEW, OLD):
        (scratch / kind / name).parent.mkdir(parents=True)
    (scratch / NEW / name).write_text(text)
    (folder / name).rename(scratch / OLD / name)
    Exchange(scratch, [name], [name]).begin()
    return scratch


# Who saves


def forked(do: Callable[[], None]) -> int:
    """Run something in a copy of this process; the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            do()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_killed_process(at, other, folder, monkeypatch):
    """Killed for good, with the folder locked and files half exchanged; the lock does not outlive it."""
    real, count = os.replace, []

    def replace(source, target):
        count.append(target)
        if len(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    before = load(folder)
    monkeypatch.setattr(os, "replace", replace)
    assert forked(lambda: other.save_pretrained(folder)) == signal.SIGKILL
    monkeypatch.undo()
    assert (folder / LOCK).exists()
    assert [path.name for path in folder.glob(".saving-*")]
    if (folder / "config.json").exists():
        assert_same_weights(load(folder), before)
    else:
        with pytest.raises(CheckpointError, match="a save into it was interrupted, or is not done yet"):
            ElasticForCausalLM.from_pretrained(folder)
        assert hf_elastic.recover(folder)
        assert_same_weights(load(folder), other)
    before.save_pretrained(folder)
    assert not list(folder.glob(".saving-*"))
    assert_same_weights(load(folder), before)


def test_two_who_save_at_once_wait_for_each_other(other, family_folder, tmp_path, caplog):
    models = [load(family_folder("nano3")), other]
    for _ in range(3):
        threads = [threading.Thread(target=model.save_pretrained, args=(tmp_path / "out",)) for model in models * 2]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        saved = load(tmp_path / "out").state_dict()
        assert any(all(torch.equal(t, m.state_dict()[k]) for k, t in saved.items()) for m in models)
        assert not list((tmp_path / "out").glob(".saving-*"))


def test_what_a_living_process_writes_is_waited_for(other, tmp_path, caplog):
    ready, go = os.pipe(), os.pipe()

    def child() -> None:
        with replacing(tmp_path / "out") as scratch:
            (scratch / "theirs").write_text("theirs")
            os.write(ready[1], b"x")
            os.read(go[0], 1)

    process = os.fork()
    if process == 0:
        try:
            child()
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    assert len(list((tmp_path / "out").glob(f"{SCRATCH}*"))) == 1
    timer = threading.Timer(0.3, lambda: os.write(go[1], b"x"))
    timer.start()
    with caplog.at_level(logging.WARNING):
        other.save_pretrained(tmp_path / "out")
    os.waitpid(process, 0)
    assert "another thread or process saves into" in caplog.text
    assert (tmp_path / "out" / "theirs").read_text() == "theirs"
    assert not list((tmp_path / "out").glob(".saving-*"))


def test_saving_into_a_folder_while_saving_into_it_does_not_hang(tmp_path):
    with (
        replacing(tmp_path / "out") as scratch,
        pytest.raises(CheckpointError, match="saved into by this thread already"),
        replacing(tmp_path / "out" / "." / ""),
    ):
        pass
    with replacing(tmp_path / "out") as scratch, replacing(scratch) as inner:
        (inner / "file").write_text("mine")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


# What is left over


def test_leftovers_of_killed_saves_are_removed(folder, other):
    for name in ("a", "b"):
        (folder / f"{SCRATCH}{name}" / NEW).mkdir(parents=True)
        (folder / f"{SCRATCH}{name}" / NEW / "model.safetensors").write_bytes(b"half")
    (folder / LOCK).touch()
    assert_same_weights(load(folder), load(folder))
    other.save_pretrained(folder)
    assert not list(folder.glob(".saving-*"))


@pytest.mark.parametrize(("minutes", "stays"), [(1, True), (11, False)])
def test_leftovers_of_older_versions_are_removed_when_nobody_can_be_writing(minutes, stays, folder, other):
    old = folder / ".saving-ab12cd_3"
    old.mkdir()
    (old / "model.safetensors").write_bytes(b"half")
    for path in (old / "model.safetensors", old):
        os.utime(path, (time.time() - 60 * minutes,) * 2)
    other.save_pretrained(folder)
    assert old.exists() == stays


def test_old_files_that_an_older_version_was_killed_with_stay_until_a_checkpoint_is_saved(folder, other):
    old = folder / ".saving-ab12cd_3"
    (old / ".old-x").mkdir(parents=True)
    (old / ".old-x" / "config.json").write_text("the only one")
    for path in (old / ".old-x" / "config.json", old / ".old-x", old):
        os.utime(path, (time.time() - 3600,) * 2)
    with replacing(folder) as scratch:
        (scratch / "plans.json").write_text("{}")
    assert not hf_elastic.recover(folder)
    assert (old / ".old-x" / "config.json").exists()
    other.save_pretrained(folder)
    assert not old.exists()


def test_recovering_what_needs_none(folder, listing):
    before = listing(folder)
    assert hf_elastic.recover(folder) is False
    assert listing(folder) == before
    with pytest.raises(CheckpointError, match="there is no folder"):
        hf_elastic.recover(folder / "no")


def test_the_name_of_no_folder_recovers_nothing(folder, monkeypatch, listing):
    interrupted(folder)
    before = listing(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match="the folder to recover is ''"):
        hf_elastic.recover("")
    assert listing(folder) == before


@pytest.fixture
def no_locks(monkeypatch) -> None:
    """As on a file system that has none."""

    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)


def test_without_locks_who_asks_for_it_recovers_at_once(no_locks, folder):
    whole = (folder / "config.json").read_text()
    interrupted(folder, text=whole)
    with pytest.raises(CheckpointError, match="recover"):
        ElasticForCausalLM.from_pretrained(folder)
    assert hf_elastic.recover(folder)
    assert (folder / "config.json").read_text() == whole
    assert not list(folder.glob(".saving-*"))
    load(folder)


def test_without_locks_a_later_save_removes_what_is_not_needed(no_locks, folder, other):
    """A save in between cannot know whether somebody is still exchanging files; a later one can. No tokenizer is lost meanwhile."""
    scratch = interrupted(folder)
    (folder / "tokenizer.json").write_text("old tokenizer")
    (scratch / JOURNAL).unlink()
    for name in ("tokenizer.json", "model.safetensors"):
        (scratch / NEW / name).write_text("new " + name)
        (folder / name).rename(scratch / OLD / name)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    Exchange(scratch, names, names).begin()
    other.save_pretrained(folder)
    assert scratch.exists()
    for path in (*scratch.rglob("*"), scratch):
        os.utime(path, (time.time() - 3600,) * 2)
    other.save_pretrained(folder)
    assert not list(folder.glob(".saving-*"))
    assert (folder / "tokenizer.json").read_text() == "new tokenizer.json"
    assert_same_weights(load(folder), other)


def test_files_put_in_place_by_hand_and_then_saved_over_leave_nothing(folder, other):
    interrupted(folder)
    (folder / "config.json").write_text("somebody's")
    other.save_pretrained(folder)
    assert not list(folder.glob(".saving-*"))
    assert_same_weights(load(folder), other)


# Who may not write


@pytest.fixture
def denied(monkeypatch) -> Callable[[Path], None]:
    """Refuse to make or move anything in a folder: permissions do not hold for root, who may run the tests."""

    def deny(folder: Path) -> None:
        def watched(real: Callable) -> Callable:
            def call(path, *args, **kwargs):
                reads = real is os_open and not args[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if not reads and any(Path(p).parent == folder for p in (path, *args) if isinstance(p, (str, Path))):
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
                return real(path, *args, **kwargs)

            return call

        os_open = os.open
        for name in ("open", "mkdir", "replace", "rename", "unlink"):
            monkeypatch.setattr(os, name, watched(getattr(os, name)))

    return deny


@pytest.mark.parametrize("how", ["save", "export", "new", "slice", "no locks"])
def test_a_folder_that_may_not_be_written_to_is_named(how, folder, other, tmp_path, denied, listing, capsys, request):
    if how == "no locks":  # then making the scratch folder is what fails
        request.getfixturevalue("monkeypatch").setattr("hf_elastic.storage.locking.fcntl", None)
    target = tmp_path / "there"
    target.mkdir()
    (target / "mine").write_text("mine")
    denied(tmp_path if how == "new" else target)
    target = tmp_path / "out" if how == "new" else target
    before, said = listing(tmp_path), f"^{target} cannot be written to: Permission denied. What it holds is as it was"
    if how == "slice":
        assert main(["slice", str(folder), str(target)]) == 2
        assert f"{target} cannot be written to: Permission denied" in capsys.readouterr().err
    else:
        with pytest.raises(CheckpointError, match=said) as caught:
            other.export(target) if how == "export" else other.save_pretrained(target)
        assert caught.value.errno == errno.EACCES
    assert listing(tmp_path) == before


@pytest.mark.parametrize("locks", [True, False])
def test_recovering_where_one_may_not_write(locks, folder, denied, listing, monkeypatch):
    interrupted(folder)
    if not locks:
        monkeypatch.setattr("hf_elastic.storage.locking.fcntl", None)
    denied(folder)
    before = listing(folder)
    with pytest.raises(CheckpointError, match="Permission denied.*user .*who may write there"):
        hf_elastic.recover(folder)
    assert listing(folder) == before


def test_what_another_user_left_and_nobody_else_may_look_into(folder, other, monkeypatch, caplog):
    scratch = interrupted(folder)
    real = os.lstat

    def lstat(path, *args, **kwargs):
        if Path(path).parent == scratch:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("hf_elastic.storage.exchanging.os.lstat", lstat)
        with pytest.raises(CheckpointError, match="a save into it was interrupted"):
            ElasticForCausalLM.from_pretrained(folder)
        with pytest.raises(CheckpointError, match="left by a save of another user.* Let that user call"):
            hf_elastic.recover(folder)
        other.save_pretrained(folder)
        assert "left by a save of another user" in caplog.text
    assert scratch.exists()
    assert_same_weights(load(folder), other)


def test_a_lock_that_another_user_made_is_waited_for_and_not_an_obstacle(folder, other, monkeypatch):
    (folder / LOCK).touch()
    real = os.open

    def opened(path, flags, *args, **kwargs):
        if str(path).endswith(LOCK) and flags & os.O_RDWR and Path(path).exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    with replacing(folder) as scratch:
        (scratch / "file").write_text("mine")
        with pytest.raises(BlockingIOError):
            fcntl.flock(real(folder / LOCK, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (folder / "file").exists()
    assert not list(folder.glob(".saving-*"))


def test_other_files_put_in_place_since_are_not_replaced(folder, caplog):
    scratch = interrupted(folder)
    (folder / "config.json").write_text("somebody's")
    with caplog.at_level(logging.WARNING):
        assert not hf_elastic.recover(folder)
    assert "other files have been put in its place since" in caplog.text
    assert (folder / "config.json").read_text() == "somebody's"
    assert (scratch / OLD / "config.json").exists()
    assert (scratch / NEW / "config.json").read_text() == "new"


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "C:\\outside", 7, "", "linked/outside"])
def test_a_journal_moves_nothing_in_or_out_of_the_folder(name, folder, tmp_path, listing):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "elsewhere" / "outside").write_text("mine")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    scratch = folder / f"{SCRATCH}x"
    (scratch / NEW).mkdir(parents=True)
    (scratch / JOURNAL).write_text(json.dumps({"new": [], "old": [name]}))
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match="is damaged|is a link to"):
        hf_elastic.recover(folder)
    assert {n: d for n, d in listing(tmp_path).items() if LOCK not in n} == before


@pytest.mark.parametrize("text", ["", "null", "[]", '{"new": 1, "old": []}', "[" * 10**5])
def test_a_damaged_journal(text, folder):
    scratch = interrupted(folder)
    (scratch / JOURNAL).write_text(text)
    with pytest.raises(CheckpointError, match=r"journal\.json is damaged"):
        hf_elastic.recover(folder)
    assert (scratch / OLD / "config.json").exists()


def test_a_half_exchanged_adapter_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    interrupted(tmp_path, "adapter_config.json")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json: a save into it was interrupted"):
        hf_elastic.slice_adapter(tmp_path, "small")


@pytest.mark.parametrize("command", ["slice", "export", "plan", "push"])
def test_commands_say_that_a_save_was_interrupted(command, folder, tmp_path, capsys):
    interrupted(folder)
    last = {"slice": [str(tmp_path / "out")], "export": [str(tmp_path / "out")], "push": ["me/it"]}
    assert main([command, str(folder), *last.get(command, [])]) == 2
    assert "a save into it was interrupted" in capsys.readouterr().err


def test_files_that_can_be_neither_replaced_nor_put_back_are_kept(folder, other, monkeypatch):
    before, real, broken = load(folder), os.replace, []

    def replace(source, target):
        if Path(target) == folder / "model.safetensors" or broken:
            broken.append(target)
            raise OSError(5, "the disk went away")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CheckpointError, match=r"neither be replaced .* nor put back .*hf_elastic\.recover"):
        other.save_pretrained(folder)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="interrupted"):
        ElasticForCausalLM.from_pretrained(folder)
    assert hf_elastic.recover(folder)
    assert_same_weights(load(folder), other)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), other.parameters(), strict=True))


# Links


def test_links_to_files_are_replaced_and_what_they_lead_to_is_not(folder, other, tmp_path):
    """As in the Hub's cache."""
    (tmp_path / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / "blobs" / name)
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    (folder / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    before = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    other.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()} == before
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert_same_weights(load(folder), other)


@pytest.mark.parametrize("which", ["budgets", "budgets/small"])
def test_a_linked_folder_of_budgets_is_never_touched(which, nested, other, tmp_path, listing):
    elsewhere = tmp_path / "elsewhere"
    (nested / which).rename(elsewhere)
    (nested / which).symlink_to(elsewhere)
    before, here = listing(elsewhere), listing(nested)
    with pytest.raises(CheckpointError, match=f"{which} is a link to .*; what lies there is not touched"):
        other.save_pretrained(nested, layout="nested")
    assert listing(nested) == here
    assert not list(nested.glob(".saving-*"))
    other.save_pretrained(nested)
    assert listing(elsewhere) == before
    assert (nested / which).is_symlink()
    assert_same_weights(load(nested), other)


def test_leftovers_that_are_links_are_not_followed(folder, other, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (folder / f"{SCRATCH}x").symlink_to(tmp_path / "elsewhere")
    (folder / LOCK).symlink_to(tmp_path / "elsewhere" / "lock")
    other.save_pretrained(folder)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["mine"]


def test_the_folder_itself_may_be_a_link(folder, other, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    other.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_weights(load(folder), other)
    (tmp_path / "dangling").symlink_to(tmp_path / "no")
    with pytest.raises(CheckpointError, match="is a link to .*no, which does not exist"):
        other.save_pretrained(tmp_path / "dangling")
    assert not (tmp_path / "no").exists()


# What is not saved over


def test_an_empty_name_is_no_folder(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for save in (other.save_pretrained, other.export):
        with pytest.raises(CheckpointError, match="the folder to save into is ''"):
            save("")
    with pytest.raises(CheckpointError, match="the folder to save into is ''"):
        other.save_pretrained("", is_main_process=False)
    assert not list(tmp_path.iterdir())
    other.save_pretrained(".", layout="nested")
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("command", ["slice", "export", "elastify"])
@pytest.mark.parametrize("output", ["", "{folder}", "{folder}/../nano3", "{link}", "{folder}/budgets/small"])
def test_commands_do_not_save_over_what_they_read(command, output, folder, tmp_path, capsys, listing):
    (tmp_path / "link").symlink_to(folder)
    before = listing(folder)
    assert main([command, str(folder), output.format(folder=folder, link=tmp_path / "link")]) == 2
    assert "names no folder" in (said := capsys.readouterr().err) or "the checkpoint that is read" in said
    assert listing(folder) == before


@pytest.mark.parametrize("how", ["path", "relative", "link"])
def test_a_family_is_not_replaced_by_a_part_of_it(how, folder, tmp_path, monkeypatch, listing):
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    place = {"path": folder, "relative": folder.name, "link": tmp_path / "link"}[how]
    family, small = load(place), load(place, budget="small")
    before = listing(folder)
    for save in (lambda: family.save_pretrained(folder, budget="small"), lambda: small.save_pretrained(folder)):
        with pytest.raises(ElasticConfigError, match="would be replaced by a smaller one"):
            save()
    monkeypatch.chdir(tmp_path)
    for model, budget in ((family, None), (family, "small"), (small, None)):
        with pytest.raises(ElasticConfigError, match="would be replaced by a plain checkpoint of one size"):
            model.export(folder, budget, heterogeneous=True)
    assert listing(folder) == before
    family.set_budget("small")
    family.save_pretrained(folder)  # everything, whichever budget is active
    assert_same_weights(load(folder), load(place if how != "relative" else folder))
    small.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    again.save_pretrained(tmp_path / "small")  # of a slice, all there is
    assert load(tmp_path / "small").budget == "small"


def test_a_model_whose_folder_was_saved_over_since_can_be_saved_there(folder, family_folder):
    """What is there now counts: nothing is lost that was not lost before."""
    family = load(folder)
    load(family_folder("nano3"), budget="small").save_pretrained(folder)
    family.save_pretrained(folder)
    assert_same_weights(load(folder), load(family_folder("nano3")))


def test_nothing_is_saved_into_the_files_of_a_budget(nested, listing):
    family, before = load(nested), listing(nested)
    for save in (lambda p: family.save_pretrained(p), lambda p: family.export(p, "small", heterogeneous=True)):
        with pytest.raises(ElasticConfigError, match="belongs to the checkpoint"):
            save(nested / "budgets" / "small")
    assert listing(nested) == before


# Full disks


@pytest.fixture
def full(family_folder, monkeypatch) -> None:
    """There is no room for any weight file."""
    family_folder("nano3")

    def save(tensors, filename, metadata=None):
        raise SafetensorError(FULL)

    for place in ("transformers.modeling_utils.safe_save_file", "hf_elastic.routing.router.save_file"):
        monkeypatch.setattr(place, save)


@pytest.mark.parametrize("layout", ["stock", "nested"])
def test_a_full_disk_says_which_file_and_leaves_the_old_checkpoint(layout, full, other, folder, listing):
    before = listing(folder)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors cannot be written: .*No space left.* bytes are free.*untouched"
    ) as caught:
        other.save_pretrained(folder, layout=layout)
    assert caught.value.errno == 28
    assert str(folder / "model.safetensors") in str(caught.value)
    assert listing(folder) == before


def test_a_full_disk_in_a_command(full, family_folder, tmp_path, capsys):
    for command in ("slice", "export"):
        options = ["--heterogeneous"] if command == "export" else []
        assert main([command, str(family_folder("nano3")), str(tmp_path / "out"), "--budget", "small", *options]) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path}/out/model.safetensors cannot be written" in said
        assert "held before" not in said  # there was nothing
        assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def short_files() -> Iterator[None]:
    """The system lets no file of this process grow beyond 100 KB."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("layout", ["stock", "nested"])
def test_a_file_that_does_not_fit_for_real(layout, family_folder, folder, tmp_path, listing, short_files):
    family, before = ElasticForCausalLM.from_pretrained(family_folder("nano3")), listing(folder)
    for place in (folder, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be written: .*File too large"):
            family.save_pretrained(place, layout=layout)
    assert listing(folder) == before
    assert not (tmp_path / "new").exists()


def test_a_single_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("old")

    def write_half() -> None:
        with replacing_file(tmp_path / "file") as part:
            part.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="file cannot be written: .*No space left"):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
    with replacing_file(tmp_path / "file") as part:
        part.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "new"


@pytest.fixture
def elastifying(original, tmp_path, monkeypatch) -> list[str]:
    """A command that scores; temporary files go to a folder of their own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    original("nano2").save_pretrained(tmp_path / "plain")
    rows = [{"input_ids": [1 + (i * j) % 60 for j in range(1, 17)]} for i in range(1, 9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["elastify", tmp_path / "plain", tmp_path / "out", "--calibration", tmp_path / "data.jsonl"]
    return [str(part) for part in [*command, "--budget", "small:ffn=0.5", "--batch-size", "4"]]


@pytest.mark.parametrize("where", ["output", "scores", "both"])
def test_scores_are_not_lost_on_a_full_disk(where, elastifying, tmp_path, monkeypatch, capsys, caplog):
    """Of the output, of the file they should go to, or of both: a second run needs no scoring."""
    real = hf_elastic.elastification.importance.save_file

    def save(tensors, filename, metadata=None):
        if "temporary" not in str(filename):
            Path(filename).write_bytes(b"half")
            raise SafetensorError(FULL)
        real(tensors, filename, metadata)

    if where != "scores":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)
    if where != "output":
        monkeypatch.setattr("hf_elastic.elastification.importance.save_file", save)
    options = [] if where == "output" else ["--save-scores", str(tmp_path / "scores")]
    assert main([*elastifying, *options]) == (0 if where == "scores" else 2)
    said = capsys.readouterr().err + caplog.text
    assert "Traceback" not in said
    assert not (tmp_path / "scores").exists()
    assert (tmp_path / "out").exists() == (where == "scores")
    (kept,) = (tmp_path / "temporary").iterdir()
    assert str(kept) in said
    assert Scores.load(kept).values["ffn"]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    arguments = [elastifying[0], *elastifying[1:3], "--budget", "small:ffn=0.5", "--scores", str(kept)]
    assert main(arguments) == 0
    assert load(tmp_path / "out").budgets


def test_scores_are_there_before_anything_is_sorted(elastifying, tmp_path, monkeypatch):
    def sort(*args, **kwargs):
        assert Scores.load(tmp_path / "scores").values["ffn"]
        raise MemoryError

    monkeypatch.setattr(sys.modules["hf_elastic.elastification.elastify"], "sort_state_dict", sort)
    assert main([*elastifying, "--save-scores", str(tmp_path / "scores")]) == 1
    assert Scores.load(tmp_path / "scores").values["ffn"]


def test_nothing_temporary_stays_after_a_run_that_went_well(elastifying, tmp_path):
    assert main(elastifying) == 0
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(ElasticConfigError, match="save_scores= needs calibration="):
        hf_elastic.elastify(tmp_path / "plain", budgets={"a": {"ffn": 0.5}}, sort=False, save_scores="x")


def test_a_tokenizer_is_saved_with_its_checkpoint_or_not_at_all(elastifying, folder, tmp_path, monkeypatch, listing):
    class Tokenizer:
        def save_pretrained(self, target):
            (Path(target) / "tokenizer.json").write_text("half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_elastic.storage.tokenizer_files.optional_tokenizer", lambda source: Tokenizer())
    shutil.copytree(folder, tmp_path / "out")
    before = listing(tmp_path / "out")
    assert main(["slice", str(folder), str(tmp_path / "out"), "--budget", "small"]) == 2
    assert main(elastifying) == 2
    assert listing(tmp_path / "out") == before
