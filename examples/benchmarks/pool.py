"""Pools of tasks, measured against their rivals in one run: swaps, mixed batches, files, compilations.

    python examples/benchmarks/pool.py                  # everything, on ViT-Small with the fused qkv targeted
    python examples/benchmarks/pool.py swaps files      # some of it

swaps    time to put a task in force with 1, 100 and 10,000 tasks held, and PEFT's set_adapter with 2 to 100 LoRA adapters
merged   a merged swap against copying the targeted weights n + 1 times
mixed    a batch of 16 samples with 16 tasks against the plain forward pass
files    bytes of a saved task beside those of PEFT's small adapters, and of a task in a packed pool
compiled how often a compiled model is compiled in 100 swaps
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from peft import LoraConfig, TinyLoraConfig, VeraConfig, get_peft_model
from timing import machine, paired, seconds, write
from torch import nn

from recast_peft import RecastConfig, TaskPool, get_recast_model

TARGETS = ["qkv"]
MODEL = "vit_small_patch16_224"


def backbone() -> nn.Module:
    """ViT-Small with random weights; nothing that is measured here depends on their values."""
    torch.manual_seed(0)
    return timm.create_model(MODEL, pretrained=False, num_classes=0).eval()


def pool_with(tasks: int) -> TaskPool:
    """A pool of random tasks on a fresh model."""
    pool = TaskPool(get_recast_model(backbone(), RecastConfig(target_modules=TARGETS), "first").eval())
    for i in range(tasks):
        pool.add(f"task-{i}")
    with torch.no_grad():
        pool.table[:tasks].normal_(std=0.1)
    return pool


def swaps() -> dict[str, Any]:
    """Microseconds of a swap by the number of tasks held."""
    result: dict[str, Any] = {"pool": {}, "peft": {}}
    for held in (1, 100, 10_000):
        pool = pool_with(held)
        turn = iter(range(10**9))
        result["pool"][held] = paired(20, lambda p=pool, n=held, t=turn: p.activate(f"task-{next(t) % n}"), repeat=20)[0] * 1e6
    for held in (2, 10, 100):
        model = get_peft_model(backbone(), LoraConfig(target_modules=TARGETS), "adapter_0")
        for i in range(1, held):
            model.add_adapter(f"adapter_{i}", LoraConfig(target_modules=TARGETS))
        turn = iter(range(10**9))
        swap = lambda m=model, n=held, t=turn: m.set_adapter(f"adapter_{next(t) % n}")  # noqa: E731
        result["peft"][held] = paired(10, swap, repeat=4)[0] * 1e6
    print("a swap in microseconds, by what is held beside the model")
    for name, row in (("TaskPool.activate", result["pool"]), ("PEFT set_adapter, LoRA r=8", result["peft"])):
        print(f"  {name:28}", "  ".join(f"{held:,}: {us:,.0f}" for held, us in row.items()))
    return result


def merged() -> dict[str, Any]:
    """A merged swap against copying the targeted weights n + 1 times."""
    pool = pool_with(2)
    weights = [layer.pretrained_weight.detach() for layer in pool._layers.values()]
    targets = [torch.empty_like(w) for w in weights]
    turn = iter(range(10**9))

    def copies() -> None:
        for target, weight in zip(targets, weights, strict=True):
            for _ in range(3):  # n = 2 templates, and one more
                target.copy_(weight)

    swap, copying = paired(30, lambda: pool.activate(f"task-{next(turn) % 2}", merge=True), copies)
    ratio = f"ratio {swap / copying:.2f}"
    print(f"merged swap {swap * 1e3:.2f} ms, copying the targeted weights 3 times {copying * 1e3:.2f} ms: {ratio}")
    plain, model = backbone(), pool.model
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        after, before = paired(20, lambda: model(x), lambda: plain(x))
    print(f"forward pass with a merged task against the plain model: ratio {after / before:.3f}")
    return {"swap_ms": swap * 1e3, "copies_ms": copying * 1e3, "ratio": swap / copying, "forward_ratio": after / before}


def mixed() -> dict[str, Any]:
    """A batch of 16 samples with 16 tasks against the plain forward pass."""
    pool, plain = pool_with(16), backbone()
    x = torch.randn(16, 3, 224, 224)
    ids = torch.arange(16)
    with torch.no_grad():
        both, alone = paired(7, lambda: pool.model(x, task_ids=ids), lambda: plain(x))
    print(f"16 samples with 16 tasks {both:.2f} s, plain forward {alone:.2f} s: ratio {both / alone:.3f}")
    return {"mixed_s": both, "plain_s": alone, "ratio": both / alone}


def files() -> dict[str, Any]:
    """Bytes of one task, of each method, for the same targets."""
    configs: dict[str, Callable[[], Any]] = {
        "RECAST": lambda: RecastConfig(target_modules=TARGETS),
        "TinyLoRA u=2": lambda: TinyLoraConfig(target_modules=TARGETS, u=2),
        "LoRA r=1": lambda: LoraConfig(target_modules=TARGETS, r=1),
        "LoRA r=8": lambda: LoraConfig(target_modules=TARGETS, r=8),
        "VeRA r=256": lambda: VeraConfig(target_modules=TARGETS, r=256, save_projection=False),
    }
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            get_peft_model(backbone(), config()).save_pretrained(folder)
            sizes[name] = (Path(folder) / "adapter_model.safetensors").stat().st_size
        pool = pool_with(10_000)
        packed = Path(folder) / "pool.safetensors"
        pool.save(packed)
        sizes["RECAST in a pool"] = packed.stat().st_size / 10_000
        empty = pool_with(0)
        loading = seconds(lambda: empty.load(packed))
        print("bytes of adapter_model.safetensors for one task:", ", ".join(f"{n} {s:,.0f}" for n, s in sizes.items()))
        print(f"10,000 tasks load in {loading:.3f} s and take {pool.nbytes() / 1e6:.1f} MB")
    return {"bytes": sizes, "load_10000_s": loading, "resident_bytes": pool.nbytes()}


def compiled() -> dict[str, Any]:
    """Compilations in 100 swaps of a compiled model."""
    pool = pool_with(10)
    count: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        count.append(1)
        return graph.forward

    small = copy.deepcopy(pool)
    fast = torch.compile(small.model.get_base_model(), backend=backend, fullgraph=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for i in range(100):
            small.activate(f"task-{i % 10}")
            fast(x)
    print(f"compilations in 100 swaps: {len(count)}")
    return {"compilations": len(count)}


PARTS = {"swaps": swaps, "merged": merged, "mixed": mixed, "files": files, "compiled": compiled}


def main(arguments: list[str] | None = None) -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them if none is named")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(machine())
    write(options.json, {name: PARTS[name]() for name in options.parts or PARTS})


if __name__ == "__main__":
    main()
