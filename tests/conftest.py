"""What all tests share: one thread, fixed seeds, no network, no waiting for the disk, little searching for garbage."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hub_server import HubServer, connect
from hypothesis import HealthCheck, settings
from models import seed_cpu

FSYNC, HAS_CUDA = os.fsync, torch.cuda.is_available()
torch.set_num_threads(1)
settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("deterministic")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look through it again after every few thousand new objects."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_cpu(0)
    if HAS_CUDA:
        torch.cuda.manual_seed_all(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A save waits for the disk a dozen times; ``tests/storage`` looks at that."""
    os.fsync = FSYNC if "storage" in item.path.parts else lambda handle: None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on this machine, which huggingface_hub asks instead of the real one."""
    with HubServer().running() as server:
        connect(server, monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture
def pushed(hub: HubServer) -> HubServer:
    """A Hub that holds one task, ``ada/flowers``."""
    from hub_tasks import make_model

    from recast_peft import push_task_to_hub

    push_task_to_hub(make_model("default"), "ada/flowers")
    return hub
