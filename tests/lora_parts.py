"""LoRA parts of tasks for tests."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn


def lora(**fields: Any) -> LoraConfig:
    """A LoRA part of rank 2 whose factor is 3."""
    return LoraConfig(**{"r": 2, "lora_alpha": 6, **fields})


def lora_parameters(model: nn.Module, name: str = "task") -> dict[str, nn.Parameter]:
    """The LoRA parameters of a task by their names in the model."""
    return {k: p for k, p in model.named_parameters() if ".lora_" in k and f".{name}" in k}
