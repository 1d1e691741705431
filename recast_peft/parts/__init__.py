"""Parts: what a task may own beside its coefficients. Whoever loops over what a task owns loops over ``PARTS``.

A new part is a file and a row here; a partner (a part with options of its own, ``PartnerConfig``) likewise.
"""

from __future__ import annotations

from ..options.partner import PARTNERS, PartnerConfig, resolve_partners
from .adaptformer import AdaptFormerConfig
from .base import TaskPart
from .base_biases import BaseBiasesPart
from .bias import BiasConfig
from .bias_part import BiasPart
from .clr import CLRConfig
from .head import HeadPart
from .lora import LoraPart
from .partner import PartnerPart
from .piggyback import PiggybackConfig
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
]

__all__ = [
    "PARTNERS",
    "PARTS",
    "AdaptFormerConfig",
    "BiasConfig",
    "CLRConfig",
    "PartnerConfig",
    "PiggybackConfig",
    "TaskPart",
    "resolve_partners",
]
