"""Files are written whole: whatever happens, a reader finds the old content or the new one."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import converted
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recast_peft import save_as_lora
from recast_peft.storage import atomic
from recast_peft.storage.atomic import locked, staged, staged_folder, write_text
from recast_peft.storage.tensors import write_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_failure_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), staged(file) as beside:
        beside.write_text("half of the n")
        raise RuntimeError
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]
    write_text(file, "new")
    assert file.read_text() == "new"


def test_a_link_to_another_disk_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other disk").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").symlink_to(tmp_path / "other disk")
    move = os.replace

    def within_one_disk(old: str | os.PathLike, new: str | os.PathLike) -> None:
        if ("other disk" in str(old)) != ("other disk" in str(new)):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        move(old, new)

    monkeypatch.setattr(os, "replace", within_one_disk)
    for text in ("old", "new"):
        with staged_folder(tmp_path / "folder") as folder:
            (folder / "inside").mkdir()
            (folder / "inside" / "a.txt").write_text(text)
            (folder / "b.txt").write_text(text)
        assert (tmp_path / "other disk" / "a.txt").read_text() == (tmp_path / "folder" / "b.txt").read_text() == text
        assert names(tmp_path) == ["a.txt", "b.txt"]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with staged(file) as beside:
        beside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def test_what_takes_its_place_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, int]] = []  # what was done, to which inode
    fsync, move = os.fsync, os.replace

    def flushes(handle: int) -> None:
        events.append(("flushed", os.fstat(handle).st_ino))
        fsync(handle)

    def moves(new: Path, old: Path) -> None:
        events.append(("moved", os.stat(new).st_ino))
        move(new, old)

    monkeypatch.setattr(os, "fsync", flushes)
    monkeypatch.setattr(os, "replace", moves)
    with staged_folder(tmp_path / "folder") as inside:
        write_text(inside / "a.txt", "first")
        (inside / "b.txt").write_text("second")
    write_text(tmp_path / "c.txt", "third")
    for file in (tmp_path / "folder" / "a.txt", tmp_path / "folder" / "b.txt", tmp_path / "c.txt"):
        own, folder = file.stat().st_ino, file.parent.stat().st_ino
        last = max(i for i, event in enumerate(events) if event == ("moved", own))
        assert ("flushed", own) in events[:last]
        assert ("flushed", folder) in events[last:]  # the new entry of the folder too


@pytest.mark.parametrize("fails", ["flush", "folder in the place", "file in the place of a folder", "not writable"])
def test_no_file_is_moved_where_one_cannot_be(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    write_text(folder / "a.txt", "old")
    if fails == "folder in the place":
        (folder / "b" / "b.txt").mkdir()
    if fails == "file in the place of a folder":
        (folder / "b").rmdir()
        write_text(folder / "b", "old")
    fsync, access = os.fsync, os.access

    def full(handle: int) -> None:  # network file systems and quotas tell of a full disk here
        if os.readlink(f"/proc/self/fd/{handle}").endswith("b.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        if fails == "flush":
            if not Path("/proc/self/fd").is_dir():
                pytest.skip("the system does not tell which file is flushed")
            patch.setattr(os, "fsync", full)
        if fails == "not writable":  # the tests may run as a user who may write everywhere
            patch.setattr(os, "access", lambda path, mode: Path(path).name != "b" and access(path, mode))
        with pytest.raises(OSError), staged_folder(folder) as inside:
            (inside / "b").mkdir()
            for file in ("a.txt", "b/b.txt"):
                (inside / file).write_text("new")
    assert (folder / "a.txt").read_text() == "old"
    assert names(folder) == [file for file in ("a.txt", "b") if (folder / file).is_file()]


@pytest.mark.parametrize("error", [SafetensorError("I/O error: full"), RuntimeError("basic_ios::clear: iostream error")])
@pytest.mark.parametrize("block", [staged, staged_folder])
def test_a_full_disk_is_the_same_error_whichever_library_writes(block: Any, error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="out could not be written: .*What was there before is as it was"),
        block(tmp_path / "out"),
    ):
        raise error


def test_permissions_stay_and_links_are_followed(tmp_path: Path) -> None:
    file, link = tmp_path / "a.txt", tmp_path / "link.txt"
    write_text(file, "old")
    file.chmod(0o640)
    link.symlink_to(file)
    write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o640


def grow_old(folder: Path) -> None:
    for path in [*folder.rglob("*")]:
        os.utime(path, (time.time() - 1000, time.time() - 1000))


def test_permissions_of_a_new_file_are_the_usual_ones_whoever_writes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("write", ["a writer of its own kind", "task", "LoRA"])
def test_permissions_of_new_files_in_a_folder_are_the_usual_ones_whoever_writes(write: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        if write == "task":
            converted(target_modules=["qkv"]).save_pretrained(tmp_path)
        elif write == "LoRA":
            save_as_lora(tmp_path, converted(target_modules=["qkv"]), 2)
        else:
            with staged_folder(tmp_path) as folder:
                (folder / "inside").mkdir()
                for file in ("a", "inside/b"):
                    (folder / file).touch(0o600)
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 1
    assert {path.stat().st_mode & 0o777 for path in written} == {0o640}


def test_a_living_writer_that_moves_a_file_of_its_own_keeps_it(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with staged(file) as beside:
        save_file({"x": torch.ones(2)}, beside)
        grow_old(tmp_path)
        write_text(file, "of another one, sooner")
    assert torch.equal(load_file(file)["x"], torch.ones(2))
    assert names(tmp_path) == [file.name]


def test_what_a_killed_writer_left_beside_its_file_is_removed_too(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    if (child := os.fork()) == 0:
        with staged(file) as beside:
            beside.with_name(".tmp5fT1x8").write_text("half")  # as safetensors does
            os._exit(0)
    os.waitpid(child, 0)
    assert names(tmp_path)
    grow_old(tmp_path)
    write_text(file, "whole")
    assert names(tmp_path) == [file.name]


def test_writers_at_the_same_time_leave_one_of_the_contents(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    texts = [str(number) * 50_000 for number in range(4)]
    threads = [threading.Thread(target=write_text, args=(file, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in texts
    assert names(tmp_path) == ["a.txt"]


def test_what_a_killed_writer_left_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    dead, alive = tmp_path / f".a.txt.dead{atomic.PART}", tmp_path / f".a.txt.alive{atomic.PART}"
    other = tmp_path / f".b.txt.dead{atomic.PART}"
    for path in (dead, alive, other):
        path.write_text("half")
        os.utime(path, (time.time() - 1000, time.time() - 1000))
    with open(alive, "rb") as held:
        assert atomic._lock(held.fileno())
        write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == sorted([alive.name, other.name, "a.txt"])


def test_a_folder_is_filled_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_text(folder / "task" / "a.txt", "old")
    write_text(folder / "mine.txt", "mine")
    with pytest.raises(RuntimeError), staged_folder(folder) as inside:
        assert inside.name == "model"
        write_text(inside / "task" / "a.txt", "new")
        raise RuntimeError
    assert (folder / "task" / "a.txt").read_text() == "old"
    with staged_folder(folder) as inside:
        write_text(inside / "task" / "a.txt", "new")
        write_text(inside / "b.txt", "b")
        write_text(inside / "new" / "deeper" / "c.txt", "c")
        assert (folder / "task" / "a.txt").read_text() == "old"
    assert (folder / "task" / "a.txt").read_text() == "new"
    assert (folder / "new" / "deeper" / "c.txt").read_text() == "c"
    assert names(folder) == ["a.txt", "b.txt", "c.txt", "mine.txt"]
    assert not list(folder.glob(".*"))


def test_an_empty_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError), staged_folder(""):
        write_text("a.txt", "written where nobody looks for it")
    model = converted(num_templates=1, mimicry={"method": "gradient", "steps": 1})
    for save in (model.save_pretrained, model.base_model.save_bank):
        with pytest.raises(FileNotFoundError):
            save("")
    assert names(tmp_path) == []


def test_one_writer_at_a_time_is_in_a_locked_block(tmp_path: Path) -> None:
    order = []

    def other() -> None:
        with locked(tmp_path):
            order.append("other")

    with locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]
    assert not list(tmp_path.iterdir())
