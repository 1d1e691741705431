"""One layer alone: the host's time of a call, and from what size on the coefficients' product is faster in bfloat16.

    python examples/benchmarks/single_layer.py

The first table has layers so small that all of their time is Python's and torch's own; it is what a GPU waits for where
models are small. The second is what ``coefficient_gradient="auto"`` goes by: a forward and backward pass of one layer with two
templates, with the exact product and with the same in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from timing import Row, Tables, arguments, compare, finish, start
from torch import Tensor, nn

from recast_peft import RecastConfig

LAYERS = 12
SHAPES = [(64, 64), (96, 384), (192, 768), (384, 1152), (768, 768), (1536, 384)]  # in x out
TOKENS = (32, 128, 512, 2048)


class Chain(nn.Module):
    """Linear layers of one shape; each is called with the input, and the outputs are added."""

    def __init__(self, layers: int, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(width, out)}) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer["fc"](x).sum() for layer in self.layers)  # type: ignore[operator, return-value]


METHODS: dict[str, Callable[[], Any]] = {
    "plain": lambda: None,
    "RECAST": lambda: RecastConfig(target_modules=["fc"]),
    "RECAST, group_size=1": lambda: RecastConfig(target_modules=["fc"], group_size=1),
    "LoRA r=2": lambda: LoraConfig(target_modules=["fc"], r=2),
    "DoRA r=2": lambda: LoraConfig(target_modules=["fc"], r=2, use_dora=True),
    "IA3": lambda: IA3Config(target_modules=["fc"], feedforward_modules=[]),
}


def host_time(rounds: int, repeat: int) -> list[Row]:
    """Microseconds a layer of a forward pass without gradients and of a training step, beside LoRA's."""
    x = torch.randn(2, 4, 8)
    calls: dict[str, Callable[[], Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for method, config in METHODS.items():
        model: Any = Chain(LAYERS, 8, 8) if config() is None else get_peft_model(Chain(LAYERS, 8, 8), config())
        calls[method] = torch.no_grad()(lambda model=model: model(x))
        steps[method] = lambda model=model: model(x).backward()  # type: ignore[misc]
    called, stepped = (compare(rounds, functions, "LoRA r=2", repeat) for functions in (calls, steps))
    return [
        {
            "layer": method,
            "call, microseconds": 1e6 * called[method].seconds / LAYERS,
            "ratio to LoRA": called[method].ratio,
            "training step, microseconds": 1e6 * stepped[method].seconds / LAYERS,
            "ratio to LoRA, step": stepped[method].ratio,
        }
        for method in METHODS
    ]


def narrow_products(shapes: list[tuple[int, int]], tokens: tuple[int, ...], rounds: int) -> list[Row]:
    """Milliseconds of forward and backward pass of one layer, by the way in which the coefficients' gradient is formed."""
    rows = []
    for width, out in shapes:
        ways = {}
        for way in ("exact", "bfloat16"):
            config = RecastConfig(target_modules=["fc"], coefficient_gradient=way)
            ways[way] = get_peft_model(Chain(2, width, out), config).train()
        for count in tokens:
            x = torch.randn(count, width, requires_grad=True)
            multiplications = count * width * out
            functions = {way: lambda model=model, x=x: model(x).backward() for way, model in ways.items()}  # type: ignore[misc]
            timed = compare(rounds, functions, "exact", max(1, min(50, 10**8 // multiplications)))
            rows.append(
                {
                    "layer": f"{width} x {out}, {count:,} tokens",
                    "million multiplications": multiplications / 1e6,
                    "exact, ms": timed["exact"].seconds * 1e3 / 2,
                    "bfloat16, ms": timed["bfloat16"].seconds * 1e3 / 2,
                    "ratio": timed["bfloat16"].ratio,
                }
            )
    return rows


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    options = start(arguments(__doc__), given)
    quick = options.quick
    tables = {
        "host time of a layer": host_time(*((1, 2) if quick else (9, 100))),
        "the coefficients' product": narrow_products(
            SHAPES[:1] if quick else SHAPES, TOKENS[:1] if quick else TOKENS, 1 if quick else 7
        ),
    }
    return finish("single_layer", options, tables, "ratio")


if __name__ == "__main__":
    main()
