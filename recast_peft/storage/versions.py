"""Versions of a file, or of a folder: what it was before, to go back to.

    FOLDER/pool.safetensors                       the present one
    FOLDER/.versions/pool.safetensors/<number>    what it was before, the highest number is the latest

A version is another name of the same file on the disk, so that keeping one copies nothing, and at every moment the present file
is in its place.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import RecastConfigError
from ..validation import a_path, check_arguments, whole_number
from .atomic import flush, locked, replace, staged

VERSIONS = ".versions"


def versions(path: str | os.PathLike) -> list[int]:
    """Numbers of the versions before the present one, the oldest first.

    A process that was killed while it saved may have left the present file under its next number, which is none before it.
    """
    named = [found for found in _folder(path).glob("*") if re.fullmatch("[1-9][0-9]*", found.name)]
    return sorted(int(found.name) for found in named if not _is_same(found, path))


def next_version(path: str | os.PathLike) -> Path:
    """Where the present one lies when it is a version; what holds it is made."""
    _folder(path).mkdir(parents=True, exist_ok=True)
    return _folder(path) / str(max(versions(path), default=0) + 1)


def version_path(path: str | os.PathLike, version: int) -> Path:
    """Where a version lies; it can be read as the file itself can.

    Raises:
        RecastConfigError: if there is no such version.
    """
    if version not in versions(path):
        known = ", ".join(map(str, versions(path))) or "none"
        raise RecastConfigError(f"{os.fspath(path)} has no version {version} before this one; there are: {known}")
    return _folder(path) / str(version)


@contextmanager
def keeping_version(path: str | os.PathLike, keep: int) -> Iterator[None]:
    """A block that writes a file anew; what it was becomes a version, of which the latest ``keep`` stay.

    If the block fails nothing becomes a version. Two writers take turns.
    """
    check_arguments(whole_number(0), keep=keep)
    if not keep:
        yield
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent):
        with _kept(target):
            yield
        for old in versions(target)[:-keep]:
            (_folder(target) / str(old)).unlink(missing_ok=True)


def roll_back(path: str | os.PathLike, version: int | None = None) -> int:
    """Put a version in the place of the file, in one step; the present one becomes the latest version.

    Args:
        path: path of the file.
        version: number of the version; None is the latest.

    Returns:
        the number of the version that is in its place now.

    Raises:
        RecastConfigError: if there is no such version; nothing changes then.
    """
    known = versions(path)
    target = Path(path)
    if not known:
        raise RecastConfigError(f"{target} has no version before this one: it keeps some if it is saved with keep=")
    with locked(target.parent):
        number = known[-1] if version is None else version
        chosen = version_path(target, number)
        with _kept(target):
            replace(chosen, target)
        flush(target.parent)
    return number


@contextmanager
def _kept(target: Path) -> Iterator[None]:
    """A block that replaces the present file, which becomes a version; it does not if the block fails before."""
    kept = next_version(target) if target.is_file() else None
    if kept is not None:
        try:
            os.link(os.path.realpath(target), kept)
        except OSError:  # a file system without such names
            with staged(kept) as beside:
                shutil.copyfile(target, beside)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if kept is not None and filecmp.cmp(kept, target, shallow=False):
                kept.unlink()
        raise


def _is_same(one: Path, other: str | os.PathLike) -> bool:
    """Whether two names are of one file on the disk."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is gone
        return False


def _folder(path: str | os.PathLike) -> Path:
    check_arguments(a_path, path=path)
    return Path(path).parent / VERSIONS / Path(path).name
