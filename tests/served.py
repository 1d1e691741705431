"""A small backbone and three tasks on it, to be served."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import timm
import torch
from models import move
from torch import Tensor, nn

from recast_peft import RecastConfig, TaskPool, get_recast_model

CLASSES = {"cats": ("lion", "tiger", "lynx"), "dogs": ("pug", "husky"), "cars": None}


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=4).eval()


def save_task(folder: Path, name: str, seed: int) -> None:
    labels = CLASSES.get(name)
    own = {} if labels is None else {"id2label": dict(enumerate(labels))}
    model = get_recast_model(backbone(), RecastConfig(target_modules=["qkv"], **own), name)
    move(model, f".{name}", seed, size=0.3)
    model.save_pretrained(folder)


@torch.no_grad()
def alone(pool: TaskPool, task: str | None, image: Tensor) -> Tensor:
    return pool.model(image[None], task_ids=[task])[0]


def packed(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"{folder.name}/{path.name}")
    return content.getvalue()
