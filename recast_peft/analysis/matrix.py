"""AccuracyMatrix: the accuracy on every task after every task, as a table, a picture and a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RecastSequenceError
from ..planning.table import aligned
from ..storage.atomic import staged_folder
from ..validation import check_arguments, check_is_no_folder, shown, whole_number
from .metrics import average_accuracy, average_incremental_accuracy, backward_transfer, forgetting, forward_transfer


class AccuracyMatrix:
    """The accuracy on every task after every task, by their names; ``print(matrix)`` shows it as a table.

    Args:
        tasks: names in the order of learning.

    Attributes:
        tasks: those names.
        values: R, ``(tasks, tasks)``; NaN where nothing was recorded.
        baseline: b, ``(tasks,)``: accuracies before anything was learned; NaN where nothing was recorded.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        is_list = isinstance(tasks, Sequence) and not isinstance(tasks, str)
        if not is_list or not tasks or not all(isinstance(name, str) for name in tasks) or len(set(tasks)) < len(tasks):
            raise RecastSequenceError(f"tasks={shown(tasks)}: expected names that differ, at least one")
        self.tasks = tuple(tasks)
        self.values = np.full((len(self.tasks), len(self.tasks)), np.nan)
        self.baseline = np.full(len(self.tasks), np.nan)

    def record(self, after: str | None, task: str, accuracy: float) -> None:
        """Put an accuracy in its place.

        Args:
            after: the task that was learned last; None before the first one.
            task: that was evaluated.
            accuracy: any finite number (a share or a percentage, the same for all).

        Raises:
            RecastSequenceError: if there is no such task, or the accuracy is not finite.
        """
        try:
            value = float(accuracy)
        except (TypeError, ValueError, RuntimeError):
            value = math.nan
        if not math.isfinite(value):
            hint = ". Does evaluate end with return?" if accuracy is None else ""
            given = f"accuracy on {task!r} after {after!r}: {shown(accuracy)}"
            raise RecastSequenceError(f"{given}; a finite number is expected{hint}")
        if after is None:
            self.baseline[self._index(task)] = value
        else:
            self.values[self._index(after), self._index(task)] = value

    @property
    def learned(self) -> int:
        """How many tasks have been learned: rows with a diagonal entry, from the first on."""
        missing = np.flatnonzero(np.isnan(np.diagonal(self.values)))
        return int(missing[0]) if len(missing) else len(self.tasks)

    def summary(self) -> dict[str, float]:
        """The measures that what was recorded allows, taken after the last task learned.

        Returns:
            ``average_accuracy``, ``average_incremental_accuracy``, ``backward_transfer``, ``forgetting`` and
            ``forward_transfer``, or those of them that can be had.
        """
        measures: dict[str, Callable[..., float]] = {
            "average_accuracy": average_accuracy,
            "average_incremental_accuracy": average_incremental_accuracy,
            "backward_transfer": backward_transfer,
            "forgetting": forgetting,
            "forward_transfer": partial(forward_transfer, baseline=self.baseline),
        }
        result = {}
        for name, measure in measures.items():
            with suppress(RecastSequenceError):  # not recorded, or too few tasks yet
                result[name] = measure(self.values, after=self.learned - 1)
        return result

    def table(self, digits: int = 3) -> str:
        """R as text, a row for each task learned, then the measures."""
        rows = [["", *self.tasks]]
        if not np.isnan(self.baseline).all():
            rows.append(["before", *(self._cell(value, digits) for value in self.baseline)])
        rows += [[f"after {n}", *(self._cell(v, digits) for v in row)] for n, row in zip(self.tasks, self.values, strict=True)]
        lines = aligned(rows)
        lines += [f"{name.replace('_', ' ')}: {value:+.{digits}f}" for name, value in self.summary().items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AccuracyMatrix):
            return NotImplemented
        same = np.array_equal(self.values, other.values, equal_nan=True)
        return self.tasks == other.tasks and same and np.array_equal(self.baseline, other.baseline, equal_nan=True)

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold; what was not recorded is None."""
        return {
            "tasks": list(self.tasks),
            "values": [[_or_none(v) for v in row] for row in self.values],
            "baseline": [_or_none(v) for v in self.baseline],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> AccuracyMatrix:
        """The matrix that :meth:`to_dict` wrote.

        Raises:
            RecastSequenceError: if the content is of another form.
        """
        try:
            matrix = cls(content["tasks"])
            values = np.array(content["values"], dtype=float)
            baseline = np.array(content.get("baseline") or [None] * len(matrix.tasks), dtype=float)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecastSequenceError(f"this is no accuracy matrix ({error!r}): 'tasks' and 'values' are expected") from error
        if values.shape != matrix.values.shape or baseline.shape != matrix.baseline.shape:
            raise RecastSequenceError(
                f"the accuracy matrix has another size than there are tasks\n  tasks:  {len(matrix.tasks)}\n"
                f"  values: {values.shape}, baseline: {baseline.shape}"
            )
        if np.isinf(values).any() or np.isinf(baseline).any():
            raise RecastSequenceError("the accuracy matrix holds an infinite accuracy: finite numbers are expected")
        matrix.values, matrix.baseline = values, baseline
        return matrix

    def plot(self, path: str | None = None, *, axes: Any = None, digits: int = 2) -> Any:
        """Draw the matrix as a picture.

        Args:
            path: where to save it; None does not save.
            axes: matplotlib axes to draw in; None makes a figure.
            digits: number of digits of the numbers in the cells.

        Returns:
            the matplotlib axes.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        if path is not None:
            check_is_no_folder(path, "matrix.png")
        check_arguments(whole_number(0), digits=digits)
        from matplotlib.figure import Figure

        count = len(self.tasks)
        figure = Figure(figsize=(1.6 + 0.8 * count, 1.2 + 0.6 * count), layout="constrained") if axes is None else axes.figure
        axes = figure.subplots() if axes is None else axes
        image = axes.imshow(np.ma.masked_invalid(self.values), cmap="viridis", aspect="auto")
        for i, j in zip(*np.nonzero(np.isfinite(self.values)), strict=True):
            r, g, b, _ = image.cmap(image.norm(self.values[i, j]))
            ink = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "white"
            axes.text(j, i, f"{self.values[i, j]:.{digits}f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(count), self.tasks, rotation=45, ha="right")
        axes.set_yticks(range(count), self.tasks)
        axes.set_xlabel("accuracy on")
        axes.set_ylabel("after learning")
        figure.colorbar(image, ax=axes)
        if path is not None:
            with staged_folder(Path(path).parent) as folder:
                figure.savefig(folder / Path(path).name, dpi=150)
        return axes

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise RecastSequenceError(f"there is no task {task!r}; known are {', '.join(self.tasks)}")
        return self.tasks.index(task)

    @staticmethod
    def _cell(value: float, digits: int) -> str:
        return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
