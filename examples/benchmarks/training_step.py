"""A training step of RECAST beside PEFT's methods on the same targets: time and peak memory.

    python examples/benchmarks/training_step.py                         # ViT-Small at 224, batch 8, qkv, then fc1 + fc2
    python examples/benchmarks/training_step.py --targets mlp --methods RECAST "LoRA r=8" --rounds 15

A step is forward pass, loss, backward pass and AdamW on what the method trains. Every method takes its turn in every round and
medians are compared. Memory is the most that was allocated at one moment of a step above model, optimiser state and gradients,
as torch's profiler records it (temporaries inside operators count).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import peak_bytes
from rivals import CONFIGS, FULL, MODEL, REFERENCE, TARGET_SETS, adapted
from timing import machine, paired, table, write


def training_step(method: str, targets: list[str], x: torch.Tensor, name: str) -> tuple[Callable[[], Any], int]:
    """A method's step, and the numbers that it trains."""
    model = adapted(method, targets, name).to(x.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    return step, sum(p.numel() for p in parameters)


def compare(methods: list[str], targets: list[str], x: torch.Tensor, rounds: int, name: str = MODEL) -> list[dict[str, Any]]:
    """One row a method: numbers trained, milliseconds and MiB of a step, and both as ratios to the reference."""
    steps, numbers = zip(*(training_step(method, targets, x, name) for method in methods), strict=True)
    times = paired(rounds, *steps)
    peaks = [peak_bytes(step) for step in steps]
    base = methods.index(REFERENCE) if REFERENCE in methods else 0
    return [
        {
            "method": method,
            "numbers": numbers[i],
            "ms": times[i] * 1e3,
            "time ratio": times[i] / times[base],
            "MiB": peaks[i] / 2**20,
            "memory ratio": peaks[i] / peaks[base],
        }
        for i, method in enumerate(methods)
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGET_SETS), default=["qkv", "mlp"])
    parser.add_argument("--methods", nargs="+", choices=[*CONFIGS, FULL], default=[*CONFIGS, FULL])
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of the images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.batch, 3, options.size, options.size, device="cuda" if torch.cuda.is_available() else "cpu")
    print(machine())
    results = {}
    for name in options.targets:
        print(f"\ntraining step, {options.model}, batch {options.batch}, targets {' + '.join(TARGET_SETS[name])}")
        results[name] = compare(options.methods, TARGET_SETS[name], x, options.rounds, options.model)
        print(table(results[name]))
    write(options.json, results)
    if options.picture:
        draw(results, options.picture)
    return results


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time against memory, both beside LoRA's: down and left is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(results), 4.0), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        axes.scatter([row["time ratio"] for row in rows], [row["memory ratio"] for row in rows])
        for row in rows:
            axes.annotate(row["method"], (row["time ratio"], row["memory ratio"]), fontsize=7)
        axes.axhline(1, lw=0.5, color="grey")
        axes.axvline(1, lw=0.5, color="grey")
        axes.set(title=f"training step, targets {name}", xlabel=f"time / {REFERENCE}", ylabel=f"peak memory / {REFERENCE}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
