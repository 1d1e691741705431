"""Calls of a model beside verbs that change it.

Calls run beside each other. A verb that changes what calls compute with (activating, merging, deleting, moving) waits for those
that are on their way and keeps new ones out until it is done, so that no call sees half of a change.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

from ..errors import RecastConfigError
from .blocks import with_variable
from .mixed_batch import current_batch

# models, by their Calls, of which this thread (and context) wants the active task, or none at all
_ACTIVE_TASK: ContextVar[tuple[Calls, ...]] = ContextVar("recast_active_task", default=())
_NO_TASK_AT_ALL: ContextVar[tuple[Calls, ...]] = ContextVar("recast_no_task_at_all", default=())


class Calls:
    """What runs on one model now: a lock for many calls or one verb, and the blocks that are open.

    A copy of a model, by ``deepcopy`` or ``pickle``, begins with a fresh one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._calls: dict[int, int] = {}  # thread -> how deep it is in calls
        self._owner: int | None = None  # the thread whose verb is changing the model
        self._depth = 0
        self._waiting = 0  # verbs that wait
        self._calls_waiting = 0
        self._let_in = 0  # calls that waited for a verb come before the next one
        self._blocks = 0
        self._off = 0

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call: nothing that it computes with is changed until it ends."""
        if torch.compiler.is_compiling():
            yield
            return
        me = threading.get_ident()
        with self._changed:
            if self._owner != me and me not in self._calls:  # a call inside a call, or inside a verb, waits for nobody
                self._wait_for_verbs()
            self._calls[me] = self._calls.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._calls[me] -= 1
                if not self._calls[me]:
                    del self._calls[me]
                    self._changed.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """A verb that changes the model: it waits for the calls of other threads, and they for it.

        Raises:
            RecastConfigError: if it is used from inside a call while other threads compute: they could wait for each other.
        """
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                if me in self._calls and self._others(me):
                    raise RecastConfigError(
                        "the model cannot be changed from inside one of its calls while other threads compute with it: "
                        "activate, merge or delete tasks before the call or after it"
                    )
                self._waiting += 1
                try:
                    while self._owner is not None or self._let_in or self._others(me):
                        self._changed.wait()
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()
                self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner, self._let_in = None, self._calls_waiting
                    self._changed.notify_all()

    def _wait_for_verbs(self) -> None:
        if self._owner is None and not self._waiting:
            return
        self._calls_waiting += 1
        try:
            while self._owner is not None or (self._waiting and not self._let_in):
                self._changed.wait()
        finally:
            self._calls_waiting -= 1
            if self._let_in:
                self._let_in -= 1
                self._changed.notify_all()

    def _others(self, me: int) -> bool:
        return any(thread != me for thread in self._calls)

    # ---------------------------------------------------------------- blocks

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        with self._changed:
            setattr(self, name, getattr(self, name) + 1)
        try:
            yield
        finally:
            with self._changed:
                setattr(self, name, getattr(self, name) - 1)

    def block(self) -> AbstractContextManager[None]:
        """A block that gives tasks to the calls of the thread (and context) that opened it."""
        return self._counted("_blocks")

    def check_no_block_elsewhere(self) -> None:
        """Refuse a call without tasks of its own while a block is open in another thread or context (``RecastConfigError``)."""
        if torch.compiler.is_compiling() or not self._blocks:
            return
        if current_batch() is None and self not in (*_ACTIVE_TASK.get(), *_NO_TASK_AT_ALL.get()):
            raise RecastConfigError(
                "a block with pool.batch(...) is open on this model, but not in the thread or context of this call, which "
                "names no task: whom is it for?\nThe tasks of a block belong to the thread that opened it. In a thread of an "
                "executor, and in a generator that a server runs in threads, give them with the call, "
                "model(..., task_ids=pool.ids(names)), or open the block there; asyncio.to_thread takes it along. For the task "
                "that is active in the model, whatever other threads do, open pool.batch(None)."
            )

    def of_the_active_task(self) -> AbstractContextManager[None]:
        """A block in which this thread's calls are meant for the active task, whatever blocks are open elsewhere."""
        return with_variable(_ACTIVE_TASK, (*_ACTIVE_TASK.get(), self))

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """A block in which this thread wants no task at all, also in a mixed batch."""
        with self._counted("_off"), with_variable(_NO_TASK_AT_ALL, (*_NO_TASK_AT_ALL.get(), self)):
            yield

    def is_off(self, disabled: bool) -> bool:
        """Whether a mixed batch that begins now is without tasks; ``disabled``: the model's are switched off, by whomever."""
        return self in _NO_TASK_AT_ALL.get() or (disabled and not self._off)
