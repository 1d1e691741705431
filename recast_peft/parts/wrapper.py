"""TaskModule: what each task puts in the place of one module, in PEFT's container for modules that are saved whole.

PEFT's ``ModulesToSaveWrapper`` gives the place of the module, activation and deletion. What is different here: any task's name;
the task's tensors are found by identity; merging tasks by name shows their modules too; what was frozen stays frozen when tasks
are switched off and on again; a mixed batch takes any kind of module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..composition.lazy_weight import of_no_sample
from ..composition.mixed_batch import MixedBatch, current_batch, mixed_batch
from ..composition.recomputation import CallHistory, state_of_call
from ..composition.strength import Strength
from ..errors import RecastBankError, RecastConfigError, RecastTargetError
from ..holders import Entry, TaskHolder, TaskModules, holders, module_entries, plain_modules, put_child, unwrapped_module


class TaskModule(TaskHolder, ModulesToSaveWrapper):
    """The modules of all tasks in the place of one of the model's; the active task's is the one that is called."""

    what = "modules_to_save"  # for messages
    other_param_names = ("modules_to_save",)  # what is no weight of the base, for PEFT
    adds_when_merged = False  # whether what several tasks have here adds, once it is merged
    _owner: tuple[nn.Module, ...] = ()  # the model around it, where that matters; in a tuple, since it is no child
    idle_slot: str | None = None  # an adapter that no task of its pool is in: it counts as none

    def __init__(self, module_to_save: nn.Module, module_name: str) -> None:
        nn.Module.__init__(self)
        self.module_name = module_name
        self.original_module = module_to_save
        self.modules_to_save = TaskModules()
        self._adapters: set[str] = set()
        self._active_adapter: list[str] = []  # the model's active tasks, whether they have something here or not
        self._merged: list[str] | None = None  # the tasks that are merged, likewise
        self._disable_adapters = False
        self.history = CallHistory()
        self.train(module_to_save.training)
        self.check_module()

    # ---------------------------------------------------------------- tasks

    def add(self, adapter_name: str, module: nn.Module, active: bool, inference_mode: bool) -> None:
        """Give a task its module, which is called from now on if ``active``."""
        self.modules_to_save[adapter_name] = module
        self._adapters.add(adapter_name)
        for own in map(unwrapped_module, (self.original_module, *plain_modules(self.original_module).values())):
            for parameter in own.parameters(recurse=False):  # other tasks may have something in there
                parameter.requires_grad_(False)
        if active:
            self.set_adapter([adapter_name], inference_mode=inference_mode)
        else:
            module.requires_grad_(False)

    def check_module(self) -> None:
        """Unlike PEFT's container, this one may stand around a layer of other tasks: its modules are copies without it."""
        if not isinstance(self.original_module, BaseTunerLayer):
            super().check_module()

    def update(self, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
        """Called by PEFT for modules that are saved whole: a task that has its module here keeps it."""
        if adapter_name not in self._adapters:
            super().update(adapter_name, tied_module=tied_module, **kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Call the module of the task that has one here, or else the model's own.

        Raises:
            RecastConfigError: if several tasks have one.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        owners = [name for name in names if name in self._adapters]
        if len(owners) > 1:
            raise several_owners(owners, f"{self.what} at {self.module_name}")
        self.unmerge()
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in owners and not inference_mode)
        self._active_adapter = names
        self.changed()

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Asked by PEFT before it activates tasks: the one that has a module here; unlike PEFT's, none may be activated."""
        return super().check_set_adapter(adapter_name) if adapter_name else None

    @property
    def active_adapters(self) -> list[str]:
        """The active tasks that have something here."""
        return [name for name in self._active_adapter if name in self._adapters]

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.changed()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Delete a task's module; which task is active next says the model's own verb."""
        self._adapters.discard(adapter_name)
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._active_adapter = [name for name in self._active_adapter if name != adapter_name]
        self.changed()

    def merge(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Call the named tasks' module (None: the active ones') while they are merged, whichever task is active."""
        self._merged = list(self._active_adapter if adapter_names is None else adapter_names)
        self.changed()

    def unmerge(self) -> None:
        """Call the active task's module again."""
        self._merged = None
        self.changed()

    def changed(self) -> None:
        """Called after another module may be the one that is called."""

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The tasks that are merged, of those that have something here."""
        return [name for name in self._merged or () if name in self._adapters]

    @property
    def shown_task(self) -> str | None:
        """The task whose module is called now; None for the model's own."""
        names = self._active_adapter if self._merged is None else self._merged
        acting = (name for name in names if name in self._adapters and name != self.idle_slot)
        return None if self._disable_adapters else next(acting, None)

    def tasks_of_call(self) -> tuple[str, ...]:
        """The tasks whose module is called in a call, but for those of a batch."""
        return () if self.shown_task is None else (self.shown_task,)

    def __getattr__(self, name: str) -> Any:
        """What a model reads here is that of the module which it would call; PEFT's asks for the active tasks alone."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "_disable_adapters" not in self.__dict__:  # on its way into being
                raise
        return self._getattr_wrapped(name, self._modules)

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        batch = current_batch()
        if batch is None or (self._disable_adapters and batch.is_off):
            task = self.shown_task
            return getattr(self.original_module if task is None else self.modules_to_save[task], name)
        called = {id(module): module for module in (self._module_of(key, batch) for key in batch.rows(len(batch)))}
        if len(called) == 1 and isinstance(only := next(iter(called.values())), nn.Module):
            return getattr(only, name)
        value = getattr(self.original_module, name)
        error = RecastBankError(
            f"the model reads {self.module_name} instead of calling it, and tasks of this batch own it whole, so that "
            "samples cannot have their own: pass one task at a time instead of adapter_names"
        )
        return value if not isinstance(value, Tensor) else of_no_sample(value, error)

    @property
    def dtype_of_model(self) -> torch.dtype:
        """That of the model's own module, or near it where that has no numbers."""
        found = (p.dtype for m in (self.original_module, *self._owner) for p in m.parameters() if p.is_floating_point())
        return next(found, torch.float32)

    # ---------------------------------------------------------------- what a holder can be asked

    def has_task(self, adapter_name: str) -> bool:
        return adapter_name in self._adapters

    def entries(self, adapter_name: str) -> Iterable[Entry]:
        return module_entries(self.module_name, self.modules_to_save[adapter_name])

    def refusal_to_pool(self, adapter_name: str) -> str | None:
        return f"{self.module_name} whole ({self.what})" if self.has_task(adapter_name) else None

    def adapter_state_dict(self, adapter_name: str, state_dict: Any = None) -> dict[str, Tensor]:
        """Nothing: a task's tensors are gathered by identity (tasks/state.py)."""
        return {}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Nothing: a task's tensors are put back by identity (tasks/state.py)."""
        return {}

    # ---------------------------------------------------------------- computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("adapter_names", None)
        batch = current_batch()
        if batch is None or (self._disable_adapters and batch.is_off):
            task = self.shown_task
            return self.called(self.original_module if task is None else self.modules_to_save[task], *args, **kwargs)
        return self._mixed(batch, *args, **kwargs)

    def _mixed(self, batch: MixedBatch, *args: Any, **kwargs: Any) -> Any:
        """Every sample with its own task's module; ``RecastBankError`` where what is called writes into a cache of the call."""
        given = [*args, *kwargs.values()]
        lengths = [batch.samples_in(value, self) for value in given if isinstance(value, Tensor) and value.ndim]
        fitting = [length for length in lengths if length in (len(batch), batch.beams * len(batch))]
        samples = next(iter(fitting or lengths), 0)
        groups: dict[int, tuple[Any, list[int]]] = {}
        for key, indices in batch.rows(samples).items():
            module = self._module_of(key, batch)
            groups.setdefault(id(module), (module, []))[1].extend(indices)
        if len(groups) < 2:
            return self.called(next((module for module, _ in groups.values()), self.original_module), *args, **kwargs)
        if any(hasattr(value, "get_seq_length") for value in given):
            raise RecastBankError(
                f"tasks of this batch own {self.module_name} whole, which writes into a cache: pass one task at a time instead "
                "of adapter_names, or use_cache=False"
            )
        parts = []
        for module, indices in groups.values():
            if args and all(value is None or isinstance(value, (bool, int, float, str)) for value in given[1:]):
                # other tasks may have something in the model's own
                is_own = module is self.original_module
                with mixed_batch(batch.of_rows(indices, samples)) if is_own else nullcontext():
                    part = self.called(module, batch.taken(args[0], indices), *args[1:], **kwargs)
            else:  # nobody knows which of the arguments go by sample
                part = tree_map(partial(_rows_of, indices, samples), self.called(module, *args, **kwargs))
            parts.append((indices, part))
        return joined(parts, samples)

    def called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a module gives that is called here."""
        state_of_call(self)
        return module(*args, **kwargs)

    def _module_of(self, key: str | int, batch: MixedBatch) -> nn.Module:
        return self.modules_to_save[key] if isinstance(key, str) and key in self._adapters else self.original_module

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The module that stays: of merged tasks the one that owns it, else the model's own."""
        names = (self._active_adapter if adapter_names is None else adapter_names) if merge else []
        owners = [name for name in names if name in self._adapters]
        if owners:
            return self.modules_to_save[owners[0]]
        return _taken_apart(self.original_module, merge, safe_merge, adapter_names)


class ScaledModule(Strength, TaskModule):
    """What tasks have in a place and act with by their strength; loops over the layers of PEFT's methods come by it too."""

    def __init__(self, module_to_save: nn.Module, module_name: str) -> None:
        super().__init__(module_to_save, module_name)
        self.scaling = {}

    @property
    def base_layer(self) -> nn.Module:
        """The module of the model; whoever takes a model's layers out puts it in their place."""
        return self.original_module

    def get_base_layer(self) -> nn.Module:
        """What stays when a model's layers are taken out: the module of the model, or what is merged."""
        return self.unload_and_optionally_merge_module(self.merged, False, self.merged_adapters)

    @property
    def merged(self) -> bool:
        """Whether something is merged that tasks have here."""
        return bool(self.merged_adapters)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: what a task has here is no change of a weight."""
        return False

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        self.scaling.pop(adapter_name, None)
        super().delete_adapter(adapter_name, new_active_adapters)


# diffusers and PEFT's users go through these layers to activate, scale and merge; PEFT's own class has more than these can mean
BaseTunerLayer.register(ScaledModule)


def task_modules(model: nn.Module, adapter_name: str | None = None) -> list[TaskModule]:
    """Every place of a model where tasks (or one of them) have modules of their own."""
    return holders(model, adapter_name, TaskModule)


def _taken_apart(module: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """A part of the model without the layers of tasks in it."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        module = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
    elif isinstance(module, BaseTunerLayer):
        if merge:
            module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        module = module.get_base_layer()
    for name, child in [(name, child) for name, child in module._modules.items() if child is not None]:
        plain = _taken_apart(child, merge, safe_merge, adapter_names)
        if plain is not child:
            put_child(module, name, plain)
    return module


def _rows_of(rows: list[int], samples: int, value: Any) -> Any:
    by_sample = isinstance(value, Tensor) and value.ndim > 0 and len(value) == samples
    return value[torch.tensor(rows, device=value.device)] if by_sample else value


def joined(parts: list[tuple[list[int], Any]], samples: int) -> Any:
    """Put what several modules give in one; logits of several classifiers are padded with -inf to the widest.

    Args:
        parts: the rows and the output of each module: ``(rows, ..., features)``, or several of these.
        samples: rows of the whole batch.

    Returns:
        ``(samples, ..., most features)``, or several of these.
    """
    rows, outputs = zip(*parts, strict=True)
    return tree_map(lambda *values: _joined(rows, values, samples), *outputs)


def _joined(rows: Sequence[list[int]], values: Sequence[Any], samples: int) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0]
    widest = max(values, key=lambda part: part.shape[-1])
    result = widest.new_empty((samples, *widest.shape[1:]))
    for own, part in zip(rows, values, strict=True):
        missing = widest.shape[-1] - part.shape[-1] if part.ndim > 1 else 0
        padded = nn.functional.pad(part, (0, missing), value=float("-inf")) if missing else part
        result = result.index_copy(0, torch.tensor(own, device=part.device), padded)
    return result


def was_replaced(what: str) -> RecastTargetError:
    return RecastTargetError(
        f"{what} is no longer in the model: another module was put in its place after the conversion, which belongs to no task "
        "and would not be saved. Change the module before the model is converted, or add a task for the model as it is now: "
        "add_adapter(name, config)."
    )


def several_owners(owners: Sequence[str], place: str) -> RecastConfigError:
    return RecastConfigError(
        f"Only one adapter can be set at a time for {place}, got {', '.join(owners)}, which have a module of their own there: "
        "activate one of them, give each sample its own task (adapter_names=, or a TaskPool), or combine them into a new one "
        "(add_weighted_adapter)"
    )


def check_one_owner(model: nn.Module, adapter_names: Sequence[str], merging: bool = False) -> None:
    """Refuse several tasks at once that own the same module, such as a classifier each (``RecastConfigError``).

    Where tasks are merged (``merging``) their changes of biases add.
    """
    for module in model.modules() if len(adapter_names) > 1 else ():
        if isinstance(module, ModulesToSaveWrapper) and not (merging and getattr(module, "adds_when_merged", False)):
            owners = [name for name in adapter_names if name in module._adapters]
            if len(owners) > 1:
                raise several_owners(owners, f"ModulesToSaveWrapper {getattr(module, 'module_name', '')!r}")
