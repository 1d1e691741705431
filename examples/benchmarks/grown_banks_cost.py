"""What a batch of 16 tasks costs on low-rank templates: the forward pass beside the plain model's, in one run.

    python examples/benchmarks/grown_banks_cost.py                      # ViT-Small at 224, qkv, 16 samples of 16 tasks
    python examples/benchmarks/grown_banks_cost.py --rounds 15 --json cost.json

Beside banks of low-rank templates, alone and with the module's pretrained weight as one more template, stand the plain bank in
groups of two, dense templates, and PEFT's LoRA with 16 adapters in one batch. All take turns in every round, and medians are
compared. Nothing that is measured depends on the values of weights and templates: both are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from peft import LoraConfig, get_peft_model
from timing import machine, paired, table, write
from torch import nn

from recast_peft import RecastConfig, StoredBank, TaskPool, get_recast_model, random_bank

MODEL = "vit_small_patch16_224"
TARGETS = ["qkv"]
SAMPLES = 16


def backbone(name: str) -> nn.Module:
    """The plain model with random weights."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0).eval()


def bank(model: nn.Module, templates: int, rank: int | None, plain: bool = False) -> StoredBank:
    """Templates of every module for itself."""
    config = RecastConfig(target_modules=TARGETS, group_size=1)
    return random_bank(model, config, num_templates=templates, rank=rank, plain_templates=plain)


def recast_step(model: nn.Module, config: RecastConfig, x: torch.Tensor) -> tuple[Callable[[], Any], int]:
    """The forward pass of a batch in which every sample has its own task, and the numbers of a task."""
    pool = TaskPool(get_recast_model(model, config, "first").eval())
    for i in range(SAMPLES):
        pool.add(f"task-{i}")
    with torch.no_grad():
        pool.table[:SAMPLES].normal_(std=0.1)
    ids = torch.arange(SAMPLES)
    return lambda: pool.model(x, task_ids=ids), pool.numbers_per_task


def lora_step(plain: nn.Module, rank: int, x: torch.Tensor) -> tuple[Callable[[], Any], int]:
    """The same with adapters of PEFT's LoRA."""
    config = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(plain, config, "task-0")
    for i in range(1, SAMPLES):
        model.add_adapter(f"task-{i}", config)
    names = [f"task-{i}" for i in range(SAMPLES)]
    model.eval()
    numbers = sum(p.numel() for n, p in model.named_parameters() if ".task-0." in n)
    return lambda: model(x, adapter_names=names), numbers


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plain = backbone(options.model)
    x = torch.randn(SAMPLES, *timm.data.resolve_model_data_config(plain)["input_size"])
    configs = {
        "4 templates of rank 4": RecastConfig(bank=bank(plain, 4, 4)),
        "4 templates of rank 4 and the weight": RecastConfig(bank=bank(plain, 4, 4, plain=True)),
        "8 templates of rank 8": RecastConfig(bank=bank(plain, 8, 8)),
        "4 dense templates": RecastConfig(bank=bank(plain, 4, None)),
        "plain bank, groups of 2": RecastConfig(target_modules=TARGETS),
    }
    steps: dict[str, tuple[Callable[[], Any], int]] = {"plain model, no tasks": (lambda: plain(x), 0)}
    steps.update({name: recast_step(backbone(options.model), config, x) for name, config in configs.items()})
    steps["PEFT LoRA r=4"] = lora_step(backbone(options.model), 4, x)
    with torch.no_grad():
        times = paired(options.rounds, *(step for step, _ in steps.values()))
    rows = [
        {"batch of 16 tasks": name, "numbers of a task": numbers, "ms": 1e3 * time, "ratio": time / times[0]}
        for time, (name, (_, numbers)) in zip(times, steps.items(), strict=True)
    ]
    print(machine())
    print(table(rows))
    write(options.json, {"rows": rows})
    return rows


if __name__ == "__main__":
    main()
