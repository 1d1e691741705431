"""Small models of transformers, and tasks of their own on them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from models import move, randomise, small_transformer
from torch import Tensor, nn

IDS = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(0))

bert, gpt2, llama, t5, vit = (partial(small_transformer, kind) for kind in ("bert", "gpt2", "llama", "t5", "vit"))


def call(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**kwargs).logits


def learn(model: nn.Module, name: str, seed: int) -> None:
    """Give a task coefficients and a head of its own."""
    randomise(model, name, seed)
    move(model, f".modules_to_save.{name}.", seed, size=1.0)


def numbers(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a task owns."""
    return {
        key: parameter.detach().clone()
        for key, parameter in model.named_parameters()
        if key.endswith(f"recast_coefficients.{name}") or f".modules_to_save.{name}." in key
    }
