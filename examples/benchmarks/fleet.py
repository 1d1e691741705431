"""A fleet of tasks on one backbone: requests a second, latency and memory against the number of tasks that are held.

    python examples/benchmarks/fleet.py                          # 1 to 100,000 tasks, ViT-Small, qkv, batches of up to 32
    python examples/benchmarks/fleet.py --model vit_tiny_patch16_224 --batch 16 --seconds 4 --output fleet

Requests name one of the tasks, drawn uniformly or by Zipf's law. Two measurements for each server and number of tasks:

- saturated: every batch is full; what counts is requests a second;
- open loop: requests come at random moments at one fixed rate, whatever the server does (``--load`` of what the plain model
  answers); a batch takes those that have come, up to its size; what counts is the time from coming to answer.

Beside the pool: the pool behind HTTP, with clients on the same machine (``--http``); PEFT's LoRAs with all adapters in memory
and a mixed batch (``adapter_names``); the same with 25 slots, of which the one that was not used for the longest time is given
up for an adapter from the disk; and one merged model for each task. Pooled tasks have a classifier of ten classes each, in half
precision; the others have none. Each runs in a process of its own, whose memory is given, and takes four times ``--seconds``
for each kind of traffic at most. ``--clock cpu`` counts processor time, for a machine that has other work; not behind HTTP.
"""

from __future__ import annotations

import bisect
import itertools
import random
import statistics
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fleet_servers import (
    SLOTS,
    Answers,
    Loopback,
    Slots,
    alone,
    folder,
    loopback,
    merged_models,
    plain,
    pooled,
    read_pool,
    resident_loras,
    resident_megabytes,
    write_pool,
)
from rivals import MODEL, QUICK, backbone, images
from timing import Row, Tables, arguments, compare, finish, seconds, start

HELD = (1, 32, 1_000, 10_000, 100_000)
KINDS = ("uniform", "zipf")
ZIPF, CLIENTS = 1.1, 32
OTHERS = {
    "plain model": "black",
    "RECAST pool, HTTP": "tab:orange",
    "LoRA r=8, all in memory": "tab:green",
    "a merged model each": "tab:blue",
    f"LoRA r=8, {SLOTS} slots": "tab:purple",
}


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


def arrivals(rate: float, options: Namespace) -> list[float]:
    """Moments at which requests come."""
    rng, moment, coming = random.Random(1), 0.0, []
    while moment < options.seconds:
        moment += rng.expovariate(rate)
        coming.append(moment)
    return coming


# ---------------------------------------------------------------- in the process


def saturated(answers: Answers, asked: Iterator[int], options: Namespace) -> float:
    """Requests a second with full batches."""
    answers(list(itertools.islice(asked, options.batch)))
    taken, done = 0.0, 0
    while taken < options.seconds:
        taken += seconds(lambda: answers(list(itertools.islice(asked, options.batch))))
        done += options.batch
    return done / taken


def open_loop(answers: Answers, asked: Iterator[int], rate: float, options: Namespace) -> list[float]:
    """Seconds from coming to answer of each request, which come at random moments.

    The clock is one of its own: it goes on by what each batch takes, and jumps to the next request where none waits. So with
    ``--clock cpu`` the times are those of a machine that has no other work.
    """
    coming = arrivals(rate, options)
    taken: list[float] = []
    now = 0.0
    while len(taken) < len(coming):
        if now > 3 * options.seconds:  # it falls behind for good: those that still wait are counted as they are now
            taken += [now - came for came in coming[len(taken) :]]
            break
        now = max(now, coming[len(taken)])
        batch = min(bisect.bisect(coming, now) - len(taken), options.batch)
        now += seconds(lambda batch=batch: answers(list(itertools.islice(asked, batch))))  # type: ignore[misc]
        taken += [now - came for came in coming[len(taken) : len(taken) + batch]]
    return taken


# ---------------------------------------------------------------- over HTTP


def clients(work: Callable[[], None]) -> None:
    """The same work in many threads."""
    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def saturated_http(server: Loopback, asked: Iterator[int], options: Namespace) -> float:
    """Requests a second with clients that ask again as soon as they are answered."""
    lock, done = threading.Lock(), itertools.count()
    begin = time.perf_counter()

    def work() -> None:
        while time.perf_counter() - begin < options.seconds:
            with lock:
                task = next(asked)
            server.ask(task)
            next(done)

    clients(work)
    return next(done) / (time.perf_counter() - begin)


def open_loop_http(server: Loopback, asked: Iterator[int], rate: float, options: Namespace) -> list[float]:
    """As ``open_loop``; a request that finds all clients busy waits for one, and its time counts from when it came."""
    lock, coming, taken = threading.Lock(), iter(arrivals(rate, options)), []
    begin = time.perf_counter()

    def work() -> None:
        while True:
            with lock:
                came, task = next(coming, None), next(asked)
            if came is None:
                return
            time.sleep(max(0.0, came - (time.perf_counter() - begin)))
            if time.perf_counter() - begin < 3 * options.seconds:
                server.ask(task)
            taken.append(time.perf_counter() - begin - came)

    clients(work)
    return taken


# ---------------------------------------------------------------- measuring


def row(who: str, tasks: int, taken: list[float], rate: float, megabytes: float) -> Row:
    """One row of the table."""
    cuts = statistics.quantiles(taken, n=100)
    return {
        "server": who,
        "tasks": tasks,
        "requests/s": rate,
        "p50 ms": 1e3 * cuts[49],
        "p95 ms": 1e3 * cuts[94],
        "p99 ms": 1e3 * cuts[98],
        "MB of the process": megabytes,
    }


@torch.no_grad()
def rows_of(who: str, tasks: int, make: Callable[[], Answers], rate: float, options: Namespace) -> dict[str, Row]:
    """A row for each kind of traffic, measured in a process of its own."""

    def work() -> dict[str, Row]:
        answers, rows = make(), {}
        for kind in KINDS:
            asked = traffic(tasks, kind)
            taken = open_loop(answers, asked, rate, options)
            rows[kind] = row(who, tasks, taken, saturated(answers, asked, options), resident_megabytes())
        return rows

    return alone(work)


def http_rows(tasks: int, path: Path, rate: float, options: Namespace) -> dict[str, Row]:
    """The same over HTTP."""
    rows = {}
    with loopback(path, images(backbone(options.model), 1)[0], options) as server:
        for kind in KINDS:
            asked = traffic(tasks, kind)
            taken = open_loop_http(server, asked, rate, options)
            found = saturated_http(server, asked, options)
            rows[kind] = row("RECAST pool, HTTP", tasks, taken, found, resident_megabytes(server.process))
    return rows


def sizes_of(tasks: int, path: Path, options: Namespace) -> Row:
    """What a pool takes on the disk and in memory, and how soon it is there."""
    before = resident_megabytes()
    pool, to_load = read_pool(path, options)
    held = {key: size / 2**20 for key, size in pool.sizes().items()}
    begin = time.perf_counter()
    for i in range(1000):
        pool.row(f"task-{i % tasks}")
    looked_up = 1e3 * (time.perf_counter() - begin)
    return {
        "tasks": tasks,
        "MB of the file": path.stat().st_size / 2**20,
        "s to load": to_load,
        "MB of coefficients": held["coefficients"],
        "MB of classifiers": held["heads"],
        "MB that the process grew by": resident_megabytes() - before,
        "us to look a name up": looked_up,
    }


@torch.no_grad()
def in_turns(paths: dict[int, Path], options: Namespace) -> list[Row]:
    """Full batches of pools of all sizes, timed in turns; the tasks are drawn anew for each batch."""
    x = images(backbone(options.model), options.batch)
    base = plain(x, options)
    calls: dict[str, Callable[[], Any]] = {}
    for tasks, path in paths.items():
        answers = pooled(read_pool(path, options)[0], x)
        for kind in KINDS[: 1 if tasks == 1 else 2]:
            asked = traffic(tasks, kind)
            calls[f"{tasks:,} tasks, {kind}"] = lambda answers=answers, asked=asked: answers(  # type: ignore[misc]
                list(itertools.islice(asked, options.batch))
            )
    calls["plain model"] = lambda: base([0] * options.batch)
    timed = compare(options.rounds, calls)
    return [{"batch": who, "ms": t.seconds * 1e3, f"to {next(iter(timed))}": t.ratio} for who, t in timed.items()]


def measure(options: Namespace) -> Tables:
    """All rows, and what a pool takes on disk and in memory."""
    x = images(backbone(options.model), options.batch)
    with folder() as place:
        paths = {tasks: place / f"{tasks}.safetensors" for tasks in options.tasks}
        for tasks, path in paths.items():
            alone(lambda tasks=tasks, path=path: write_pool(tasks, path, options))  # type: ignore[misc]
        sizes = [alone(lambda tasks=tasks, path=path: sizes_of(tasks, path, options)) for tasks, path in paths.items()]  # type: ignore[misc]
        batches = alone(lambda: in_turns(paths, options))
        tables = {f"a full batch of {options.batch}, {options.model}, qkv": batches, f"a pool, {options.model}": sizes}
        return tables if options.only_batches else {**servers(paths, x, place, options), **tables}


def servers(paths: dict[int, Path], x: torch.Tensor, place: Path, options: Namespace) -> Tables:
    """A table for each kind of traffic, with all servers."""
    with torch.no_grad():
        rate = options.load * saturated(plain(x, options), traffic(1, "uniform"), options)
    found = [rows_of("plain model", 1, lambda: plain(x, options), rate, options)]
    few = [tasks for tasks in options.tasks if tasks <= options.most_loras]
    for tasks, path in paths.items():
        found.append(rows_of("RECAST pool", tasks, lambda path=path: pooled(read_pool(path, options)[0], x), rate, options))  # type: ignore[misc]
        if options.http:
            found.append(http_rows(tasks, path, rate, options))
    for who, make in (("LoRA r=8, all in memory", resident_loras), ("a merged model each", merged_models)):
        for tasks in few:
            found.append(rows_of(who, tasks, lambda make=make, tasks=tasks: make(tasks, x, options), rate, options))  # type: ignore[misc]
    for tasks in options.tasks:
        found.append(rows_of(f"LoRA r=8, {SLOTS} slots", tasks, lambda: Slots(x, str(place), options), rate, options))
    about = f"{options.model}, qkv, batches of up to {options.batch}, {rate:.0f} requests/s in the open loop"
    return {f"{kind} traffic, {about}": [rows[kind] for rows in found] for kind in KINDS}


def draw(tables: Tables, path: Path) -> None:
    """Requests a second, p95 and memory against the number of tasks."""
    from matplotlib.figure import Figure

    kinds = [title for title in tables if "traffic" in title]
    shown = ("requests/s", "p95 ms", "MB of the process")
    figure = Figure(figsize=(4.5 * len(shown), 3.4 * len(kinds)), layout="constrained")
    for line, title in zip(figure.subplots(len(kinds), len(shown), sharex=True, squeeze=False), kinds, strict=True):
        for axes, key in zip(line, shown, strict=True):
            for who in dict.fromkeys(r["server"] for r in tables[title]):
                rows = [r for r in tables[title] if r["server"] == who]
                mine = who == "RECAST pool"
                line_of = {"lw": 2.2 if mine else 1.2, "color": "tab:red" if mine else OTHERS.get(who)}
                axes.plot([r["tasks"] for r in rows], [r[key] for r in rows], marker="o", ms=4, label=who, **line_of)
            axes.set(xscale="log", yscale="log", title=f"{key}, {title.split(',')[0]}", xlabel="tasks that are held")
            axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default=MODEL, help="of timm (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", type=int, default=list(HELD))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--load", type=float, default=0.6, help="share of the plain model's rate (default: %(default)s)")
    about = "LoRAs and merged models that are held in memory at most (default: %(default)s)"
    parser.add_argument("--most-loras", type=int, default=32, help=about)
    parser.add_argument("--rounds", type=int, default=5)
    about = "full batches timed in turns alone, which a busy machine disturbs least (with --clock cpu)"
    parser.add_argument("--only-batches", action="store_true", help=about)
    about = "the pool behind HTTP too, asked by 32 clients on this machine; needs the extra 'serving'"
    parser.add_argument("--http", action="store_true", help=about)
    options = start(parser, given)
    if options.quick:
        options.model, options.tasks, options.seconds, options.batch, options.rounds = QUICK, [1, 30], 0.1, 4, 1
    tables = measure(options)
    if options.output and not options.only_batches:
        options.output.mkdir(parents=True, exist_ok=True)
        draw(tables, options.output / "fleet_curves.png")
    return finish("fleet", options, tables)


if __name__ == "__main__":
    main()
