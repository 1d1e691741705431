"""TaskPart: what a kind of part of a task can do; everything that loops over what a task owns loops over ``PARTS``.

A part is a kind: a head, norms, biases, a LoRA, a partner. Before a model is touched it says what a task would get
(``prepare``), then it puts that in (``install``). What lies in the model is asked through ``TaskHolder`` (holders.py), and a
part adds what no module of its own holds. A new part is a subclass in a file of its own and a row in ``PARTS``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..config import RecastConfig
from ..holders import Entry
from ..names import lies_in, without_wrappers
from ..placement.offloaded import like_weights


class Piece:
    """What a task gets at one place, ready to be put in."""

    place: str  # the module of the plain model that it belongs to
    module: nn.Module  # what holds its tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its entries by the names that a task's file has."""
        return {without_wrappers(f"{self.place}.{key}"): tuple(value.shape) for key, value in self.module.state_dict().items()}

    def num_parameters(self) -> int:
        """The parameters that a task trains there."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def beside(self, owned: Collection[str]) -> list[Any]:
        """What is left of a module that the task owns whole, beside others that it owns too: this, parts of it, or nothing.

        Raises:
            RecastConfigError: if it cannot be told apart.
        """
        return [] if lies_in(self.place, owned) else [self]


@dataclass(frozen=True)
class Request:
    """What a task asks of a model."""

    model: nn.Module  # the backbone, with or without other tasks; it is not touched
    config: RecastConfig
    targets: tuple[str, ...]  # names of the modules that get coefficients
    counting: bool = False  # whether the pieces are only counted: then they are made on the meta device

    def like(self, module: nn.Module) -> dict[str, Any]:
        """Device of what stands at a place, and its dtype, but float32 beside half precision, as PEFT's adapters have it."""
        device, dtype = like_weights(module, self.model)
        return {
            "device": torch.device("meta") if self.counting else device,
            "dtype": torch.promote_types(dtype, torch.float32),
        }


@dataclass(frozen=True)
class Place:
    """Where pieces are put: the tuner, and how its task begins."""

    tuner: BaseTuner  # the ``RecastModel``
    adapter_name: str
    active: bool  # whether the task is active at once
    inference_mode: bool  # whether it is frozen
    low_cpu_mem_usage: bool = False  # whether its parameters hold no numbers until a file is loaded

    @property
    def model(self) -> nn.Module:
        """The backbone."""
        return self.tuner.model


class TaskPart:
    """A kind of part; stateless, what tasks own lies in the model."""

    name = ""
    """By which plans and cards call it."""

    owns_modules = False
    """Whether a piece is a module of the model that the task owns whole."""

    def prepare(self, request: Request) -> list[Any]:
        """Check everything (``RecastError``) and say what a task would get, a ``Piece`` for each place; nothing is changed."""
        return []

    def check(self, request: Request, pieces: list[Any], owned: Collection[str], compressed: Collection[str]) -> None:
        """Check the pieces of this part beside what else the task gets (``RecastError``).

        ``owned`` are the modules that the task owns whole, ``compressed`` those for whose weight a compressed bank stands.
        """

    def install(self, place: Place, pieces: list[Any]) -> None:
        """Put prepared pieces in."""

    def entries(self, model: nn.Module, adapter_name: str, config: RecastConfig) -> Iterable[Entry]:
        """A task's tensors that no ``TaskHolder`` holds, such as biases of the model itself."""
        return ()

    def bank_reference(self, pieces: list[Any]) -> Any:
        """The stored bank that pieces are on, ``{"name": ..., "fingerprint": ...}``; None without one."""
        return None

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        """What a task owns here that a pool, arithmetic or a LoRA cannot hold; None if there is nothing, or it can."""
        return None
