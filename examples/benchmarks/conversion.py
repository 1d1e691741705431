"""What a conversion costs, and how it grows with the model: ViT-Tiny to 1.1 billion parameters.

    python examples/benchmarks/conversion.py
    python examples/benchmarks/conversion.py --models vit_tiny_patch16_224 vit_large_patch16_224

All linear layers in groups of 2: exact banks (n = 2), compressed banks (n = 1, closed form), and PEFT's LoRA r=8 on the same
layers. Memory is the peak of the process's resident set during the conversion above what it was just before. The vision
transformers are timm's in float32, the largest model has LLaMA's shape and is in bfloat16; weights are random.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from large_model import GIB, PeakMemory, build
from peft import LoraConfig, get_peft_model
from rivals import QUICK, backbone
from timing import Row, Tables, arguments, finish, seconds, start
from torch import nn

from recast_peft import RecastConfig
from recast_peft.planning.candidates import total_bytes

LARGEST = "llama-shaped"
VITS = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")]
CONFIGS: dict[str, Callable[[], Any]] = {
    "RECAST, exact (n = 2)": lambda: RecastConfig(target_modules="all-linear", group_size=2),
    "RECAST, compressed (n = 1)": lambda: RecastConfig(target_modules="all-linear", group_size=2, num_templates=1),
    "LoRA r=8": lambda: LoraConfig(target_modules="all-linear", r=8),
}


def model_of(name: str, layers: int, width: int) -> nn.Module:
    """The model by its name."""
    return build(layers, width, torch.bfloat16) if name == LARGEST else backbone(name)


def measure(name: str, layers: int, width: int) -> list[Row]:
    """One row a method: seconds, peak memory above the model, and the model before and after."""
    rows = []
    original = model_of(name, layers, width)
    count = sum(p.numel() for p in original.parameters())
    for method, config in CONFIGS.items():
        model = copy.deepcopy(original)
        before = total_bytes(model)
        done: list[nn.Module] = []
        with PeakMemory() as memory:
            taken = seconds(lambda done=done, model=model, config=config: done.append(get_peft_model(model, config())))
        rows.append(
            {
                "conversion": method,
                "million parameters": count / 1e6,
                "seconds": taken,
                "seconds a billion": taken / count * 1e9,
                "peak above GiB": memory.above / GIB,
                "model GiB": before / GIB,
                "after GiB": total_bytes(done[0]) / GIB,
            }
        )
        del model, done
        gc.collect()
    return rows


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=[*VITS, LARGEST], default=[*VITS, LARGEST])
    parser.add_argument("--layers", type=int, default=15, help="of the largest model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="of the largest model (default: %(default)s)")
    options = start(parser, given)
    if options.quick:
        options.models, options.layers, options.width = [QUICK, LARGEST], 2, 64
    for config in CONFIGS.values():  # what the first conversion of a process loads is no model's cost
        get_peft_model(backbone(QUICK), config())
    tables = {f"conversion, {name}, all linear layers": measure(name, options.layers, options.width) for name in options.models}
    return finish("conversion", options, tables, "seconds")


if __name__ == "__main__":
    main()
