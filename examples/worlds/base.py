"""What a world and its tasks are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Item = TypeVar("Item")


@dataclass(frozen=True)
class Split:
    """Examples with their classes.

    Attributes:
        inputs: what the model is called with, one row for each example: pictures, or token numbers and their mask.
        labels: shape ``(examples,)``.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The split on a device."""
        return Split(tuple(values.to(device) for values in self.inputs), self.labels.to(device))

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(tuple(values[rows] for values in self.inputs), self.labels[rows])


@dataclass(frozen=True)
class Task:
    """A classification task of a world: its name, the names of its classes, and what to learn and to test on."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    def limited(self, train: int | None, test: int | None) -> Task:
        """The same task with at most so many examples; they come shuffled, so the first ones are a fair choice."""
        return replace(self, train=self.train[: train or len(self.train)], test=self.test[: test or len(self.test)])


@dataclass(frozen=True)
class World:
    """A pretrained backbone and the tasks that are made for it.

    Attributes:
        name: ``text``, ``pictures`` or ``vit``.
        backbone: makes the pretrained model anew; called with a split's inputs it gives features ``(examples, width)``.
        width: of the features.
        head: name of the module that a task's classifier replaces.
        tasks: by name, what makes each.
        epochs: passes over a task's training examples in a study; every method gets as many.
        head_lr: learning rate of the classifier, the same for every method.
        lora_targets: what LoRA and its kin adapt here.
        norm_targets: the norms that LN tuning trains.
        ia3_targets: what IA3 scales.
        ia3_feedforward: those of them whose inputs it scales, and not their outputs.
        batch_size: examples in a step.
        special_tokens: of texts: what stands for a word that was taken out, then tokens that are no words.
    """

    name: str
    backbone: Callable[[], nn.Module]
    width: int
    head: str
    tasks: Mapping[str, Callable[[], Task]]
    epochs: int
    head_lr: float
    lora_targets: Sequence[str] | str
    norm_targets: Sequence[str] | str
    ia3_targets: Sequence[str] | str
    ia3_feedforward: Sequence[str] = ()
    batch_size: int = 32
    special_tokens: tuple[int, ...] = ()


def draw_evenly(
    items: Mapping[str, Sequence[Item]], train: int, test: int, seed: int = 0
) -> tuple[tuple[str, ...], list[tuple[Item, int]], list[tuple[Item, int]]]:
    """Draw the same number of items of each class, and shuffle them.

    Args:
        items: by class, in an order that does not change from run to run.
        train: items of each class to learn on.
        test: at most so many others of each class to test on.
        seed: of the drawing.

    Returns:
        The classes, and for training and test the items with the number of their class.

    Raises:
        ValueError: if a class has too few items.
    """
    generator, classes = np.random.default_rng(seed), tuple(sorted(items))
    parts: tuple[list[tuple[Item, int]], ...] = ([], [])
    for label, name in enumerate(classes):
        found = [(items[name][i], label) for i in generator.permutation(len(items[name]))]
        if len(found) <= train:
            raise ValueError(f"class {name!r} has {len(found)} items; more than {train} are needed to learn and to test on")
        parts[0].extend(found[:train])
        parts[1].extend(found[train : train + test])
    learn, check = ([part[i] for i in generator.permutation(len(part))] for part in parts)
    return classes, learn, check


def labels_of(items: Sequence[tuple[object, int]]) -> Tensor:
    """The numbers of the classes as a tensor."""
    return torch.tensor([label for _, label in items])
