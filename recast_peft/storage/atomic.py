"""Files that are written beside their place and moved into it: a reader, a kill or a full disk finds the old or the new one.

    with staged(path) as beside:      # .NAME.<random>.part/file in the same folder
        write(beside)                 # whatever fails here leaves ``path`` as it was
                                      # flushed to the disk, then moved: os.replace is one step for every reader

What a killed process leaves behind is taken away by the next one that writes to the same place. Two processes that write to
one folder take turns: each holds a lock on the folder (of the operating system, so that it ends with the process) while it
moves its files.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..validation import a_path, check_arguments

try:
    import fcntl
except ImportError:  # Windows: files are still replaced in one step each, but writers do not take turns
    fcntl = None  # type: ignore[assignment]

PART = ".part"  # ending of what is not yet in its place
SAVING = ".saving-"  # start of the names of folders that files are written to before they are moved
ABANDONED_AFTER = 60.0  # seconds after which a file that no process holds a lock on belongs to a killed one
ABANDONED_WITHOUT_LOCKS = 24 * 3600.0
# what torch.save says where a disk is full or broken, in a RuntimeError
_TORCH_CANNOT_WRITE = ("iostream error", "PytorchStreamWriter", "unexpected pos")


# ---------------------------------------------------------------- one file


@contextmanager
def staged(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside ``path`` to write to; when the block ends well it takes the place of ``path`` in one step.

    The folder is made if it is missing. Where ``path`` is a link, what it points to is replaced.

    Raises:
        OSError: if it cannot be written, whichever library writes.
    """
    check_arguments(a_path, path=path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent, f".{target.name}.")
    outer = target.parent / f".{target.name}.{uuid.uuid4().hex}{PART}"
    beside = outer / "file"
    try:
        outer.mkdir()
        # the lock says that this process is alive; safetensors moves files of its own there, which nobody else may read
        with locked(outer, wait=False), _errors_of_the_disk(target):
            beside.touch(exist_ok=False)
            mode = beside.stat().st_mode & 0o7777
            yield beside
            with suppress(OSError):
                os.chmod(beside, mode)
            if not _is_beside(target):
                flush(beside)
            replace(beside, target)
        if not _is_beside(target):
            flush(target.parent)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file whole or not at all."""
    with staged(path) as beside:
        beside.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8 whole or not at all, with line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, content: Any, *, sort_keys: bool = False) -> None:
    """Write a value as JSON, indented, whole or not at all; it ends with its last bracket, so that a cut is noticed."""
    write_text(path, json.dumps(content, indent=2, sort_keys=sort_keys))


# ---------------------------------------------------------------- a folder


def made_folder(path: str | os.PathLike) -> Path:
    """A folder, made if it is missing; an empty name is refused, which pathlib takes for the folder that the process is in.

    Raises:
        OSError: if it cannot be made.
    """
    check_arguments(a_path, path=path)
    os.makedirs(path, exist_ok=True)
    return Path(path)


@contextmanager
def staged_folder(folder: str | os.PathLike, move: Callable[[Path, Path, list[Path]], None] | None = None) -> Iterator[Path]:
    """A folder to write to, whose files take their places in ``folder`` one by one when the block ends well.

    Whatever fails in the block, or a kill, leaves ``folder`` as it was. Other files in ``folder`` stay. All files are on the
    disk, and all places are looked at, before the first one is moved.

    Args:
        folder: made if it is missing.
        move: puts files (of the first folder, in the second one) in their places, under the lock of ``folder``; None is
            :func:`move_files`.

    Yields:
        an empty folder of the same name, inside of ``folder``.

    Raises:
        OSError: if a file cannot be written or moved, whichever library writes.
    """
    target = made_folder(folder)
    _remove_abandoned(target, SAVING)
    outer = target / f"{SAVING}{uuid.uuid4().hex}{PART}"
    inside = outer / (target.resolve().name or "root")  # cards name a task by its folder
    try:
        inside.mkdir(parents=True)
        with locked(outer, wait=False), _errors_of_the_disk(target):  # the lock says that this process is alive
            yield inside
            files = sorted(path.relative_to(inside) for path in inside.rglob("*") if path.is_file())
            mode = inside.stat().st_mode & 0o666
            for path in files:
                with suppress(OSError):
                    os.chmod(inside / path, mode)  # that of any new file here; safetensors lets nobody else read its own
                flush(inside / path)  # where a full disk may tell of it only now
            with locked(target):
                for path in files:
                    _check_place(target / path)
                (move or move_files)(inside, target, files)
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def move_files(source: Path, target: Path, files: Sequence[Path]) -> None:
    """Move files from a folder to another one on the same disk, each in one step."""
    for path in files:
        replace(source / path, target / path)
    for parent in {(target / path).parent for path in files}:
        flush(parent)


def replace(new: Path, old: Path) -> None:
    """Put a file that is on the disk in the place of another one in one step; a link's is that which it points to."""
    place = Path(os.path.realpath(old))
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        os.chmod(new, place.stat().st_mode & 0o7777)  # as the one that it replaces
    try:
        os.replace(new, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with staged(place) as beside:  # a link leads to another disk
            shutil.copyfile(new, beside)
        new.unlink()


def _check_place(path: Path) -> None:
    """Refuse a place that a file cannot be moved to (``OSError``)."""
    place = Path(os.path.realpath(path))
    folder = next(parent for parent in place.parents if os.path.lexists(parent))
    if place.is_dir():
        code, where = errno.EISDIR, place
    elif not folder.is_dir():
        code, where = errno.ENOTDIR, folder
    elif not os.access(folder, os.W_OK | os.X_OK):
        code, where = errno.EACCES, folder
    else:
        return
    raise OSError(code, os.strerror(code), os.fspath(where))


@contextmanager
def locked(folder: str | os.PathLike, wait: bool = True) -> Iterator[None]:
    """A block that no other process is in for the same folder; where the system has no such locks it is an ordinary block.

    The lock lies on the folder itself and leaves no file behind; it ends with the process, however that ends.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, wait)
        yield
    finally:
        os.close(handle)  # which gives the lock back


def _lock(handle: int, wait: bool = False) -> bool:
    """Whether the lock was taken."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or a file system without locks
        return False
    return True


# ---------------------------------------------------------------- details


def flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def _errors_of_the_disk(path: Path) -> Iterator[None]:
    """A block that writes for ``path``, in which a full or broken disk is an ``OSError`` whichever library writes."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(said in str(error) for said in _TORCH_CANNOT_WRITE):
            raise
        raise OSError(f"{path} could not be written: {error}. What was there before is as it was.") from error


def _is_beside(path: Path) -> bool:
    """Whether a file lies in a ``staged_folder``, and comes to the disk when it is moved out of it."""
    return any(part.startswith(SAVING) and part.endswith(PART) for part in path.parts)


def _remove_abandoned(folder: Path, start: str) -> None:
    """Take away what processes that were killed while writing left in a folder."""
    with suppress(OSError):
        for path in [p for p in folder.iterdir() if p.name.startswith(start) and p.name.endswith(PART)]:
            with suppress(OSError):
                if _is_abandoned(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_abandoned(path: Path) -> bool:
    age = time.time() - path.stat().st_mtime
    if fcntl is None:
        return age > ABANDONED_WITHOUT_LOCKS
    if age < ABANDONED_AFTER:  # it may have been made a moment ago and not be locked yet
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        return _lock(handle)
    finally:
        os.close(handle)
