"""What every call of a RECAST model passes through: a task for each sample, and the lock between calls and verbs."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..composition.calls import Calls
from ..composition.lazy_weight import model_reads
from ..composition.mixed_batch import MixedBatch, current_batch, mixed_batch
from ..errors import RecastConfigError
from ..layer import RecastLayer
from ..names import BASE_ADAPTER, modules_of, plain_name
from ..parts.head import task_heads
from ..parts.stacking import Adding
from .state import keep_trained

TASK_ARGUMENTS = ("adapter_names", "task_ids")
_EXCHANGE = re.compile(r"\b(transpose|swapaxes|swapdims)\((\w+, )?(0, 1|1, 0)\)|permute\((\w+, )?1, 0\b")
REPEATING = ("num_beams", "num_return_sequences")  # arguments of generate that repeat each sample


def waits_for_calls(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb of the model that no call of another thread runs beside."""

    @functools.wraps(verb)
    def waiting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.calls.change():
            return verb(self, *args, **kwargs)

    return waiting


class _MethodWithTasks:
    """A method of the plain model that takes a task for each sample too; copied and pickled with a PEFT model that keeps it."""

    def __init__(self, tuner: Any, method: Callable[..., Any]) -> None:
        self.tuner, self.method = tuner, method
        functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tasks = {name: kwargs.pop(name) for name in _task_arguments(kwargs, self.method)}
        if all(value is None for value in tasks.values()):
            return self.method(*args, **kwargs)
        with self.tuner._enable_peft_forward_hooks(**tasks):
            return self.method(*args, **kwargs)


class TaskCalls(BaseTuner):
    """The side of ``RecastModel`` that calls see; a base class of it."""

    task_pool: tuple[Any, ...] = ()  # the TaskPools of this model, the latest first
    _positions_first: str | None = None  # a module of the plain model that may take positions before samples
    pools_made = 0  # each has a number of its own, which its tasks' numbers carry

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls = Calls()
        self._guards: list[Any] = []  # handles of what refuses arguments that the plain model would swallow
        super().__init__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes; ``adapter_names`` or ``task_ids`` give each sample its own task."""
        tasks = {name: kwargs.pop(name) for name in _task_arguments(kwargs, self.model.forward)}
        with self._enable_peft_forward_hooks(**tasks):
            return super().forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the plain model; one of its methods that takes any keywords takes a task for each sample too."""
        found = super().__getattr__(name)
        if not inspect.ismethod(found) or found.__self__ is not self.model:
            return found
        return _MethodWithTasks(self, found) if _takes_any_keyword(found) else found

    def guard(self, before_loading: Callable[..., None]) -> None:
        """Let the plain model refuse tasks that its keywords would swallow, and calls that name no task beside open blocks.

        ``before_loading`` looks at whatever state dict is loaded into it.
        """
        if not self._guards:
            self._guards.append(self.model.register_load_state_dict_pre_hook(before_loading))
            first = (name for name, module in self.model.named_modules() if _may_exchange(module))
            self._positions_first = next((plain_name(name) or type(self.model).__name__ for name in first), None)
            for module in (self.model, *self.model.children()):
                if module is self.model or (_takes_any_keyword(module.forward) and modules_of(module, RecastLayer)):
                    self._guards.append(module.register_forward_pre_hook(_Guard(self.calls), with_kwargs=True))

    def remove_guards(self) -> None:
        """Undo ``guard``."""
        while self._guards:
            self._guards.pop().remove()

    @waits_for_calls
    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)

    # ---------------------------------------------------------------- a task for each sample

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        Adding.end()
        adapter_names, task_ids = kwargs.get("adapter_names"), kwargs.get("task_ids")
        repeats = _repeats(kwargs)
        with self.calls.call():
            batch = current_batch()
            if adapter_names is not None or task_ids is not None:
                with self.samples_with_tasks(self._mixed_batch(adapter_names, task_ids, repeats)):
                    yield
            elif batch is not None and repeats > 1:  # text is generated in a block
                with mixed_batch(replace(batch, beams=repeats)):
                    yield
            else:
                self.calls.check_no_block_elsewhere()
                with model_reads():
                    yield

    def with_own_repeats(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` that say how often samples are repeated, also where the model's own config says so."""
        own = getattr(self.model, "generation_config", None)
        if own is None or kwargs.get("generation_config") is not None:
            return kwargs
        own_repeats = {name: getattr(own, name, None) for name in REPEATING}
        return {**{name: count for name, count in own_repeats.items() if (count or 1) > 1}, **kwargs}

    @contextmanager
    def samples_with_tasks(self, batch: MixedBatch) -> Iterator[None]:
        """Give every sample its own task until the block ends, also in modules that tasks own whole."""
        disabled = any(holder._disable_adapters for holder in modules_of(self.model, RecastLayer))
        with mixed_batch(replace(batch, is_off=self.calls.is_off(disabled), positions_first=self._positions_first)):
            yield

    def _mixed_batch(self, adapter_names: Any, task_ids: Any, repeats: int) -> MixedBatch:
        if task_ids is None:
            return MixedBatch(names=self._checked_names(adapter_names), beams=repeats)
        if adapter_names is not None:
            raise RecastConfigError("adapter_names and task_ids were both given; give one of them")
        return self.pool_in_use(task_ids).mixed_batch_of(task_ids, repeats)

    def pool_in_use(self, task_ids: Any = None) -> Any:
        """The TaskPool that ``task_ids`` refer to: the numbers of its tasks say so, names are those of the latest pool.

        Raises:
            RecastConfigError: if the model has none, or not that one.
        """
        if not self.task_pool:
            raise RecastConfigError("task_ids was given, but the model has no pool of tasks (any more): make a new TaskPool")
        latest = self.task_pool[0]
        if torch.compiler.is_compiling() or len(self.task_pool) == self.pools_made == 1:
            return latest
        return latest.pool_of(task_ids, self.task_pool)

    def _checked_names(self, adapter_names: Any) -> tuple[str, ...]:
        """The names of a batch's tasks, one for each sample."""
        is_many = isinstance(adapter_names, Iterable) and not isinstance(adapter_names, str)
        names = tuple(adapter_names) if is_many else (None,)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names should be a list with a name for each sample, got {adapter_names!r}.")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(names) - set(self.peft_config) - {BASE_ADAPTER})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)} "
                f"(the model has {', '.join(self.peft_config)})"
            )
        return names


class _Guard:
    """Stands before the plain model."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [name for name in _task_arguments(kwargs, module.forward) if kwargs[name] is not None]
        if given:
            raise RecastConfigError(
                f"{given[0]} was given to the plain {type(module).__name__}, which knows nothing of tasks: call the PEFT model "
                "with it (model(...), model.generate(...), or another method by way of the PEFT model)"
            )
        self.calls.check_no_block_elsewhere()
        if "_hf_hook" in vars(module) and hasattr(module, "peft_config"):
            keep_trained(module)
        batch, labels = current_batch(), kwargs.get("labels")
        if batch is not None and isinstance(labels, torch.Tensor) and not torch.compiler.is_compiling():
            for head in task_heads(module):
                head.check_loss(batch, labels)


def _may_exchange(module: nn.Module) -> bool:
    """Whether what is in a module may get positions before samples."""
    return vars(module).get("batch_first") is False or _exchanges(type(module).forward)


@functools.cache
def _exchanges(forward: Callable[..., Any]) -> bool:
    """Whether a forward, by its source, exchanges the first two dimensions of something."""
    if forward.__module__.startswith("torch."):
        return False
    try:
        return _EXCHANGE.search(inspect.getsource(forward)) is not None
    except (OSError, TypeError):  # there is no source
        return False


def _repeats(kwargs: dict[str, Any]) -> int:
    """How often ``generate`` repeats each sample."""
    config = kwargs.get("generation_config")
    counts = [kwargs[name] if name in kwargs else getattr(config, name, 1) for name in REPEATING]
    return max([1, *(count for count in counts if isinstance(count, int))])


def _takes_any_keyword(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _task_arguments(kwargs: dict[str, Any], function: Callable[..., Any]) -> list[str]:
    """The arguments of a call that give tasks to samples; not those that a function has of its own under such a name."""
    given = [name for name in TASK_ARGUMENTS if name in kwargs]
    own = inspect.signature(function).parameters if given else ()
    return [name for name in given if name not in own]
