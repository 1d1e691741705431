"""What a batch of 16 tasks costs on low-rank templates: the forward pass beside the plain model's.

    python examples/benchmarks/grown_banks_cost.py                    # ViT-Small, qkv, 16 samples of 16 tasks

Beside banks of low-rank templates, alone and with the module's pretrained weight as one more template, stand the plain bank in
groups of two, dense templates, and PEFT's LoRA with 16 adapters in one batch. Nothing that is measured depends on the values of
weights and templates: both are random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rivals import MODEL, QUICK, backbone, images
from timing import Row, Tables, arguments, compare, finish, start
from torch import Tensor

from recast_peft import RecastConfig, TaskPool, get_recast_model, random_bank

TARGETS = ["qkv"]
SAMPLES = 16


def on_templates(name: str, templates: int, rank: int | None, plain: bool = False) -> RecastConfig:
    """A task on templates that every module has for itself."""
    config = RecastConfig(target_modules=TARGETS, group_size=1)
    bank = random_bank(backbone(name), config, num_templates=templates, rank=rank, plain_templates=plain)
    return RecastConfig(bank=bank)


def recast_step(name: str, config: RecastConfig, x: Tensor) -> tuple[Callable[[], Any], int]:
    """The forward pass of a batch in which every sample has its own task, and the numbers of a task."""
    pool = TaskPool(get_recast_model(backbone(name), config, "first").eval())
    for i in range(SAMPLES):
        pool.add(f"task-{i}")
    with torch.no_grad():
        pool.table[:SAMPLES].normal_(std=0.1)
    ids = torch.arange(SAMPLES)
    return lambda: pool.model(x, task_ids=ids), pool.numbers_per_task


def lora_step(name: str, rank: int, x: Tensor) -> tuple[Callable[[], Any], int]:
    """The same with adapters of PEFT's LoRA."""
    config = LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(backbone(name), config, "task-0")
    for i in range(1, SAMPLES):
        model.add_adapter(f"task-{i}", config)
    names = [f"task-{i}" for i in range(SAMPLES)]
    model.eval()
    numbers = sum(p.numel() for n, p in model.named_parameters() if ".task-0." in n)
    return lambda: model(x, adapter_names=names), numbers


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = start(parser, given)
    name = QUICK if options.quick else MODEL
    plain = backbone(name).eval()
    x = images(plain, SAMPLES, "cpu")
    configs = {
        "RECAST, 4 templates of rank 4": on_templates(name, 4, 4),
        "RECAST, 4 of rank 4 and the weight": on_templates(name, 4, 4, plain=True),
        "RECAST, 8 templates of rank 8": on_templates(name, 8, 8),
        "RECAST, 4 dense templates": on_templates(name, 4, None),
        "RECAST, plain bank, groups of 2": RecastConfig(target_modules=TARGETS),
    }
    steps: dict[str, tuple[Callable[[], Any], int]] = {"plain model, no tasks": (lambda: plain(x), 0)}
    steps.update({what: recast_step(name, config, x) for what, config in configs.items()})
    steps["LoRA r=4, adapter_names"] = lora_step(name, 4, x)
    with torch.no_grad():
        times = compare(1 if options.quick else options.rounds, {what: step for what, (step, _) in steps.items()})
    rows: list[Row] = [
        {"batch": what, "numbers of a task": steps[what][1], "ms": t.seconds * 1e3, "ratio to plain": t.ratio}
        for what, t in times.items()
    ]
    return finish(
        "grown_banks_cost", options, {f"{SAMPLES} samples of {SAMPLES} tasks, {name}, targets qkv": rows}, "ratio to plain"
    )


if __name__ == "__main__":
    main()
