"""Many tasks in one batch: every sample with its own task, beside the plain forward pass.

    python examples/benchmarks/mixed_batch.py                    # 16 samples with 1, 4 and 16 tasks, ViT-Small, qkv

A pool gives each sample its task by ``task_ids``; adapters of PEFT (RECAST tasks or LoRA) by ``adapter_names``. The alternative
to both is one pass for each task with its share of the samples.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from rivals import CONFIGS, MODEL, QUICK, backbone, images
from swaps import TARGETS, pool_with
from timing import Row, Tables, add_device, arguments, compare, finish, in_precision, start, where
from torch import Tensor, nn


def adapters(method: str, tasks: int, name: str) -> nn.Module:
    """A model with that many adapters of a method."""
    model = get_peft_model(backbone(name), CONFIGS[method](TARGETS), "adapter_0")
    for i in range(1, tasks):
        model.add_adapter(f"adapter_{i}", CONFIGS[method](TARGETS))
    return model.eval()


@torch.no_grad()
def measure(x: Tensor, tasks: int, options: Namespace) -> list[Row]:
    """One row for each way of giving every sample its task."""
    name = options.model
    plain = in_precision(backbone(name).eval(), options)
    pool = pool_with(tasks, name)
    pooled = in_precision(pool.model, options)
    lora = in_precision(adapters("LoRA r=8", tasks, name), options)
    ids = torch.arange(len(x)) % tasks
    rows = [(ids == i).nonzero().squeeze(1).to(x.device) for i in range(tasks)]
    names = [f"adapter_{i}" for i in ids.tolist()]

    def one_after_the_other() -> None:
        for i in range(tasks):
            pool.activate(f"task-{i}")
            pooled(x[rows[i]])
        pool.deactivate()

    calls: dict[str, Callable[[], Any]] = {
        "plain model": lambda: plain(x),
        "RECAST pool, task_ids": lambda: pooled(x, task_ids=ids),
        "RECAST pool, one pass a task": one_after_the_other,
        "LoRA r=8, adapter_names": lambda: lora(x, adapter_names=names),
    }
    timed = compare(options.rounds, calls, repeat=options.repeat)
    return [{"batch": what, "ms": t.seconds * 1e3, "ratio to plain": t.ratio} for what, t in timed.items()]


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    options = start(parser, given)
    if options.quick:
        options.model, options.samples, options.rounds = QUICK, 4, 1
    x = images(backbone(options.model), options.samples, options.device)
    x = x.bfloat16() if options.precision == "bfloat16" else x
    tables = {
        f"{len(x)} samples with {tasks} task(s), {options.model}, targets qkv{where(options)}": measure(x, tasks, options)
        for tasks in options.tasks
        if tasks <= len(x)
    }
    return finish("mixed_batch", options, tables, "ratio to plain")


if __name__ == "__main__":
    main()
