"""Making another task active: a pool of RECAST tasks beside PEFT's adapters.

    python examples/benchmarks/swaps.py

The first table has the time of a swap by how many tasks are held beside the model; of adapters (LoRA, IA3, RECAST tasks in no
pool) it is ``set_adapter``. The second has a merged swap, after which the model is a plain one, against copying the
targeted weights n + 1 times, as many as it reads. The third counts the compilations of a compiled model in 100 swaps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from rivals import CONFIGS, MODEL, QUICK, backbone, images
from timing import Row, Tables, arguments, compare, finish, start

from recast_peft import RecastConfig, RecastLayer, TaskPool, get_recast_model

TARGETS = ["qkv"]
HELD = (1, 100, 10_000)  # tasks of a pool
ADAPTERS = (2, 10, 100)  # adapters of PEFT


def pool_with(tasks: int, name: str = MODEL, classes: tuple[int, ...] = ()) -> TaskPool:
    """A pool of random tasks on a fresh model, with classifiers of these sizes in turn."""
    pool = TaskPool(get_recast_model(backbone(name), RecastConfig(target_modules=TARGETS), "first").eval())
    for i in range(tasks):
        size = classes[i % len(classes)] if classes else None
        pool.add(f"task-{i}", RecastConfig(target_modules=TARGETS, num_classes=size))
    with torch.no_grad():
        pool.table[:tasks].normal_(std=0.1)
    return pool


def next_of(held: int, activate: Callable[[int], Any]) -> Callable[[], Any]:
    """Activates one number after the other, from the first again after the last."""
    turn = iter(range(10**9))
    return lambda: activate(next(turn) % held)


def live(name: str, quick: bool, device: str) -> list[Row]:
    """Microseconds of a swap by what is held."""
    rows = []
    for what, classes in {"": (), ", classifiers of one size": (10,), ", of two sizes": (10, 12)}.items():
        for held in HELD[:2] if quick or classes else HELD:
            pool = pool_with(held, name, classes)
            pool.model.to(device)
            swap = next_of(held, lambda i, p=pool: p.activate(f"task-{i}"))  # type: ignore[misc]
            rows.append((f"TaskPool.activate{what}", held, compare(2 if quick else 20, {"": swap}, repeat=20)[""].seconds))
    for method in ("RECAST", "LoRA r=8", "IA3"):
        for held in ADAPTERS[:1] if quick else ADAPTERS:
            model = get_peft_model(backbone(name), CONFIGS[method](TARGETS), "adapter_0")
            for i in range(1, held):
                model.add_adapter(f"adapter_{i}", CONFIGS[method](TARGETS))
            model.to(device)
            swap = next_of(held, lambda i, m=model: m.set_adapter(f"adapter_{i}"))  # type: ignore[misc]
            rows.append((f"set_adapter, {method}", held, compare(2 if quick else 10, {"": swap}, repeat=4)[""].seconds))
    return [{"swap": what, "tasks held": held, "microseconds": taken * 1e6} for what, held, taken in rows]


def merged(name: str, quick: bool, device: str) -> list[Row]:
    """A merged swap against copying the targeted weights n + 1 times, and LoRA's way of doing the same."""
    pool = pool_with(2, name)
    pool.model.to(device)
    layers = [module for module in pool.model.modules() if isinstance(module, RecastLayer)]
    weights = [layer.pretrained_weight.detach() for layer in layers]
    targets = [torch.empty_like(w) for w in weights]

    def copies() -> None:
        for target, weight in zip(targets, weights, strict=True):
            for _ in range(3):  # n = 2 templates, and one more
                target.copy_(weight)

    lora = get_peft_model(backbone(name), CONFIGS["LoRA r=8"](TARGETS), "adapter_0").eval()
    lora.add_adapter("adapter_1", CONFIGS["LoRA r=8"](TARGETS))
    lora.to(device)

    def lora_swap(i: int) -> None:
        lora.unmerge_adapter()
        lora.merge_adapter([f"adapter_{i}"])

    lora.merge_adapter(["adapter_0"])
    timed = compare(
        2 if quick else 30,
        {
            "copying the targeted weights 3 times": copies,
            "TaskPool.activate(merge=True)": next_of(2, lambda i: pool.activate(f"task-{i}", merge=True)),
            "unmerge and merge, LoRA r=8": next_of(2, lora_swap),
        },
    )
    return [{"merged swap": what, "ms": t.seconds * 1e3, "ratio": t.ratio} for what, t in timed.items()]


def compiled(name: str, device: str) -> list[Row]:
    """Compilations in 100 swaps of a compiled model."""
    count: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        count.append(1)
        return graph.forward

    pool = copy.deepcopy(pool_with(10, name))
    pool.model.to(device)
    fast = torch.compile(pool.model.get_base_model(), backend=backend, fullgraph=True)
    x = images(pool.model.get_base_model(), 1, device)
    with torch.no_grad():
        for i in range(100):
            pool.activate(f"task-{i % 10}")
            fast(x)
    return [{"compiled model": "TaskPool.activate", "swaps": 100, "compilations": len(count)}]


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    options = start(parser, given)
    name, quick, device = QUICK if options.quick else options.model, options.quick, options.device
    place = "" if device == "cpu" else f", {device}"
    tables = {
        f"swaps, {name}, targets qkv{place}": live(name, quick, device),
        f"merged swaps, {name}, targets qkv{place}": merged(name, quick, device),
        f"compilations{place}": compiled(name, device),
    }
    return finish("swaps", options, tables, "microseconds")


if __name__ == "__main__":
    main()
