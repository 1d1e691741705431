"""TaskServer: requests of many tasks, collected into batches; each fails alone.

Requests come from any thread or from asyncio. One thread collects those whose samples have the same names, shapes and dtypes
and computes them in one call of the model with a task for each sample. What is wrong with one request (an unknown task, an
input that the model refuses, a deadline that is over) is said to it alone.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RecastConfigError, RecastError
from ...parts.head import split_logits
from ...pool.pool import TaskPool
from ...storage.tensors import FLOATING
from ...tasks.calls import TASK_ARGUMENTS
from ...validation import COUNT, check_arguments, function, is_whole, number_above, optional, shown

Sample = Tensor | Mapping[str, Tensor]
RESERVED = {"", *TASK_ARGUMENTS}  # names that no tensor of a sample may have


class TaskServerError(RecastError, RuntimeError):
    """A request cannot be answered."""


class ServerBusyError(TaskServerError):
    """The queue is full, or the server is closed: try again later, or elsewhere."""


@dataclass(frozen=True)
class Answer:
    """What a request gets.

    Attributes:
        task: that answered; None is the pretrained model.
        output: output of the sample, without a batch dimension and without padding to other tasks' classes.
        label: name of the most likely class, if the task names its classes and all outputs are numbers.
        batch: how many requests were computed together.
    """

    task: str | None
    output: Tensor
    label: str | None
    batch: int


@dataclass(eq=False)
class _Request:
    task: str | None
    sample: dict[str, Tensor]  # a bare tensor under the empty name
    signature: tuple[Any, ...]
    deadline: float
    future: Future[Answer] = field(default_factory=Future)


def check_server_options(
    *,
    max_batch: Any = 32,
    wait: Any = 0.002,
    max_queue: Any = 1024,
    timeout: Any = 30.0,
    output_of: Any = None,
) -> None:
    """Hold options of ``TaskServer`` against what they may be (``RecastConfigError``)."""
    check_arguments(COUNT, max_batch=max_batch, max_queue=max_queue)
    check_arguments(number_above(0, itself=True), wait=wait)
    check_arguments(optional(function), output_of=output_of)
    if not (isinstance(timeout, (int, float)) and timeout > 0):  # it may be infinite
        raise RecastConfigError(f"timeout={shown(timeout)}: expected seconds above 0")


class TaskServer:
    """A front of a pool for many clients at once; use it as a context manager, or close it.

    Args:
        pool: pool of the tasks; its model is put in evaluation mode.
        max_batch: most requests that are computed together.
        wait: seconds that a request waits for others to come.
        max_queue: most requests that wait; further ones are refused at once.
        timeout: seconds after which a request that still waits is given up.
        output_of: the tensor ``(samples, ...)`` in what the model returns; None takes ``logits``, or the output itself.
    """

    def __init__(
        self,
        pool: TaskPool,
        *,
        max_batch: int = 32,
        wait: float = 0.002,
        max_queue: int = 1024,
        timeout: float = 30.0,
        output_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_server_options(max_batch=max_batch, wait=wait, max_queue=max_queue, timeout=timeout, output_of=output_of)
        self.pool, self.max_batch, self.wait, self.max_queue, self.timeout = pool, max_batch, wait, max_queue, timeout
        self._output_of = output_of or _output_of
        self._measured = _measured_inputs(pool.model.get_base_model())
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._counts = dict.fromkeys(("answered", "failed", "timed_out", "refused", "batches", "batched"), 0)
        pool.model.eval()
        self._thread = threading.Thread(target=self._serve, name="recast-task-server", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- requests

    def submit(self, task: str | None, sample: Sample, timeout: float | None = None) -> Future[Answer]:
        """Put a request in the queue, from any thread.

        Args:
            task: name; None is the pretrained model.
            sample: one sample without a batch dimension: a tensor, or tensors by the names that the model takes; floating-point
                numbers are taken in the dtype of the model's own, and so are whole ones of pictures and sounds.
            timeout: seconds for this request, at most the server's own.

        Returns:
            a future of the answer. It fails with a ``RecastError`` for what the request is wrong in, ``TimeoutError`` if it
            waited too long.

        Raises:
            RecastConfigError: if there is no such task, or the sample is none.
            ServerBusyError: if the queue is full, or the server is closed.
        """
        if self._lacks(task):
            raise RecastConfigError(f"the pool has no task {shown(task)}")
        named = {"": sample} if isinstance(sample, Tensor) else dict(sample) if isinstance(sample, Mapping) else {}
        if not named or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in named.items()):
            raise RecastConfigError(f"sample is a {type(sample).__name__}: expected a tensor, or tensors by name")
        odd = sorted(RESERVED.intersection(named)) if isinstance(sample, Mapping) else []
        if odd:  # they would say of which task the sample is
            raise RecastConfigError(f"sample has a tensor called {odd[0]!r}: expected names of the model's own inputs")
        measured = {name for name, v in named.items() if v.is_floating_point() or (is_whole(v) and name in self._measured)}
        named = {name: value.to(self._dtype()) if name in measured else value for name, value in named.items()}
        signature = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(named.items()))
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout == timeout):  # NaN is not
            raise RecastConfigError(f"timeout={shown(timeout)}: expected seconds, or None")
        deadline = time.monotonic() + min(self.timeout, self.timeout if timeout is None else timeout)
        request = _Request(task, named, signature, deadline)
        with self._changed:
            if self._closed or len(self._waiting) >= self.max_queue:
                self._counts["refused"] += 1
                what = "is closed" if self._closed else f"has {len(self._waiting)} requests waiting, the most that it takes"
                raise ServerBusyError(f"the server {what}: try again later")
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def __call__(self, task: str | None, sample: Sample, timeout: float | None = None) -> Answer:
        """Answer a request, from any thread; see ``submit``."""
        return self.submit(task, sample, timeout).result()

    async def answer(self, task: str | None, sample: Sample, timeout: float | None = None) -> Answer:
        """Answer a request in asyncio; see ``submit``. Cancelling it takes it out of the queue."""
        return await asyncio.wrap_future(self.submit(task, sample, timeout))

    @property
    def is_alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive() and not self._closed

    def stats(self) -> dict[str, int]:
        """Counts since the start: requests that were answered, failed, timed out or were refused; batches and their samples."""
        with self._changed:
            return {**self._counts, "waiting": len(self._waiting)}

    def close(self, timeout: float = 30.0) -> None:
        """Take no more requests, answer those that wait, and stop; what is left after ``timeout`` seconds fails."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            left, self._waiting = list(self._waiting), deque()
        for request in left:
            self._fail(request, ServerBusyError("the server was closed before this request was computed"), "failed")

    def __enter__(self) -> TaskServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.pool.model.parameters() if p.dtype in FLOATING), None)

    # ---------------------------------------------------------------- the serving thread

    def _serve(self) -> None:
        while (batch := self._next_batch()) is not None:
            ready = [request for request in batch if self._may_run(request)]
            if ready:
                self._compute(ready)

    def _next_batch(self) -> list[_Request] | None:
        """Requests of one signature, the oldest first; None when the server is closed and nothing waits."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            signature = self._waiting[0].signature
            end = time.monotonic() + self.wait
            while not self._closed and (left := end - time.monotonic()) > 0 and self._alike(signature) < self.max_batch:
                self._changed.wait(left)
            taken: list[_Request] = []
            others: deque[_Request] = deque()
            for request in self._waiting:
                fits = request.signature == signature and len(taken) < self.max_batch
                (taken if fits else others).append(request)
            self._waiting = others
            return taken

    def _alike(self, signature: tuple[Any, ...]) -> int:
        return sum(request.signature == signature for request in self._waiting)

    def _may_run(self, request: _Request) -> bool:
        if not request.future.set_running_or_notify_cancel():
            return False
        if time.monotonic() > request.deadline:
            self._fail(request, TimeoutError("the request waited longer than its time"), "timed_out")
            return False
        if self._lacks(request.task):
            self._fail(request, _removed(request.task), "failed")
            return False
        return True

    def _compute(self, requests: list[_Request]) -> None:
        """Answer requests together; if that fails, one by one, so that a bad one fails alone."""
        try:
            answers = self._outputs(requests)
        except BaseException as error:  # of whatever kind: the thread goes on, and nobody waits for ever
            if len(requests) == 1:
                shown = error if isinstance(error, RecastError) else _refused(requests[0], error)
                self._fail(requests[0], shown, "failed")
                return
            for request in requests:
                self._compute([request])
            return
        with self._changed:
            self._counts["batches"] += 1
            self._counts["batched"] += len(requests)
            self._counts["answered"] += len(requests)
        for request, answer in zip(requests, answers, strict=True):
            request.future.set_result(answer)

    def _outputs(self, requests: list[_Request]) -> list[Answer]:
        requests.sort(key=lambda request: request.task or "")  # samples of one task side by side are not copied together
        tasks = [request.task for request in requests]
        device = self.pool.table.device
        stacked = {name: torch.stack([r.sample[name] for r in requests]).to(device) for name in requests[0].sample}
        with torch.inference_mode(), self.pool.lock:  # names, labels and numbers of one moment
            for task in filter(self._lacks, tasks):  # since it was looked at
                raise _removed(task)
            labels = {task: None if task is None else self.pool.labels(task) for task in {*tasks}}
            batch = self.pool.mixed_batch_of(tasks)
        with torch.inference_mode(), self.pool.held(batch):
            out = self.pool.model(stacked[""]) if "" in stacked else self.pool.model(**stacked)
            output = self._output_of(out).float().cpu()
        if len(output) != len(requests):
            raise RecastConfigError(f"the model gave {len(output)} outputs for {len(requests)} samples")
        rows = split_logits(output) if output.ndim > 1 and output.shape[-1] > 1 else output.unbind()
        return [_answer(task, row, labels[task], len(requests)) for task, row in zip(tasks, rows, strict=True)]

    def _lacks(self, task: Any) -> bool:
        """Whether there is no such task; an error of the pool would name those of other clients."""
        return task is not None and not (isinstance(task, str) and task in self.pool)

    def _fail(self, request: _Request, error: BaseException, count: str) -> None:
        with self._changed:
            self._counts[count] += 1
        if not request.future.done():
            request.future.set_exception(error)


def _removed(task: str | None) -> RecastConfigError:
    return RecastConfigError(f"the task {task!r} was removed while the request waited")


def _answer(task: str | None, row: Tensor, id2label: Mapping[int, str] | None, batch: int) -> Answer:
    has_likeliest = row.ndim == 1 and len(row) > 0 and not row.isnan().any()
    label = id2label.get(int(row.argmax())) if id2label is not None and has_likeliest else None
    return Answer(task, row.clone(), label, batch)


def _measured_inputs(model: Any) -> set[str]:
    """Names of what holds pictures, sounds and the like, whose numbers JSON may write as whole ones; "" is a bare tensor."""
    name = getattr(model, "main_input_name", None)  # of transformers
    reads_ids = name == "input_ids" if name else any(isinstance(module, nn.Embedding) for module in model.modules())
    return set() if reads_ids else {"", name or next(iter(inspect.signature(model.forward).parameters), "")}


def _output_of(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "pooler_output", "last_hidden_state"):
        if isinstance(getattr(out, name, None), Tensor):
            return getattr(out, name)
    raise RecastConfigError(f"the model returned a {type(out).__name__}: say which tensor counts with output_of=")


def _refused(request: _Request, error: BaseException) -> TaskServerError:
    given = ", ".join(f"{name or 'sample'} {tuple(value.shape)} {value.dtype}" for name, value in request.sample.items())
    made = TaskServerError(f"the model refused the sample ({given}): {type(error).__name__}: {str(error)[:300]}")
    made.__cause__ = error
    return made
