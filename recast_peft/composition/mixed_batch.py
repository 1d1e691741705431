"""Which task each sample of a batch belongs to, during one call and in one thread.

A call with ``adapter_names=[...]`` or ``task_ids=tensor`` sets this for its own duration in its own thread, and the layers
look it up. So two threads with different tasks on one model never see each other's. It is a context variable and not a
``threading.local``, since the compiler follows the former and silently keeps the first value of the latter. The compiler of a
torch before 2.14 follows neither: what is compiled there looks at a plain variable, which all threads share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import RecastConfigError
from ..holders import TaskHolder

NO_TASK = -1  # the number that stands for the pretrained model


@dataclass(frozen=True)
class PoolTasks:
    """What a call holds of a pool: as it was when the call began, whatever becomes of the pool meanwhile."""

    slot: str  # the adapter whose banks the tasks are on
    slices: Mapping[str, slice]  # columns of a task's coefficients, by the names of targets, biases and LoRA factors
    head: Callable[[int], Any]  # the classifier of a task of the batch by its number; None if it has none
    labels: Mapping[int, Any] = field(default_factory=dict)  # what is said of the classes of tasks with a classifier


@dataclass(frozen=True)
class MixedBatch:
    """The tasks of one call."""

    names: tuple[str, ...] = ()  # a task for each sample; empty when tasks are given by number
    task_ids: Tensor | None = None  # ``(samples,)`` numbers of a pool's tasks, or None
    pool: PoolTasks | None = None  # what the call holds of the pool that ``task_ids`` refer to
    coefficients: Tensor | None = None  # ``(samples, numbers per task)`` gathered from the pool's table
    keys: tuple[int, ...] | None = None  # ``task_ids`` as whole numbers, read once; None where they are only known as a tensor
    beams: int = 1  # how often generation repeats each sample in the decoder
    is_off: bool = False  # whether all samples are the pretrained model's, since tasks were switched off where the call began
    positions_first: str | None = None  # a module of the model that may take positions before samples
    _rows: dict[int, dict[str | int, list[int]]] = field(default_factory=dict, repr=False, compare=False)
    _indices: dict[tuple, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.names) if self.task_ids is None else len(self.task_ids)

    @property
    def slot(self) -> str:
        """The adapter whose banks the tasks of a pool are on."""
        assert self.pool is not None
        return self.pool.slot

    def samples_in(self, x: Tensor, holder: TaskHolder, *, is_ordered: bool = False) -> int:
        """The samples of an input of a module that holds something of tasks.

        Raises:
            RecastConfigError: for a nested tensor, whose samples cannot be told apart here; and, unless ``is_ordered``, where
                the first dimension may be that of the positions.
        """
        if x.is_nested:
            raise RecastConfigError(
                "a nested tensor cannot have another task for each sample: pad it (torch.nested.to_padded_tensor), or give all "
                "samples one task"
            )
        if not is_ordered:
            self._check_order(x, holder)
        return len(x)

    def repeats(self, samples: int, module_name: str | None = None) -> int:
        """How often each entry stands for a sample in an input of ``samples`` rows (of a module): once, or once a beam.

        An input with any other number of rows is refused (``RecastConfigError``).
        """
        if samples == len(self):
            return 1
        if self.beams > 1 and samples == len(self) * self.beams:
            return self.beams
        given = "adapter_names" if self.task_ids is None else "task_ids"
        where = "" if module_name is None else f" at {module_name}"
        raise RecastConfigError(
            f"Length of `{given}` should be the same as the number of inputs, but got {len(self)} and {samples} "
            f"respectively{where}. Give one task for each sample; a task can be given several times. Where a module is called "
            "with other rows than samples, give a task for each row, or leave it out of the targets (exclude_modules)."
        )

    def _check_order(self, x: Tensor, holder: TaskHolder) -> None:
        """Refuse an input ``(samples, positions, features)`` that may be ``(positions, samples, features)`` as well.

        What had samples first in a batch of which one could tell has them first in others too.

        Raises:
            RecastConfigError: if it has as many samples as positions, and the model a module that may take positions first.
        """
        if self.positions_first is None or x.ndim != 3 or holder.has_samples_first or 1 in x.shape[:2]:
            return
        counts = (len(self), len(self) * self.beams)
        if len(x) not in counts:  # whoever counts the samples says so
            return
        if x.shape[1] not in counts:
            if not torch.compiler.is_compiling():
                holder.has_samples_first = True
            return
        raise RecastConfigError(
            f"{self.positions_first} may take positions before samples (batch_first=False, or a forward that exchanges them), "
            f"and this batch has as many samples as positions, {x.shape[1]}: nobody can tell which of them have the tasks. "
            "Give it another number of samples (once is enough where samples are first), or all of them one task"
        )

    def rows(self, samples: int) -> dict[str | int, list[int]]:
        """The samples of each task, in the order of their first appearance; a task of a pool by its number.

        Numbers of tasks that lie on an accelerator are read once a call, not once a layer.
        """
        if torch.compiler.is_compiling():
            return self._rows_of(samples)
        if samples not in self._rows:
            self._rows[samples] = self._rows_of(samples)
        return self._rows[samples]

    def _rows_of(self, samples: int) -> dict[str | int, list[int]]:
        repeats = self.repeats(samples)
        keys: Sequence[str | int] = self.names
        if self.task_ids is not None:
            keys = self.task_ids.tolist() if self.keys is None else self.keys
        rows: dict[str | int, list[int]] = {}
        for i, key in enumerate(key for key in keys for _ in range(repeats)):
            rows.setdefault(key, []).append(i)
        return rows

    def index(self, samples: Sequence[int], device: torch.device) -> Tensor:
        """Numbers of samples as a tensor on a device, which is brought there once a call, not once a layer."""
        if torch.compiler.is_compiling():
            return torch.tensor(samples, device=device)
        key = (device, *samples)
        if key not in self._indices:
            self._indices[key] = torch.tensor(samples, device=device)
        return self._indices[key]

    def taken(self, x: Tensor, samples: Sequence[int]) -> Tensor:
        """Samples ``(samples, ...)`` of a tensor; a view of it where they lie side by side."""
        place = self.side_by_side(samples)
        return x[self.index(samples, x.device)] if place is None else x[place]

    def of_rows(self, samples: Sequence[int], count: int) -> MixedBatch:
        """The batch of some rows of an input that has ``count`` rows."""
        repeats = self.repeats(count)
        entries = [row // repeats for row in samples]
        chosen: dict[str, Any] = {"names": tuple(self.names[entry] for entry in entries) if self.names else ()}
        if self.task_ids is not None:
            chosen["task_ids"] = self.task_ids[self.index(entries, self.task_ids.device)]
            chosen["keys"] = None if self.keys is None else tuple(self.keys[entry] for entry in entries)
        if self.coefficients is not None:
            chosen["coefficients"] = self.coefficients[self.index(entries, self.coefficients.device)]
        return MixedBatch(**chosen, pool=self.pool, is_off=self.is_off, positions_first=self.positions_first)

    @staticmethod
    def side_by_side(samples: Sequence[int]) -> slice | None:
        """Where samples lie if each comes right after the one before; None if they do not."""
        first = samples[0]
        return slice(first, first + len(samples)) if [*samples] == [*range(first, first + len(samples))] else None

    def offsets(self, module_name: str, samples: int) -> Tensor | None:
        """The offsets ``(samples, templates)`` of a target module; None if the pool's tasks leave it alone."""
        assert self.pool is not None
        part = self.pool.slices.get(module_name)
        if part is None:
            return None
        assert self.coefficients is not None
        repeats = self.repeats(samples)
        gathered = self.coefficients if repeats == 1 else self.coefficients.repeat_interleave(repeats, dim=0)
        return gathered[:, part]


class _Block:
    """A batch for as long as its block is open, and the block around it.

    A generator's block may end in another thread than it began in, whose variable nobody can put back: it is closed instead.
    """

    def __init__(self, batch: MixedBatch, around: _Block | None) -> None:
        self.batch, self.around, self.is_open = batch, around, True


_BLOCK: ContextVar[_Block | None] = ContextVar("recast_mixed_batch", default=None)
_shared: MixedBatch | None = None  # the latest batch of any thread

FOLLOWS_CONTEXT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
"""Whether this torch's compiler follows context variables."""


def _is_compiled_without_context() -> bool:
    return not FOLLOWS_CONTEXT and torch.compiler.is_compiling()


def _innermost(block: _Block | None) -> MixedBatch | None:
    while block is not None and not block.is_open:
        block = block.around
    return None if block is None else block.batch


def current_batch() -> MixedBatch | None:
    """The mixed batch of the call that this thread is in, or None."""
    return _shared if _is_compiled_without_context() else _innermost(_BLOCK.get())


@contextmanager
def mixed_batch(batch: MixedBatch) -> Iterator[None]:
    """Give every sample its own task until the block ends."""
    global _shared
    before, _shared = _shared, batch
    if _is_compiled_without_context():
        try:
            yield
        finally:
            _shared = before
        return
    around = _BLOCK.get()
    block = _Block(batch, around)
    _BLOCK.set(block)
    try:
        yield
    finally:
        block.is_open = False
        if _BLOCK.get() is block:  # else it ends in another context than it began in
            _BLOCK.set(around)
        _shared = _innermost(_BLOCK.get())  # this thread's; what another one had when this block began may be over
