"""The main job: learn several tasks one after the other on one backbone, and say honestly what their numbers buy.

    python examples/demo.py --output demo_output

It converts a pretrained backbone (plan and fidelity are printed), learns the tasks as RECAST tasks, saves each, reloads all
of them into a fresh backbone, swaps between them, and shows the accuracy of every task after every task. Beside it the same
tasks are learned with a linear probe, with PEFT's LoRA, and with RECAST on a bank of biases that was grown from the
pretraining's own characters. What is shown is written as text, JSON and a picture.

By default everything is embedded: a small vision transformer pretrained on printed glyphs, and tasks of handwriting, other
scripts and symbols. With a network, any other backbone and data do as well:

    python examples/demo.py --backbone vit_small_patch16_224.augreg_in21k --dataset Flowers102 --dataset CIFAR10
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from glyph_backbone import load_backbone
from glyphs import TASKS, Task, load_task
from peft import PeftModel
from practice_bank import load_practice_bank
from torch import nn
from training import Schedule, recast_groups, test_accuracy, train_groups, train_lora, train_probe, train_recast

from recast_peft import BiasConfig, RecastConfig, TaskPool, mimicry_report, plan_recast
from recast_peft.analysis.matrix import AccuracyMatrix
from recast_peft.analysis.sequence import learn_in_sequence

DEFAULT_TASKS = ("handwriting", "greek", "cyrillic", "hebrew", "operators", "arrows")
HEAD_DECAY = 10.0  # of every classifier: with 60 images a class it overfits otherwise (docs/accuracy.md)
ON_BANK = "RECAST, bank"
BANK_LR = 0.158  # of coefficients on a bank of biases (docs/grown_banks.md)
TASK_FILES = ("adapter_config.json", "adapter_model.safetensors")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for tasks, table and picture")
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS), choices=list(TASKS), help="embedded tasks, in order")
    parser.add_argument("--train-per-class", type=int, default=60)
    parser.add_argument("--test-per-class", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=Schedule.epochs)
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", help="a timm or transformers name, or a folder, instead of the embedded backbone")
    parser.add_argument("--untrained", action="store_true", help="with --backbone: random weights, for trying the path out")
    parser.add_argument(
        "--dataset", action="append", help="a torchvision or datasets name, or a folder of images; may be given several times"
    )
    parser.add_argument("--limit", type=int, default=2000, help="with --dataset: most images for training, and for the test")
    return parser.parse_args(arguments)


def sources(arguments: argparse.Namespace) -> tuple[Callable[[], nn.Module], dict[str, Task]]:
    """A function that makes a fresh backbone, and the tasks by name."""
    if arguments.backbone is None and arguments.dataset is None:
        sizes = {"train_per_class": arguments.train_per_class, "test_per_class": arguments.test_per_class}
        return load_backbone, {name: load_task(name, seed=arguments.seed, **sizes) for name in arguments.tasks}
    if arguments.backbone is None or arguments.dataset is None:
        raise SystemExit("--backbone and --dataset go together: the embedded ones fit each other alone")
    from named_sources import load_named_backbone, load_named_task  # needs torchvision, and a network for most names

    make_backbone = partial(load_named_backbone, arguments.backbone, pretrained=not arguments.untrained)
    preprocessing = make_backbone()
    tasks = [load_named_task(name, preprocessing, arguments.limit, arguments.seed) for name in arguments.dataset]
    return make_backbone, {task.name: task for task in tasks}


def size_of(folder: Path) -> tuple[int, int]:
    """Bytes of a saved task: all of it, and of the coefficients alone (4 bytes a number)."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if ".recast_" in key]  # noqa: SIM118
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    return sum((folder / name).stat().st_size for name in TASK_FILES), 4 * numbers


def learn(
    make_backbone: Callable[[], nn.Module], tasks: dict[str, Task], schedule: Schedule
) -> tuple[PeftModel, AccuracyMatrix]:
    """Learn the tasks one after the other with RECAST."""

    def train(model: PeftModel, task: Task) -> None:
        groups = recast_groups(model, schedule)
        train_groups(model, groups, task.train_images, task.train_labels, schedule, schedule.epochs, f"RECAST {task.name}")

    configs = {name: RecastConfig(num_classes=task.num_classes, seed=schedule.seed) for name, task in tasks.items()}
    return learn_in_sequence(make_backbone(), tasks, train, test_accuracy, config=configs)


def on_bank(make_backbone: Callable[[], nn.Module], task: Task, schedule: Schedule) -> tuple[float, int]:
    """RECAST with a scale for each ``fc1`` and the templates of the bank of biases: test accuracy, and the numbers trained."""
    partner = BiasConfig(bank=load_practice_bank())
    fields = {"target_modules": ["fc1"], "group_size": 1, "partners": [partner]}
    config = RecastConfig(num_classes=task.num_classes, seed=schedule.seed, **fields)  # type: ignore[arg-type]
    fast = replace(schedule, coefficient_lr=BANK_LR)
    _, found, numbers = train_recast(make_backbone, task, fast, config, f"{ON_BANK} {task.name}")
    return found, numbers


def reload(make_backbone: Callable[[], nn.Module], folder: Path, tasks: dict[str, Task]) -> PeftModel:
    """A fresh backbone with all saved tasks."""
    first, *others = tasks
    model = PeftModel.from_pretrained(make_backbone(), folder / first, first)
    for name in others:
        model.load_adapter(folder / name, name)
    return model.eval()


def swap_times(model: PeftModel, tasks: dict[str, Task]) -> dict[str, float]:
    """Microseconds (medians of 50) to put another task in force: composed as used, and merged."""
    pool = TaskPool(model)
    for name in tasks:
        pool.add(name, name)
    names = list(tasks)
    result = {}
    for label, merge in (("live", False), ("merged", True)):
        pool.activate(names[0], merge=merge)
        times = []
        for i in range(50):
            start = time.perf_counter()
            pool.activate(names[(i + 1) % len(names)], merge=merge)
            times.append(time.perf_counter() - start)
        result[label] = sorted(times)[len(times) // 2] * 1e6
    pool.deactivate()
    return result


def compare_table(results: dict[str, dict[str, float]], classes: dict[str, int], numbers: dict[str, int]) -> str:
    """Test accuracy in percent, a row for each task and a column for each method."""
    methods = list(numbers)
    lines = ["task".ljust(14) + "classes".rjust(8) + "".join(m.rjust(16) for m in methods)]
    lines.append("numbers trained".ljust(22) + "".join(f"{numbers[m]:,}".rjust(16) for m in methods))
    for task, row in results.items():
        lines.append(task.ljust(14) + str(classes[task]).rjust(8) + "".join(f"{100 * row[m]:.1f}".rjust(16) for m in methods))
    means = {m: sum(row[m] for row in results.values()) / len(results) for m in methods}
    lines.append("mean".ljust(22) + "".join(f"{100 * means[m]:.1f}".rjust(16) for m in methods))
    lines.append(
        "(numbers trained: beside the classifier, which every method trains; the probe is the better of a short and a long run)"
    )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, float]], numbers: dict[str, int], matrix: AccuracyMatrix, path: Path) -> None:
    """Bars of the methods by task, and the accuracy matrix beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, grid) = plt.subplots(1, 2, figsize=(13, 4.8), width_ratios=(1.3, 1), layout="constrained")
    width = 0.8 / len(numbers)
    for i, (method, count) in enumerate(numbers.items()):
        heights = [100 * row[method] for row in results.values()]
        places = [x + (i - (len(numbers) - 1) / 2) * width for x in range(len(results))]
        bars.bar(places, heights, width, label=f"{method} ({count:,} numbers)")
    bars.set_xticks(range(len(results)), list(results))
    bars.set_ylabel("test accuracy in percent")
    bars.set_ylim(bottom=max(0, min(100 * min(row.values()) for row in results.values()) - 10))
    bars.legend(loc="lower right")
    bars.set_title("One backbone, one task after the other")
    matrix.plot(axes=grid)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Run the demo; returns what is also written as JSON."""
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if options.backbone is None else "0")
    started = time.perf_counter()
    schedule = Schedule(epochs=options.epochs, seed=options.seed, head_decay=HEAD_DECAY)
    make_backbone, tasks = sources(options)
    options.output.mkdir(parents=True, exist_ok=True)
    text: list[str] = []

    def say(what: object) -> None:
        text.append(str(what))
        print(what, flush=True)

    say("The plan (nothing is touched yet):")
    plain = make_backbone()
    say(plan_recast(plain, RecastConfig()))
    model, matrix = learn(make_backbone, tasks, schedule)
    say(f"\nFidelity of the converted backbone:\n{mimicry_report(model)}")
    model.save_pretrained(options.output / "tasks", selected_adapters=list(tasks))
    say("\nSaved tasks (config and weights; the classifier is most of it):")
    for name in tasks:
        whole, coefficients = size_of(options.output / "tasks" / name)
        say(f"  {name:14}{whole:>8,} bytes, of which coefficients {coefficients:>4}")

    fresh = reload(make_backbone, options.output / "tasks", tasks)
    again = {}
    for name, task in tasks.items():
        fresh.set_adapter(name)
        again[name] = test_accuracy(fresh, task)
    same = all(again[name] == matrix.values[-1][j] for j, name in enumerate(tasks))
    say(f"\nReloaded into a fresh backbone: {'the same accuracies' if same else 'OTHER accuracies'} on all {len(tasks)} tasks")
    say(f"\nAccuracy on each task after each task:\n{matrix}")
    swaps = swap_times(fresh, tasks)
    say(f"\nTime of a swap: {swaps['live']:.0f} microseconds live, {swaps['merged']:.0f} with the weights merged")

    recast_numbers = sum(p.numel() for n, p in model.named_parameters() if f"recast_coefficients.{next(iter(tasks))}" in n)
    lora_name = f"LoRA r={options.rank}"
    has_bank = options.backbone is None  # the bank was made for the embedded backbone
    numbers = {"linear probe": 0, "RECAST": recast_numbers, **({ON_BANK: 0} if has_bank else {}), lora_name: 0}
    results: dict[str, dict[str, float]] = {}
    for j, (name, task) in enumerate(tasks.items()):
        probe, _ = train_probe(make_backbone(), task, schedule, f"linear probe {name}")
        _, lora, numbers[lora_name] = train_lora(make_backbone, task, schedule, options.rank, f"LoRA {name}")
        results[name] = {"linear probe": probe, "RECAST": float(matrix.values[-1][j]), lora_name: lora}
        if has_bank:
            results[name][ON_BANK], numbers[ON_BANK] = on_bank(make_backbone, task, schedule)
    classes = {name: task.num_classes for name, task in tasks.items()}
    say("\nTest accuracy in percent:\n" + compare_table(results, classes, numbers))
    seconds = time.perf_counter() - started
    say(f"\n{seconds:.0f} seconds in all; table, picture and tasks are in {options.output}")

    draw(results, numbers, matrix, options.output / "demo.png")
    summary = {"results": results, "numbers": numbers, "matrix": matrix.to_dict(), "swap_us": swaps, "seconds": seconds}
    (options.output / "demo.txt").write_text("\n".join(text) + "\n")
    (options.output / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    main()
