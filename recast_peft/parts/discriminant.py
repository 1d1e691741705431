"""A task's classifier in closed form: linear discriminant analysis of the features that reach it.

With tens of images a class, a linear classifier that is trained by gradient descent fits the training images far better than
others, while coefficients, which are few, do not. So after a task was trained its classifier may be put in place anew: the
class means and one covariance for all classes, drawn towards a sphere, give it without a further training step. It is an
ordinary linear layer as before.

Source: R. A. Fisher, "The use of multiple measurements in taxonomic problems", 1936; the covariance that is drawn towards a
sphere: J. H. Friedman, "Regularized discriminant analysis", 1989, with one covariance for all classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import RecastConfigError, RecastTargetError
from .head import ClassStatistics, TaskHead, class_statistics

SHRINKAGE = 0.2


def fit_discriminant_head(
    model: nn.Module, batches: Iterable[Any], adapter_name: str | None = None, *, shrinkage: float = SHRINKAGE
) -> nn.Linear:
    """Set a task's linear classifier to the linear discriminants of its classes; call it when the task is trained.

    Args:
        model: a PEFT model with a task that owns a linear classifier (of a head of several layers: its last one), be it a
            RECAST task or one of PEFT's own methods.
        batches: ``(inputs, labels)`` pairs, or dictionaries with ``labels`` in them (given to the model by name): the training
            examples once, not augmented.
        adapter_name: the task; None is the active one.
        shrinkage: share of a sphere in the covariance, 0 to 1.

    Returns:
        the classifier; its weights and biases are written in place.

    Raises:
        RecastConfigError: if ``shrinkage`` is not between 0 and 1.
        RecastTargetError: if the task has no linear classifier with biases, is not in force or is frozen, a label is none of
            its classes, a class has no example, or the examples do not determine a covariance.
    """
    check_shrinkage(shrinkage)
    head = linear_head(model, adapter_name)
    found = class_statistics(model, head, head.out_features, head.in_features, batches, products=True)
    weight, bias = discriminants(found, shrinkage)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def discriminants(found: ClassStatistics, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """Weights and biases whose logits are the log posteriors of normal classes with one covariance, up to a constant.

    With class means m, their shares p of the examples and the covariance S = (1 - s) S_within + s mean(diag S_within) I, the
    logit of class c is x S^-1 m[c] - m[c] S^-1 m[c] / 2 + log p[c].

    Args:
        found: of all examples, with products.
        shrinkage: s.

    Returns:
        ``(classes, features)`` and ``(classes,)`` in float64, with a mean of zero over the classes.

    Raises:
        RecastConfigError: if ``shrinkage`` is not between 0 and 1.
        RecastTargetError: if the covariance has no inverse.
    """
    check_shrinkage(shrinkage)
    assert found.products is not None
    total = found.counts.sum()
    means = found.sums / found.counts[:, None]  # (classes, features)
    within = (found.products - (means * found.counts[:, None]).T @ means) / total
    sphere = torch.eye(len(within), dtype=within.dtype) * within.diagonal().mean()
    covariance = (1 - shrinkage) * within + shrinkage * sphere
    centre = found.sums.sum(0) / total
    away = means - centre  # as seen from the centre, where the least digits are lost
    rounding = 1e-12 * found.products.diagonal().mean() / total  # of differences of float64 sums of this size
    if not torch.linalg.eigvalsh(covariance)[0] > rounding:
        raise RecastTargetError(
            f"{int(total)} examples of {len(means)} classes with {len(within)} features do not determine a covariance with "
            f"shrinkage={shrinkage}: give more examples, or a larger shrinkage"
        )
    weight = torch.linalg.solve(covariance, away.T).T
    bias = (found.counts / total).log() - (weight * (away / 2 + centre)).sum(1)
    return weight - weight.mean(0), bias - bias.mean()


def linear_head(model: nn.Module, adapter_name: str | None = None) -> nn.Linear:
    """The linear layer that gives a task's logits.

    Raises:
        RecastTargetError: if the task has none of its own with biases, is not in force or is frozen.
    """
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    wrappers = [m for m in wrappers if isinstance(m, TaskHead)] or wrappers
    active = next((m.active_adapters[0] for m in wrappers if m.active_adapters), None)
    name = adapter_name or active or ""
    found = [
        last
        for m in wrappers
        if name in m.modules_to_save and (last := _last_linear(m.modules_to_save[name])) is not None and last.bias is not None
    ]
    if len(found) != 1:
        raise RecastTargetError(
            f"task {name!r} owns {len(found)} linear classifiers with biases; one is expected: "
            "make the task with RecastConfig(num_classes=...)"
        )
    if any(m.disable_adapters or name not in m.active_adapters for m in wrappers):
        raise RecastTargetError(f"task {name!r} is not in force: call model.set_adapter({name!r}) first")
    if not found[0].weight.requires_grad:
        raise RecastTargetError(
            f"the classifier of task {name!r} is frozen: load the task with is_trainable=True; fit a task of a pool as an "
            "adapter, then add it to the pool"
        )
    return found[0]


def _last_linear(head: nn.Module) -> nn.Linear | None:
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    return linear[-1] if linear else None


def check_shrinkage(shrinkage: float) -> None:
    """Refuse what is not a share."""
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, (int, float)) or not 0 <= shrinkage <= 1:
        raise RecastConfigError(f"shrinkage={shrinkage!r}: expected a number from 0 (none) to 1 (a sphere)")
