"""TemplateBank: what the layers of one group share, and how a weight is composed from it.

An exact bank owns nothing: its templates are the pretrained weights of its members, looked up on the layers each time, so
that moving, copying or merging the model never leaves it with stale tensors. A compressed bank owns its templates and the
base coefficients that reproduce each member's pretrained weight from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .functional import composition_dtype
from .mimicry import Recipe

if TYPE_CHECKING:
    from .layer import RecastLayer


class TemplateBank(nn.Module):
    """The templates of one group.

    Args:
        name: of the bank.
        members: names of the group's target modules, in the order of their depth.
        layers: the members' layers, in the same order.
        recipe: None for an exact bank; else how templates are mixed from the pretrained weights.
        weights: the members' pretrained weights; needed with a recipe.

    Shapes:
        templates of a compressed bank: ``(templates, *weight_shape)`` in the dtype of the weights;
        its base coefficients: ``(layers, templates)`` in float32.
    """

    templates: nn.Parameter | None
    base_coefficients: Tensor | None

    def __init__(
        self,
        name: str,
        members: Sequence[str],
        layers: Sequence[RecastLayer],
        recipe: Recipe | None = None,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.members = tuple(members)
        self.layers = list(layers)  # a plain list: the bank does not own its members
        self.recipe = recipe
        self.register_parameter("templates", None)
        self.register_buffer("base_coefficients", None)
        if recipe is not None:
            assert weights is not None
            # set in place of register_parameter, which low_cpu_mem_usage redirects to the meta device
            self._parameters["templates"] = nn.Parameter(mix_templates(weights, recipe.mix), requires_grad=False)
            self._buffers["base_coefficients"] = recipe.base.to(weights[0].device, torch.float32)

    @property
    def is_exact(self) -> bool:
        """Whether the pretrained weights themselves are the templates."""
        return self.templates is None

    @property
    def num_templates(self) -> int:
        """Templates in the bank."""
        return len(self.layers) if self.templates is None else self.templates.shape[0]

    def index(self, member: str) -> int:
        """The place of a member in the group."""
        return self.members.index(member)

    def base_of(self, member: str) -> Tensor:
        """Base coefficients ``(templates,)`` of a member of a compressed bank."""
        assert self.base_coefficients is not None
        return self.base_coefficients[self.index(member)]

    def get_templates(self, device: torch.device) -> list[Tensor]:
        """The n templates, each shaped like a member's weight, on ``device``."""
        if self.templates is None:
            templates = [layer.pretrained_weight for layer in self.layers]
        else:
            templates = list(self.templates.unbind(0))
        return [t if t.device == device else t.to(device) for t in templates]

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


def mix_templates(weights: Sequence[Tensor], mix: Tensor) -> Tensor:
    """Templates as a fixed mix of pretrained weights: T = mix @ W.

    Args:
        weights: one for each layer, of one shape.
        mix: ``(templates, layers)``.

    Returns:
        ``(templates, *weight_shape)`` in the dtype of the weights, summed in float32 (float64 for float64 weights).
    """
    work = composition_dtype(weights[0].dtype)
    scale = mix.to(weights[0].device, work)
    result = torch.empty((mix.shape[0], *weights[0].shape), dtype=weights[0].dtype, device=weights[0].device)
    for i in range(mix.shape[0]):
        total = torch.zeros(weights[0].shape, dtype=work, device=weights[0].device)
        for layer, weight in enumerate(weights):
            total.addcmul_(weight.detach().to(total.device, work), scale[i, layer])
        result[i] = total
    return result


def follow_device(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` (from ``nn.Module.to`` and its kin) makes of coefficients: moved, but never to less than float32."""
    probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
    return tensor.to(probe.device, composition_dtype(tensor.dtype, probe.dtype))
