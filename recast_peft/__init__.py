"""RECAST (ICLR 2025) for Hugging Face PEFT: tasks of fewer than 50 numbers on shared, frozen weight templates."""

from ._version import __version__
from .auto import AutoRecastModel, get_recast_model
from .bank import TemplateBank
from .bank_files import StoredBank, load_bank
from .bank_learning import LearnedBank, learn_bank, random_bank
from .bias_bank import grow_bias_bank
from .compressed import load_compressed_model, save_compressed_model
from .config import RecastConfig
from .conversion import collapse_coefficient_sets
from .discriminant import fit_discriminant_head
from .errors import (
    RecastBankError,
    RecastBaseMismatchError,
    RecastCompatibilityError,
    RecastConfigError,
    RecastError,
    RecastHubError,
    RecastLoadError,
    RecastSequenceError,
    RecastTargetError,
)
from .fitting import fit_bank
from .growth import GrowthReport, extend_bank, grow_bank, growth_report
from .heads import fit_prototypes, split_logits
from .hub import push_bank_to_hub, push_task_to_hub, push_tasks_to_hub
from .layer import RecastLayer
from .lora_conversion import LoraConversionReport, convert_to_lora, save_as_lora
from .model import RecastModel
from .model_card import write_model_card
from .optim import create_recast_optimizer
from .partners import PARTNERS, AdaptFormerConfig, BiasConfig, CLRConfig, PartnerConfig, PiggybackConfig
from .plan import RecastPlan, plan_recast
from .registration import register
from .report import MimicryReport, mimicry_report
from .scaling import ScalingTable, scaling_table
from .stacking import STACKABLE
from .task_pool import TaskPool

register(RecastConfig, RecastModel)


__all__ = [
    "PARTNERS",
    "STACKABLE",
    "AdaptFormerConfig",
    "AutoRecastModel",
    "BiasConfig",
    "CLRConfig",
    "GrowthReport",
    "LearnedBank",
    "LoraConversionReport",
    "MimicryReport",
    "PartnerConfig",
    "PiggybackConfig",
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
    "RecastSequenceError",
    "RecastTargetError",
    "ScalingTable",
    "StoredBank",
    "TaskPool",
    "TemplateBank",
    "__version__",
    "collapse_coefficient_sets",
    "convert_to_lora",
    "create_recast_optimizer",
    "extend_bank",
    "fit_bank",
    "fit_discriminant_head",
    "fit_prototypes",
    "get_recast_model",
    "grow_bank",
    "grow_bias_bank",
    "growth_report",
    "learn_bank",
    "load_bank",
    "load_compressed_model",
    "mimicry_report",
    "plan_recast",
    "push_bank_to_hub",
    "push_task_to_hub",
    "push_tasks_to_hub",
    "random_bank",
    "save_as_lora",
    "save_compressed_model",
    "scaling_table",
    "split_logits",
    "write_model_card",
]
