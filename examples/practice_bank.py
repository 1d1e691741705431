"""Grow the bank of biases that the demo's tasks start from, out of practice tasks, and write it.

A practice task shows characters of the pretraining, worn more than pretraining shows them (:func:`glyphs.practice_task`). So
the bank is made by whoever pretrained the backbone, before there is any task. One CPU thread needs half a minute::

    python examples/practice_bank.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from glyph_backbone import load_backbone
from glyphs import Task, practice_task
from torch import Tensor
from training import Schedule, train_groups

from recast_peft import StoredBank, grow_bias_bank, load_bank

BANK_PATH = Path(__file__).parent / "backbone" / "practice_biases"
"""Where the bank lies."""

TASKS = 5
BIAS_LR = 0.0316  # of biases that are trained whole, as the search of benchmarks/accuracy.py found it


def trained_biases(task: Task, schedule: Schedule) -> dict[str, Tensor]:
    """The biases of the backbone, trained on a task together with a classifier.

    Returns:
        by parameter name, each ``(channels,)``.
    """
    torch.manual_seed(schedule.seed)
    model = load_backbone()
    model.reset_classifier(task.num_classes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith("head."))
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias") and not name.startswith("head.")}
    groups: list[dict[str, object]] = [
        {"params": list(biases.values()), "lr": BIAS_LR, "weight_decay": 0.0},
        {"params": list(model.head.parameters()), "lr": schedule.head_lr, "weight_decay": schedule.head_decay},
    ]
    train_groups(model, groups, task.train_images, task.train_labels, schedule, schedule.epochs, task.name)
    return {name: parameter.detach() for name, parameter in biases.items()}


def practice_bank(tasks: int = TASKS, train_per_class: int = 40, epochs: int = Schedule.epochs) -> StoredBank:
    """A bank of biases with one template for each practice task."""
    schedule = Schedule(epochs=epochs, head_decay=10.0)
    practised = [practice_task(index, 0, train_per_class, 1) for index in range(tasks)]
    return grow_bias_bank(load_backbone(), [trained_biases(task, schedule) for task in practised])


def load_practice_bank(path: Path = BANK_PATH) -> StoredBank:
    """The bank that lies beside the backbone."""
    return load_bank(path)


def main(arguments: list[str] | None = None) -> None:
    """Make the bank, write it and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BANK_PATH, help="folder to write (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    bank = practice_bank().save(options.output)
    print(f"{options.output}: {bank.nbytes:,} bytes of templates, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
