"""Tasks and banks on the Hub: pushed in one commit, fetched whole or not at all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..banks.card import push_bank_to_hub
from ..config import tasks_among
from ..errors import RecastConfigError, RecastError, RecastLoadError
from ..storage.paths import goes_up
from ..storage.transfer import LIBRARY, NoSuchFile, commit_folder, commit_of, fetch_file, hub_errors
from ..validation import a_path, check_arguments, check_is_peft_model, check_is_task, checked_names, listed, optional, shown
from .cards import write_repository_card
from .task_files import read_task_config, task_sizes, tasks_inside

__all__ = ["fetch_task", "push_bank_to_hub", "push_task_to_hub", "push_tasks_to_hub", "task_names"]

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
    check_is_peft_model(model)
    names = list(model.active_adapters) if adapter_name is None else checked_names("adapter_name", adapter_name)
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
    check_is_peft_model(model)
    given = task_names(model) if adapter_names is None else checked_names("adapter_names", adapter_names)
    names = list(dict.fromkeys(given))
    results = results or {}
    commit = {
        "private": private,
        "token": token,
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": commit_message or f"Upload {'task' if len(names) == 1 else 'tasks'} {', '.join(names)}",
        "commit_description": commit_description,
    }
    if not names:
        raise RecastConfigError("adapter_names is empty: name at least one task")
    for name in names:
        check_is_task(name, tasks_among(model.peft_config))
    if not isinstance(results, Mapping) or not all(name in names and isinstance(results[name], Mapping) for name in results):
        raise RecastConfigError(
            f"results={shown(results)}: expected values by name for tasks that are pushed ({listed(names)}), "
            "{task: {name: value}}"
        )
    configs: dict[str, Any] = {name: model.peft_config[name] for name in results}
    before = {name: config.results for name, config in configs.items()}
    try:
        for name, measured in results.items():
            configs[name].results = {**(before[name] or {}), **measured}
        return _push(model, repo_id, names, license, commit)
    except BaseException:
        for name, config in configs.items():
            config.results = before[name]
        raise


def _push(model: PeftModel, repo_id: str, names: Sequence[str], license: str | None, commit: Mapping[str, Any]) -> CommitInfo:
    with TemporaryDirectory() as folder:
        saved = Path(folder, "saved")
        PeftModel.save_pretrained(model, str(saved), selected_adapters=list(names))
        if len(names) == 1 and names[0] != "default":
            saved = saved / names[0]
        return commit_folder(
            saved,
            repo_id,
            lambda path, full, lies: write_repository_card(path, repo_id=full, license=license, lies=lies),
            **commit,
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
    check_arguments(a_path, name=name)
    name = os.fspath(name)
    if os.path.isfile(name):
        raise RecastLoadError(
            f"{name} is a file: expected the folder of a saved task, which holds {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}"
        )
    if os.path.isdir(name):
        folder = local_task(name, subfolder)
    else:
        config_file, subfolder = fetch_config(name, subfolder, hub_kwargs)
        folder = Path(config_file).parent
        pinned = {**hub_kwargs, "revision": commit_of(config_file) or hub_kwargs.get("revision")}
        try:
            fetch_file(name, SAFETENSORS_WEIGHTS_NAME, subfolder, pinned)
        except RecastError as error:
            if isinstance(error, NoSuchFile):
                fetch_file(name, WEIGHTS_NAME, subfolder, pinned)
            elif not (folder / WEIGHTS_NAME).is_file():
                raise
    read_task_config(folder)
    task_sizes(folder)
    return folder


def fetch_config(name: str, subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> tuple[str, str | None]:
    """The config of a task of a repository, and its subfolder; see :func:`fetch_task` for the arguments and what is raised."""
    check_arguments(optional(a_path), subfolder=subfolder)
    try:
        return fetch_file(name, CONFIG_NAME, subfolder, hub_kwargs), subfolder
    except RecastError as error:
        if subfolder is not None or os.path.isdir(name):
            raise
        if isinstance(error, NoSuchFile):
            subfolder = _only_task(name, _tasks_of_repository(name, hub_kwargs))
        elif isinstance(error.__cause__, LocalEntryNotFoundError) and (cached := _tasks_in_the_cache(name, hub_kwargs)):
            subfolder = _only_task(f"the cache of {name}", cached)
        else:
            raise
    return fetch_file(name, CONFIG_NAME, subfolder, hub_kwargs), subfolder


def local_task(name: str | os.PathLike, subfolder: str | None = None) -> Path:
    """The folder of a task in a folder of this machine; without a subfolder the root, or the one subfolder that holds a task.

    Raises:
        RecastLoadError: if there is no task, or several.
    """
    check_arguments(optional(a_path), subfolder=subfolder)
    folder = Path(name, subfolder or "")
    if subfolder is not None or (folder / CONFIG_NAME).is_file():
        return folder
    return folder / _only_task(os.fspath(name), tasks_inside(folder))


def _tasks_of_repository(name: str, hub_kwargs: Mapping[str, Any]) -> list[str]:
    """The subfolders of a repository that hold a task."""
    with hub_errors("list", name):
        api = HfApi(token=hub_kwargs.get("token"), library_name=LIBRARY)
        files = api.list_repo_files(name, revision=hub_kwargs.get("revision"))
    folders = (file.removesuffix(f"/{CONFIG_NAME}") for file in files if file.endswith(f"/{CONFIG_NAME}"))
    return sorted(folder for folder in folders if not goes_up(folder))


def _tasks_in_the_cache(name: str, hub_kwargs: Mapping[str, Any]) -> list[str]:
    """The subfolders of a repository that hold a task and were fetched before; a lone one may have got neighbours since."""
    given = {key: value for key, value in hub_kwargs.items() if key in ("revision", "cache_dir")}
    try:
        root = Path(snapshot_download(name, local_files_only=True, allow_patterns=[f"*/{CONFIG_NAME}"], **given))
    except LocalEntryNotFoundError:
        return []
    found = sorted(path.parent.relative_to(root).as_posix() for path in root.glob(f"*/**/{CONFIG_NAME}"))
    if len(found) == 1:
        warnings.warn(
            f"the Hub was not asked, and of {name} the cache holds one task, in {found[0]!r}, which is taken. If the "
            "repository has others, say which one with subfolder=",
            stacklevel=3,
        )
    return found


def _only_task(name: str, subfolders: list[str]) -> str:
    if len(subfolders) == 1:
        return subfolders[0]
    if not subfolders:
        raise NoSuchFile(f"{name} holds no task: there is no {CONFIG_NAME} in it or in its subfolders")
    raise RecastLoadError(f"{name} holds {len(subfolders)} tasks, in {listed(subfolders, 12)}: say which one with subfolder=")
