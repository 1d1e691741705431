"""A training step of RECAST beside PEFT's methods on the same targets: time and peak memory.

    python examples/benchmarks/training_step.py                         # ViT-Small at 224, batch 8, qkv, then fc1 + fc2
    python examples/benchmarks/training_step.py --targets mlp --methods RECAST "LoRA r=8" --rounds 15
    python examples/benchmarks/training_step.py --device cuda --precision autocast --batch 64 --model vit_base_patch16_224
    python examples/benchmarks/training_step.py --model resnet34 --targets conv --methods RECAST "LoRA r=8"

A step is forward pass, loss, backward pass and AdamW on what the method trains. Every method takes its turn in every round;
medians of times and of ratios within a round are shown. Memory is the most that was allocated at one moment of a step above
model, optimiser state and gradients, as torch's profiler records it (temporaries inside operators count).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from memory import peak_bytes
from rivals import CONFIGS, ESTIMATED, FULL, LEAST, MODEL, ON_BIASES, QUICK, REFERENCE, TARGET_SETS, adapted, backbone, images
from timing import Row, Tables, add_device, arguments, captured, compare, finish, in_precision, start, where

METHODS = ["RECAST", *ESTIMATED, ON_BIASES, *(name for name in CONFIGS if name not in ("RECAST", "LoRA r=1"))]


def training_step(method: str, targets: list[str], x: torch.Tensor, options: Namespace) -> tuple[Callable[[], Any], int]:
    """A method's step, and the numbers that it trains."""
    model = adapted(method, targets, options.model).train()
    call = in_precision(model, options)
    if options.compile:
        call = torch.compile(call)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, capturable=options.graphs)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        call(x).float().square().mean().backward()
        optimizer.step()

    return step, sum(p.numel() for p in parameters)


def measure(targets: list[str], x: torch.Tensor, options: Namespace) -> list[Row]:
    """One row a method: numbers trained, milliseconds and MiB of a step, and both as ratios to the reference."""
    methods = options.methods
    steps = {method: training_step(method, targets, x, options) for method in methods}
    base = REFERENCE if REFERENCE in methods else methods[0]
    timed = {method: captured(step) if options.graphs else step for method, (step, _) in steps.items()}
    times = compare(options.rounds, timed, base, options.repeat)
    peaks = {method: peak_bytes(step, options.device) for method, (step, _) in steps.items()}
    return [
        {
            "method": method,
            "numbers": steps[method][1],
            "ms": times[method].seconds * 1e3,
            "time ratio": times[method].ratio,
            "MiB": peaks[method] / 2**20,
            "memory ratio": peaks[method] / peaks[base],
        }
        for method in methods
    ]


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--targets", nargs="+", choices=list(TARGET_SETS), default=["qkv", "mlp"])
    parser.add_argument(
        "--methods", nargs="+", choices=[*CONFIGS, *ESTIMATED, ON_BIASES, LEAST, FULL], default=[*METHODS, LEAST, FULL]
    )
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--graphs", action="store_true", help="every step as a CUDA graph that is replayed")
    parser.add_argument("--compile", action="store_true", help="every model by torch.compile")
    options = start(parser, given)
    if options.quick:
        options.model, options.batch, options.rounds = QUICK, 2, 1
    x = images(backbone(options.model), options.batch, options.device)
    if options.precision == "bfloat16":
        x = x.bfloat16()
    how = where(options) + (", compiled" if options.compile else "") + (", CUDA graphs" if options.graphs else "")
    tables = {
        f"training step, {options.model}, batch {options.batch}, targets {' + '.join(TARGET_SETS[name])}{how}": measure(
            TARGET_SETS[name], x, options
        )
        for name in options.targets
    }
    return finish("training_step", options, tables, "time ratio")


if __name__ == "__main__":
    main()
