"""Finding the task of a sample that nobody named: the nearest prototype in the pretrained model's features.

Each task is remembered by the mean features of its classes (or of all its samples), taken in the frozen base, and by how far
its samples lie around them. A sample goes to the task of the nearest prototype, distances measured in units of the spread
within prototypes, dimension by dimension. This is class-incremental use: no task is given at test time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecastConfigError
from ..validation import listed, shown


@dataclass(frozen=True)
class TaskFeatures:
    """What is remembered of one task.

    Attributes:
        prototypes: ``(prototypes, features)`` mean features.
        scatter: ``(features,)`` sum of squared distances of the samples to their prototypes.
        samples: how many samples there were.
    """

    prototypes: Tensor
    scatter: Tensor
    samples: int


def summarise(features: Tensor, labels: Tensor | None = None) -> TaskFeatures:
    """Mean features by class (all samples are one class without labels), and the spread around them.

    Args:
        features: ``(samples, features)``.
        labels: ``(samples,)`` or None.
    """
    if features.ndim != 2 or not len(features):
        raise RecastConfigError(
            f"features have shape {tuple(features.shape)}; expected (samples, features), at least one sample"
        )
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != features.shape[:1]):
        given = tuple(labels.shape) if isinstance(labels, Tensor) else f"{shown(labels)}, no tensor"
        raise RecastConfigError(f"one label for each sample is needed\n  labels:  {given}\n  samples: {len(features)}")
    _check_finite(features)  # such a prototype would be the nearest one of every sample
    groups = torch.zeros(len(features), dtype=torch.long) if labels is None else labels.cpu()
    classes, places = groups.unique(return_inverse=True)
    prototypes = torch.stack([features[places == c].mean(dim=0) for c in range(len(classes))])
    scatter = (features - prototypes[places]).square().sum(dim=0)
    return TaskFeatures(prototypes, scatter, len(features))


def nearest_task(features: Tensor, tasks: dict[int, TaskFeatures]) -> Tensor:
    """The task with the nearest prototype, for each sample.

    Args:
        features: ``(samples, features)``.
        tasks: what is remembered of each task, by its number.

    Returns:
        ``(samples,)`` numbers of tasks.

    Raises:
        RecastConfigError: if nothing is remembered, or features are not finite.
    """
    if not tasks:
        raise RecastConfigError("no task is remembered: call pool.remember(name, inputs, labels) for those to choose from")
    _check_finite(features)  # no prototype is the nearest one of such a sample
    spread = sum(t.scatter for t in tasks.values()) / max(1, sum(t.samples for t in tasks.values()))
    unit = (spread + 1e-6 * spread.mean()).sqrt().clamp_min(1e-12)  # type: ignore[union-attr]
    prototypes = torch.cat([t.prototypes for t in tasks.values()]) / unit
    owner = torch.cat([torch.full((len(t.prototypes),), row) for row, t in tasks.items()])
    return owner[torch.cdist(features / unit, prototypes).argmin(dim=1)]


def _check_finite(features: Tensor) -> None:
    bad = [*map(str, (~torch.isfinite(features).all(dim=1)).nonzero().flatten().tolist())]
    if bad:
        raise RecastConfigError(
            f"features of the samples {listed(bad)} are not finite (NaN or infinity): look at the inputs, and at the model"
        )
