"""Tasks on a small classifier of pictures, to be pushed to a Hub and fetched from it."""

from __future__ import annotations

import re
from typing import Any

import torch
import yaml
from hub_server import HubServer
from models import move
from peft import PeftModel
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from recast_peft import RecastConfig, get_recast_model

TASK_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make_backbone(seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5))


def learn(model: PeftModel, name: str, seed: int) -> None:
    """Give a task numbers of its own."""
    move(model, f".{name}.", seed, size=0.3)


def make_model(*names: str, config: RecastConfig | None = None) -> PeftModel:
    model = get_recast_model(make_backbone(), config or RecastConfig(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, RecastConfig())
    for seed, name in enumerate(names):
        learn(model, name, seed)
    return model.eval()


def output(model: nn.Module, task: str | None = None) -> torch.Tensor:
    if task is not None:
        model.set_adapter(task)
    with torch.no_grad():
        return model(pixel_values=PIXELS).logits


def metadata(card: bytes | str) -> dict[str, Any]:
    text = card.decode() if isinstance(card, bytes) else card
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.DOTALL)[1])


def files_of(hub: HubServer, name: str, revision: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.repositories[name].find(revision).files.items() if path[0] != "."}


def hub_commit(hub: HubServer, name: str) -> str:
    return hub.repositories[name].branches["main"]
