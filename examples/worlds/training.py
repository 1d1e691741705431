"""One training loop for every method: same examples in the same order, same schedule, same classifier."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .base import Split, World

Scores = Callable[[Split], Tensor]
"""Gives class scores ``(examples, classes)`` of a split: a model with its classifier, or a classifier on stored features."""


def train(
    scores: Scores, optimizer: torch.optim.Optimizer, split: Split, world: World, epochs: int, seed: int, progress: str = ""
) -> None:
    """Train what an optimiser holds: a rise over a tenth of the steps, then a cosine; the adapter's gradient is clipped to 1.

    Args:
        scores: of a part of the split.
        optimizer: its first group is the classifier, which is not clipped.
        split: what to learn from.
        world: says how many examples a step has.
        epochs: passes over the split.
        seed: of the order of the examples.
        progress: what the bar is called; without a name, or a terminal, there is none.
    """
    steps = epochs * math.ceil(len(split) / world.batch_size)
    rates = [group["lr"] for group in optimizer.param_groups]
    planned = max(steps, 11)  # of fewer there is no tenth to rise in, and of ten torch divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=planned, pct_start=0.1)
    adapter = [parameter for group in optimizer.param_groups[1:] for parameter in group["params"]]
    order = torch.Generator().manual_seed(seed)
    with tqdm(total=steps, desc=progress, disable=None if progress else True, leave=False) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(split), generator=order).split(world.batch_size):
                part = split[rows]
                loss = F.cross_entropy(scores(part), part.labels)
                optimizer.zero_grad()
                loss.backward()
                if adapter:
                    nn.utils.clip_grad_norm_(adapter, 1.0)
                optimizer.step()
                schedule.step()
                bar.update()


@torch.no_grad()
def accuracy(scores: Scores, split: Split, batch_size: int = 128) -> float:
    """Percentage of examples whose class is found."""
    hits = 0
    for start in range(0, len(split), batch_size):
        part = split[start : start + batch_size]
        hits += int((scores(part).argmax(1) == part.labels).sum())
    return 100 * hits / len(split)


@torch.no_grad()
def features(model: nn.Module, split: Split, batch_size: int = 128) -> Split:
    """The split with the features of a frozen backbone as its inputs."""
    found = [model(*split[start : start + batch_size].inputs) for start in range(0, len(split), batch_size)]
    return Split((torch.cat(found),), split.labels)


def fresh_classifier(world: World, classes: int) -> nn.Linear:
    """A classifier that begins at zero, the same for every method."""
    head = nn.Linear(world.width, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
