"""Backbones of timm and transformers on a Hub, and tasks on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from hub_server import HubServer, folder_content
from models import move
from peft import PeftModel
from timm.models import save_for_hf
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from recast_peft import RecastConfig, get_recast_model

BASE = "ada/base"
TASK = "ada/task"
TIMM_SIZES = {"img_size": 32, "num_classes": 5}


def make_timm(seed: int = 0, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", **{**TIMM_SIZES, **arguments}).eval()


def make_transformers(seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5)).eval()


def serve_timm(hub: HubServer, folder: Path, seed: int = 0, name: str = BASE, is_old: bool = False, **kwargs: Any) -> str:
    """Put a timm model on the server in timm's own format, or in the one that it had before safetensors."""
    save_for_hf(make_timm(seed), folder / str(seed), model_args=TIMM_SIZES, safe_serialization=not is_old)
    return hub.add(name, folder_content(folder / str(seed)), **kwargs)


def serve_transformers(hub: HubServer, folder: Path, seed: int = 0, **kwargs: Any) -> str:
    make_transformers(seed).save_pretrained(folder / str(seed))
    return hub.add(BASE, folder_content(folder / str(seed)), **kwargs)


def learned(backbone: nn.Module, /, seed: int = 7, name: str = "default", **fields: Any) -> PeftModel:
    """A task with numbers of its own."""
    model = get_recast_model(backbone, RecastConfig(**fields), adapter_name=name)
    move(model, seed=seed, size=0.3)
    return model.eval()


def output(model: nn.Module) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    size = 32 if hasattr(base, "pretrained_cfg") else 16
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result = model(pixels)
    return result if isinstance(result, torch.Tensor) else result[0]
