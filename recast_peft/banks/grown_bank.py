"""GrownBank: pretrained weights and grown templates side by side; zero offsets give the pretrained weight to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..composition.composed import ComposedModule
from ..composition.kinds import kind_of
from .grown_templates import PARTS, GrownTemplates, LowRankSum, low_rank_sum
from .template_bank import BankBeside


class GrownBank(BankBeside):
    """The templates of one group: the members' pretrained weights (unless they are left out), then the grown ones.

    Args:
        name, members, layers: as for :class:`TemplateBank`.
        grown: the grown templates; they are held in the weights' dtype.
        stored: ``{"name": ..., "fingerprint": ...}`` of the bank file; one dictionary for all of its banks.
        version: version of the bank file.
        history: its earlier versions.
        made: how it was made, for its card.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[str],
        layers: Sequence[ComposedModule],
        grown: GrownTemplates,
        stored: dict[str, str | None],
        version: int = 1,
        history: tuple[Mapping[str, Any], ...] = (),
        made: str | Mapping[str, Any] = "grown",
    ) -> None:
        super().__init__(name, members, layers, stored=stored)
        self.plain, self.energy, self.shape = grown.plain, grown.energy, grown.weight_shape
        self.version, self.history, self.made = version, history, made
        self.parts = PARTS[len(grown.tensors)]
        like = layers[0]
        for part, tensor in zip(self.parts, grown.tensors, strict=True):
            # set in place of register_parameter, which low_cpu_mem_usage redirects to the meta device
            self._parameters[part] = nn.Parameter(tensor.to(like.weight_device, like.weight_dtype), requires_grad=False)

    @property
    def fingerprint(self) -> str:
        """Of the bank file."""
        assert self.stored is not None
        return str(self.stored["fingerprint"])

    @property
    def key(self) -> str:
        """Its name among the banks of a model, in which several versions may stand beside each other."""
        return f"{self.name}@{self.fingerprint}"

    @property
    def grown_templates(self) -> GrownTemplates:
        """The grown templates."""
        tensors = tuple(self._parameters[part] for part in self.parts)
        return GrownTemplates(tensors, self.shape, self.plain, self.energy)  # type: ignore[arg-type]

    @property
    def num_templates(self) -> int:
        """Templates in the bank."""
        return len(self.grown_templates) + (len(self.layers) if self.plain else 0)

    def get_templates(self, device: torch.device) -> list[Tensor]:
        """The templates, each shaped like a member's weight, on ``device``."""
        plain = super().get_templates(device) if self.plain else []
        return [*plain, *(t if t.device == device else t.to(device) for t in self.grown_templates.dense())]

    def product_terms(
        self, member: str, offsets: Tensor, device: torch.device
    ) -> tuple[list[Tensor], Tensor | None, LowRankSum | None]:
        """What a member's weight is the sum of, and with which coefficients; low-rank pairs are not multiplied out."""
        own = self.layers[self.index(member)]
        plain = super().get_templates(device) if self.plain else [own.pretrained_weight.to(device)]
        scale: Tensor | None = None
        if self.plain:
            offsets = self.base_row(member, offsets) + offsets
            scale, offsets = offsets[:, : len(plain)], offsets[:, len(plain) :]
        tensors = tuple(t.to(device) for t in self.grown_templates.tensors)
        kind = kind_of(own.base_layer)
        if len(tensors) == 2 and kind is not None and kind.takes_low_rank:
            pairs = low_rank_sum(own.base_layer, (tensors[0], tensors[1]), offsets) if len(self.grown_templates) else None
            return plain, scale, pairs
        scale = torch.ones_like(offsets[:, :1]) if scale is None else scale
        return [*plain, *(t.to(device) for t in self.grown_templates.dense())], torch.cat([scale, offsets], dim=1), None

    def extra_repr(self) -> str:
        return f"{self.name}, members={len(self.members)}, templates={self.num_templates} ({len(self.grown_templates)} grown)"
