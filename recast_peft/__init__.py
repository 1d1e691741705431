"""RECAST (ICLR 2025) for Hugging Face PEFT: tasks of fewer than 50 numbers on shared, frozen weight templates."""

from ._version import __version__
from .auto import AutoRecastModel, get_recast_model
from .bank import TemplateBank
from .config import RecastConfig
from .errors import (
    RecastBankError,
    RecastBaseMismatchError,
    RecastCompatibilityError,
    RecastConfigError,
    RecastError,
    RecastHubError,
    RecastLoadError,
    RecastTargetError,
)
from .hub import push_bank_to_hub, push_task_to_hub, push_tasks_to_hub
from .layer import RecastLayer
from .model import RecastModel
from .model_card import write_model_card
from .plan import RecastPlan, plan_recast
from .registration import register

register(RecastConfig, RecastModel)


__all__ = [
    "AutoRecastModel",
    "RecastBankError",
    "RecastBaseMismatchError",
    "RecastCompatibilityError",
    "RecastConfig",
    "RecastConfigError",
    "RecastError",
    "RecastHubError",
    "RecastLayer",
    "RecastLoadError",
    "RecastModel",
    "RecastPlan",
    "RecastTargetError",
    "TemplateBank",
    "__version__",
    "get_recast_model",
    "plan_recast",
    "push_bank_to_hub",
    "push_task_to_hub",
    "push_tasks_to_hub",
    "write_model_card",
]
