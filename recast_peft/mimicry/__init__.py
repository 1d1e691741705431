"""Neural Mimicry: from pretrained weights to templates and base coefficients (paper, section 3.2).

A method is a class in a file of its own and one row in ``METHODS``.
"""

from __future__ import annotations

from typing import Any

from ..validation import resolve_options
from .autoencoder import AutoEncoder
from .base import FittedTemplates, MimicryMethod, Recipe
from .closed_form import ClosedForm, gram_matrix
from .data_aware import DataAware
from .fidelity import Fidelity, measure_fidelity
from .gradient import Gradient

METHODS: dict[str, type[MimicryMethod]] = {
    "closed_form": ClosedForm,
    "gradient": Gradient,
    "autoencoder": AutoEncoder,
    "data_aware": DataAware,
}


def resolve_method(mimicry: str | dict[str, Any] | MimicryMethod) -> MimicryMethod:
    """The method that a config means.

    Args:
        mimicry: a name, ``{"method": name, option: value, ...}``, or the method's own object.

    Raises:
        RecastConfigError: if there is no such method or option, or a value cannot be used.
    """
    return resolve_options("mimicry", mimicry, MimicryMethod, METHODS)  # type: ignore[type-abstract]


__all__ = [
    "METHODS",
    "AutoEncoder",
    "ClosedForm",
    "DataAware",
    "Fidelity",
    "FittedTemplates",
    "Gradient",
    "MimicryMethod",
    "Recipe",
    "gram_matrix",
    "measure_fidelity",
    "resolve_method",
]
