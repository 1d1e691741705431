"""Neural Mimicry: from pretrained weights to templates and base coefficients (paper, section 3.2).

A method is a class in a file of its own and one row in ``METHODS``.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from ..errors import RecastConfigError
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
    if isinstance(mimicry, MimicryMethod):
        return mimicry
    options = {"method": mimicry} if isinstance(mimicry, str) else mimicry
    if not isinstance(options, dict) or not isinstance(options.get("method"), str):
        raise RecastConfigError(
            f"mimicry={mimicry!r}: expected the name of a method, a dictionary with a 'method' and its options, or an options "
            f"object; methods: {', '.join(METHODS)}"
        )
    name = options["method"]
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise RecastConfigError(
            f"mimicry={name!r}: expected one of {', '.join(METHODS)}{f'; did you mean {near[0]!r}?' if near else ''}"
        )
    method = METHODS[name]
    given = {key: value for key, value in options.items() if key != "method"}
    known = [field.name for field in dataclasses.fields(method)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise RecastConfigError(
            f"mimicry {name} has no option {', '.join(map(repr, unknown))}; its options: {', '.join(known) or 'none'}"
        )
    try:
        return method(**given)
    except TypeError as error:
        raise RecastConfigError(f"mimicry={mimicry!r}: an option is of the wrong type ({error})") from error


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
