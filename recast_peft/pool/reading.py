"""A task for a pool, read from where it lies: a folder, the Hub, the model, a state dict, a config."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from torch import Tensor

from ..composition.strength import warn_of_strength
from ..config import RecastConfig
from ..errors import RecastConfigError, RecastLoadError
from ..hub.peft_models import DEFAULT, is_checkpoint
from ..hub.task_files import numbers_file
from ..hub.transfer import fetch_task
from ..names import MODEL_PREFIX, check_adapter_name, entry_key
from ..parts.head_building import PreparedHead, prepare_head
from ..tasks.arithmetic import head_of_adapter
from ..tasks.files import read_entries
from ..validation import a_path, check_arguments, listed, shown
from .layout import PoolLayout, refuse_parts
from .lora import lora_modules

Read = tuple[Tensor, PreparedHead | None]
HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")  # of a saved task


def read_task(layout: PoolLayout, configs: Mapping[str, Any], name: str, source: Any, hub_kwargs: dict[str, Any]) -> Read:
    """The row ``(numbers per task,)`` and the head of a task; see ``TaskPool.add``."""
    is_saved = isinstance(source, (str, Path)) and source not in configs
    wrong = [key for key in hub_kwargs if key not in HUB_ARGUMENTS or not is_saved]
    if wrong:
        raise RecastConfigError(
            f"task {name!r} was given {listed(wrong)}: a saved task takes {', '.join(HUB_ARGUMENTS)}, a task of the model or a "
            "fresh one takes no more than its source. What a fresh one is like is said by a RecastConfig"
        )
    if source is None or isinstance(source, RecastConfig):
        return layout.fresh_row(name, source), None if source is None else prepare_head(layout.backbone, source)
    if isinstance(source, Mapping):
        entries = dict(source)
        wrong = [key for key, value in entries.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
        if wrong:
            raise RecastConfigError(
                f"the state dict of task {name!r} holds {shown(wrong[0])}: {shown(entries[wrong[0]])}; expected "
                "tensors of torch by name"
            )
        entries = {entry_key(key): value for key, value in entries.items()}
        return layout.row_of(f"task {name!r}", entries, {}, layout.has_biases(entries)), None
    if isinstance(source, str) and source in configs:
        warn_of_strength(layout.backbone, source, "the pool", stacklevel=5)
        return layout.row_of_adapter(source, configs[source]), head_of_adapter(layout.backbone, source)
    if not isinstance(source, (str, Path)):
        raise RecastConfigError(
            f"source is a {type(source).__name__}: expected a folder or a name on the Hub, a task of the model, a state dict, "
            "a RecastConfig, or None"
        )
    return _read_saved(layout, name, source, hub_kwargs)


def _read_saved(layout: PoolLayout, name: str, source: str | Path, hub_kwargs: dict[str, Any]) -> Read:
    folder = str(fetch_task(source, **hub_kwargs))
    config = RecastConfig.from_pretrained(folder)
    refuse_parts(name, config)
    what = f"the task at {str(source)!r}"
    layout.check_config(what, config)
    entries = read_entries(folder, {}, what, config)
    layout.lora.check(what, config.lora_config, lora_modules(key.removeprefix(MODEL_PREFIX) for key in entries))
    head = prepare_head(layout.backbone, config)
    shapes = {} if head is None else head.shapes()
    try:
        values = layout.row_of(what, entries, shapes, config.partner("bias") is not None)
    except RecastLoadError:
        layout.check_modules(name, config)  # whose entries no row has
        raise
    if head is not None:
        prefix = f"{MODEL_PREFIX}{head.place}."
        head.module.load_state_dict({k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)})
        head.module.requires_grad_(False)
    return values, head


def read_folder(layout: PoolLayout, configs: Mapping[str, Any], folder: str | Path) -> list[tuple[str, Tensor, Any]]:
    """Name, row and head of every task saved in a folder, in alphabetical order; the one named ``"default"`` lies in its root.

    Raises:
        RecastLoadError: if there is none, saying where they may lie instead.
        RecastConfigError: if a folder has a name that no task can have, or there are two tasks named ``"default"``.
    """
    check_arguments(a_path, folder=folder)
    root = Path(folder)
    paths = sorted(path.parent for path in root.glob(f"*/{CONFIG_NAME}"))
    if not paths:
        raise RecastLoadError(f"{folder} holds no saved task (no folder with an {CONFIG_NAME} in it){_where_instead(root)}")
    tasks = {path.name: path for path in paths}
    if (root / CONFIG_NAME).is_file() and not _is_copy(root, paths):
        if DEFAULT in tasks:
            raise RecastConfigError(
                f"{folder} and its subfolder {DEFAULT!r} both hold a task of the name {DEFAULT!r}: put them in one by one with "
                "pool.add(name, folder)"
            )
        tasks[DEFAULT] = root
    for name in tasks:
        check_adapter_name(name)
    # a task of the model may have the same name: what lies in the folder is meant
    return [(name, *read_task(layout, configs, name, path, {})) for name, path in sorted(tasks.items())]


def _is_copy(root: Path, tasks: list[Path]) -> bool:
    """Whether the root of a checkpoint of the Trainer holds the active task, which lies in a folder of its own too."""
    file = numbers_file(root)
    if file is None or not is_checkpoint(root):
        return False
    return any(other.is_file() and filecmp.cmp(file, other, shallow=False) for other in (path / file.name for path in tasks))


def _where_instead(root: Path) -> str:
    if not root.is_dir():
        return ": there is no such folder"
    if (root / CONFIG_NAME).is_file():
        return f": it is a saved task itself; put it in with pool.add({root.name!r}, {str(root)!r})"
    deeper = sorted({path.parent.parent for path in root.glob(f"*/*/{CONFIG_NAME}")})
    if deeper:
        return f": its folders hold some, load_folder takes one of them: {', '.join(map(str, deeper[:3]))}"
    return ""
