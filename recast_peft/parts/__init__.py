"""Partners: what a task may train beside its coefficients, as the paper combines RECAST with other methods (its section 4).

A partner is a config in a file of its own, which is imported here.
"""

from __future__ import annotations

from ..options.partner import PARTNERS, PartnerConfig, resolve_partners
from .adaptformer import AdaptFormerConfig
from .bias import BiasConfig
from .clr import CLRConfig
from .piggyback import PiggybackConfig

__all__ = ["PARTNERS", "AdaptFormerConfig", "BiasConfig", "CLRConfig", "PartnerConfig", "PiggybackConfig", "resolve_partners"]
