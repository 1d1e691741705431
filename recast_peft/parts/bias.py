"""A coefficient for each bias: what the paper's tasks leave as pretrained takes part with one number a module.

RECAST composes weights and keeps every bias (paper, section 3.1). Here a task also owns one number for every bias, in the same
terms: the pretrained bias is the only template, the number is the offset to its coefficient, and zero changes nothing. It is
our own addition, no paper's; docs/results/glyphs.md has what it earned. With a bank of biases (``grow_bias_bank``) the
templates are those of the bank instead, each of which spans the biases of a whole block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..banks.template_bank import follow_device
from ..composition.kinds import family_of, kind_of
from ..errors import RecastBankError
from ..options.partner import PartnerCandidate
from ..placement.offloaded import StaysInMemory
from ..planning.reading import why_unheard
from .banked import BankedPartnerConfig, OfBank


def channels_of(module: nn.Module) -> int | None:
    """The dimension of a module's output along which its bias lies; None if that is not known."""
    kind = kind_of(module)
    return None if kind is None else kind.channels


@dataclass(frozen=True, kw_only=True)
class BiasConfig(BankedPartnerConfig, method="bias"):
    """One coefficient for the bias of each module, or coefficients for the templates of a bank of biases.

    Args:
        target_modules: the modules whose biases take part; None takes those of all linear layers and convolutions in the
            model's numbered layers, and those of the task's targets (a bias of a patch embedding or of a head is none of
            these). Norms can be named. A bank says itself which modules these are.
        bank: templates of biases that ``grow_bias_bank`` made: the bank, or the name of a folder or repository where it lies.
            Stored configs hold ``{"name": ..., "fingerprint": ...}``.
    """

    acts_on = "bias"
    bank_maker = "grow_bias_bank"

    def is_default_place(self, candidate: PartnerCandidate, targets: Collection[str]) -> bool:
        family = family_of(candidate.module)
        is_layer = family is not None and family.call is not None
        is_numbered = any(part.isdecimal() for part in candidate.name.split(".")) or candidate.name in targets
        return is_layer and is_numbered

    def refusal(self, candidate: PartnerCandidate) -> str | None:
        module = candidate.module
        if not isinstance(module._parameters.get("bias"), Tensor):
            return f"{type(module).__name__} has no bias"
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "a multi-head attention reads it and never calls it"
        if channels_of(module) is None:
            return f"it is not known where the bias of {type(module).__name__} lies in what it puts out"
        return why_unheard(candidate, "bias")

    def build(self, module: nn.Module, shape: tuple[int, ...] | None, generator: torch.Generator, **like: Any) -> nn.Module:
        return BiasCoefficient(module, **like)


class BiasCoefficient(StaysInMemory):
    """The offset to the coefficient of one bias, of one task.

    Shapes:
        ``offset`` ``(1,)``; bias ``(channels,)``.
    """

    is_called = True
    owner: str | None = None  # the place whose coefficients these are; None is its own

    def __init__(self, module: nn.Module, **like: Any) -> None:
        super().__init__()
        self.channels: Any = channels_of(module)
        self.offset = nn.Parameter(torch.zeros(1, **like))

    @property
    def numbers(self) -> nn.Parameter:
        """The coefficients that it computes with, ``(templates,)``."""
        return self.offset

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BiasCoefficient:
        kept = {name: values.data for name, values in self.named_parameters(recurse=False) if not values.is_meta}
        super()._apply(fn, recurse)
        for name, values in kept.items():  # float32 beside weights of any dtype, as coefficients of weights are
            getattr(self, name).data = follow_device(fn, values)
        return self

    def templates(self, bias: Tensor) -> Tensor:
        """The templates ``(templates, channels)``; here the pretrained bias alone."""
        return bias[None]

    def scale_templates(self) -> Tensor | None:
        """The templates ``(templates, channels)`` of a norm's scale, if the task moves it."""
        return None

    def change(self, bias: Tensor) -> Tensor:
        """What comes to a bias, in the dtype of the offset."""
        return mixed(self.numbers, self.templates(bias))

    def scale_change(self) -> Tensor | None:
        """What comes to the scale of a norm; None where the task leaves it."""
        templates = self.scale_templates()
        return None if templates is None else mixed(self.numbers, templates)

    def forward(self, y: Tensor, bias: Tensor, scale: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        """The output ``y`` of the module as it would be with the task's bias (and the task's scale of a norm).

        ``offsets`` ``(samples, templates)`` are each sample's own, in place of this task's.
        """
        numbers = self.numbers if offsets is None else offsets
        changed = y + self.along_channels(mixed(numbers, self.templates(bias)), y)
        templates = self.scale_templates()
        if templates is None:
            return changed
        share = self.along_channels(share_of(mixed(numbers, templates), scale), y)
        return changed + (y - self.along_channels(bias, y)) * share  # the bias is no part of what is scaled

    def along_channels(self, values: Tensor, y: Tensor) -> Tensor:
        """Values ``(channels,)``, or ``(samples, channels)``, in the dtype of an output and shaped so that they fit it."""
        *samples, channels = values.shape
        ones = [1] * (y.ndim - 2)
        return values.view(*samples, *((channels, *ones) if self.channels > 0 else (*ones, channels))).to(y.dtype)


def mixed(numbers: Tensor, templates: Tensor) -> Tensor:
    """Templates ``(templates, channels)`` times numbers ``(templates,)`` or ``(samples, templates)``, in the numbers' dtype."""
    templates = templates.to(numbers)
    return numbers * templates[0] if len(templates) == 1 else numbers @ templates  # which autocast rounds


def share_of(growth: Tensor, scale: Tensor | None) -> Tensor:
    """What a scale grows by, in units of itself; where it is zero a bank of scales has nothing to add."""
    assert scale is not None
    return growth / torch.where(scale == 0, torch.ones_like(scale), scale)


class BiasTemplates(OfBank):
    """The templates of one bias, which all tasks on one bank share."""

    templates: Tensor  # ``(templates, channels)``
    scales: Tensor  # likewise of a norm, where the bank moves its scale too


class BiasMix(BiasCoefficient):
    """What a task adds to one bias: the templates of the bank, mixed by the coefficients of the bias's group.

    Shapes:
        ``offset`` ``(templates,)``, owned by the first bias of the group alone; bias ``(channels,)``.
    """

    def __init__(self, module: nn.Module, templates: BiasTemplates, place: str, owner: BiasMix | None, **like: Any) -> None:
        nn.Module.__init__(self)
        self.channels = channels_of(module)
        self.shared = templates
        self.owners = () if owner is None else (owner,)  # in a tuple, since it is no child
        self.owner = place if owner is None else owner.owner
        if owner is None:
            self.offset = nn.Parameter(torch.zeros(len(templates.templates), **like))

    @property
    def numbers(self) -> nn.Parameter:
        return (self.owners[0] if self.owners else self).offset

    def templates(self, bias: Tensor) -> Tensor:
        return self.shared.templates

    def scale_templates(self) -> Tensor | None:
        return self.shared._buffers.get("scales")


def scaled_by(member: str, places: Mapping[str, PartnerCandidate]) -> str | None:
    """The norm whose scale a bank's member is; None for a member that is a module, of whose bias the templates are."""
    norm = member.removesuffix(".weight")
    return norm if member not in places and norm != member and norm in places else None


def member_parameter(places: Mapping[str, PartnerCandidate], member: str, width: int) -> Tensor:
    """The bias of a bank's member in a model, or the scale of a norm; ``RecastBankError`` if there is none of this width."""
    norm = scaled_by(member, places)
    if norm is not None:
        bias = places[norm].module._parameters.get("weight")
    else:
        bias = places[member].module._parameters.get("bias") if member in places else None
    if bias is None or bias.numel() != width:
        has = "no such bias" if bias is None else f"{bias.numel()} numbers"
        raise RecastBankError(
            f"the bank of biases does not fit the model at {member}\n  bank:  {width} numbers\n  model: {has}"
        )
    return bias
