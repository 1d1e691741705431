"""A tiny Llama with a task, to be trained by hand."""

from __future__ import annotations

from typing import Any

import torch
from models import randomise
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from recast_peft import RecastConfig, get_recast_model

IDS = torch.stack([torch.arange(8), torch.arange(8) * 3 % 31])  # one row for each process


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=4, initializer_range=0.2, **sizes))


def task_config(group_size: int | None = 2, **config: Any) -> RecastConfig:
    return RecastConfig(**{"target_modules": "all-mlp", "group_size": group_size, **config})


def converted(**config: Any) -> Any:
    model = get_recast_model(llama(), task_config(**config), "task")
    randomise(model, "task", size=0.1)
    return model


def train(model: nn.Module, ids: Tensor, steps: int = 3) -> list[float]:
    """The losses of some steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits
