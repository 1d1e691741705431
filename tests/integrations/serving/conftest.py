"""A folder of tasks in service, and a sample."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from served import CLASSES, backbone, save_task
from torch import Tensor

from recast_peft import RecastConfig, TaskPool, get_recast_model
from recast_peft.integrations.serving import TaskStore


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate(CLASSES):
        save_task(folder / "first", name, seed)
        save_task(folder / "second", name, seed + 10)
    return folder


@pytest.fixture
def store(saved, tmp_path) -> TaskStore:
    shutil.copytree(saved / "first", tmp_path / "live")
    pool = TaskPool(get_recast_model(backbone(), RecastConfig(target_modules=["qkv"]), "layout").eval())
    pool.deactivate()
    made = TaskStore(tmp_path / "live", pool)
    assert made.refresh() == sorted(CLASSES)
    return made


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 160, 160, generator=torch.Generator().manual_seed(1))
