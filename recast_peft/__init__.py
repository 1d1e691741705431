"""RECAST (ICLR 2025) for Hugging Face PEFT: tasks of fewer than 50 numbers on shared, frozen weight templates."""

from ._version import __version__
from .analysis.report import MimicryReport, mimicry_report
from .analysis.scaling import ScalingTable, scaling_table
from .auto import AutoRecastModel, get_recast_model
from .banks.files import StoredBank, load_bank
from .banks.template_bank import TemplateBank
from .composition.strength import rescale_adapter_scale
from .config import RecastConfig
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
from .growth.adapters import CompressedAdapters, compress_adapters
from .growth.biases import grow_bias_bank
from .growth.families import KnownPictures, MissingWords, PracticeFamily, PracticeTask
from .growth.fitting import fit_bank
from .growth.practice import practice_bank
from .growth.random import random_bank
from .growth.readout import readout_bank
from .growth.report import GrowthReport, growth_report
from .growth.weights import extend_bank, grow_bank
from .hub.cards import write_card_of_saved_task, write_model_card
from .hub.hotswap import hotswap_adapter
from .hub.peft_models import with_task_verbs
from .hub.transfer import push_bank_to_hub, push_task_to_hub, push_tasks_to_hub
from .integrations.compressed import load_compressed_model, save_compressed_model
from .integrations.export import export_aoti, export_onnx, export_program, export_task, export_tasks
from .layer import RecastLayer
from .model import RecastModel
from .optim import create_recast_optimizer, find_coefficient_lr
from .options.record import AFTER_SAVING, BEFORE_LOADING
from .parts import PARTNERS, AdaptFormerConfig, BiasConfig, CLRConfig, PartnerConfig, PiggybackConfig, ReadoutConfig
from .parts.discriminant import fit_discriminant_head
from .parts.head import split_logits
from .parts.prototypes import fit_prototypes
from .parts.stacking import STACKABLE
from .planning.plan import RecastPlan
from .pool.pool import TaskPool
from .registration import register
from .tasks.banks import collapse_coefficient_sets
from .tasks.lora_conversion import LoraConversionReport, convert_to_lora, save_as_lora
from .tasks.plan import plan_recast

register(RecastConfig, RecastModel)
AFTER_SAVING.append(write_card_of_saved_task)
BEFORE_LOADING.append(with_task_verbs)


__all__ = [
    "PARTNERS",
    "STACKABLE",
    "AdaptFormerConfig",
    "AutoRecastModel",
    "BiasConfig",
    "CLRConfig",
    "CompressedAdapters",
    "GrowthReport",
    "KnownPictures",
    "LoraConversionReport",
    "MimicryReport",
    "MissingWords",
    "PartnerConfig",
    "PiggybackConfig",
    "PracticeFamily",
    "PracticeTask",
    "ReadoutConfig",
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
    "compress_adapters",
    "convert_to_lora",
    "create_recast_optimizer",
    "export_aoti",
    "export_onnx",
    "export_program",
    "export_task",
    "export_tasks",
    "extend_bank",
    "find_coefficient_lr",
    "fit_bank",
    "fit_discriminant_head",
    "fit_prototypes",
    "get_recast_model",
    "grow_bank",
    "grow_bias_bank",
    "growth_report",
    "hotswap_adapter",
    "load_bank",
    "load_compressed_model",
    "mimicry_report",
    "plan_recast",
    "practice_bank",
    "push_bank_to_hub",
    "push_task_to_hub",
    "push_tasks_to_hub",
    "random_bank",
    "readout_bank",
    "rescale_adapter_scale",
    "save_as_lora",
    "save_compressed_model",
    "scaling_table",
    "split_logits",
    "write_model_card",
]
