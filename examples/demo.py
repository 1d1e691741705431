"""The main job on real pretrained weights: learn tasks one after the other, and say honestly what their numbers buy and cost.

    python examples/demo.py --output demo_output

Two backbones that other people trained, MiniLM (sentences) and an ImageNet EfficientNet-Lite0 (pictures), each with tasks of
real data (``examples/worlds``). For each backbone the tasks are learned in sequence with RECAST, saved, reloaded into a fresh
backbone, swapped, and mixed in one batch. Beside it every task is learned with a linear probe, with a classifier that reads
several blocks (a readout, made of the texts or pictures without their labels), and with PEFT's LoRA of rank 8 and 1: the same
examples, epochs, batches and schedule, and classifiers of one size. Methods are learned side by side, one on each processor.
Table, picture and figures go to the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from frontier import PROBE, run
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from worlds import WORLDS, Split, Task, World
from worlds.training import accuracy, train

from recast_peft import RecastConfig, TaskPool, create_recast_optimizer, plan_recast
from recast_peft.analysis.matrix import AccuracyMatrix
from recast_peft.analysis.sequence import learn_in_sequence

RECAST = "RECAST"
RIVALS = (PROBE, "readout alone", "LoRA r=1", "LoRA r=8")
RATES = {PROBE: 0.0, "readout alone": 0.0, "LoRA r=1": 1.5e-2, "LoRA r=8": 3e-3}
SHORT = {"text": ("field", "type", "kind"), "pictures": ("digits", "icons", "scripts")}  # tasks of the demo
EPOCHS = {"text": 3, "pictures": 5}
# glibc keeps the memory of tensors that are freed, up to these bytes: else a tenth of the time goes into asking for it anew
HELD_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


@dataclass
class Result:
    """What a method reached on each task, and what a task of it costs beside the classifier."""

    trainable: int = 0
    bytes: int = 0
    seconds: float = 0.0
    accuracies: dict[str, float] = field(default_factory=dict)


def scores_of(model: nn.Module, split: Split, **more: object) -> Tensor:
    """Class scores of a model with its own classifier."""
    return model(*split.inputs, **more)


def coefficients(model: nn.Module) -> list[nn.Parameter]:
    """What a RECAST task trains beside its classifier."""
    return [p for name, p in model.named_parameters() if p.requires_grad and "recast_" in name]


def learn(world: World, tasks: dict[str, Task], seed: int, result: Result) -> tuple[PeftModel, AccuracyMatrix]:
    """Learn the tasks one after the other with RECAST, as it is."""

    def train_task(model: PeftModel, task: Task) -> None:
        model.eval()  # statistics of batch norms and dropout as they were: every method learns like this
        started = time.perf_counter()
        numbers = coefficients(model)
        result.trainable = sum(p.numel() for p in numbers)
        own = {id(p) for p in numbers}
        for parameter in model.parameters():  # every method's classifier begins at zero
            if parameter.requires_grad and id(parameter) not in own:
                nn.init.zeros_(parameter)
        optimizer = create_recast_optimizer(model, lr=world.head_lr)
        optimizer.param_groups.sort(key=lambda group: bool({id(p) for p in group["params"]} & own))  # the classifier first
        train(partial(scores_of, model), optimizer, task.train, world, world.epochs, seed, f"{RECAST} {task.name}")
        result.seconds += time.perf_counter() - started

    def test_task(model: nn.Module, task: Task) -> float:
        return accuracy(partial(scores_of, model), task.test) / 100

    configs = {
        name: RecastConfig(num_classes=len(task.classes), head_module=world.head, seed=seed) for name, task in tasks.items()
    }
    return learn_in_sequence(world.backbone(), tasks, train_task, test_task, config=configs, progress=False)


def reload(world: World, folder: Path, tasks: dict[str, Task]) -> PeftModel:
    """A fresh backbone with all saved tasks."""
    first, *others = tasks
    model = PeftModel.from_pretrained(world.backbone(), folder / first, first)
    for name in others:
        model.load_adapter(folder / name, name)
    return model.eval()


def coefficient_bytes(folder: Path) -> int:
    """Bytes of a saved task without its classifier: its config, and its numbers with their names."""
    from safetensors.torch import load_file, save

    entries = {name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if "recast_" in name}
    return (folder / "adapter_config.json").stat().st_size + len(save(entries))


@torch.no_grad()
def mixed_batch(pool: TaskPool, model: PeftModel, tasks: dict[str, Task], size: int = 24) -> float:
    """One batch with samples of all tasks: the largest difference to each sample's own task alone."""
    each = min(size // len(tasks), *(len(task.test) for task in tasks.values()))
    drawn = [(name, place) for place in range(each) for name in tasks]
    rows = [tasks[name].test[place : place + 1] for name, place in drawn]
    inputs = tuple(torch.cat(values) for values in zip(*(row.inputs for row in rows), strict=True))
    mixed = model(*inputs, task_ids=pool.ids([name for name, _ in drawn]))
    difference = 0.0
    for row, (name, _) in enumerate(drawn):
        with pool.use(name):
            alone = model(*(values[row : row + 1] for values in inputs))[0]
        difference = max(difference, float((mixed[row, : len(alone)] - alone).abs().max()))
    return difference


def swap_time(pool: TaskPool, tasks: dict[str, Task], times: int = 60) -> float:
    """Microseconds (a median) to make another task active."""
    measured = []
    for name, _ in zip(cycle(tasks), range(times), strict=False):
        started = time.perf_counter()
        pool.activate(name)
        measured.append(time.perf_counter() - started)
    pool.deactivate()
    return 1e6 * sorted(measured)[times // 2]


def table(results: dict[str, Result]) -> str:
    """A row for each method."""
    tasks = list(results[RECAST].accuracies)
    lines = ["method".ljust(15) + "trainable".rjust(11) + "bytes".rjust(10) + "seconds".rjust(9)]
    lines[0] += "".join(task.rjust(10) for task in (*tasks, "mean"))
    for name, one in results.items():
        found = [one.accuracies[task] for task in tasks]
        cost = f"{one.trainable:>11,}{one.bytes:>10,}{one.seconds / len(tasks):>9.1f}"
        lines.append(name.ljust(15) + cost + "".join(f"{value:>10.1f}" for value in (*found, sum(found) / len(found))))
    lines.append(
        "(of a task, its classifier aside: trainable parameters, bytes on disk, seconds of training; accuracy in percent)"
    )
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Result]], path: Path) -> None:
    """Bars of the methods by task, a panel for each backbone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(6.5 * len(found), 4.5), layout="constrained", squeeze=False)
    for panel, (world, results) in zip(panels[0], found.items(), strict=True):
        width = 0.8 / len(results)
        for i, (method, one) in enumerate(results.items()):
            places = [x + (i - (len(results) - 1) / 2) * width for x in range(len(one.accuracies))]
            panel.bar(places, list(one.accuracies.values()), width, label=f"{method}: {one.trainable:,} parameters")
        panel.set_xticks(range(len(one.accuracies)), list(one.accuracies))
        panel.set_ylabel("test accuracy in percent")
        panel.set_title(world)
        panel.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def learn_with_recast(world: World, tasks: dict[str, Task], options: argparse.Namespace) -> tuple[Result, str]:
    """Everything about RECAST on one backbone: what it reached, and what there is to say of it."""
    recast, folder, text = Result(), options.output / world.name, []
    say: Callable[[str], None] = text.append
    plain = world.backbone()
    plan, whole = plan_recast(plain, RecastConfig()), sum(p.numel() for p in plain.parameters())
    say(f"\n== {world.name}: {type(plain).__name__} of {whole:,} parameters ==")
    say(f"RECAST as it is: {plan.num_coefficients} numbers for each task on {len(plan.groups)} banks")
    model, matrix = learn(world, tasks, options.seed, recast)
    recast.accuracies = {name: 100 * float(matrix.values[-1][j]) for j, name in enumerate(tasks)}
    say(f"\nAccuracy on each task after each task:\n{matrix}")
    model.save_pretrained(folder, selected_adapters=list(tasks))
    recast.bytes = coefficient_bytes(folder / next(iter(tasks)))
    fresh = reload(world, folder, tasks)
    again = {}
    for name, task in tasks.items():
        fresh.set_adapter(name)
        again[name] = accuracy(partial(scores_of, fresh), task.test)
    same = all(abs(again[name] - recast.accuracies[name]) < 1e-4 for name in tasks)
    say(f"Saved and reloaded into a fresh backbone: {'the same' if same else 'OTHER'} accuracies on all {len(tasks)} tasks")
    pool = TaskPool(fresh)
    for name in tasks:
        pool.add(name, name)
    say(f"All tasks in one batch: every sample as with its own task alone, to {mixed_batch(pool, fresh, tasks):.0e}")
    say(f"Another task becomes active in {swap_time(pool, tasks):.0f} microseconds")
    return recast, "\n".join(text)


def learn_with_rival(method: str, world: World, tasks: dict[str, Task], options: argparse.Namespace) -> tuple[Result, str]:
    """The same tasks with another method, each on a backbone of its own."""
    one = Result()
    for name, task in tasks.items():
        found = run(world, task, method, options.seed, RATES[method], progress=options.processes == 1)
        one.accuracies[name] = found.accuracy
        one.trainable, one.bytes, one.seconds = found.trainable, found.bytes, one.seconds + found.seconds
    return one, ""


def learn_all(worlds: dict[str, tuple[World, dict[str, Task]]], options: argparse.Namespace) -> list[tuple[Result, str]]:
    """Every method on every backbone, several at a time; the results world by world, RECAST first."""
    jobs = [
        (learn_with_recast, *given, options) if method == RECAST else (learn_with_rival, method, *given, options)
        for given in worlds.values()
        for method in (RECAST, *options.methods)
    ]
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    os.environ.update(HELD_MEMORY)  # of the processes that are started
    alone = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads, "initargs": (threads,)}
    with ThreadPoolExecutor(1) if options.processes == 1 else ProcessPoolExecutor(options.processes, **alone) as pool:
        futures = [pool.submit(*job) for job in jobs]
        for _ in tqdm(as_completed(futures), total=len(jobs), desc="methods learned", disable=None):
            pass
    return [future.result() for future in futures]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for tasks, table and picture")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--methods", nargs="*", default=list(RIVALS), choices=RIVALS, help="beside RECAST")
    parser.add_argument("--train", type=int, default=360, help="most examples of a task to learn from")
    parser.add_argument("--test", type=int, default=300, help="most examples of a task to test on")
    parser.add_argument("--epochs", type=int, help="instead of the demo's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="methods at a time")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Result]]:
    """Run the demo; the results by world and method, which are also written."""
    options, started, text = parse(arguments), time.perf_counter(), []
    options.output.mkdir(parents=True, exist_ok=True)

    def say(what: object) -> None:
        text.append(str(what))
        print(what, flush=True)

    worlds: dict[str, tuple[World, dict[str, Task]]] = {}
    for name in options.worlds:
        tasks = {task: WORLDS[name].tasks[task]().limited(options.train, options.test) for task in SHORT[name]}
        worlds[name] = replace(WORLDS[name], epochs=options.epochs or EPOCHS[name]), tasks
    learned, methods = iter(learn_all(worlds, options)), (RECAST, *options.methods)
    found = {}
    for name in worlds:
        results, texts = zip(*(next(learned) for _ in methods), strict=True)
        found[name] = dict(zip(methods, results, strict=True))
        say(f"{texts[0]}\n\n{table(found[name])}")
    say(f"\n{time.perf_counter() - started:.0f} seconds in all; table, picture and tasks are in {options.output}")
    draw(found, options.output / "demo.png")
    summary = {world: {method: vars(one) for method, one in results.items()} for world, results in found.items()}
    (options.output / "demo.txt").write_text("\n".join(text) + "\n")
    (options.output / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
