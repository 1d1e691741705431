"""What is read off an accuracy matrix: pure functions of numbers.

``R[i, j]`` is the accuracy on task j after task i was learned (both counted from 0 here, from 1 in the papers). Definitions:

- Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017 (arXiv 1706.08840), section 2, for R,
  the average accuracy, backward transfer and forward transfer;
- Rebuffi et al., CVPR 2017 (arXiv 1611.07725), for the average incremental accuracy;
- Chaudhry, Dokania, Ajanthan and Torr, "Riemannian Walk for Incremental Learning", ECCV 2018 (arXiv 1801.10112),
  for forgetting.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..errors import RecastSequenceError
from ..validation import listed


def average_accuracy(matrix: ArrayLike, after: int | None = None) -> float:
    """Mean accuracy on the tasks learned so far: ``ACC = 1/T sum_j R[T-1, j]`` (Lopez-Paz and Ranzato).

    Args:
        matrix: R, ``(tasks, tasks)``; entries that are not needed may be NaN.
        after: the task after which it is taken; None is the last one.

    Raises:
        RecastSequenceError: if the matrix is not square, or lacks an entry that is needed.
    """
    R, last = _checked(matrix, after)
    return float(_entries(R, [(last, j) for j in range(last + 1)]).mean())


def average_incremental_accuracy(matrix: ArrayLike, after: int | None = None) -> float:
    """Mean of the average accuracies after each task: ``1/T sum_k (1/(k+1) sum_{j<=k} R[k, j])``.

    Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017 (arXiv 1611.07725), section 4.1.
    Arguments and errors as for :func:`average_accuracy`.
    """
    R, last = _checked(matrix, after)
    return float(np.mean([average_accuracy(R, k) for k in range(last + 1)]))


def backward_transfer(matrix: ArrayLike, after: int | None = None) -> float:
    """What later tasks did to earlier ones: ``BWT = 1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j])``.

    Negative where tasks were forgotten (Lopez-Paz and Ranzato). Arguments and errors as for
    :func:`average_accuracy`; at least two tasks are needed.
    """
    R, last = _checked(matrix, after, at_least=2)
    now = _entries(R, [(last, j) for j in range(last)])
    then = _entries(R, [(j, j) for j in range(last)])
    return float((now - then).mean())


def forward_transfer(matrix: ArrayLike, baseline: ArrayLike, after: int | None = None) -> float:
    """What earlier tasks did for later ones: ``FWT = 1/(T-1) sum_{j>=1} (R[j-1, j] - b[j])``.

    Lopez-Paz and Ranzato: the accuracy on a task just before it is learned, above that of a model that has learned
    nothing.

    Args:
        matrix: R, ``(tasks, tasks)``, with the entries right above the diagonal.
        baseline: b, ``(tasks,)``: accuracies before anything was learned (the paper's random initialisation; for adapters, the
            pretrained model).
        after: the last task that is counted; None is the last one.

    Raises:
        RecastSequenceError: as for :func:`average_accuracy`; at least two tasks are needed.
    """
    R, last = _checked(matrix, after, at_least=2)
    b = _numbers("baseline", baseline)
    if b.shape != (len(R),):
        raise RecastSequenceError(
            f"baseline has another length than there are tasks\n  tasks:    {len(R)}\n  baseline: {tuple(b.shape)}"
        )
    missing = [j for j in range(1, last + 1) if not np.isfinite(b[j])]
    if missing:
        raise RecastSequenceError(f"baseline lacks the accuracy on task {missing[0]} before anything was learned")
    return float((_entries(R, [(j - 1, j) for j in range(1, last + 1)]) - b[1 : last + 1]).mean())


def forgetting(matrix: ArrayLike, after: int | None = None) -> float:
    """How far accuracies fell from their best: ``F = 1/(k-1) sum_{j<k-1} (max_{l<k-1} R[l, j] - R[k-1, j])``.

    Chaudhry et al.: the maximum goes over all states before the present one. Entries of it that were not measured
    (NaN, usually those before a task was learned) are left out; ``R[j, j]`` must be there. Negative where a task got better
    than it ever was. Arguments and errors as for :func:`average_accuracy`; at least two tasks are needed.
    """
    R, last = _checked(matrix, after, at_least=2)
    now = _entries(R, [(last, j) for j in range(last)])
    _entries(R, [(j, j) for j in range(last)])
    return float((np.nanmax(R[:last, :last], axis=0) - now).mean())


def _checked(matrix: ArrayLike, after: int | None, at_least: int = 1) -> tuple[NDArray[np.float64], int]:
    R = _numbers("an accuracy matrix", matrix)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise RecastSequenceError(f"an accuracy matrix is square, with a row and a column for each task; given: {R.shape}")
    last = len(R) - 1 if after is None else after
    if not isinstance(last, (int, np.integer)) or not 0 <= last < len(R):
        raise RecastSequenceError(f"after={after}: expected the number of a task, 0 to {len(R) - 1}")
    if last + 1 < at_least:
        raise RecastSequenceError(f"{at_least} tasks must have been learned, not {last + 1}: there is nothing to compare yet")
    return R, last


def _numbers(what: str, given: ArrayLike) -> NDArray[np.float64]:
    if isinstance(given, torch.Tensor):  # of any dtype and device
        given = given.detach().cpu().double()
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecastSequenceError(f"{what} holds what is no number, or rows of unequal length: {error}") from error


def _entries(R: NDArray[np.float64], places: list[tuple[int, int]]) -> NDArray[np.float64]:
    missing = [f"R[{i}, {j}]" for i, j in places if not np.isfinite(R[i, j])]
    if missing:
        raise RecastSequenceError(f"the accuracy matrix lacks {listed(missing, 6)}")
    return np.array([R[i, j] for i, j in places])
