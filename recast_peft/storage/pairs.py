"""Two files that belong together and are replaced as one.

A safetensors file and its companion (a task's numbers and its config, a bank and the rest of its backbone) cannot be moved into
place in one step. So the file names its companion by an id in its metadata, and the companion waits beside its place until the
file is there:

    1. companion  -> .companion.<id>.waiting        the old pair is whole
    2. file       -> its place                      from this moment on the new pair is whole
    3. .companion.<id>.waiting -> its place

Whoever reads asks :func:`companion_of`, which finds the right one also after a kill between the second and the third step.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from .atomic import flush, move_files, replace, staged_folder
from .tensors import CHECKSUM, read_metadata, read_tensors, write_tensors

COMPANION = "recast_companion"  # the entry of the file's metadata
WAITING = ".waiting"
TRIES = 20


def companion_id(path: Path) -> str | None:
    """What identifies a companion: a safetensors file's checksum, else a hash of its bytes; None if it is not there."""
    if path.suffix == ".safetensors":
        return read_metadata(path).get(CHECKSUM)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def companion_of(file: Path, companion: Path) -> Path:
    """Where the companion of a file is: nearly always in its place, else waiting beside it.

    A companion that was changed by hand after it was saved stays the one that is read.
    """
    waiting = list(companion.parent.glob(f".{companion.name}.*{WAITING}"))
    if not waiting:
        return companion
    named = read_metadata(file).get(COMPANION)
    if named is None or companion_id(companion) == named:
        return companion
    right = _waiting(companion, named)
    return right if right in waiting else companion


def read_companion(file: Path, companion: Path) -> bytes:
    """The bytes of the companion of a file, also while another process replaces both.

    Raises:
        OSError: if there is none.
    """
    for _ in range(TRIES):
        with suppress(FileNotFoundError):  # it has just taken its place
            return companion_of(file, companion).read_bytes()
    return companion.read_bytes()


def replace_pair(new_file: Path, file: Path, new_companion: Path, companion: Path) -> None:
    """Replace a file and its companion as one; the new file names the new companion. To be called in a ``locked`` block.

    Raises:
        OSError: if the disk is full; the old pair is there as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    current = companion_of(file, companion)
    if current != companion:  # a process was killed before it could finish
        replace(current, companion)
    for left in companion.parent.glob(f".{companion.name}.*{WAITING}"):
        left.unlink(missing_ok=True)
    waiting = _waiting(companion, read_metadata(new_file).get(COMPANION, ""))
    replace(new_companion, waiting)
    flush(companion.parent)
    replace(new_file, file)
    flush(file.parent)
    replace(waiting, companion)


@contextmanager
def staged_pairs(folder: str | os.PathLike, pairs: Mapping[str, str]) -> Iterator[Path]:
    """A folder to write to (see ``staged_folder``), in which the files of ``pairs`` are replaced with their companions as one.

    Args:
        folder: made if it is missing.
        pairs: names of safetensors files with those of their companions. A checksum, and the companion's id, are put into the
            file before it is moved.
    """

    def move(source: Path, target: Path, files: list[Path]) -> None:
        for path, companion in _pairs_in(source, pairs):
            replace_pair(source / path, target / path, source / companion, target / companion)
            files = [other for other in files if other not in (path, companion)]
        move_files(source, target, files)

    with staged_folder(folder, move) as inside:
        yield inside
        for path, companion in _pairs_in(inside, pairs):
            seal(inside / path, inside / companion)


def _pairs_in(folder: Path, pairs: Mapping[str, str]) -> list[tuple[Path, Path]]:
    found = [(file, file.with_name(pairs[file.name])) for file in sorted(folder.rglob("*")) if file.name in pairs]
    return [(a.relative_to(folder), b.relative_to(folder)) for a, b in found if a.is_file() and b.is_file()]


def seal(file: Path, companion: Path, texts: Mapping[str, str] | None = None) -> None:
    """Put a checksum, the id of its companion, and texts into the metadata of a safetensors file that has none."""
    metadata, named = read_metadata(file), companion_id(companion) or ""
    if CHECKSUM in metadata and metadata.get(COMPANION) == named:
        return
    content = read_tensors(file, floating=False, finite=False)
    tensors = {key: tensor.clone() for key, tensor in content.tensors.items()}  # not the file that is about to be replaced
    write_tensors(file, tensors, {**(texts or {}), **content.metadata, COMPANION: named})


def _waiting(companion: Path, named: str) -> Path:
    return companion.with_name(f".{companion.name}.{named}{WAITING}")
