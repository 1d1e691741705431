"""A coefficient for each bias: what the paper's tasks leave as pretrained takes part with one number a module.

RECAST composes weights and keeps every bias (paper, section 3.1). Here a task also owns one number for every bias, in the same
terms: the pretrained bias is the only template, the number is the offset to its coefficient, and zero changes nothing. It is
our own addition, no paper's; docs/what_was_tried.md has what it earned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .base import PartnerConfig

if TYPE_CHECKING:
    from ..targets import Candidate

# the dimension of the output along which a module's bias lies, by how the module computes
CHANNELS: dict[Callable, int] = {
    nn.Linear.forward: -1,
    Conv1D.forward: -1,
    nn.LayerNorm.forward: -1,
    nn.Conv1d.forward: 1,
    nn.Conv2d.forward: 1,
    nn.Conv3d.forward: 1,
    nn.GroupNorm.forward: 1,
    nn.BatchNorm1d.forward: 1,
}
"""Row for row a kind of module whose output is something plus its bias; every batch norm's forward is that of the first."""

_WITHOUT_NAMES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class BiasConfig(PartnerConfig):
    """One coefficient for the bias of each module.

    Args:
        target_modules: the modules whose biases take part; None takes those of all linear layers and convolutions in the
            model's numbered layers, and those of the task's targets (a bias of a patch embedding or of a head is none of
            these). Norms can be named.
    """

    acts_on = "bias"

    method: str = field(default="bias", init=False)

    def is_default_place(self, candidate: Candidate, targets: Collection[str]) -> bool:
        is_layer = isinstance(candidate.module, _WITHOUT_NAMES)
        is_numbered = any(part.isdecimal() for part in candidate.name.split(".")) or candidate.name in targets
        return is_layer and is_numbered and self.refusal(candidate) is None

    def refusal(self, candidate: Candidate) -> str | None:
        module = candidate.module
        if not isinstance(module._parameters.get("bias"), Tensor):
            return f"{type(module).__name__} has no bias"
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "a multi-head attention reads it and never calls it"
        if type(module).forward not in CHANNELS:
            return f"it is not known where the bias of {type(module).__name__} lies in what it puts out"
        return None

    def build(self, module: nn.Module, shape: tuple[int, ...] | None, generator: torch.Generator, **like: Any) -> nn.Module:
        return BiasCoefficient(CHANNELS[type(module).forward], **like)


class BiasCoefficient(nn.Module):
    """The offset to the coefficient of one bias, of one task.

    Shapes:
        ``offset`` ``(1,)``; bias ``(channels,)``.
    """

    def __init__(self, channels: int, **like: Any) -> None:
        super().__init__()
        self.channels = channels
        self.offset = nn.Parameter(torch.zeros(1, **like))

    def change(self, bias: Tensor) -> Tensor:
        """What comes to a bias, in the dtype of the offset."""
        return self.offset * bias.to(self.offset.dtype)

    def forward(self, y: Tensor, bias: Tensor) -> Tensor:
        """The output ``y`` of the module as it would be with the task's bias."""
        change = self.change(bias)
        if self.channels > 0 and y.ndim > 2:
            change = change.view(-1, *[1] * (y.ndim - 2))
        return y + change.to(y.dtype)
