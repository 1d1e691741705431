"""Names from files that somebody else wrote: a path stays in its folder, a repository is a name on the Hub and nothing else."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import RecastLoadError


def inside(folder: str | os.PathLike, name: str, what: str) -> Path:
    """The path of a name from a file, below the folder that the file lies in.

    Raises:
        RecastLoadError: if the name is empty or absolute, goes up, or leads out of the folder by a link.
    """
    root, wrong = os.path.realpath(folder), None
    if not name or is_absolute(name) or goes_up(name) or "\0" in name:
        wrong = "which is no place below"
    elif os.path.commonpath([root, os.path.realpath(Path(folder, name))]) != root:
        wrong = "a link that leads out of"
    if wrong is not None:
        raise RecastLoadError(f"{what} is {name!r}, {wrong} {os.fspath(folder)}: names in files stay in their folder")
    return Path(folder, name)


def is_absolute(name: str) -> bool:
    """Whether a name is a whole path, here or on another system, or begins at somebody's home."""
    return bool(PureWindowsPath(name).anchor) or name.startswith("~")  # to Windows, "/etc" has an anchor too


def goes_up(name: str) -> bool:
    """Whether a name has a part ``..``."""
    return ".." in name.replace("\\", "/").split("/")


def is_hub_name(name: object) -> bool:
    """Whether a name can only be a repository on the Hub: no path, no address, no folder that lies here."""
    if not isinstance(name, str) or is_absolute(name) or goes_up(name) or "\\" in name:
        return False
    return is_repository(name) and not os.path.exists(name)


def is_repository(name: Any) -> bool:
    """Whether a name has the form of a repository's."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith(".")
