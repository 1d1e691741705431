"""transformers' own ``model.load_adapter`` and auto classes: a task's tensors are put in as PEFT's verbs put them in.

transformers finds the tensors of an adapter by its name in the keys, and only reports what it does not find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..config import RecastConfig
from .files import filling, load_into

LOADING = "_load_pretrained_model"


def take_over_loading(model: nn.Module, config: RecastConfig, adapter_name: str, filled: Callable[..., None]) -> None:
    """Let the next loading of a transformers model, which is that of a task's file, go by the task's own names.

    Other models than those of transformers are left alone. ``filled`` is then called as ``filling`` calls it.
    """
    if hasattr(type(model), LOADING):
        setattr(model, LOADING, partial(_load, model, config, adapter_name, filled))


def hand_back_loading(model: nn.Module) -> None:
    """Undo ``take_over_loading``."""
    vars(model).pop(LOADING, None)


def _load(
    backbone: nn.Module,
    config: RecastConfig,
    adapter_name: str,
    filled: Callable[..., None],
    *,
    state_dict: Mapping[str, Tensor] | None,
    checkpoint_files: list[str] | None,
    load_config: Any,
    **options: Any,
) -> Any:
    from transformers.modeling_utils import load_state_dict

    hand_back_loading(backbone)
    with filling(adapter_name, filled):
        given = {key: value for file in checkpoint_files or () for key, value in load_state_dict(file).items()}
        own = load_into(backbone, config, adapter_name, {**given, **(state_dict or {})})
    load = getattr(type(backbone), LOADING)  # finds everything where it is, and says so
    return load(state_dict=own, checkpoint_files=None, load_config=replace(load_config, weight_mapping=[]), **options)
