"""What a call with a task for each sample holds: numbers, coefficients and classifiers as they were when it began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..composition.mixed_batch import NO_TASK, MixedBatch, PoolTasks
from ..errors import RecastConfigError
from .table import ROW_BITS, USE_BITS, TaskTable


def hold(table: TaskTable, slot: str, slices: Mapping[str, slice], tasks: Any, beams: int) -> MixedBatch:
    """Gather the tasks of a call, once for all layers.

    Tasks are ``(samples,)`` numbers from ``ids``, or a list or an array of such numbers or of names.

    Raises:
        RecastConfigError: if a number is not that of a task that is in the pool now.
    """
    if torch.compiler.is_compiling():
        return _hold_compiled(table, slot, slices, tasks, beams)
    with table.lock:
        numbers = as_numbers(table, tasks)
        keys = tuple(numbers.tolist())
        rows = table.rows_of(keys)
        stored = {key: table._heads[row] for key, row in zip(keys, rows, strict=True) if row in table._heads}
        heads = {key: head.call() for key, head in stored.items()}
        labels = {key: head.labels for key, head in stored.items()}
        where = torch.tensor(rows, dtype=torch.int64, device=table.table.device)
        coefficients = _gathered(table.table, where)
    return MixedBatch(
        task_ids=numbers, keys=keys, pool=PoolTasks(slot, slices, heads.get, labels), coefficients=coefficients, beams=beams
    )


def _hold_compiled(table: TaskTable, slot: str, slices: Mapping[str, slice], numbers: Tensor, beams: int) -> MixedBatch:
    """The same where no number can be looked at: the samples of numbers that are no task's become NaN."""
    numbers = numbers.to(torch.int64)
    row = (numbers & (2**ROW_BITS - 1)).clamp(max=len(table.table) - 1).to(table.table.device)
    is_known = (numbers == NO_TASK).to(row.device) | (table._numbers[row] == numbers.to(row.device))
    gathered = _gathered(table.table, torch.where((numbers == NO_TASK).to(row.device), NO_TASK, row))
    coefficients = torch.where(is_known[:, None], gathered, float("nan"))

    def head(number: int) -> nn.Module | None:
        stored = table._heads.get(number & (2**ROW_BITS - 1)) if number >= 0 else None
        return None if stored is None else stored.module()

    return MixedBatch(task_ids=numbers, pool=PoolTasks(slot, slices, head), coefficients=coefficients, beams=beams)


def _gathered(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of the table, copied; zeros for NO_TASK."""
    present = (rows >= 0).to(table.dtype)[:, None]
    return table[rows.clamp_min(0)] * present


def as_numbers(table: TaskTable, tasks: Any) -> Tensor:
    """Tasks as a call is given them, as a tensor ``(samples,)`` of numbers.

    Raises:
        RecastConfigError: if they are none.
    """
    tasks = tasks.tolist() if isinstance(tasks, np.ndarray) else tasks
    if isinstance(tasks, (list, tuple)):
        if all(task is None or isinstance(task, str) for task in tasks):
            return table.ids(tasks)
        if all(type(task) is int and -(2**63) <= task < 2**63 for task in tasks):
            tasks = torch.tensor(tasks, dtype=torch.int64)
    if not isinstance(tasks, Tensor):
        given = f"{tasks!r}"
    elif tasks.is_meta:
        given = "a tensor on the meta device, which holds none"
    elif tasks.ndim != 1 or tasks.dtype not in (torch.int64, torch.int32):
        given = f"{tasks.dtype} {tuple(tasks.shape)}"
    else:
        return tasks
    raise RecastConfigError(
        "task_ids must be whole numbers of shape (samples,), as pool.ids(names) gives them, or a list of names; got "
        f"{given[:120]}"
    )


def pool_of(tasks: Any, pools: Sequence[Any]) -> Any:
    """The pool whose tasks are meant, the first if they do not say (``RecastConfigError`` if there is none, or several)."""
    is_known = isinstance(tasks, np.ndarray) or (isinstance(tasks, Tensor) and not tasks.is_meta)
    numbers = tasks.tolist() if is_known else tasks
    if not isinstance(numbers, (list, tuple)) or not all(type(number) is int for number in numbers):
        return pools[0]  # which says what is wrong with them
    serials = {number >> (ROW_BITS + USE_BITS) for number in numbers if number >= 0}
    if not serials:
        return pools[0]
    found = [pool for pool in pools if pool.serial in serials]
    if len(serials) > 1 or not found:
        what = "tasks of several pools" if len(serials) > 1 else "tasks of a pool that this model has no more"
        raise RecastConfigError(f"task_ids holds {what}: take all numbers of a call from pool.ids(names) of one pool")
    return found[0]
