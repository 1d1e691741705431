"""Prototypes: a head that is filled instead of trained, and how what reaches a head is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecastConfigError, RecastTargetError
from ..mimicry.features import evaluating, run_on
from ..validation import is_whole, shown
from .head import task_heads
from .head_building import PrototypeHead


def fit_prototypes(model: nn.Module, batches: Iterable[Any], adapter_name: str | None = None) -> Tensor:
    """Set a task's prototypes to the mean features of its classes.

    Args:
        model: a PEFT model with a task made with ``head_type="prototypes"``.
        batches: ``(inputs, labels)`` pairs, or dictionaries with ``labels`` in them (dictionaries are given by name).
        adapter_name: the task; None is the active one.

    Returns:
        ``(classes, features)`` the prototypes.

    Raises:
        RecastTargetError: if the task has no prototypes or is not active, a label is none of its classes, or a class has
            no example.
    """
    name, holding = wrappers_of_task(task_heads(model), adapter_name)
    head = next((wrapper.modules_to_save[name] for wrapper in holding), None)
    if not isinstance(head, PrototypeHead):
        task = "the active task" if name is None else f"task {name!r}"
        raise RecastTargetError(f"{task} has no prototypes: make it with RecastConfig(..., head_type='prototypes')")
    check_is_active(name, holding)
    classes, features = head.prototypes.shape
    counts = torch.zeros(classes, dtype=torch.float64)
    sums = torch.zeros(classes, features, dtype=torch.float64)

    def add(given: Tensor, labels: Tensor) -> None:
        sums.index_add_(0, labels, given.double())
        counts.add_(torch.bincount(labels, minlength=classes))

    read_head_inputs(model, head, (classes, features), batches, add)
    check_every_class(counts)
    with torch.no_grad():
        head.prototypes.copy_(sums / counts[:, None])
    return head.prototypes.detach().clone()


def wrappers_of_task(wrappers: Iterable[Any], adapter_name: str | None) -> tuple[Any, list[Any]]:
    """The name of a task, None being the active one, and those wrappers that hold a module of it."""
    active = next((wrapper.active_adapters[0] for wrapper in wrappers if wrapper.active_adapters), None)
    name = active if adapter_name is None else adapter_name
    return name, [wrapper for wrapper in wrappers if name in wrapper.modules_to_save]


def check_is_active(name: str, holding: Iterable[Any]) -> None:
    """Refuse a task whose modules are not those that are called (``RecastTargetError``)."""
    if any(wrapper.disable_adapters or name not in wrapper.active_adapters for wrapper in holding):
        raise RecastTargetError(f"task {name!r} is not active: call model.set_adapter({name!r}) first")


def read_head_inputs(
    model: nn.Module,
    head: nn.Module,
    shape: tuple[int, int],
    batches: Iterable[Any],
    take: Callable[[Tensor, Tensor], None],
) -> None:
    """Run a model in evaluation mode and hand on what reaches its head, batch by batch.

    Args:
        model: as it stands.
        head: the module whose input, ``(examples, features)``, counts.
        shape: classes of the task, and features that reach the head.
        batches: as ``fit_prototypes`` takes them.
        take: is called with ``(examples, features)`` and ``(examples,)`` labels, both on the CPU.

    Raises:
        RecastConfigError: if a batch is no pair and no dictionary.
        RecastTargetError: for labels that are no classes; if the head sees several vectors an example, or numbers not finite.
    """
    classes, features = shape
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with hook, torch.no_grad(), evaluating(model):
        for batch in batches:
            labels = whole_labels(_run(model, batch), classes)
            given = seen.pop().cpu()
            if given.shape != (len(labels), features):
                raise RecastTargetError(
                    f"the classifier must see one vector for each label\n  its input: {tuple(given.shape)}\n"
                    f"  labels:    {tuple(labels.shape)}"
                )
            if not torch.isfinite(given).all():
                raise RecastTargetError("the classifier sees numbers that are not finite: look at the inputs, and at the model")
            take(given, labels)


def whole_labels(labels: Any, classes: int) -> Tensor:
    """Labels ``(examples,)`` in 64 bits on the CPU; ``RecastTargetError`` if they are no whole numbers of the classes."""
    if not is_whole(labels) or labels.ndim != 1:
        found = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else shown(labels)
    elif not len(labels) or labels.min() < 0 or labels.max() >= classes:
        found = f"{int(labels.min())} to {int(labels.max())}" if len(labels) else "none"
    else:
        return labels.cpu().long()
    raise RecastTargetError(
        "labels must be numbers of the task's classes, one whole number for each example\n"
        f"  labels:  {found}\n  classes: 0 to {classes - 1}"
    )


def check_every_class(counts: Tensor) -> None:
    """Refuse classes without an example; counts ``(classes,)`` (``RecastTargetError``)."""
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise RecastTargetError(f"no example of class {empty[:5]} was given; every class needs at least one")


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        batch = {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
    elif not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        raise RecastConfigError(
            f"batches holds a {type(batch).__name__}: expected a list of (inputs, labels) pairs, such as a DataLoader yields "
            "them, or of dictionaries with labels; a single batch is given as [(inputs, labels)]"
        )
    inputs, labels = batch
    if isinstance(inputs, (Tensor, Mapping)):
        run_on(model, inputs)
    else:
        model(inputs)
    return labels
