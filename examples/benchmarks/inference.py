"""A forward pass with a task in force beside the plain model and PEFT's methods: live, kept and merged.

    python examples/benchmarks/inference.py                      # ViT-Small at 224, batch 1 and 8, qkv, then fc1 + fc2
    python examples/benchmarks/inference.py --targets qkv --batches 1 --rounds 40

live    weights are composed in every call (of the others: whatever the method computes beside the layer)
cached  RECAST inside ``with model.cached_weights():``
merged  after ``merge_adapter()``
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from rivals import MODEL, ON_BIASES, QUICK, TARGET_SETS, adapted, backbone, images, randomise
from timing import Row, Tables, add_device, arguments, compare, finish, start
from torch import nn

LIVE = ["RECAST", ON_BIASES, "LoRA r=8", "DoRA r=8", "VeRA r=256", "TinyLoRA u=2", "IA3"]
MERGED = ["RECAST", ON_BIASES, "LoRA r=8"]


def variants(targets: list[str], x: torch.Tensor, name: str, blocks: ExitStack) -> dict[str, Callable[[], Any]]:
    """Every forward pass by its name, the plain one first; ``blocks`` holds the block in which weights are cached."""

    def ready(model: nn.Module) -> nn.Module:
        randomise(model)
        return model.to(x.device).eval()

    plain = ready(backbone(name))
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(x)}
    for method in LIVE:
        model = ready(adapted(method, targets, name))
        calls[f"{method}, live"] = lambda model=model: model(x)  # type: ignore[misc]
    kept = ready(adapted("RECAST", targets, name))
    blocks.enter_context(kept.cached_weights())  # type: ignore[operator]
    calls["RECAST, cached"] = lambda: kept(x)
    for method in MERGED:
        model = ready(adapted(method, targets, name))
        model.merge_adapter()  # type: ignore[operator]
        calls[f"{method}, merged"] = lambda model=model: model(x)  # type: ignore[misc]
    return calls


@torch.no_grad()
def measure(targets: list[str], x: torch.Tensor, rounds: int, name: str) -> list[Row]:
    """One row a variant: milliseconds, and the ratio to the plain model."""
    with ExitStack() as blocks:
        timed = compare(rounds, variants(targets, x, name, blocks))
    return [{"forward pass": key, "ms": t.seconds * 1e3, "ratio to plain": t.ratio} for key, t in timed.items()]


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--targets", nargs="+", choices=list(TARGET_SETS), default=["qkv", "mlp"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    options = start(parser, given)
    if options.quick:
        options.model, options.rounds = QUICK, 1
    plain = backbone(options.model)
    tables = {}
    for name in options.targets:
        for batch in options.batches:
            title = f"forward pass, {options.model}, batch {batch}, targets {' + '.join(TARGET_SETS[name])}"
            x = images(plain, batch, options.device)
            tables[title] = measure(TARGET_SETS[name], x, options.rounds, options.model)
    return finish("inference", options, tables, "ratio to plain")


if __name__ == "__main__":
    main()
