"""Whether and how strongly the LoRA part of a task acts: PEFT's own factors by the task's name; what is merged follows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..composition.blocks import with_attribute
from ..errors import RecastConfigError
from ..holders import container_key, holders, task_of_key
from ..layer import RecastLayer
from ..names import modules_of
from ..validation import check_arguments, one_of
from .stacking import Mixed


def keys_of(names: str | Sequence[str]) -> list[str]:
    """The names under which PEFT's layers hold tasks, or one of them."""
    return [container_key(name) for name in ([names] if isinstance(names, str) else names)]


class PartStrength(Mixed):
    """The verbs of strength of a LoRA part's layer; a mixin of PEFT's layers, which hold a task under ``container_key``."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a task's part adds to the weight; PEFT's verbs ask by its key. ``RecastConfigError`` if it has none here."""
        known = self._get_available_adapters()
        key = adapter if adapter in known else container_key(str(adapter))
        if key not in known:
            have = ", ".join(sorted(map(task_of_key, known))) or "none"
            raise RecastConfigError(f"task {adapter!r} has no LoRA part at {self.module_name}; those that have: {have}")
        return super().get_delta_weight(key)

    def set_scale(self, adapter: str, scale: float) -> None:
        super().set_scale(container_key(adapter), scale)
        self.rescaled()

    def scale_layer(self, scale: float) -> None:
        super().scale_layer(scale)
        self.rescaled()

    def unscale_layer(self, scale: float | None = None) -> None:
        super().unscale_layer(scale)
        self.rescaled()

    def rescaled(self) -> None:
        """Merge what is merged once more."""
        tasks = self.merged_tasks
        if tasks:
            self.unmerge()
            self.merge(adapter_names=tasks)

    @property
    def merged_tasks(self) -> list[str]:
        """The tasks whose parts are merged."""
        return [task_of_key(key) for key in self.merged_adapters]


def part_layers(model: nn.Module, adapter_name: str | None = None) -> list[Any]:
    """The layers of LoRA parts in a model, of all tasks or of one."""
    return holders(model, adapter_name, PartStrength)


def switched_off(model: nn.Module, part: str) -> AbstractContextManager[None]:
    """Compute without one of the two parts of the tasks until the block ends; see ``RecastModel.disable_part``."""
    check_arguments(one_of("recast", "lora"), part=part)
    layers = part_layers(model)
    if not layers:
        raise RecastConfigError(
            "disable_part: the model's tasks have no LoRA part; give one with RecastConfig(lora_config=...)"
        )
    recast = modules_of(model, RecastLayer)
    if any(layer.merged for layer in (*layers, *recast)):
        raise RecastConfigError("disable_part: tasks are merged; call unmerge_adapter() first")
    return with_attribute(layers if part == "lora" else recast, "_switched_off", True)
