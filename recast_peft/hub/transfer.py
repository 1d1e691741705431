"""Tasks and banks on the Hub: pushed in one commit, fetched whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..config import RecastConfig
from ..errors import RecastConfigError, RecastError, RecastHubError, RecastLoadError
from .backbone import commit_of
from .cards import (
    CARD_NAME,
    read_task_config,
    task_sizes,
    tasks_inside,
    write_bank_card,
    write_repository_card,
)

# ---------------------------------------------------------------- pushing


def task_names(model: PeftModel) -> list[str]:
    """The tasks of a model, without the adapters that its pools write into."""
    slots = {pool.slot for pool in getattr(model.base_model, "task_pool", ())}
    return [name for name in model.peft_config if name not in slots]


def push_task_to_hub(
    model: PeftModel,
    repo_id: str,
    adapter_name: str | None = None,
    *,
    results: Mapping[str, Any] | None = None,
    **options: Any,
) -> CommitInfo:
    """Push one task, with its card, to the root of a repository, in one commit.

    Args:
        model: a model with tasks.
        repo_id: the repository, made if it does not exist.
        adapter_name: the task; None is the active one.
        results: measured values by name; stored in the task's config and shown in its card.
        options: ``license``, ``private``, ``token``, ``revision`` and the other arguments of :func:`push_tasks_to_hub`.

    Returns:
        the commit.

    Raises:
        RecastConfigError: if there is no such task.
        RecastHubError: if the Hub refuses, or cannot be reached; nothing is committed then.
    """
    names = [adapter_name] if adapter_name is not None else list(model.active_adapters)
    if len(names) != 1:
        raise RecastConfigError(f"the model's active tasks are {names}: name the one to push with adapter_name")
    return push_tasks_to_hub(model, repo_id, names, results={names[0]: results} if results else None, **options)


def push_tasks_to_hub(
    model: PeftModel,
    repo_id: str,
    adapter_names: Sequence[str] | None = None,
    *,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    license: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push several tasks of a model as one repository, in one commit.

    The layout is PEFT's: the task named ``"default"`` lies in the root, every other in a subfolder of its name. A lone
    task lies in the root whatever its name.

    Args:
        model: a model with tasks.
        repo_id: the repository, made if it does not exist.
        adapter_names: the tasks; None is all of them.
        results: for each task, measured values by name; stored in the task's config and shown in its card.
        license: licence of the tasks, for the card.
        commit_message: first line of the commit.
        commit_description: what stands below it.
        private: whether a repository that is made here is private.
        token: access token of the Hub; None takes the one that you are logged in with.
        revision: branch to push to, made if it does not exist.
        create_pr: open a pull request instead of writing to the branch.

    Returns:
        the commit.

    Raises:
        RecastConfigError: if there is no such task.
        RecastHubError: if the Hub refuses, or cannot be reached; nothing is committed then.
    """
    names = task_names(model) if adapter_names is None else list(adapter_names)
    results = results or {}
    if not names:
        raise RecastConfigError("adapter_names is empty: name at least one task")
    for name in (*names, *results):
        if not isinstance(model.peft_config.get(name), RecastConfig):
            raise RecastConfigError(f"the model has no RECAST task {name!r}; it has {', '.join(task_names(model))}")
    for name, measured in results.items():
        config: Any = model.peft_config[name]
        config.results = {**(config.results or {}), **measured}
    with TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        PeftModel.save_pretrained(model, str(saved), selected_adapters=names)
        for card in saved.rglob(CARD_NAME):
            card.unlink()
        if len(names) == 1 and names[0] != "default":
            saved = saved / names[0]
        return _commit_folder(
            saved,
            repo_id,
            lambda path, full: write_repository_card(path, repo_id=full, license=license),
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {'task' if len(names) == 1 else 'tasks'} {', '.join(names)}",
            commit_description=commit_description,
        )


def _commit_folder(
    folder: Path,
    repo_id: str,
    write_card: Any,
    *,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    **commit: Any,
) -> CommitInfo:
    """Put a folder's files and cards into a repository with one commit."""
    api = HfApi(token=token, library_name="recast_peft")
    with _hub_errors("push to", repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
            name = (place / CARD_NAME).relative_to(folder).as_posix()
            present = _existing_card(api, repo_id, name, revision, folder.parent / "cards")
            if present:
                shutil.copyfile(present, place / CARD_NAME)
        write_card(folder, repo_id)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        return api.create_commit(repo_id, operations, revision=revision, **commit)


def _existing_card(api: HfApi, repo_id: str, name: str, revision: str | None, folder: Path) -> str | None:
    try:
        return api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None


# ---------------------------------------------------------------- a bank


class SavableBank(Protocol):
    """Template banks that can be written to a folder, such as a ``StoredBank``."""

    def save(self, path: str | Path) -> Any:
        """Write ``recast_bank.json`` and the templates."""


def push_bank_to_hub(
    bank: SavableBank,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload template banks",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push stored template banks, with a card, in one commit.

    Args:
        bank: a stored bank.
        repo_id: the repository, made if it does not exist.
        base_model: the repository of the backbone that the bank stands for, for the card.
        license: licence of the bank, for the card.
        commit_message: first line of the commit.
        commit_description: what stands below it.
        private: whether a repository that is made here is private.
        token: access token of the Hub; None takes the one that you are logged in with.
        revision: branch to push to, made if it does not exist.
        create_pr: open a pull request instead of writing to the branch.

    Returns:
        the commit.

    Raises:
        RecastHubError: if the Hub refuses, or cannot be reached; nothing is committed then.
    """
    with TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        bank.save(saved)
        return _commit_folder(
            saved,
            repo_id,
            lambda path, full: write_bank_card(path, repo_id=full, base_model=base_model, license=license),
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )


# ---------------------------------------------------------------- fetching


def fetch_task(name: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> Path:
    """Bring all files of a task onto this machine, of one commit, and check that they can be read.

    Args:
        name: a folder, or a repository on the Hub.
        subfolder: where in it the task lies. None is the root, or the one subfolder that holds a task.
        hub_kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Returns:
        the folder that holds the task's files.

    Raises:
        RecastHubError: if the repository cannot be reached or read.
        RecastLoadError: if there is no task in it, or a file is damaged.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        folder = Path(name, subfolder or "")
        if subfolder is None and not (folder / CONFIG_NAME).is_file():
            folder = folder / _only_task(name, tasks_inside(folder))
    else:
        try:
            config_file = fetch_file(name, CONFIG_NAME, subfolder, hub_kwargs)
        except _NoSuchFile:
            if subfolder is not None:
                raise
            subfolder = _only_task(name, _tasks_of_repository(name, hub_kwargs))
            config_file = fetch_file(name, CONFIG_NAME, subfolder, hub_kwargs)
        folder = Path(config_file).parent
        pinned = {**hub_kwargs, "revision": commit_of(config_file) or hub_kwargs.get("revision")}
        try:
            fetch_file(name, SAFETENSORS_WEIGHTS_NAME, subfolder, pinned)
        except RecastError as error:
            if isinstance(error, _NoSuchFile):
                fetch_file(name, WEIGHTS_NAME, subfolder, pinned)
            elif not (folder / WEIGHTS_NAME).is_file():
                raise
    read_task_config(folder)
    task_sizes(folder)
    return folder


class _NoSuchFile(RecastLoadError):
    """A folder or a repository is there, but not this file in it."""


def fetch_file(name: str, file: str, subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> str:
    """The path of one file of a folder or a repository; see :func:`fetch_task`."""
    where = f"{subfolder}/{file}" if subfolder else file
    if os.path.isdir(name):
        path = os.path.join(name, subfolder or "", file)
        if not os.path.isfile(path):
            raise _NoSuchFile(f"{name} holds no {where}")
        return path
    with _hub_errors("read", name, where):
        return hf_hub_download(name, file, subfolder=subfolder, library_name="recast_peft", **hub_kwargs)


def _tasks_of_repository(name: str, hub_kwargs: Mapping[str, Any]) -> list[str]:
    """The subfolders of a repository that hold a task."""
    with _hub_errors("list", name):
        api = HfApi(token=hub_kwargs.get("token"), library_name="recast_peft")
        files = api.list_repo_files(name, revision=hub_kwargs.get("revision"))
    return sorted(file.removesuffix(f"/{CONFIG_NAME}") for file in files if file.endswith(f"/{CONFIG_NAME}"))


def _only_task(name: str, subfolders: list[str]) -> str:
    if len(subfolders) == 1:
        return subfolders[0]
    if not subfolders:
        raise _NoSuchFile(f"{name} holds no task: there is no {CONFIG_NAME} in it or in its subfolders")
    raise RecastLoadError(
        f"{name} holds {len(subfolders)} tasks, in {', '.join(subfolders[:12])}{', ...' if len(subfolders) > 12 else ''}: "
        "say which one with subfolder="
    )


@contextmanager
def _hub_errors(what: str, repo_id: str, file: str | None = None) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises into errors that say what to do."""
    try:
        yield
    except RecastError:
        raise
    except Exception as error:
        is_wrapped = isinstance(error, ValueError) and isinstance(error.__cause__, HfHubHTTPError)  # a forced download
        reason = error.__cause__ if is_wrapped else error
        raise _explained(reason, f"cannot {what} {repo_id!r}{f' ({file})' if file else ''}") from error


def _explained(error: BaseException | None, cannot: str) -> RecastError:
    where = f"{cannot} at {hub_constants.ENDPOINT}"
    if isinstance(error, LocalEntryNotFoundError):
        return RecastHubError(
            f"{where}: it is not in the cache, and the Hub cannot be reached (or was not to be asked). "
            "Check the connection, or fetch it once while there is one."
        )
    if isinstance(error, (RevisionNotFoundError, EntryNotFoundError)):
        kind = "revision" if isinstance(error, RevisionNotFoundError) else "file"
        return _NoSuchFile(f"{where}: there is no such {kind} in the repository")
    if isinstance(error, (RepositoryNotFoundError, GatedRepoError)):
        return RecastHubError(
            f"{where}: there is no such folder here and no such repository there, or it is private or gated and the token "
            "does not open it. Check the name, and pass token= or run `hf auth login`."
        )
    if isinstance(error, HFValidationError):
        return RecastHubError(f"{cannot}: there is no such folder, and it is no name of a repository ({error})")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        hint = " The token is not valid for this." if status in (401, 403) else ""
        return RecastHubError(f"{where}: the Hub answered {status}.{hint}\n  {error}")
    return RecastHubError(f"{where}: {type(error).__name__}: {error}\nNothing was loaded or changed here; try again.")
