"""The methods that the benchmarks compare: RECAST beside those of PEFT, each at its natural size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, TinyLoraConfig, VeraConfig, get_peft_model
from torch import nn

from recast_peft import BiasConfig, RecastConfig, StoredBank, grow_bias_bank

REFERENCE = "LoRA r=8"
MODEL = "vit_small_patch16_224"
TARGET_SETS = {
    "qkv": ["qkv"],
    "mlp": ["fc1", "fc2"],
    "all": ["qkv", "proj", "fc1", "fc2"],
    "conv": ["conv1", "conv2"],  # of a ResNet
}

CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "RECAST": lambda targets: RecastConfig(target_modules=targets),
    "RECAST, group_size=1": lambda targets: RecastConfig(target_modules=targets, group_size=1),
    "RECAST, 8 directions": lambda targets: RecastConfig(target_modules=targets, num_directions=8),
    "LoRA r=1": lambda targets: LoraConfig(target_modules=targets, r=1),
    "LoRA r=8": lambda targets: LoraConfig(target_modules=targets, r=8),
    "DoRA r=8": lambda targets: LoraConfig(target_modules=targets, r=8, use_dora=True),
    "VeRA r=256": lambda targets: VeraConfig(target_modules=targets, r=256, save_projection=False),
    "TinyLoRA u=2": lambda targets: TinyLoraConfig(target_modules=targets, u=2, save_projection=False),
    "IA3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[t for t in targets if t == "fc2"]),
    "LN tuning": lambda targets: LNTuningConfig(target_modules=r".*\.norm[12]|norm"),
}
ESTIMATED: dict[str, Callable[[list[str]], Any]] = {
    "RECAST, exact gradient": lambda targets: RecastConfig(target_modules=targets, coefficient_gradient="exact"),
    "RECAST, bfloat16 gradient": lambda targets: RecastConfig(target_modules=targets, coefficient_gradient="bfloat16"),
}
"""RECAST with gradients of its coefficients that cost less; it differs from "RECAST" in training alone."""

FULL = "full fine-tuning"
LEAST = "the first block's first bias"
"""A gradient through the whole frozen model, and next to nothing learned: what no method can be cheaper than."""
ON_BIASES = "RECAST, own weights, bank of biases"
"""A scale for each target and four templates of biases for each block: what gains most with few numbers."""


QUICK = "test_vit"  # of timm: two blocks of width 64


def backbone(name: str = MODEL, classes: int = 0) -> nn.Module:
    """A timm model with random weights; neither time nor memory depends on their values."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=classes, **({"depth": 2} if name == QUICK else {}))


def images(model: nn.Module, batch: int, device: str = "cpu") -> torch.Tensor:
    """Random images of the size that a timm model takes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *model.pretrained_cfg["input_size"], generator=generator).to(device)  # type: ignore[index, misc]


@cache
def bias_bank(name: str, templates: int = 4) -> StoredBank:
    """A bank of biases of a timm model, from sources that moved them at random."""
    sources = []
    for seed in range(templates):
        generator = torch.Generator().manual_seed(seed)
        plain = {key: p.detach() for key, p in backbone(name).named_parameters() if key.endswith("bias")}
        sources.append({key: p + 0.01 * torch.randn(p.shape, generator=generator) for key, p in plain.items()})
    return grow_bias_bank(backbone(name), sources)


def adapted(method: str, targets: list[str], name: str = MODEL) -> nn.Module:
    """A fresh model with a method on it."""
    if method == FULL:
        return backbone(name)
    if method == LEAST:
        model = backbone(name).requires_grad_(False)
        next(p for key, p in model.named_parameters() if ".0." in key and key.endswith("bias")).requires_grad_()
        return model
    if method == ON_BIASES:
        partners = [BiasConfig(bank=bias_bank(name))]
        return get_peft_model(backbone(name), RecastConfig(target_modules=targets, group_size=1, partners=partners))
    return get_peft_model(backbone(name), {**CONFIGS, **ESTIMATED}[method](targets))


def randomise(model: nn.Module, adapter: str | None = None) -> None:
    """Give the parameters that a method trains other values than those it starts from, so that it changes what is computed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (adapter is None or adapter in name):
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
