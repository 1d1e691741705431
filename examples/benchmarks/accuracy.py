"""What do the numbers that a task trains buy? RECAST beside PEFT's methods, at equal counts and at natural sizes.

    python examples/benchmarks/accuracy.py --output accuracy_output

Every method learns each of the demo's tasks, from the same classifier, on the same images in the same order, for as long. Its
learning rate, and the classifier's rate and weight decay, are found by the same search, once where a method has several sizes,
on images of two tasks that are drawn with another seed; the test images only judge what was chosen. Beside the classifier
that was trained, one is fitted in closed form to the trained model's features (linear discriminant analysis), so that what a
method changes in the features can be told from how well the classifier was trained. Runs are kept in ``runs.jsonl`` in the
output folder: a study that is broken off goes on where it stood, and ``--table`` shows what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' folder

from demo import DEFAULT_TASKS
from peft import IA3Config, LNTuningConfig, LoraConfig, TinyLoraConfig, VeraConfig
from study import TUNING_TASKS, Method, NotRun, Study, linear_probe, part_of_backbone, peft_method, recast_method
from study_tables import Row, draw, precision, row_of, table
from training import Schedule

TARGETS = ["qkv", "fc1", "fc2"]
ALL_FOUR = ["qkv", "attn.proj", "fc1", "fc2"]
REFERENCE = "LoRA r=8"
PROBE = linear_probe()

# shared by the layers of a bank, in the last four blocks or in all eight; groups of 2, 4 and 8 blocks
RECAST_SIZES: dict[int, dict[str, Any]] = {
    12: {"coefficient_sharing": "blocks", "layers_to_transform": [4, 5, 6, 7]},
    24: {"coefficient_sharing": "blocks"},
    48: {"group_size": 2},
    96: {"group_size": 4},
    192: {"group_size": 8},
}
TINYLORA_SIZES: dict[int, dict[str, Any]] = {
    12: {"u": 1, "weight_tying": 0.5},
    24: {"u": 1},
    48: {"u": 2},
    96: {"u": 4},
    192: {"u": 8},
}


def lora(rank: int, targets: Sequence[str] = ("qkv",)) -> Method:
    """PEFT's LoRA, on the fused projections or on other layers."""
    name = f"LoRA r={rank}" + ("" if list(targets) == ["qkv"] else ", all four")
    return peft_method(name, LoraConfig, {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}, 3e-3)


def recast(numbers: int) -> Method:
    """RECAST with so many numbers."""
    return recast_method(f"RECAST, {numbers}", {"target_modules": TARGETS, **RECAST_SIZES[numbers]}, 0.05)


def recast_all_four(group_size: int) -> Method:
    """RECAST on every linear layer of a block."""
    fields = {"target_modules": ALL_FOUR, "group_size": group_size}
    return recast_method(f"RECAST, all four, groups of {group_size}", fields, 0.05)


def recast_with_biases(name: str, **fields: Any) -> Method:
    """RECAST with a coefficient for every bias of the blocks."""
    return recast_method(f"RECAST + bias, {name}", {"partners": [{"method": "bias"}], **fields}, 0.05)


def tinylora(numbers: int) -> Method:
    """TinyLoRA with so many numbers on the same layers."""
    return peft_method(f"TinyLoRA, {numbers}", TinyLoraConfig, {"target_modules": TARGETS, **TINYLORA_SIZES[numbers]}, 0.05)


ROWS: dict[str, list[Method]] = {
    "RECAST, qkv + fc1 + fc2": [recast(numbers) for numbers in RECAST_SIZES],
    "RECAST, all four": [recast_all_four(1), recast_all_four(2)],
    "RECAST, attention": [recast_method("RECAST, attention", {"target_modules": ["qkv", "attn.proj"]}, 0.05)],
    "RECAST, MLP": [
        recast_method("RECAST, fc1", {"target_modules": ["fc1"], "group_size": 1}, 0.05),
        recast_method("RECAST, MLP, groups of 1", {"target_modules": ["fc1", "fc2"], "group_size": 1}, 0.05),
        recast_method("RECAST, MLP", {"target_modules": ["fc1", "fc2"]}, 0.05),
    ],
    "RECAST, estimated gradients": [
        recast_method("RECAST, 48, bfloat16 gradient", {"target_modules": TARGETS, "coefficient_gradient": "bfloat16"}, 0.05),
    ],
    "RECAST with biases": [
        recast_with_biases("fc1", target_modules=["fc1"], group_size=1),
        recast_with_biases("MLP, groups of 1", target_modules=["fc1", "fc2"], group_size=1),
        recast_with_biases("all four, groups of 2", target_modules=ALL_FOUR),
    ],
    "TinyLoRA, qkv + fc1 + fc2": [
        *(tinylora(numbers) for numbers in TINYLORA_SIZES),
        peft_method("TinyLoRA u=64", TinyLoraConfig, {"target_modules": TARGETS, "u": 64}, 0.05),  # PEFT's default
    ],
    "TinyLoRA, all four": [peft_method("TinyLoRA, all four", TinyLoraConfig, {"target_modules": ALL_FOUR, "u": 1}, 0.05)],
    "LoRA, qkv": [lora(1), lora(8)],
    "LoRA, all four": [lora(1, ALL_FOUR), lora(8, ALL_FOUR)],
    "LN tuning": [peft_method("LN tuning", LNTuningConfig, {"target_modules": r".*\.norm[12]|norm"}, 1e-2)],
    "VeRA": [peft_method("VeRA r=256", VeraConfig, {"target_modules": ["qkv"], "r": 256}, 1e-2)],
    "IA3": [peft_method("IA3", IA3Config, {"target_modules": ["qkv", "fc2"], "feedforward_modules": ["fc2"]}, 1e-2)],
    "BitFit": [part_of_backbone("BitFit", "bias", 1e-2)],
    "full fine-tuning": [part_of_backbone("full fine-tuning", "", 1e-3)],
}
"""The methods by family, with the learning rates that the search starts from."""

BIASES = ROWS["RECAST with biases"][1]
SEARCHED = {"RECAST": recast(48), "RECAST + bias": BIASES, "TinyLoRA": tinylora(48), "LoRA r=1": lora(1), "LoRA r=8": lora(8)}
"""By what a row's name begins with: the row whose search gives its rate. Every other row is searched itself."""
ITSELF = ("TinyLoRA, 96", "TinyLoRA, 192")  # with more numbers a layer the rate of 48 diverges

TUNING_SEED = 11  # its images judge nothing else
HEADS = [(lr, decay) for lr in (0.003, 0.01) for decay in (0.01, 10.0, 30.0)]
"""Learning rates and weight decays of the classifier that the search chooses from."""

QUICK = ("RECAST, 48", "TinyLoRA, 48", "LoRA r=8")


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The command line that studies share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=Path(output), help="folder for table, JSON and picture")
    made.add_argument("--runs", type=Path, help="file of runs, which studies may share (default: runs.jsonl in the output)")
    made.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--epochs", type=int, default=Schedule.epochs)
    made.add_argument("--train-per-class", type=int, default=40)
    made.add_argument("--test-per-class", type=int, default=100)
    made.add_argument("--table", action="store_true", help="make no runs, show what is there")
    made.add_argument("--quick", action="store_true", help="few images, one seed, few methods: shows that it works, no more")
    return made


def make_study(options: argparse.Namespace) -> Study:
    """The study that a command line asks for; ``--quick`` changes the options."""
    torch.set_num_threads(1)
    if options.quick:
        options.tasks, options.seeds, options.epochs = ["arrows", "damage"], [0], 1
        options.train_per_class, options.test_per_class = 6, 10
    options.output.mkdir(parents=True, exist_ok=True)
    runs = options.runs or options.output / "runs.jsonl"
    return Study(runs, Schedule(epochs=options.epochs), options.train_per_class, options.test_per_class, options.table)


def tuned(study: Study, families: dict[str, list[Method]], options: argparse.Namespace) -> dict[str, list[Method]]:
    """The methods with the rates that the search finds; in ``--table`` mode those whose search is there."""
    tasks = options.tasks[:1] if options.quick else TUNING_TASKS
    heads = HEADS[:2] if options.quick else HEADS
    found: dict[str, list[Method]] = {}
    for family, methods in families.items():
        for method in methods:
            with suppress(NotRun):
                key = method.name if method.name in ITSELF else method.name.split(",")[0]
                best = study.tune(SEARCHED.get(key, method), tasks, TUNING_SEED, "test", heads)
                tuned = replace(method, lrs=best.lrs, head_lr=best.head_lr, head_decay=best.head_decay)
                found.setdefault(family, []).append(tuned)
    return found


def collect(study: Study, families: dict[str, list[Method]], options: argparse.Namespace) -> list[Row]:
    """Make the runs of methods, seed by seed; all that is known as rows. The first method is the probe."""
    named = [(family, method) for family, methods in families.items() for method in methods]
    if not options.table:
        for seed in options.seeds:
            for _, method in named:
                for task in options.tasks:
                    study.run(method, task, seed)
    probe = named[0][1]
    rows = [row_of(study, family, method, probe, options.tasks, options.seeds) for family, method in named]
    return [row for row in rows if row is not None]


def show(rows: list[Row], options: argparse.Namespace, title: str) -> None:
    """Print the table, and write table, JSON and picture."""
    text = table(rows, REFERENCE)
    error = precision(rows)
    if error is not None:
        text += f"\n\nstandard error of a gain, by the spread over seeds: {error:.2f} points"
    print(text)
    (options.output / "table.md").write_text(text + "\n")
    (options.output / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    draw(rows, options.output / "picture.png", title)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the study; returns the rows."""
    made = parser(__doc__, "accuracy_output")
    made.add_argument("--methods", nargs="+", help="only these rows, by name (default: all)")
    options = made.parse_args(arguments)
    study = make_study(options)
    names = options.methods or (QUICK if options.quick else None)
    families = {family: [m for m in methods if names is None or m.name in names] for family, methods in ROWS.items()}
    rows = collect(study, tuned(study, {PROBE.name: [PROBE], **families}, options), options)
    show(rows, options, f"Accuracy against numbers trained, mean of {len(options.tasks)} tasks")
    return rows


if __name__ == "__main__":
    main()
