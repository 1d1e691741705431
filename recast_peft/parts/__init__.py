"""Partners: what a task may train beside its coefficients, as the paper combines RECAST with other methods (its section 4).

A partner is a config in a file of its own and one row in ``PARTNERS``.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from ..errors import RecastConfigError
from ..options.partner import PartnerConfig
from .adaptformer import AdaptFormerConfig
from .bias import BiasConfig
from .clr import CLRConfig
from .piggyback import PiggybackConfig

PARTNERS: dict[str, type[PartnerConfig]] = {
    "adaptformer": AdaptFormerConfig,
    "bias": BiasConfig,
    "clr": CLRConfig,
    "piggyback": PiggybackConfig,
}


def resolve_partners(partners: Any) -> list[PartnerConfig]:
    """The partners that a config means.

    Args:
        partners: a list of partners, each as its own object, its name, or ``{"method": name, option: value, ...}``.

    Raises:
        RecastConfigError: if there is no such partner or option, a value cannot be used, or a partner is named twice.
    """
    if not isinstance(partners, (list, tuple)):
        raise RecastConfigError(f"partners={partners!r}: expected a list of partners, such as [AdaptFormerConfig()]")
    resolved = [_resolve(partner) for partner in partners]
    methods = [partner.method for partner in resolved]
    double = sorted({method for method in methods if methods.count(method) > 1})
    if double:
        raise RecastConfigError(f"partners names {double[0]!r} twice; give one of them all target_modules")
    return resolved


def _resolve(partner: Any) -> PartnerConfig:
    if isinstance(partner, PartnerConfig):
        return partner
    options = {"method": partner} if isinstance(partner, str) else partner
    if not isinstance(options, dict) or not isinstance(options.get("method"), str):
        raise RecastConfigError(
            f"partners: {partner!r} is no partner: expected its object, its name, or a dictionary with 'method' and options; "
            f"partners: {', '.join(PARTNERS)}"
        )
    name = options["method"]
    if name not in PARTNERS:
        near = difflib.get_close_matches(name, PARTNERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecastConfigError(f"partners: there is no {name!r}: expected one of {', '.join(PARTNERS)}{hint}")
    known = [f.name for f in dataclasses.fields(PARTNERS[name]) if f.init]
    unknown = sorted(set(options) - {"method", *known})
    if unknown:
        raise RecastConfigError(
            f"partner {name} has no option {', '.join(map(repr, unknown))}; its options: {', '.join(known)}"
        )
    return PARTNERS[name](**{key: value for key, value in options.items() if key != "method"})


__all__ = ["PARTNERS", "AdaptFormerConfig", "BiasConfig", "CLRConfig", "PartnerConfig", "PiggybackConfig", "resolve_partners"]
