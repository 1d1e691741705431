"""The paper's partners alone and with RECAST: test accuracy on glyphs, and the numbers that each trains.

    python examples/benchmarks/partners.py                        # the vision transformer: AdaptFormer and Piggyback
    python examples/benchmarks/partners.py --backbone cnn         # a small convolutional network: CLR and Piggyback

"X" and "RECAST + X" differ in ``train_coefficients`` alone. One schedule for all, and one learning rate for each kind of part.
The convolutional network is pretrained first, on the images that the vision transformer was pretrained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import machine, table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' folder

from glyph_backbone import load_backbone
from glyphs import load_task, pretraining_batches, pretraining_characters
from training import Schedule, test_accuracy, train_groups, train_probe

from recast_peft import RecastConfig, create_recast_optimizer, get_recast_model

PARTNER_LR = {"adaptformer": 3e-3, "clr": 3e-3, "piggyback": 3e-4}
METHODS = {"vit": ("adaptformer", "piggyback"), "cnn": ("clr", "piggyback")}
TARGETS = {"vit": "all-attention", "cnn": "all-conv"}
WIDTH = 48


class Cnn(nn.Module):
    """Four residual convolutions after a stem. Input ``(N, 1, 28, 28)``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, stride=2, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(4))
        self.num_features = 4 * WIDTH
        self.head: nn.Module = nn.Linear(self.num_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = x + F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if place in (1, 2) else x
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def pretrained_cnn(batches: int, seed: int = 0) -> Cnn:
    """The convolutional network, pretrained, without its head."""
    torch.manual_seed(seed)
    model = Cnn(len(pretraining_characters()))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=batches)
    for images, labels in pretraining_batches(batches, seed=seed):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
        decay.step()
    model.head = nn.Identity()
    return model.eval()


def configs(backbone: str, classes: int, seed: int) -> dict[str, tuple[RecastConfig, str | None]]:
    """For every method its config, and the partner in it."""
    common: dict[str, Any] = {"target_modules": TARGETS[backbone], "num_classes": classes, "head_module": "head", "seed": seed}
    found: dict[str, tuple[RecastConfig, str | None]] = {"RECAST": (RecastConfig(**common), None)}
    for name in METHODS[backbone]:
        found[name] = (RecastConfig(**common, partners=[name], train_coefficients=False), name)
        found[f"RECAST + {name}"] = (RecastConfig(**common, partners=[name]), name)
    return found


def measure(
    backbone: str, make_backbone: Callable[[], nn.Module], task_name: str, schedule: Schedule, per_class: int
) -> list[dict[str, Any]]:
    """One row for each method on one task."""
    task = load_task(task_name, schedule.seed, train_per_class=per_class)
    probe, _ = train_probe(make_backbone(), task, schedule)
    rows: list[dict[str, Any]] = [{"method": "linear probe", "task": task_name, "numbers": 0, "loss": None, "accuracy": probe}]
    for method, (config, partner) in configs(backbone, task.num_classes, schedule.seed).items():
        torch.manual_seed(schedule.seed)  # of the dropout
        model = get_recast_model(make_backbone(), config)
        rates = {"lr": schedule.head_lr, "coefficient_lr": schedule.coefficient_lr, "partner_lr": PARTNER_LR.get(partner or "")}
        groups = create_recast_optimizer(model, **rates).param_groups  # type: ignore[arg-type]
        head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "head" in n)
        train_groups(model, groups, task.train_images, task.train_labels, schedule, schedule.epochs)
        with torch.no_grad():
            loss = F.cross_entropy(model(task.train_images), task.train_labels).item()
        numbers = model.get_nb_trainable_parameters()[0] - head
        rows.append(
            {"method": method, "task": task_name, "numbers": numbers, "loss": loss, "accuracy": test_accuracy(model, task)}
        )
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(METHODS), default="vit")
    parser.add_argument("--tasks", nargs="+", default=["greek", "cyrillic"])
    parser.add_argument("--epochs", type=int, default=Schedule.epochs)
    parser.add_argument("--train-per-class", type=int, default=40)
    parser.add_argument("--pretraining-batches", type=int, default=1000, help="of the convolutional network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    schedule = dataclasses.replace(Schedule(), epochs=options.epochs, seed=options.seed)
    make_backbone: Callable[[], nn.Module] = load_backbone
    if options.backbone == "cnn":
        state = pretrained_cnn(options.pretraining_batches).state_dict()

        def make_backbone() -> nn.Module:
            model = Cnn(1)
            model.head = nn.Identity()
            model.load_state_dict(state)
            return model.eval()

    rows = [
        row
        for task in options.tasks
        for row in measure(options.backbone, make_backbone, task, schedule, options.train_per_class)
    ]
    print(table(rows))
    content = {"backbone": options.backbone, "rows": rows}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
    return content


if __name__ == "__main__":
    main()
