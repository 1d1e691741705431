"""Prototypes: a head that is filled instead of trained, and what is collected of the features of labelled examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecastTargetError
from ..mimicry.features import device_of, evaluating
from .head import TaskHead
from .head_building import PrototypeHead


def fit_prototypes(model: nn.Module, batches: Iterable[Any], adapter_name: str | None = None) -> Tensor:
    """Set a task's prototypes to the mean features of its classes.

    Args:
        model: a PEFT model with a task made with ``head_type="prototypes"``.
        batches: ``(inputs, labels)`` pairs, or dictionaries with ``labels`` in them (given to the model by name).
        adapter_name: the task; None is the active one.

    Returns:
        ``(classes, features)`` the prototypes.

    Raises:
        RecastTargetError: if the task has no prototypes or is not active, a label is none of its classes, or a class has
            no example.
    """
    heads = [m for m in model.modules() if isinstance(m, TaskHead)]
    name = adapter_name or (heads[0].active_adapters[0] if heads and heads[0].active_adapters else None)
    head = heads[0].modules_to_save[name] if heads and name is not None and name in heads[0].modules_to_save else None
    if not isinstance(head, PrototypeHead):
        raise RecastTargetError(f"task {name!r} has no prototypes: make it with RecastConfig(..., head_type='prototypes')")
    if heads[0].disable_adapters or name not in heads[0].active_adapters:
        raise RecastTargetError(f"task {name!r} is not active: call model.set_adapter({name!r}) first")
    classes, features = head.prototypes.shape
    found = class_statistics(model, head, classes, features, batches)
    with torch.no_grad():
        head.prototypes.copy_(found.sums / found.counts[:, None])
    return head.prototypes.detach().clone()


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """What is kept of the features of labelled examples, in float64.

    Attributes:
        counts: ``(classes,)`` the examples of each class.
        sums: ``(classes, features)`` of their features.
        products: ``(features, features)`` sum of the outer products of all features, where it was asked for.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add examples ``(examples, features)`` with their labels ``(examples,)``.

        Raises:
            RecastTargetError: if a label is none of the classes.
        """
        if labels.min() < 0 or labels.max() >= len(self.sums):
            raise RecastTargetError(
                f"labels must be numbers of the task's classes\n  labels:  {int(labels.min())} to {int(labels.max())}\n"
                f"  classes: 0 to {len(self.sums) - 1}"
            )
        labels, features = labels.cpu(), features.detach().to("cpu", torch.float64)
        self.sums.index_add_(0, labels, features)
        self.counts.add_(torch.bincount(labels, minlength=len(self.sums)))
        if self.products is not None:
            self.products.addmm_(features.T, features)


def class_statistics(
    model: nn.Module, head: nn.Module, classes: int, features: int, batches: Iterable[Any], products: bool = False
) -> ClassStatistics:
    """Run a model in evaluation mode and collect what reaches its head.

    Args:
        model: as it stands.
        head: the module whose input, ``(examples, features)``, counts.
        classes: classes of the task.
        features: that reach the head.
        batches: ``(inputs, labels)`` pairs, or dictionaries with ``labels`` in them (given to the model by name).
        products: whether outer products are kept too.

    Raises:
        RecastTargetError: if a label is none of the classes, a class has no example, or the head sees more than one vector an
            example.
    """
    found = ClassStatistics(
        torch.zeros(classes, dtype=torch.float64),
        torch.zeros(classes, features, dtype=torch.float64),
        torch.zeros(features, features, dtype=torch.float64) if products else None,
    )
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                labels = _run(model, batch)
                given = seen.pop()
                if given.shape != (len(labels), features):
                    raise RecastTargetError(
                        f"the classifier must see one vector for each label\n  its input: {tuple(given.shape)}\n"
                        f"  labels:    {tuple(labels.shape)}"
                    )
                found.add(given, labels)
    finally:
        handle.remove()
    empty = (found.counts == 0).nonzero().flatten().tolist()
    if empty:
        raise RecastTargetError(f"no example of class {empty[:5]} was given; every class needs at least one")
    return found


def _run(model: nn.Module, batch: Any) -> Tensor:
    device = device_of(model)

    def here(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, dict):
        model(**{key: here(value) for key, value in batch.items() if key != "labels"})
        return batch["labels"]
    inputs, labels = batch
    model(here(inputs))
    return labels
