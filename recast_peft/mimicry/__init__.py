"""Neural Mimicry: from pretrained weights to templates and base coefficients (paper, section 3.2).

A method is a function in a file of its own and one row in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import RecastConfigError
from .closed_form import closed_form


@dataclass(frozen=True)
class Recipe:
    """Templates that are a fixed mix of the group's pretrained weights: T = mix @ W, and W_l is about base[l] @ T.

    Attributes:
        mix: ``(templates, layers)`` in float64.
        base: ``(layers, templates)`` in float64.
    """

    mix: Tensor
    base: Tensor


METHODS: dict[str, Callable[[Sequence[Tensor], int], tuple[Tensor, Tensor]]] = {
    "closed_form": closed_form,
}


def mimic(weights: Sequence[Tensor], num_templates: int, method: str = "closed_form") -> Recipe:
    """Find templates and base coefficients for one group.

    Args:
        weights: the pretrained weights of the group's layers, all of one shape.
        num_templates: n, fewer than there are layers.
        method: a name in ``METHODS``.

    Returns:
        the recipe of the bank.

    Raises:
        RecastConfigError: if there is no such method.
    """
    if method not in METHODS:
        raise RecastConfigError(f"mimicry={method!r}: expected one of {', '.join(sorted(METHODS))}")
    mix, base = METHODS[method](weights, num_templates)
    return Recipe(mix, base)
