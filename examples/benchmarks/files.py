"""What a task costs to store and to hold: bytes on disk, bytes in memory, time to load.

    python examples/benchmarks/files.py

Of every method one task for the same targets is saved with ``save_pretrained``; the second table has 10,000 tasks in a pool.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import get_peft_model
from rivals import CONFIGS, MODEL, QUICK, REFERENCE, backbone
from swaps import TARGETS, pool_with
from timing import Row, Tables, arguments, finish, seconds, start


def saved(name: str) -> list[Row]:
    """Numbers, and bytes of the saved weights, of each method."""
    rows = []
    for method, config in CONFIGS.items():
        model = get_peft_model(backbone(name), config(TARGETS))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        rows.append((method, sum(p.numel() for p in model.parameters() if p.requires_grad), size))
    base = next(size for method, _, size in rows if method == REFERENCE)
    return [{"method": m, "numbers": numbers, "bytes": size, "share of LoRA r=8": size / base} for m, numbers, size in rows]


def resident(name: str, tasks: int) -> list[Row]:
    """Tasks in a pool: bytes of a task in its file and in memory, and the time to load all of them."""
    pool, empty = pool_with(tasks, name), pool_with(0, name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.safetensors"
        pool.save(path)
        size = path.stat().st_size
        loading = seconds(lambda: empty.load(path))
    return [
        {
            "tasks": tasks,
            "bytes a task, in the file": size / tasks,
            "bytes a task, in memory": pool.nbytes() / tasks,
            "seconds to load all": loading,
        }
    ]


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    options = start(arguments(__doc__), given)
    name = QUICK if options.quick else MODEL
    tables = {
        f"one saved task, {name}, targets qkv": saved(name),
        f"tasks in a pool, {name}, targets qkv": resident(name, 100 if options.quick else 10_000),
    }
    return finish("files", options, tables, "bytes")


if __name__ == "__main__":
    main()
