"""Training on two processes gives what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import converted, vit_input
from peft import PeftModel
from processes import start_two
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
STEPS = 3
CONFIGS: list[dict[str, Any]] = [
    {},
    {"num_templates": 1},
    {"num_directions": 2},
    {"modules_to_save": ["head"], "num_coefficient_sets": 2},
]


def build(config: dict[str, Any]) -> PeftModel:
    return converted(target_modules=["qkv", "fc1"], depth=2, **config).train()


def train(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        optimiser.zero_grad()
        F.mse_loss(model(inputs), target).backward()
        optimiser.step()


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        inputs, target = vit_input(4), torch.linspace(-1, 1, 12).reshape(4, 3)
        half = slice(2 * rank, 2 * rank + 2)
        for number, config in enumerate(CONFIGS):
            model = build(config)
            train(DistributedDataParallel(model), inputs[half], target[half])
            torch.save(trained(model), f"{folder}/{number}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes trained, every config in one start of them."""
    folder = tmp_path_factory.mktemp("distributed")
    start_two(work, folder)
    return folder


@pytest.mark.parametrize("number", range(len(CONFIGS)), ids=[str(config) for config in CONFIGS])
def test_two_processes_learn_what_one_learns(results: Path, number: int) -> None:
    model = build(CONFIGS[number])
    start = trained(model)
    train(model, vit_input(4), torch.linspace(-1, 1, 12).reshape(4, 3))
    expected = trained(model)
    first, second = (torch.load(results / f"{number}-{rank}.pt") for rank in range(2))
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(first[name], second[name])
        assert not torch.equal(value, start[name])
