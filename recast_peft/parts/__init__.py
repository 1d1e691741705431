"""Parts: what a task may own beside its coefficients. Whoever loops over what a task owns loops over ``PARTS``.

A new part is a file and a row here; a partner (a part with options of its own, ``PartnerConfig``) likewise.
"""

from __future__ import annotations

from typing import Any

from ..options.partner import PARTNERS, PartnerConfig, resolve_partners
from .adaptformer import AdaptFormerConfig
from .base import Request, TaskPart
from .base_biases import BaseBiasesPart
from .bias import BiasConfig
from .bias_part import BiasPart
from .clr import CLRConfig
from .head import HeadPart
from .lora import LoraPart
from .partner import PartnerPart
from .piggyback import PiggybackConfig
from .readout import ReadoutConfig, ReadoutPart
from .saved import NormsPart, SavedPart

PARTS: list[TaskPart] = [
    LoraPart(),
    HeadPart(),
    SavedPart(),
    NormsPart(),
    BaseBiasesPart(),
    PartnerPart(AdaptFormerConfig),
    BiasPart(),
    PartnerPart(CLRConfig),
    PartnerPart(PiggybackConfig),
    ReadoutPart(),
]


def pieces_of(request: Request) -> list[tuple[TaskPart, list[Any]]]:
    """What every part would give a task (``RecastError`` if it cannot); what several name whole the first of them gives."""
    found: list[tuple[TaskPart, list[Any]]] = []
    owned: list[str] = []
    for part in PARTS:
        pieces = part.prepare(request)
        if part.owns_modules:
            pieces = [left for piece in pieces for left in piece.beside(owned)]
            owned += [piece.place for piece in pieces]
        found.append((part, pieces))
    return found


__all__ = [
    "PARTNERS",
    "PARTS",
    "AdaptFormerConfig",
    "BiasConfig",
    "CLRConfig",
    "PartnerConfig",
    "PiggybackConfig",
    "ReadoutConfig",
    "TaskPart",
    "pieces_of",
    "resolve_partners",
]
