"""A task's classifier in closed form: linear discriminant analysis of the features that reach it.

With tens of images a class, a linear classifier that is trained by gradient descent fits the training images far better than
others, while coefficients, which are few, do not. So after a task was trained its classifier may be put in place anew: the
class means and one covariance for all classes, drawn towards a sphere, give it without a further training step. It is an
ordinary linear layer as before.

Sources: R. A. Fisher, "The use of multiple measurements in taxonomic problems", 1936; a covariance that is drawn towards a
sphere: J. H. Friedman, "Regularized discriminant analysis", 1989; how far: O. Ledoit and M. Wolf, "A well-conditioned estimator
for large-dimensional covariance matrices", Journal of Multivariate Analysis 88, 2004 (lemma 3.2 to 3.4).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import RecastConfigError, RecastTargetError
from ..names import modules_of
from ..validation import is_number
from .head import TaskHead
from .prototypes import check_every_class, check_is_active, read_head_inputs, whole_labels, wrappers_of_task
from .wrapper import ScaledModule

Shrinkage = float | Literal["auto"]


def fit_discriminant_head(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str | None = None,
    *,
    shrinkage: Shrinkage = "auto",
    held_out: Iterable[Any] | None = None,
) -> nn.Linear:
    """Set a task's linear classifier to the linear discriminants of its classes; call it when the task is trained.

    Args:
        model: a PEFT model with a task that owns a linear classifier (of a head of several layers: its last one), be it a
            RECAST task or one of PEFT's own methods.
        batches: ``(inputs, labels)`` pairs, or dictionaries with ``labels`` in them (dictionaries are given by name): the
            training examples once, not augmented. Their features are held in memory, 4 bytes a number.
        adapter_name: the task; None is the active one.
        shrinkage: share of a sphere in the covariance, 0 to 1. ``"auto"`` chooses it for each class by the formula of Ledoit
            and Wolf.
        held_out: examples that were not trained on, in the same form. If the new classifier gets fewer of them right than
            the one before, that one stays, and a warning gives both accuracies.

    Returns:
        the classifier; its weights and biases are written in place.

    Raises:
        RecastConfigError: if ``shrinkage`` is neither ``"auto"`` nor between 0 and 1.
        RecastTargetError: if the task has no linear classifier with biases, is not active or is frozen, a label is none of
            its classes, a class has no example, or the examples do not determine a covariance.
    """
    check_shrinkage(shrinkage)
    head = linear_head(model, adapter_name)
    weight, bias = discriminants(*_gathered(model, head, batches), head.out_features, shrinkage)
    if held_out is not None:
        features, labels = _gathered(model, head, held_out)
        before = _share_right(head.weight.detach().cpu(), head.bias.detach().cpu(), features, labels)
        after = _share_right(weight, bias, features, labels)
        if after < before:
            warnings.warn(
                "the linear discriminants are worse than the classifier that was trained, which stays as it is\n"
                f"  right of {len(labels)} held-out examples, trained:      {before:.1%}\n"
                f"  right of {len(labels)} held-out examples, discriminants: {after:.1%}",
                stacklevel=2,
            )
            return head
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


def discriminants(features: Tensor, labels: Tensor, classes: int, shrinkage: Shrinkage = "auto") -> tuple[Tensor, Tensor]:
    """Weights and biases whose logits are the log posteriors of normal classes with one covariance, up to a constant.

    With class means m, their shares p of the examples and the covariance S, the logit of class c is
    x S^-1 m[c] - m[c] S^-1 m[c] / 2 + log p[c]. S is the mean of the classes' covariances, weighted by p. A number s as
    shrinkage gives (1 - s) S + s mean(diag S) I; ``"auto"`` shrinks each class by :func:`ledoit_wolf_shrinkage`, with its
    features in units of their standard deviations (as scikit-learn does).

    Args:
        features: ``(examples, features)``.
        labels: ``(examples,)``, numbers of classes.
        classes: how many there are.
        shrinkage: s, or ``"auto"``.

    Returns:
        ``(classes, features)`` and ``(classes,)`` in float64, with a mean of zero over the classes.

    Raises:
        RecastConfigError: if ``shrinkage`` is neither ``"auto"`` nor between 0 and 1.
        RecastTargetError: if a label is none of the classes, a class has no example, or the covariance has no inverse.
    """
    check_shrinkage(shrinkage)
    labels = whole_labels(labels, classes)
    shares = torch.bincount(labels, minlength=classes).double() / len(labels)
    check_every_class(shares)
    means = torch.stack([features[labels == c].double().mean(0) for c in range(classes)])  # (classes, features)
    covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for c in range(classes):
        away = features[labels == c].double() - means[c]
        covariance += shares[c] * (_shrunk(away, means[c]) if shrinkage == "auto" else away.T @ away / len(away))
    if shrinkage != "auto":
        sphere = torch.eye(len(covariance), dtype=torch.float64) * covariance.diagonal().mean()
        covariance = (1 - shrinkage) * covariance + shrinkage * sphere
    centre = shares @ means
    away = means - centre  # as seen from the centre, where the least digits are lost
    told = ~_constant(features)  # nothing can be told by the others: they get no weight
    weight = torch.zeros_like(means)
    weight[:, told] = _solved(covariance[told][:, told], away[:, told].T, len(features), classes, shrinkage).T
    bias = shares.log() - (weight * (away / 2 + centre)).sum(1)
    return weight - weight.mean(0), bias - bias.mean()


def ledoit_wolf_shrinkage(away: Tensor) -> float:
    """The share of a sphere that makes the expected squared error of a covariance least (Ledoit and Wolf, 2004).

    Args:
        away: ``(examples, features)``, each feature with a mean of zero.

    Returns:
        from 0, which leaves the covariance of the examples S as it is, to 1: the sphere of the same mean variance m alone. It
        is b / d with d = |S - m I|^2 and b = min(d, sum_k |x_k x_k^T - S|^2 / examples^2).
    """
    examples, features = away.shape
    small = away @ away.T if examples < features else away.T @ away  # both have the same squares and trace
    square = small.square().sum() / examples**2  # |S|^2
    mean = small.trace() / examples / features
    distance = square - features * mean**2
    noise = (away.square().sum(1).square().mean() - square) / examples
    return float((noise.clamp_min(0) / distance).clamp_max(1)) if distance > 1e-12 * square else 0.0


def _shrunk(away: Tensor, mean: Tensor) -> Tensor:
    """The covariance of one class, shrunk with its features in units of their standard deviations."""
    size = away.square().mean(0).sqrt()
    is_constant = size <= 1e-12 * mean.abs()  # but for rounding in float64
    size = size.masked_fill(is_constant, 1.0)
    scaled = (away / size).masked_fill(is_constant, 0.0)
    share = ledoit_wolf_shrinkage(scaled)
    return (1 - share) * away.T @ away / len(away) + share * scaled.square().mean() * torch.diag(size.square())


def _constant(features: Tensor) -> Tensor:
    """Which features are the same in all examples, up to the rounding of float32: ``(features,)``."""
    x = features.double()
    return x.std(0, correction=0) <= 1e-6 * x.square().mean(0).sqrt()


def _solved(covariance: Tensor, right: Tensor, examples: int, classes: int, shrinkage: Shrinkage) -> Tensor:
    """``covariance^-1 right``, whatever the features' sizes; ``RecastTargetError`` if there is no feature, or no inverse."""
    if not len(covariance):
        raise RecastTargetError("all features are the same in all examples: look at what reaches the classifier")
    size = covariance.diagonal().sqrt()
    constant = (size == 0).nonzero().flatten().tolist()
    if constant:
        raise RecastTargetError(
            f"{len(constant)} features are the same in all examples of a class and differ between classes, so no covariance "
            "can be formed: give more examples, or a shrinkage above 0"
        )
    scaled = covariance / size / size[:, None]
    if not torch.linalg.eigvalsh(scaled)[0] > 1e-12:
        raise RecastTargetError(
            f"{examples} examples of {classes} classes with {len(covariance)} features do not determine a covariance with "
            f"shrinkage={shrinkage!r}: give more examples, or a larger shrinkage"
        )
    return torch.linalg.solve(scaled, right / size[:, None]) / size[:, None]


def _gathered(model: nn.Module, head: nn.Linear, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """What reaches a task's classifier, ``(examples, features)``, and the labels ``(examples,)``, on the CPU."""
    pairs: list[tuple[Tensor, Tensor]] = []
    shape = (head.out_features, head.in_features)
    read_head_inputs(model, head, shape, batches, lambda features, labels: pairs.append((features, labels)))
    if not pairs:
        raise RecastTargetError("batches hold no example")
    features, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    return features, labels


def _share_right(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> float:
    logits = features.double() @ weight.double().T + bias.double()
    return float((logits.argmax(1) == labels).double().mean())


def linear_head(model: nn.Module, adapter_name: str | None = None) -> nn.Linear:
    """The layer of a task's logits; ``RecastTargetError`` if it has none of its own with biases, is not active or is frozen."""
    wrappers = [m for m in modules_of(model, ModulesToSaveWrapper) if not isinstance(m, ScaledModule)]  # no partners
    wrappers = [m for m in wrappers if isinstance(m, TaskHead)] or wrappers
    name, holding = wrappers_of_task(wrappers, adapter_name)
    heads = [wrapper.modules_to_save[name] for wrapper in holding]
    found = [last for head in heads for last in modules_of(head, nn.Linear)[-1:] if last.bias is not None]
    if len(found) != 1:
        raise RecastTargetError(
            f"{'the active task' if name is None else f'task {name!r}'} owns {len(found)} linear classifiers with biases; one "
            "is expected: make the task with RecastConfig(num_classes=...)"
        )
    check_is_active(name, holding)
    if not found[0].weight.requires_grad:
        raise RecastTargetError(
            f"the classifier of task {name!r} is frozen: load the task with is_trainable=True; fit a task of a pool as an "
            "adapter, then add it to the pool"
        )
    return found[0]


def check_shrinkage(shrinkage: Shrinkage) -> None:
    """Refuse what is neither a share nor "auto"."""
    if shrinkage != "auto" and not (is_number(shrinkage) and 0 <= shrinkage <= 1):
        raise RecastConfigError(f"shrinkage={shrinkage!r}: expected 'auto', or a number from 0 (none) to 1 (a sphere)")
