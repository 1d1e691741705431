"""The table of tasks: rows, names, and numbers that are never those of another task.

A row that a task leaves is used again. The number by which calls name a task carries beside the row how often that was, and
which pool it is of, so that a number that somebody kept is refused and never another task's. In a model's first pool the number
of a row that was never left is the row itself.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..banks.template_bank import follow_device
from ..composition.mixed_batch import NO_TASK
from ..errors import RecastConfigError
from ..validation import shown
from .heads import StoredHead
from .routing import TaskFeatures

FIRST_CAPACITY = 16
ROW_BITS, USE_BITS = 32, 16
LAST_USE = 2**USE_BITS - 1
LAST_SERIAL = 2 ** (63 - ROW_BITS - USE_BITS) - 1
NOBODY = -2  # the number of a row that is free


class PoolLock:
    """A lock that a thread may take again; a copy of it, by ``deepcopy`` or ``pickle``, is a fresh one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[PoolLock], tuple[()]]:
        return PoolLock, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class TaskTable:
    """Tasks as rows of one table; safe to use from several threads.

    Attributes:
        table: ``(capacity, numbers per task)`` in float32; rows beyond the tasks, and of removed tasks, are zero.
    """

    def __init__(self, width: int, device: torch.device, serial: int) -> None:
        self.serial = serial
        self.lock = PoolLock()
        self._names: list[str | None] = []
        self._ids: list[int] = []  # of each row: the number by which calls name its task
        self._uses: list[int] = []  # of each row: how many tasks have left it
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._heads: dict[int, StoredHead] = {}
        self._remembered: dict[int, TaskFeatures] = {}
        with torch.inference_mode(False):
            self.table = nn.Parameter(torch.zeros(FIRST_CAPACITY, width, device=device), requires_grad=False)
            self._numbers = torch.full((FIRST_CAPACITY,), NOBODY, device=device)  # _ids, for compiled calls

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def names(self) -> list[str]:
        """The tasks, in the order of their rows."""
        return [name for name in self._names if name is not None]

    @property
    def numbers_per_task(self) -> int:
        """Coefficients of one task, the coefficient sets averaged."""
        return self.table.shape[1]

    def row(self, name: str) -> int:
        """The row of a task in the table.

        Raises:
            RecastConfigError: if there is no such task.
        """
        row = self._rows.get(name) if isinstance(name, str) else None
        if row is None:
            with self.lock:
                near = [name for name in self._names[:20] if name is not None][:5]
            more = ", ..." if len(self) > len(near) else ""
            raise RecastConfigError(f"the pool has no task {shown(name)}; it has {len(self)}: {', '.join(near)}{more}")
        return row

    def ids(self, names: Iterable[str | None]) -> Tensor:
        """Numbers of tasks, for ``task_ids``; None is the pretrained model.

        A number is a task's own: after the task has been removed it is refused.
        """
        if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
            raise RecastConfigError(f"names={shown(names)}: expected a name for each sample, in a list")
        with self.lock:
            numbers = [NO_TASK if name is None else self._ids[self.row(name)] for name in names]
        return torch.tensor(numbers, dtype=torch.int64, device=self.table.device)

    def rows_of(self, numbers: Sequence[int]) -> list[int]:
        """Rows of tasks by their numbers; the caller holds the lock.

        Raises:
            RecastConfigError: if a number is not that of a task that is in the pool now.
        """
        rows = []
        for number in numbers:
            row = number & (2**ROW_BITS - 1)
            if number == NO_TASK:
                rows.append(NO_TASK)
            elif number >= 0 and row < len(self._ids) and self._ids[row] == number:
                rows.append(row)
            else:
                raise self._unknown(number)
        return rows

    def _unknown(self, number: int) -> RecastConfigError:
        row, use = number & (2**ROW_BITS - 1), (number >> ROW_BITS) & LAST_USE
        if number >= 0 and number >> (ROW_BITS + USE_BITS) == self.serial and row < len(self._uses) and use < self._uses[row]:
            what = "which was the number of a task that has been removed"
        else:
            what = f"which is not the number of one of the pool's {len(self)} tasks"
        return RecastConfigError(f"task_ids holds {number}, {what}: take the numbers from pool.ids(names) for each call")

    def add_row(self, name: str, values: Tensor, head: StoredHead | None = None) -> int:
        """Put a task in.

        Raises:
            RecastConfigError: if the name is taken, or a number is not finite.
        """
        check_not_diverged(name, values, head)
        with self.lock:
            self.check_new_names([name])
            return self._put(name, values, head)

    def replace_row(self, name: str, values: Tensor, head: StoredHead | None = None) -> int:
        """Put a task in the place of one of the same name, in one step; calls that hold the former end with it.

        Returns:
            the row, which is another one.

        Raises:
            RecastConfigError: if there is no such task, or a number is not finite; the former stays.
        """
        check_not_diverged(name, values, head)
        with self.lock:
            former = self.row(name)
            row = self._put(name, values, head)  # who asks for the name meanwhile gets the one or the other
            if former in self._remembered:  # its samples look to the pretrained model as they did
                self._remembered[row] = self._remembered[former]
            self._vacate(former)
        return row

    def _put(self, name: str, values: Tensor, head: StoredHead | None) -> int:
        row = self._free.pop() if self._free else self._new_rows(1)
        with torch.no_grad():
            self.table[row] = values.to(self.table.device)
        self._occupy(row, name, head)
        return row

    def check_new_names(self, names: Sequence[str]) -> None:
        """Refuse names of which one is taken."""
        taken = [name for name in names if name in self._rows]
        if taken:
            raise RecastConfigError(f"the pool has these tasks already: {', '.join(taken[:5])}; remove them first")

    def add_rows(self, names: Sequence[str], values: Tensor, heads: dict[int, StoredHead]) -> int:
        """Put several tasks in, one after the other; all of them or none.

        Values are ``(tasks, numbers per task)``; classifiers come by their places among the names.

        Returns:
            the row of the first.
        """
        with self.lock:
            self.check_new_names(names)
            start = self._new_rows(len(names))
            try:
                with torch.no_grad():
                    self.table[start : start + len(names)] = values.to(self.table.device)
                for place, name in enumerate(names):
                    self._occupy(start + place, name, heads.get(place), number=False)
                self._numbers[start : start + len(names)] = torch.tensor(self._ids[start:], dtype=torch.int64)
            except BaseException:  # the user may interrupt what takes a while
                for name in self._rows.keys() & {*names}:
                    self.remove_row(self._rows[name])
                raise
        return start

    def remove_row(self, row: int) -> None:
        """Take the task of a row out; the caller holds the lock."""
        name = self._names[row]
        assert name is not None
        del self._rows[name]
        self._vacate(row)

    def _vacate(self, row: int) -> None:
        self._names[row] = None
        self._ids[row] = self._numbers[row] = NOBODY
        self._heads.pop(row, None)
        self._remembered.pop(row, None)
        self._uses[row] += 1
        if self._uses[row] <= LAST_USE:
            self._free.append(row)
        with torch.no_grad():
            self.table[row].zero_()

    def _occupy(self, row: int, name: str, head: StoredHead | None, number: bool = True) -> None:
        self._ids[row] = (self.serial << USE_BITS | self._uses[row]) << ROW_BITS | row
        if number:
            self._numbers[row] = self._ids[row]
        if head is not None:
            self._heads[row] = head
        self._names[row] = name
        self._rows[name] = row  # last: a task that is interrupted before is in the pool with all it has, or not at all

    def _new_rows(self, count: int) -> int:
        start = len(self._names)
        self._reserve(start + count)
        self._names += [None] * count
        self._ids += [NOBODY] * count
        self._uses += [0] * count
        return start

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.table):
            return
        if self.table.requires_grad:
            warnings.warn(
                f"The pool's table grows beyond {len(self.table)} tasks while it can be trained: an optimizer that was made "
                "before would go on with the former table, and train nothing. Make it again, from pool.parameters().",
                stacklevel=2,
            )
        more = max(rows - len(self.table), len(self.table))
        with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could never be trained
            self._numbers = F.pad(self._numbers, (0, more), value=NOBODY)
            self.table = nn.Parameter(F.pad(self.table, (0, 0, 0, more)), requires_grad=self.table.requires_grad)

    def follow_table(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do with the table what ``nn.Module.to`` and its kin do with the model, but for less precision.

        The caller holds the lock.
        """
        self.table.data = follow_device(fn, self.table.data)
        self._numbers = self._numbers.to(self.table.device)


def check_not_diverged(name: str, values: Tensor, head: StoredHead | None) -> None:
    """Refuse the numbers of a task that diverged (``RecastConfigError``)."""
    bad = "coefficients" if not torch.isfinite(values).all() else None
    if head is not None and not all(torch.isfinite(tensor).all() for tensor in head.held()):
        bad = bad or "the classifier"
    if bad:
        raise RecastConfigError(
            f"task {name!r} holds numbers that are not finite (NaN or infinity) in its {bad}: it diverged in training, or its "
            "file is damaged"
        )
