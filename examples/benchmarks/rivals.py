"""The methods that the benchmarks compare: RECAST beside those of PEFT, each at its natural size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, TinyLoraConfig, VeraConfig, get_peft_model
from torch import nn

from recast_peft import RecastConfig

REFERENCE = "LoRA r=8"
MODEL = "vit_small_patch16_224"
TARGET_SETS = {"qkv": ["qkv"], "mlp": ["fc1", "fc2"], "all": ["qkv", "proj", "fc1", "fc2"]}

CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "RECAST": lambda targets: RecastConfig(target_modules=targets),
    "RECAST n=1": lambda targets: RecastConfig(target_modules=targets, num_templates=1),
    "LoRA r=8": lambda targets: LoraConfig(target_modules=targets, r=8),
    "DoRA r=8": lambda targets: LoraConfig(target_modules=targets, r=8, use_dora=True),
    "VeRA r=256": lambda targets: VeraConfig(target_modules=targets, r=256),
    "TinyLoRA u=2": lambda targets: TinyLoraConfig(target_modules=targets, u=2),
    "IA3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[t for t in targets if t == "fc2"]),
    "LN tuning": lambda targets: LNTuningConfig(target_modules=r".*\.norm[12]|norm"),
}
FULL = "full fine-tuning"


def backbone(name: str = MODEL) -> nn.Module:
    """A timm model with random weights; neither time nor memory depends on their values."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0)


def adapted(method: str, targets: list[str], name: str = MODEL) -> nn.Module:
    """A fresh model with a method on it."""
    return backbone(name) if method == FULL else get_peft_model(backbone(name), CONFIGS[method](targets))
