"""Does a bank grown from other tasks make RECAST's few coefficients stronger?

    python examples/benchmarks/grown_banks.py --seeds 0 1 2 --output grown_banks_output

Leave one out: of the demo's tasks every one is held out in turn; a bank is grown from LoRA adapters of all the others,
and the task that was held out is learned with its coefficients alone. Beside it stand a linear probe, RECAST on plain
banks, and LoRA. It prints the table as it goes and writes it with a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' folder

from glyph_backbone import load_backbone
from glyphs import TASKS, Task, load_task
from torch import nn
from training import Schedule, train_lora, train_probe, train_recast

from recast_peft import RecastConfig, StoredBank, grow_bank, growth_report

Figures = dict[str, tuple[float, int]]  # method -> accuracy, numbers beside the classifier


def recast(task: Task, schedule: Schedule, bank: StoredBank | None = None, **fields: object) -> tuple[float, int]:
    """RECAST with a config: test accuracy and numbers."""
    config = RecastConfig(num_classes=task.num_classes, seed=schedule.seed, bank=bank, **fields)  # type: ignore[arg-type]
    _, found, numbers = train_recast(load_backbone, task, schedule, config)
    return found, numbers


def held_out(task: Task, sources: list[nn.Module], schedule: Schedule, templates: int) -> Figures:
    """All methods on one task; the sources are those of the other tasks."""
    own = RecastConfig(target_modules=["qkv"], group_size=1)
    beside = grow_bank(load_backbone(), sources, own, num_templates=templates)
    alone = grow_bank(load_backbone(), sources, own, num_templates=templates, plain_templates=False)
    methods: dict[str, Callable[[], tuple[float, int]]] = {
        "linear probe": lambda: train_probe(load_backbone(), task, schedule),
        "plain bank, groups of 2": lambda: recast(task, schedule),
        "plain bank, groups of 4": lambda: recast(task, schedule, group_size=4),
        "grown beside plain": lambda: recast(task, schedule, beside),
        "grown alone": lambda: recast(task, schedule, alone),
        "LoRA r=1": lambda: train_lora(load_backbone, task, schedule, 1)[1:],
        "LoRA r=8": lambda: train_lora(load_backbone, task, schedule, 8)[1:],
    }
    print(f"\nbank for {task.name}:\n{growth_report(beside)}", flush=True)
    return {name: method() for name, method in methods.items()}


def table_of(results: dict[str, dict[str, Figures]]) -> str:
    """Mean accuracy over seeds and tasks, the gain over the probe, and the gain of every task."""
    runs = [(task, figures) for tasks in results.values() for task, figures in tasks.items()]
    names = sorted({task for task, _ in runs}, key=list(TASKS).index)
    lines = [
        "| method | numbers | accuracy | gain over the probe | " + " | ".join(names) + " |",
        "|---|" * 1 + "---|" * (3 + len(names)),
    ]
    for method in runs[0][1]:
        gains = {n: [f[method][0] - f["linear probe"][0] for t, f in runs if t == n] for n in names}
        flat = [gain for each in gains.values() for gain in each]
        found = sum(f[method][0] for _, f in runs) / len(runs)
        cells = [f"{100 * sum(each) / len(each):+.1f}" for each in gains.values()]
        numbers = runs[0][1][method][1]
        lines.append(f"| {method} | {numbers:,} | {found:.3f} | {100 * sum(flat) / len(flat):+.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Figures]], path: Path) -> None:
    """Gain over the probe against the numbers of a task, a point for each task and seed."""
    from matplotlib.figure import Figure

    runs = [figures for tasks in results.values() for figures in tasks.values()]
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in list(runs[0])[1:]:
        gains = [100 * (f[method][0] - f["linear probe"][0]) for f in runs]
        numbers = [f[method][1] for f in runs]
        points = axes.plot(numbers, gains, ".", alpha=0.4)
        axes.plot(numbers[:1], [sum(gains) / len(gains)], "o", color=points[0].get_color(), label=method)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="numbers of a task beside its classifier", ylabel="points above the linear probe")
    axes.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--train-per-class", type=int, default=40)
    parser.add_argument("--rank", type=int, default=4, help="of the sources")
    parser.add_argument("--templates", type=int, default=5, help="grown templates of each of the eight modules")
    parser.add_argument("--coefficient-lr", type=float, default=Schedule.coefficient_lr)
    parser.add_argument("--output", type=Path, default=Path("grown_banks_output"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Figures]] = {}
    start = time.perf_counter()
    for seed in options.seeds:
        schedule = Schedule(epochs=options.epochs, seed=seed, coefficient_lr=options.coefficient_lr)
        tasks = {name: load_task(name, seed=seed, train_per_class=options.train_per_class) for name in options.tasks}
        sources = {name: train_lora(load_backbone, task, schedule, options.rank)[0] for name, task in tasks.items()}
        for name, task in tasks.items():
            others: list[nn.Module] = [source for other, source in sources.items() if other != name]
            results.setdefault(str(seed), {})[name] = held_out(task, others, schedule, options.templates)
            print(f"\nseed {seed}, {name}, {time.perf_counter() - start:.0f} s\n{table_of(results)}", flush=True)
            (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.output / "table.md").write_text(table_of(results) + "\n")
    draw(results, options.output / "picture.png")


if __name__ == "__main__":
    main()
