"""RECAST (ICLR 2025) for Hugging Face PEFT: tasks of fewer than 50 numbers on shared, frozen weight templates."""

from ._version import __version__
from .auto import get_recast_model
from .bank import TemplateBank
from .config import RecastConfig
from .errors import (
    RecastBankError,
    RecastBaseMismatchError,
    RecastCompatibilityError,
    RecastConfigError,
    RecastError,
    RecastLoadError,
    RecastTargetError,
)
from .layer import RecastLayer
from .model import RecastModel
from .plan import RecastPlan, plan_recast
from .registration import register

register(RecastConfig, RecastModel)


__all__ = [
    "RecastBankError",
    "RecastBaseMismatchError",
    "RecastCompatibilityError",
    "RecastConfig",
    "RecastConfigError",
    "RecastError",
    "RecastLayer",
    "RecastLoadError",
    "RecastModel",
    "RecastPlan",
    "RecastTargetError",
    "TemplateBank",
    "__version__",
    "get_recast_model",
    "plan_recast",
]
