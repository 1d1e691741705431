"""A classifier of all classes so far in closed form, for whoever is not told the task: random features and ridge regression.

Features of a frozen model are projected at random, rectified, and the classes are read off by least squares. What is kept of
the examples are two sums, so that learning tasks one after the other gives the very classifier that learning them at once
gives, and nothing is forgotten.

Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023
(arXiv 2307.02251).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecastSequenceError
from ..validation import COUNT, SEED, check_arguments, is_whole, number_above, optional, shown

RIDGES = tuple(10.0**power for power in range(-6, 7))
HELD_OUT = 5  # one example in so many judges the ridge


class IncrementalClassifier:
    """Tells all classes apart that it was shown, task after task.

    Args:
        features: numbers in a sample's features.
        projections: random features; None takes the features themselves.
        ridge: added to the diagonal of the Gram matrix, in units of its mean diagonal; None chooses it anew with each task, by
            the squared error on a fifth of the task's examples.
        seed: random seed for the projections.

    Attributes:
        classes: names (whole numbers or strings) in the order in which they came.
        weight: ``(random features, classes)`` in float64.
    """

    def __init__(self, features: int, *, projections: int | None = 2000, ridge: float | None = None, seed: int = 0) -> None:
        check_arguments(COUNT, features=features)
        check_arguments(optional(COUNT), projections=projections)
        check_arguments(optional(number_above(0)), ridge=ridge)
        check_arguments(SEED, seed=seed)
        self.features, self.ridge = features, ridge
        self.classes: list[int | str] = []
        generator = torch.Generator().manual_seed(seed)
        width, self._projection = features, None
        if projections is not None:
            drawn = torch.randn(features, projections, generator=generator, dtype=torch.float32)
            width, self._projection = projections, drawn.double()
        self._gram = torch.zeros(width, width, dtype=torch.float64)
        self._sums = torch.zeros(width, 0, dtype=torch.float64)
        self.weight = torch.zeros(width, 0, dtype=torch.float64)

    def learn(self, features: Tensor, labels: Tensor, classes: Sequence[int | str] | None = None) -> None:
        """Add the examples of a task; classes that were seen before may come again.

        Args:
            features: ``(examples, features)`` of the frozen model.
            labels: ``(examples,)``, whole numbers.
            classes: the name of each number, a whole number or a string; None takes the numbers themselves.

        Raises:
            RecastSequenceError: if shapes or kinds do not fit, a label has no name, or the classifier cannot be solved for;
                nothing is learned then.
        """
        hidden = self._hidden(features)
        if not is_whole(labels) or labels.shape != features.shape[:1] or not len(labels):
            given = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else shown(labels)
            raise RecastSequenceError(
                f"one label for each example is needed, a whole number\n  labels:   {given}\n  examples: {len(features)}"
            )
        numbers = labels.tolist()
        classes = None if classes is None else _names(classes)
        if classes is not None and not 0 <= min(numbers) <= max(numbers) < len(classes):
            raise RecastSequenceError(f"labels are {min(numbers)} to {max(numbers)}, and classes names {len(classes)}")
        names = numbers if classes is None else [classes[number] for number in numbers]
        all_classes = list(dict.fromkeys([*self.classes, *names]))
        wanted = torch.zeros(len(names), len(all_classes), dtype=torch.float64)
        wanted[torch.arange(len(names)), [all_classes.index(name) for name in names]] = 1.0
        before = nn.functional.pad(self._sums, (0, len(all_classes) - len(self.classes)))
        ridge = self.ridge or self._best_ridge(hidden, wanted, before)
        gram, sums = self._gram + hidden.T @ hidden, before + hidden.T @ wanted
        weight = self._solved(gram, sums, ridge)
        if not weight.isfinite().all():
            raise RecastSequenceError(
                f"no classifier of these examples can be solved for with ridge {ridge:g}: their features are all zero, too "
                "large, or depend on each other. Look at the features, or give a larger ridge"
            )
        self.classes, self._gram, self._sums, self.weight = all_classes, gram, sums, weight

    def logits(self, features: Tensor) -> Tensor:
        """Scores ``(samples, classes)`` of all classes so far, about 1 for a sample's own and 0 for the others."""
        return self._hidden(features) @ self.weight

    def predict(self, features: Tensor) -> list[int | str]:
        """The class of each sample.

        Raises:
            RecastSequenceError: if nothing was learned yet.
        """
        if not self.classes:
            raise RecastSequenceError("nothing was learned yet: call learn(features, labels) first")
        return [self.classes[place] for place in self.logits(features).argmax(1).tolist()]

    def _hidden(self, features: Tensor) -> Tensor:
        if not isinstance(features, Tensor) or features.is_complex():
            given = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise RecastSequenceError(f"features are {given}: expected a tensor of real numbers (samples, {self.features})")
        if features.ndim != 2 or features.shape[1] != self.features:
            raise RecastSequenceError(f"features have shape {tuple(features.shape)}; expected (samples, {self.features})")
        x = features.detach().cpu().double()
        if not x.isfinite().all():
            raise RecastSequenceError("features hold what is no finite number: look at the images, and at the model's dtype")
        return x if self._projection is None else torch.relu(x @ self._projection)

    def _best_ridge(self, hidden: Tensor, wanted: Tensor, before: Tensor) -> float:
        order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))
        judged = order % HELD_OUT == 0
        if not judged.any() or judged.all():
            return 1e-2
        gram = self._gram + hidden[~judged].T @ hidden[~judged]
        sums = before + hidden[~judged].T @ wanted[~judged]
        errors = [(hidden[judged] @ self._solved(gram, sums, ridge) - wanted[judged]).square().mean() for ridge in RIDGES]
        return RIDGES[int(torch.stack(errors).nan_to_num(nan=torch.inf).argmin())]

    @staticmethod
    def _solved(gram: Tensor, sums: Tensor, ridge: float) -> Tensor:
        ridged = gram.clone()
        ridged.diagonal().add_(ridge * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(ridged)  # half of what a solver for any matrix takes
        return torch.full_like(sums, torch.nan) if failed else torch.cholesky_solve(sums, factor)


def _names(classes: Any) -> list[int | str]:
    """Names of classes as keys: of a tensor's or an array's numbers the numbers themselves."""
    try:
        if isinstance(classes, (str, Mapping)):
            raise TypeError
        return [name if isinstance(name, str) else operator.index(name) for name in classes]
    except TypeError as error:
        raise RecastSequenceError(f"classes={shown(classes)}: expected a list of whole numbers or strings") from error
