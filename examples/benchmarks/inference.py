"""A forward pass with an active task beside the plain model and PEFT's methods: live and merged.

    python examples/benchmarks/inference.py                      # ViT-Small at 224, batch 1 and 8, qkv, then fc1 + fc2
    python examples/benchmarks/inference.py --targets qkv --batches 1 --rounds 40

live    weights are composed in every call (of the others: whatever the method computes beside the layer)
merged  after ``merge_adapter()``
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch
from rivals import MODEL, ON_BIASES, QUICK, TARGET_SETS, adapted, backbone, images, randomise
from timing import Row, Tables, add_device, arguments, captured, compare, finish, in_precision, start, where
from torch import nn

OURS = ["RECAST", "RECAST, group_size=1", "RECAST, 8 directions", ON_BIASES]
LIVE = [*OURS, "LoRA r=8", "DoRA r=8", "VeRA r=256", "TinyLoRA u=2", "IA3"]
MERGED = ["RECAST", ON_BIASES, "LoRA r=8"]


def variants(targets: list[str], x: torch.Tensor, options: Namespace) -> dict[str, Callable[[], Any]]:
    """Every forward pass by its name, the plain one first."""

    def ready(model: nn.Module) -> Callable[[], Any]:
        randomise(model)
        call = in_precision(model.eval(), options)
        return lambda: call(x)

    def chosen(names: list[str]) -> list[str]:
        return [name for name in names if options.methods is None or name in options.methods]

    name = options.model
    calls: dict[str, Callable[[], Any]] = {"plain": ready(backbone(name))}
    for method in chosen(LIVE):
        calls[f"{method}, live"] = ready(adapted(method, targets, name))
    for method in chosen(MERGED):
        model = adapted(method, targets, name)
        calls[f"{method}, merged"] = ready(model)
        model.merge_adapter()  # type: ignore[operator]
    return {key: captured(call) for key, call in calls.items()} if options.graphs else calls


@torch.no_grad()
def measure(targets: list[str], x: torch.Tensor, options: Namespace) -> list[Row]:
    """One row a variant: milliseconds, and the ratio to the plain model."""
    timed = compare(options.rounds, variants(targets, x, options), repeat=options.repeat)
    return [{"forward pass": key, "ms": t.seconds * 1e3, "ratio to plain": t.ratio} for key, t in timed.items()]


def parser() -> ArgumentParser:
    """The command line."""
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--targets", nargs="+", choices=list(TARGET_SETS), default=["qkv", "mlp"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="+", choices=LIVE, help="of the table, beside the plain model (default: all)")
    parser.add_argument("--graphs", action="store_true", help="every pass as a CUDA graph that is replayed")
    return parser


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    options = start(parser(), given)
    if options.quick:
        options.model, options.rounds = QUICK, 1
    plain = backbone(options.model)
    tables = {}
    for name in options.targets:
        for batch in options.batches:
            title = f"forward pass, {options.model}, batch {batch}, targets {' + '.join(TARGET_SETS[name])}"
            title += where(options) + (", CUDA graphs" if options.graphs else "")
            x = images(plain, batch, options.device)
            x = x.bfloat16() if options.precision == "bfloat16" else x
            tables[title] = measure(TARGET_SETS[name], x, options)
    return finish("inference", options, tables, "ratio to plain")


if __name__ == "__main__":
    main()
