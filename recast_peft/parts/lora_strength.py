"""How strongly the LoRA part of a task acts: PEFT's own factors, by the task's name, and what is merged follows them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..composition.recomputation import CallHistory, strengths_of_call
from ..holders import container_key, task_of_key


def with_strengths_of_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a layer with the factors of its forward pass, if that is computed again."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self).setdefault("history", CallHistory())  # the layer was PEFT's before
        now = self.scaling
        then = strengths_of_call(self)
        if then is now:
            return forward(self, *args, **kwargs)
        self.scaling = then
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.scaling = now

    return call


class PartStrength:
    """The verbs of strength of a LoRA part's layer; a mixin of PEFT's layers, which hold a task under ``container_key``."""

    merged: bool
    merged_adapters: list[str]
    merge: Any
    history: CallHistory
    scaling: dict[str, float]
    unmerge: Any

    def set_scale(self, adapter: str, scale: float) -> None:
        super().set_scale(container_key(adapter), scale)  # type: ignore[misc]
        self.rescaled()

    def scale_layer(self, scale: float) -> None:
        super().scale_layer(scale)  # type: ignore[misc]
        self.rescaled()

    def unscale_layer(self, scale: float | None = None) -> None:
        super().unscale_layer(scale)  # type: ignore[misc]
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
