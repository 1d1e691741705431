"""A fleet of tasks on one backbone: requests a second, latency and memory against the number of tasks that are held.

    python examples/benchmarks/fleet.py                          # 1 to 100,000 tasks, ViT-Small, qkv, batches of up to 32
    python examples/benchmarks/fleet.py --model test_vit --seconds 4 --output fleet

Requests name one of the tasks, drawn uniformly or by Zipf's law. Two measurements for each number of tasks:

- saturated: every batch is full; what counts is requests a second;
- open loop: requests come at random moments at one fixed rate, whatever the server does (``--load`` of what the plain model
  answers); a batch takes those that have come, up to its size; what counts is the time from coming to answer.

Beside the pool: PEFT's LoRAs with all adapters in memory and a mixed batch (``adapter_names``), and with 25 slots, of which the
one that was not used for the longest time is given up for an adapter from the disk. Pooled tasks have a classifier of ten
classes each, in half precision; the LoRAs have none.
"""

from __future__ import annotations

import bisect
import itertools
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rivals import CONFIGS, MODEL, QUICK, backbone, images
from swaps import TARGETS
from timing import Row, Tables, arguments, compare, finish, start
from torch import Tensor

from recast_peft import RecastConfig, TaskPool, get_recast_model
from recast_peft.pool.heads import StoredHead

HELD = (1, 32, 1_000, 10_000, 100_000)
CLASSES, SLOTS, ZIPF = 10, 25, 1.1
Answers = Callable[[list[int]], Any]  # computes one batch for tasks by number


def traffic(tasks: int, kind: str) -> Iterator[int]:
    """Numbers of the tasks that are asked for."""
    rng = random.Random(0)
    if kind == "uniform":
        while True:
            yield rng.randrange(tasks)
    weights = list(itertools.accumulate(1 / (rank + 1) ** ZIPF for rank in range(tasks)))
    order = rng.sample(range(tasks), tasks)
    while True:
        yield order[bisect.bisect(weights, rng.random() * weights[-1])]


def saturated(answers: Answers, asked: Iterator[int], options: Namespace) -> float:
    """Requests a second with full batches."""
    answers(list(itertools.islice(asked, options.batch)))
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < options.seconds:
        answers(list(itertools.islice(asked, options.batch)))
        done += options.batch
    return done / (time.perf_counter() - begin)


def open_loop(answers: Answers, asked: Iterator[int], rate: float, options: Namespace) -> list[float]:
    """Seconds from coming to answer of each request, which come at random moments."""
    rng, moment, coming = random.Random(1), 0.0, []
    while moment < options.seconds:
        moment += rng.expovariate(rate)
        coming.append(moment)
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < len(coming):
        now = time.perf_counter() - begin
        if now > 3 * options.seconds:  # it falls behind for good: those that still wait are counted as they are now
            taken += [now - came for came in coming[len(taken) :]]
            break
        batch = bisect.bisect(coming, now) - len(taken)
        if batch <= 0:
            time.sleep(max(0.0, coming[len(taken)] - now))
            continue
        batch = min(batch, options.batch)
        answers(list(itertools.islice(asked, batch)))
        end = time.perf_counter() - begin
        taken += [end - came for came in coming[len(taken) : len(taken) + batch]]
    return taken


# ---------------------------------------------------------------- who answers


def plain(x: Tensor, options: Namespace) -> Answers:
    """The model without any task."""
    model = backbone(options.model).eval()
    return lambda tasks: model(x[: len(tasks)])


def pool_of(tasks: int, options: Namespace) -> TaskPool:
    """A pool of random tasks, each with a classifier."""
    pool = TaskPool(get_recast_model(backbone(options.model), RecastConfig(target_modules=TARGETS), "first").eval())
    pool.add("task-0", RecastConfig(num_classes=CLASSES, head_dtype="float16"))
    kind, (weight, bias) = (head := pool._heads[0]).kind, head.tensors
    heads = {
        i: StoredHead(kind, (torch.randn_like(weight), bias.clone()), head.labels, torch.float16) for i in range(tasks - 1)
    }
    pool.add_rows([f"task-{i}" for i in range(1, tasks)], torch.randn(tasks - 1, pool.numbers_per_task) * 0.1, heads)
    with tempfile.TemporaryDirectory() as folder:  # as it is when it was read from its file
        pool.save(Path(folder) / "pool.safetensors")
        again = TaskPool(pool.model)
        begin = time.perf_counter()
        again.load(Path(folder) / "pool.safetensors")
        again.seconds_to_load = time.perf_counter() - begin  # type: ignore[attr-defined]
        again.bytes_of_file = (Path(folder) / "pool.safetensors").stat().st_size  # type: ignore[attr-defined]
    return again


def pooled(pool: TaskPool, x: Tensor) -> Answers:
    """Every batch by the names of its tasks."""
    return lambda tasks: pool.model(x[: len(tasks)], task_ids=pool.ids([f"task-{task}" for task in tasks]))


def full_batches(answers: Answers, tasks: int, options: Namespace) -> Callable[[], Any]:
    """A full batch of tasks that are drawn anew each time."""
    asked = traffic(tasks, "uniform")
    return lambda: answers(list(itertools.islice(asked, options.batch)))


def resident_loras(tasks: int, x: Tensor, options: Namespace) -> tuple[Answers, PeftModel]:
    """All adapters in memory, mixed batches."""
    model = get_peft_model(backbone(options.model), CONFIGS["LoRA r=8"](TARGETS), "a0").eval()
    for i in range(1, tasks):
        model.add_adapter(f"a{i}", CONFIGS["LoRA r=8"](TARGETS))
    model.eval()
    return (lambda asked: model(x[: len(asked)], adapter_names=[f"a{task}" for task in asked])), model


class Slots:
    """A few adapters in memory, the others on the disk."""

    def __init__(self, x: Tensor, folder: str, options: Namespace) -> None:
        self.x = x
        self.model = get_peft_model(backbone(options.model), CONFIGS["LoRA r=8"](TARGETS), "stored").eval()
        self.model.save_pretrained(folder)
        self.file = str(Path(folder) / "stored")
        self.held: OrderedDict[int, None] = OrderedDict()
        self.loads = 0

    def __call__(self, asked: list[int]) -> Any:
        wanted = set(asked)
        for task in sorted(wanted):
            if task not in self.held:
                self._load(task, wanted)
            self.held.move_to_end(task)
        return self.model(self.x[: len(asked)], adapter_names=[f"a{task}" for task in asked])

    def _load(self, task: int, wanted: set[int]) -> None:
        spare = [held for held in self.held if held not in wanted]
        while len(self.held) >= max(SLOTS, len(wanted)) and spare:
            gone = spare.pop(0)
            del self.held[gone]
            self.model.delete_adapter(f"a{gone}")
        self.model.load_adapter(self.file, f"a{task}")
        self.model.eval()
        self.held[task] = None
        self.loads += 1


# ---------------------------------------------------------------- measuring


def row(who: str, tasks: int, answers: Answers, kind: str, rate: float, megabytes: float, options: Namespace) -> Row:
    """One row of the table."""
    asked = traffic(tasks, kind)
    taken = open_loop(answers, asked, rate, options)
    cuts = statistics.quantiles(taken, n=100)
    return {
        "server": who,
        "tasks": tasks,
        "requests/s": saturated(answers, asked, options),
        "p50 ms": 1e3 * cuts[49],
        "p95 ms": 1e3 * cuts[94],
        "p99 ms": 1e3 * cuts[98],
        "MB of tasks": megabytes,
    }


@torch.no_grad()
def measure(options: Namespace) -> Tables:
    """All rows, and what a pool takes on disk and in memory."""
    x = images(backbone(options.model), options.batch)
    base = plain(x, options)
    rate = options.load * saturated(base, traffic(1, "uniform"), options)
    by_kind: dict[str, list[Row]] = {
        kind: [row("plain model", 1, base, kind, rate, 0.0, options)] for kind in ("uniform", "zipf")
    }
    sizes: list[Row] = []
    full: dict[str, Callable[[], Any]] = {"plain model": lambda: base([0] * options.batch)}
    for tasks in options.tasks:
        pool = pool_of(tasks, options)
        full[f"RECAST pool, {tasks:,} tasks"] = full_batches(pooled(pool, x), tasks, options)
        held = {key: size / 2**20 for key, size in pool.sizes().items()}
        for kind, rows in by_kind.items() if not options.only_batches else ():
            rows.append(row("RECAST pool", tasks, pooled(pool, x), kind, rate, sum(held.values()), options))
        begin = time.perf_counter()
        for i in range(1000):
            pool.row(f"task-{i % tasks}")
        sizes.append(
            {
                "tasks": tasks,
                "MB of the file": pool.bytes_of_file / 2**20,  # type: ignore[attr-defined]
                "s to load": pool.seconds_to_load,  # type: ignore[attr-defined]
                "MB of coefficients": held["coefficients"],
                "MB of classifiers": held["heads"],
                "us to look a name up": 1e3 * (time.perf_counter() - begin),
            }
        )
    timed = compare(options.rounds, full)
    in_turns: list[Row] = [{"batch": who, "ms": t.seconds * 1e3, "ratio to plain": t.ratio} for who, t in timed.items()]
    if options.only_batches:
        return {f"a full batch of {options.batch}, {options.model}, qkv": in_turns, f"a pool, {options.model}": sizes}
    for tasks in [tasks for tasks in options.tasks if tasks <= options.most_loras]:
        answers, model = resident_loras(tasks, x, options)
        size = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" in name) / 2**20
        for kind, rows in by_kind.items():
            rows.append(row("LoRA r=8, all in memory", tasks, answers, kind, rate, size, options))
    with tempfile.TemporaryDirectory() as folder:
        for tasks in options.tasks:
            slots = Slots(x, folder, options)
            for kind, rows in by_kind.items():
                rows.append(row(f"LoRA r=8, {SLOTS} slots", tasks, slots, kind, rate, float("nan"), options))
    about = f"{options.model}, qkv, batches of up to {options.batch}, {rate:.0f} requests/s in the open loop"
    return {
        **{f"{kind} traffic, {about}": rows for kind, rows in by_kind.items()},
        f"a full batch of {options.batch}, {options.model}, qkv": in_turns,
        f"a pool, {options.model}": sizes,
    }


def draw(tables: Tables, path: Path) -> None:
    """Requests a second and p95 against the number of tasks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [title for title in tables if "traffic" in title]
    figure, axes = plt.subplots(2, len(kinds), figsize=(5 * len(kinds), 7), sharex=True, squeeze=False)
    for column, title in enumerate(kinds):
        for line, key in enumerate(("requests/s", "p95 ms")):
            axis = axes[line][column]
            for who in dict.fromkeys(r["server"] for r in tables[title]):
                rows = [r for r in tables[title] if r["server"] == who]
                axis.plot([r["tasks"] for r in rows], [r[key] for r in rows], marker="o", label=who)
            axis.set(xscale="log", yscale="log", ylabel=key, title=title.split(",")[0] if line == 0 else "")
            axis.grid(alpha=0.3)
        axes[-1][column].set_xlabel("tasks that are held")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", type=int, default=list(HELD))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.6, help="share of the plain model's rate (default: %(default)s)")
    parser.add_argument(
        "--most-loras", type=int, default=32, help="LoRAs that are held in memory at most (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    about = "full batches timed in turns alone, which a busy machine disturbs least (with --clock cpu)"
    parser.add_argument("--only-batches", action="store_true", help=about)
    options = start(parser, given)
    if options.quick:
        options.model, options.tasks, options.seconds, options.batch, options.rounds = QUICK, [1, 30], 0.2, 4, 1
    tables = measure(options)
    if options.output and not options.only_batches:
        options.output.mkdir(parents=True, exist_ok=True)
        draw(tables, options.output / "fleet_curves.png")
    return finish("fleet", options, tables)


if __name__ == "__main__":
    main()
