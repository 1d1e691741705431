"""How far are estimated gradients of coefficients from exact ones, beside the noise that batches bring anyway?

    python examples/benchmarks/gradient_noise.py

The demo's backbone on one of its tasks. The gradient of all coefficients for one batch is formed exactly and in bfloat16; its
error is the norm of the difference, as a share of the exact gradient's norm, root mean square over batches. Beside it stands
the noise of batches: how far the exact gradient of one batch is from the mean over all of them. Both are measured on a fresh
task and on one that was trained for some passes. Their ratio, squared, is how much the estimate adds to the variance of a
training step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' folder

from glyph_backbone import load_backbone
from glyphs import Task, load_task
from timing import Row, Tables, arguments, finish, start
from torch import Tensor, nn
from training import Schedule, recast_groups, train_groups

from recast_peft import RecastConfig, get_recast_model

TARGETS = ["qkv", "fc1", "fc2"]
WAYS: dict[str, str] = {
    "bfloat16": "bfloat16",
}


def coefficients_of(model: nn.Module) -> list[nn.Parameter]:
    """The coefficients of the task, in the model's order."""
    return [p for name, p in model.named_parameters() if "recast_coefficients" in name]


def build(task: Task, way: str, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The task on a fresh backbone, with what was trained before."""
    config = RecastConfig(num_classes=task.num_classes, target_modules=TARGETS, coefficient_gradient=way)
    model = get_recast_model(load_backbone(), config)
    if state is not None:
        model.load_state_dict(state)
    return model.train()


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of all coefficients, ``(numbers,)``."""
    loss = F.cross_entropy(model(images), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, coefficients_of(model))])


def errors(task: Task, state: dict[str, Tensor] | None, batches: int, batch_size: int) -> list[Row]:
    """One row a way."""
    order = torch.randperm(len(task.train_labels), generator=torch.Generator().manual_seed(0))
    rows = [part for part in order.split(batch_size) if len(part) == batch_size][:batches]
    parts = [(task.train_images[part], task.train_labels[part]) for part in rows]
    model = build(task, "exact", state)
    exact = torch.stack([gradient(model, *part) for part in parts])
    size = exact.norm(dim=1).square().mean().sqrt()
    noise = (exact - exact.mean(0)).norm(dim=1).square().sum().div(max(1, len(parts) - 1)).sqrt() / size
    found = []
    for name, way in WAYS.items():
        model = build(task, way, state)
        squares = [(gradient(model, *part) - own).square().sum() for part, own in zip(parts, exact, strict=True)]
        error = torch.stack(squares).mean().sqrt() / size
        added = float((error / noise).square())
        found.append({"gradient": name, "error": float(error), "noise of batches": float(noise), "variance added": added})
    return found


def main(given: list[str] | None = None) -> Tables:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("--task", default="operators")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3, help="that the trained task was trained for")
    options = start(parser, given)
    per_class = 40
    if options.quick:
        options.batches, options.epochs, per_class = 2, 1, 8
    task = load_task(options.task, 0, per_class, 1)
    schedule = Schedule()
    model = build(task, "exact")
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    train_groups(model, recast_groups(model, schedule), task.train_images, task.train_labels, schedule, options.epochs)
    states = {"a fresh task": fresh, f"after {options.epochs} passes": model.state_dict()}
    tables = {
        f"gradients of {sum(p.numel() for p in coefficients_of(model))} coefficients, {options.task}, {when}": errors(
            task, state, options.batches, schedule.batch_size
        )
        for when, state in states.items()
    }
    return finish("gradient_noise", options, tables, "variance added")


if __name__ == "__main__":
    main()
