"""TemplateBank: what the layers of one group share, and how a weight is composed from it.

An exact bank owns nothing: its templates are the pretrained weights of its members, looked up on the layers each time, so
that moving, copying or merging the model never leaves it with stale tensors. A compressed bank owns its templates and the
base coefficients that reproduce each member's pretrained weight from them: mixed from the pretrained weights by a recipe, or
fitted freely, in which case they are stored in a bank file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..composition.compose import compose_weight, composition_dtype, without_autocast
from ..composition.composed import ComposedModule
from ..composition.fingerprint import same_weight, weight_fingerprint
from ..mimicry import Fidelity, FittedTemplates, Recipe, measure_fidelity
from ..placement.offloaded import StaysInMemory
from ..placement.sharded import is_plain

if TYPE_CHECKING:
    from .core_product import CoreProduct
    from .grown_templates import LowRankSum


PLACEHOLDER = "recast_fingerprint"  # attribute of a parameter that only holds the place of a released weight
MIXED_AT_ONCE = 1 << 21  # numbers of the members together that are held in the composition's dtype at once


class TemplateBank(StaysInMemory):
    """The templates of one group.

    Args:
        name: name of the bank.
        members: names of the group's target modules, in the order of their depth.
        layers: the members' layers, in the same order.
        recipe: how templates are mixed from the pretrained weights; ``build`` does it.
        fitted: templates and base coefficients that are there already; beside them a recipe only says how they were made.
            Neither of the two makes an exact bank.
        stored: ``{"name": ..., "fingerprint": ...}`` of the bank file that ``fitted`` belongs to; one dictionary for all of
            its banks.

    Shapes:
        templates of a compressed bank: ``(templates, *weight_shape)`` in the dtype of the weights;
        its base coefficients: ``(layers, templates)`` in float32.
    """

    templates: nn.Parameter | None
    base_coefficients: Tensor | None
    is_outdated = False  # while other pretrained weights are loaded into a whole model
    is_factored = False  # whether the sum of the templates is formed without the templates; see ``added_to``
    _made: str | None = None  # fingerprint of the templates of a compressed bank

    def __init__(
        self,
        name: str,
        members: Sequence[str],
        layers: Sequence[ComposedModule],
        recipe: Recipe | None = None,
        fitted: FittedTemplates | None = None,
        stored: dict[str, str | None] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.members = tuple(members)
        self.layers = list(layers)  # a plain list: the bank does not own its members
        self.recipe = recipe
        self.stored = stored
        self.fidelity: dict[str, Fidelity] = {}  # member -> how well it was reproduced; empty for an exact bank
        self.register_parameter("templates", None)
        self.register_buffer("base_coefficients", None)
        if fitted is not None:
            self._hold(fitted.templates, fitted.base)

    def build(self) -> None:
        """Make the templates of a recipe, and note how well the members are reproduced.

        Apart from the constructor, so that of a large model one group after the other is built and its pretrained weights
        are released: no more than one group is held twice.
        """
        weights = [layer.pretrained_weight for layer in self.layers]
        if self.templates is not None and self.base_coefficients is not None:
            like = weights[0]
            self._hold(self.templates.data.to(like.device, like.dtype), self.base_coefficients)
        elif self.recipe is not None:
            self._hold(mix_templates(weights, self.recipe.mix), self.recipe.base)
        assert self.templates is not None
        assert self.base_coefficients is not None
        if any(hasattr(weight, PLACEHOLDER) for weight in weights):
            return  # a compressed model is being loaded: there is nothing to compare with
        measured = measure_fidelity(weights, self.templates, self.base_coefficients)
        self.fidelity = dict(zip(self.members, measured, strict=True))
        self._made = weight_fingerprint(self.templates)

    def _hold(self, templates: Tensor, base: Tensor) -> None:
        # set in place of register_parameter, which low_cpu_mem_usage redirects to the meta device
        self._parameters["templates"] = nn.Parameter(templates, requires_grad=False)
        self._buffers["base_coefficients"] = base.to(templates.device, torch.float32)

    @property
    def is_foreign(self) -> bool:
        """Whether a state dict brought other templates than the bank made or read; of shards that is not looked at."""
        if self._made is None or self.templates is None or not is_plain(self.templates):
            return False
        return not same_weight(weight_fingerprint(self.templates), self._made)

    @property
    def is_exact(self) -> bool:
        """Whether the pretrained weights themselves are the templates."""
        return self.templates is None and self.recipe is None

    @property
    def is_anchored(self) -> bool:
        """Whether offsets are added to the pretrained weight itself, so that zero offsets give it to the last bit."""
        return self.is_exact

    @property
    def key(self) -> str:
        """Its name among the banks of a model."""
        return self.name

    @property
    def num_templates(self) -> int:
        """Templates in the bank."""
        if self.templates is not None:
            return self.templates.shape[0]
        return len(self.layers) if self.recipe is None else self.recipe.mix.shape[0]

    def index(self, member: str) -> int:
        """The place of a member in the group."""
        return self.members.index(member)

    def base_of(self, member: str) -> Tensor:
        """Base coefficients ``(templates,)`` of a member of a compressed bank."""
        assert self.base_coefficients is not None
        return self.base_coefficients[self.index(member)]

    def base_row(self, member: str, like: Tensor) -> Tensor:
        """Coefficients ``(templates,)`` that give the member's own weight, in the dtype and on the device of ``like``."""
        if self.templates is None:
            row = torch.zeros(self.num_templates, dtype=like.dtype, device=like.device)
            row[self.index(member)].fill_(1)  # an assignment would make an accelerator wait for the host
            return row
        return self.base_of(member).to(like)

    def get_templates(self, device: torch.device) -> list[Tensor]:
        """The n templates, each shaped like a member's weight, on ``device``."""
        held = self._parameters
        # an exact bank is asked at every call, and torch's own look-up of an attribute takes ten times as long
        own = None if "templates" in held and held["templates"] is None else self.templates
        templates = [layer.pretrained_weight for layer in self.layers] if own is None else list(own.unbind(0))
        return [t if t.device == device else t.to(device) for t in templates]

    def added_to(self, weight: Tensor | None, offsets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A weight (None: zero) with the templates, each times its coefficient, added to it; differentiable.

        Args:
            weight: shaped like a member's weight.
            offsets: ``(templates,)``, on the weight's device.
            dtype: of the result; None means that of the weight, or of the templates.
        """
        return compose_weight(weight, self.get_templates(offsets.device), offsets, dtype)

    def product_terms(
        self, member: str, offsets: Tensor, device: torch.device
    ) -> tuple[list[Tensor], Tensor | None, LowRankSum | CoreProduct | None]:
        """What a member's weight is the sum of, and with which coefficients.

        Args:
            member: the target module.
            offsets: ``(samples, templates)``.
            device: device of the terms.

        Returns:
            n tensors shaped like the weight, their coefficients ``(samples, n)`` (None: one tensor, as it is), and the
            sum of the low-rank pairs that come to it.
        """
        return self.get_templates(device), self.base_row(member, offsets) + offsets, None

    def same_recipe(self, recipe: Recipe) -> bool:
        """Whether a recipe would build this very bank."""
        mine = self.recipe
        return mine is not None and torch.equal(mine.mix, recipe.mix) and torch.equal(mine.base, recipe.base)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemplateBank:
        kept = self.base_coefficients
        super()._apply(fn, recurse)
        if kept is not None:
            self._buffers["base_coefficients"] = follow_device(fn, kept)
        return self

    def extra_repr(self) -> str:
        kind = "exact" if self.is_exact else "compressed"
        return f"{self.name}, members={len(self.members)}, templates={self.num_templates} ({kind})"


class BankBeside(TemplateBank):
    """A bank with templates beside the pretrained weights, which stay."""

    is_exact = False
    is_anchored = True


@without_autocast()
def mix_templates(weights: Sequence[Tensor], mix: Tensor) -> Tensor:
    """Templates as a fixed mix of pretrained weights: T = mix @ W.

    Args:
        weights: one for each layer, of one shape.
        mix: ``(templates, layers)``.

    Returns:
        ``(templates, *weight_shape)`` in the dtype of the weights, summed in float32 (float64 for float64 weights).
    """
    work = composition_dtype(weights[0].dtype)
    device = weights[0].device
    scale = mix.to(device, work)
    result = torch.empty((mix.shape[0], *weights[0].shape), dtype=weights[0].dtype, device=device)
    flat = [weight.detach().reshape(-1) for weight in weights]
    into = result.view(mix.shape[0], -1)
    chunk = max(1, MIXED_AT_ONCE // len(weights))
    for start in range(0, into.shape[1], chunk):
        part = torch.stack([f[start : start + chunk].to(device, work) for f in flat])
        into[:, start : start + chunk] = scale @ part
    return result


def follow_device(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` (from ``nn.Module.to`` and its kin) makes of coefficients: moved, but never to less than float32."""
    probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
    dtype = composition_dtype(tensor.dtype, probe.dtype)
    if tensor.is_meta:  # to_empty() gives it a place, and a state dict its numbers
        return torch.empty_like(tensor, device=probe.device, dtype=dtype)
    return tensor.to(probe.device, dtype)


def move_in_place(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move parameters and buffers to a device; they stay the same objects, and those on the meta device stay there."""
    for tensor in tensors:
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
