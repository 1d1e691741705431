"""Files from the Hub and to it, with errors that say what to do."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import RecastError, RecastHubError, RecastLoadError
from .cards import CARD_NAME

LIBRARY = "recast_peft"
_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")
_TOKEN = " The token is not valid for this."
_SINCE = " Somebody else pushed meanwhile: push again."


class NoSuchFile(RecastLoadError):
    """A folder or a repository is there, but not this file in it."""


def fetch_file(name: str, file: str, subfolder: str | None = None, hub_kwargs: Mapping[str, Any] | None = None) -> str:
    """The path on this machine of one file of a folder or a repository.

    Args:
        name: a folder, or a repository on the Hub.
        file: in it.
        subfolder: subfolder of the folder or the repository.
        hub_kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        NoSuchFile: if there is no such file.
        RecastHubError: if the repository cannot be reached or read.
    """
    where = f"{subfolder}/{file}" if subfolder else file
    if os.path.isdir(name):
        path = os.path.join(name, subfolder or "", file)
        if not os.path.isfile(path):
            raise NoSuchFile(f"{name} holds no {where}")
        return path
    with hub_errors("read", name, where):
        return hf_hub_download(name, file, subfolder=subfolder, library_name=LIBRARY, **(hub_kwargs or {}))


def fetch_together(name: str, first: str, *others: str, hub_kwargs: Mapping[str, Any] | None = None) -> Path:
    """Fetch several files of a repository, all of the commit that the first one is of; the folder that holds them.

    Raises:
        NoSuchFile: if one of them is missing.
        RecastHubError: if the repository cannot be reached or read.
    """
    given = dict(hub_kwargs or {})
    path = fetch_file(name, first, None, given)
    pinned = {**given, "revision": commit_of(path) or given.get("revision")}
    for other in others:
        fetch_file(name, other, None, pinned)
    return Path(path).parent


def commit_of(path: str | os.PathLike) -> str | None:
    """The commit that a file of the Hub's cache belongs to; None for a file elsewhere."""
    match = _COMMIT.search(os.fspath(path))
    return match[1] if match else None


def commit_folder(
    folder: Path,
    repo_id: str,
    write_card: Callable[[Path, str, Callable[[str], bool]], Any],
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    commit_description: str | None = None,
) -> CommitInfo:
    """Put a folder's files and cards into a repository with one commit.

    Args:
        folder: its files take the same places in the repository; those that the repository has beside them stay.
        repo_id: the repository, made if it does not exist.
        write_card: writes the cards into a folder for a repository; the cards that are there already lie in the folder, and
            the third argument says whether a file lies in the repository.
        private, token, revision, create_pr, commit_message, commit_description: as everywhere in ``huggingface_hub``; a
            revision that does not exist is made as a branch.

    Raises:
        RecastHubError: if the Hub refuses, or cannot be reached; nothing is committed then.
    """
    api = HfApi(token=token, library_name=LIBRARY)
    with hub_errors("push to", repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        present = {file.rfilename for file in head.siblings or ()}
        for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
            name = (place / CARD_NAME).relative_to(folder).as_posix()
            if name in present:
                card = api.hf_hub_download(repo_id, name, revision=head.sha, local_dir=folder.parent / "cards")
                shutil.copyfile(card, place / CARD_NAME)
        write_card(folder, repo_id, present.__contains__)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        said: dict[str, Any] = {"commit_message": commit_message, "commit_description": commit_description}
        # what somebody else pushed since is in no card that was written here
        return api.create_commit(repo_id, operations, revision=revision, create_pr=create_pr, parent_commit=head.sha, **said)


@contextmanager
def hub_errors(what: str, repo_id: str, file: str | None = None) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises into errors that say what to do.

    Raises:
        RecastHubError: if the Hub refuses, or cannot be reached.
        NoSuchFile: if the repository has no such file or revision.
    """
    try:
        yield
    except RecastError:
        raise
    except Exception as error:
        is_wrapped = isinstance(error, ValueError) and isinstance(error.__cause__, HfHubHTTPError)  # a forced download
        reason = error.__cause__ if is_wrapped else error
        raise _explained(reason, f"cannot {what} {repo_id!r}{f' ({file})' if file else ''}") from error


def _explained(error: BaseException | None, cannot: str) -> RecastError:
    where = f"{cannot} at {constants.ENDPOINT}"
    if isinstance(error, LocalEntryNotFoundError):
        return RecastHubError(
            f"{where}: there is no such folder here, it is not in the Hub's cache, and the Hub cannot be reached (or was not "
            "to be asked). Check the name and the connection, or fetch it once while there is one."
        )
    if isinstance(error, (RevisionNotFoundError, EntryNotFoundError)):
        kind = "revision" if isinstance(error, RevisionNotFoundError) else "file"
        return NoSuchFile(f"{where}: there is no such {kind} in the repository")
    if isinstance(error, (RepositoryNotFoundError, GatedRepoError)):
        return RecastHubError(
            f"{where}: there is no such folder here and no such repository there, or it is private or gated and the token "
            "does not open it. Check the name, and pass token= or run `hf auth login`."
        )
    if isinstance(error, HFValidationError):
        return RecastHubError(f"{cannot}: there is no such folder, and it is no name of a repository ({error})")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        hint = {401: _TOKEN, 403: _TOKEN, 412: _SINCE}.get(status or 0, "")
        return RecastHubError(f"{where}: the Hub answered {status}.{hint}\n  {error}")
    return RecastHubError(f"{where}: {type(error).__name__}: {error}\nNothing was loaded or changed here; try again.")
