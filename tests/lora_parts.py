"""LoRA parts of tasks for tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import outputs, randomise, reference_model, tiny_vit
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from recast_peft import RecastConfig, get_recast_model


def lora(**fields: Any) -> LoraConfig:
    """A LoRA part of rank 2 whose factor is 3."""
    return LoraConfig(**{"r": 2, "lora_alpha": 6, **fields})


def lora_parameters(model: nn.Module, name: str = "task") -> dict[str, nn.Parameter]:
    """The LoRA parameters of a task by their names in the model."""
    return {k: p for k, p in model.named_parameters() if ".lora_" in k and f".{name}" in k}


TARGETS = {
    "the same": None,
    "some of them": ["qkv"],
    "others": ["fc1"],
    "around and beside": ["proj", "fc2"],
}


def two_parts(name: str = "task", depth: int = 4, **fields: Any) -> PeftModel:
    """A tiny vision transformer with one task of two parts that both do something."""
    config = RecastConfig(target_modules=["qkv", "proj"], lora_config=lora(**fields))
    model = get_recast_model(tiny_vit(depth=depth), config, name).eval()
    fill(model, name)
    return model


def fill(model: nn.Module, name: str = "task", seed: int = 3) -> None:
    randomise(model, name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_lora_by_hand(plain: nn.Module, model: PeftModel, scale: float = 3.0, name: str = "task") -> nn.Module:
    """Adds scale * B A to the weights of a plain model, by the names in the task's keys."""
    parts = {k.partition(f".{name}")[0]: p.detach() for k, p in lora_parameters(model, name).items()}
    result = copy.deepcopy(plain)
    for key, b in parts.items():
        if key.endswith("lora_B"):
            module = key.removesuffix(".lora_B").removeprefix("base_model.model.").replace(".base_layer", "")
            with torch.no_grad():
                result.get_submodule(module).weight += scale * b @ parts[key.removesuffix("B") + "A"]
    return result


def expected(model: PeftModel, x: Tensor, name: str = "task") -> Tensor:
    """W + sum d T + scale B A, by plain arithmetic."""
    return outputs(with_lora_by_hand(reference_model(tiny_vit(), model, (name,)), model, name=name), x)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
