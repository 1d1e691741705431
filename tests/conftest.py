"""What all tests share: one thread, fixed seeds, no network, no waiting for the disk, little searching for garbage."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:  # what takes long to import is left to the processes that run tests: so they start at once
    from hub_server import HubServer

FSYNC = os.fsync
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
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@cache
def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _seed() -> None:
    from models import seed_cpu

    seed_cpu(0)
    if has_cuda():
        import torch

        torch.cuda.manual_seed_all(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A save waits for the disk a dozen times; ``tests/storage`` looks at that."""
    os.fsync = FSYNC if "storage" in item.path.parts else lambda handle: None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on this machine, which huggingface_hub asks instead of the real one."""
    from hub_server import HubServer, connect

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
