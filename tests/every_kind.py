"""A model of every kind of module that can be wrapped, plain and converted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import KINDS, seeded
from torch import nn

from recast_peft import RecastConfig, get_recast_model


def build(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[nn.Module, Any, torch.Tensor]:
    """A plain model of a kind, the same model converted, and an input."""
    row = KINDS[kind]
    plain = seeded(row.build).to(dtype)
    inputs = row.inputs()
    model = get_recast_model(copy.deepcopy(plain), RecastConfig(target_modules=row.targets, **row.config, **config)).eval()
    return plain, model, inputs.to(dtype) if inputs.is_floating_point() else inputs
