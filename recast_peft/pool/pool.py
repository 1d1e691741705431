"""TaskPool: thousands of tasks resident beside one model, activated in place, or many in one batch.

The tasks are the rows of one table (their coefficients, side by side over all target modules). Activating a task copies one
row into the coefficients of one adapter, the slot, so its time does not depend on how many tasks there are, no new tensor
is made, and a compiled model is not compiled again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..composition.mixed_batch import MixedBatch
from ..config import RecastConfig, layout_of, tasks_among
from ..errors import RecastConfigError
from ..hub.peft_models import TaskModel, with_task_verbs
from ..model import RecastModel
from ..names import check_adapter_name
from .activation import Slot
from .batches import hold, pool_of
from .features import base_features
from .layout import PoolLayout, same_layout
from .lora import LoraColumns, poolable_part
from .resident import ResidentTasks
from .routing import nearest_task, summarise
from .table import LAST_SERIAL

SLOT = "task_pool"


class TaskPool(ResidentTasks):
    """Tasks of one model, as rows of one table.

    Tasks can be put in, taken out and looked up in any thread, beside calls of the model in others. A call holds the tasks
    that it began with. ``activate``, ``deactivate`` and ``use`` change the model for all threads, and wait for calls that are
    on their way.

    Args:
        model: a PEFT model with at least one RECAST task; all tasks of the pool have that task's target modules and banks.
        like: the task whose layout the pool takes; None is the first one.
        slot: the name of the adapter that the pool adds to the model and writes the active task into.
        head_dtype: dtype in which classifiers are kept in memory, such as ``torch.float16`` or its name; they compute in the
            model's own. None keeps every bit.

    Attributes:
        table: ``(capacity, numbers per task)`` in float32; rows beyond the tasks, and of removed tasks, are zero. Coefficient
            sets are stored as their mean, which describes the same weights. It can be trained: see ``parameters``.

    Raises:
        RecastConfigError: if the model has no RECAST task, or the slot's name is that of a task.
    """

    def __init__(
        self, model: PeftModel, like: str | None = None, slot: str = SLOT, head_dtype: torch.dtype | str | None = None
    ) -> None:
        self.model, self._tuner = model, tuner_of(model)
        tuner, like = self._tuner, _task_like(self._tuner, like)
        check_adapter_name(slot)
        part = poolable_part(tuner.model, like)
        layout = layout_of(cast(RecastConfig, tuner.peft_config[like]), inference_mode=True, lora_config=part)
        was_there = slot in tuner.peft_config
        if was_there and all(pool.slot != slot for pool in tuner.task_pool):
            raise RecastConfigError(
                f"slot={slot!r}: the model has a task of this name, and the pool would write its tasks over it: give the slot "
                "another name"
            )
        with ExitStack() as undo:
            if not was_there:
                with torch.inference_mode(False):
                    model.add_adapter(slot, layout)
                undo.callback(model.delete_adapter, slot)
            config = cast(RecastConfig, tuner.peft_config[slot])
            pool_layout = PoolLayout(tuner.model, config, slot)
            part_of_like = LoraColumns(tuner.model, like, layout)
            if not same_layout(layout, config) or pool_layout.lora.parts != part_of_like.parts:
                raise RecastConfigError(
                    f"slot={slot!r}: the model has such an adapter already, with other target modules, banks or another LoRA "
                    f"part than {like!r}: give the slot another name"
                )
            pool_layout.lora.compute_as(part_of_like)
            self._slot = Slot(model, tuner, slot, pool_layout)
            serial = tuner.pools_made % LAST_SERIAL
            super().__init__(pool_layout, tuner.peft_config, self._slot.make_place_for, head_dtype, serial)
            tuner.pools_made += 1
            tuner.task_pool = (self, *(pool for pool in tuner.task_pool if pool.slot != slot))
            undo.pop_all()
        if was_there and self._slot.is_active():
            self.deactivate()  # what another pool left in it is no task of this one
        self._let_calls_name_tasks()

    def _let_calls_name_tasks(self) -> None:
        model = with_task_verbs(self.model)
        if not isinstance(model, TaskModel) and "task_ids" in inspect.signature(type(model).forward).parameters:
            model.register_forward_pre_hook(_refuse_task_ids, with_kwargs=True)
        model.special_peft_forward_args.add("task_ids")

    def __repr__(self) -> str:
        shown = [repr(name) for name in self.names[:3]] + (["..."] if len(self) > 3 else [])
        sizes = ", ".join(f"{key} {size:,} bytes" for key, size in self.sizes().items() if size)
        return (
            f"TaskPool({len(self)} task{'' if len(self) == 1 else 's'}: {', '.join(shown) or 'none'}; "
            f"{self.numbers_per_task} numbers each, {len(self._heads)} with a classifier; {sizes}; slot={self.slot!r}, "
            f"active={self.active!r})"
        )

    @property
    def slot(self) -> str:
        """The adapter that the active task is written into."""
        return self._slot.name

    @property
    def active(self) -> str | None:
        """The task that is active, or None for the pretrained model and for an ordinary adapter."""
        return self._slot.active

    def remove(self, name: str) -> None:
        """Take a task out; if it was active, the pretrained model is. Calls that hold it compute with it to their end."""
        row = self.row(name)
        if self.active == name:
            self.deactivate()
        with self.lock:
            if self._rows.get(name) == row:
                self.remove_row(row)
        if self.active == name and name not in self:  # another thread activated it meanwhile
            self.deactivate()

    # ---------------------------------------------------------------- one active task

    def activate(self, name: str, merge: bool = False) -> None:
        """Make a task active, in all threads; calls that are on their way end first. What fails leaves the pretrained model.

        Args:
            name: name of the task.
            merge: write its composed weights into the modules (in place: the same storage for every task), so that the model
                runs at the plain model's speed. Otherwise the weights are composed as they are used.
        """
        self.row(name)
        with self._tuner.calls.change(), self.lock:
            self._slot.check(self)
            row = self.row(name)
            self._slot.activate(name, self.table[row], self._heads.get(row), merge)

    def deactivate(self) -> None:
        """Make the pretrained model active, to the last bit (the slot's coefficients are zero)."""
        with self._tuner.calls.change(), self.lock:
            self._slot.check(self)
            try:
                self._slot.deactivate()
            except KeyboardInterrupt:
                self._slot.deactivate()
                raise

    @contextmanager
    def use(self, name: str, merge: bool = False) -> Iterator[None]:
        """Make a task active until the block ends, and then what was before (an ordinary adapter too), also after errors.

        Args:
            name: name of the task.
            merge: write its composed weights into the modules, as in ``activate``.
        """
        with self._slot.kept_aside() as (before, merged):
            try:
                self.activate(name, merge=merge)
                with self._tuner.calls.of_the_active_task():
                    yield
            finally:
                if before is None or before not in self:
                    self.deactivate()
                else:
                    self.activate(before, merge=merged)

    # ---------------------------------------------------------------- a task for each sample

    def batch(self, tasks: Tensor | Sequence[str | None] | None) -> AbstractContextManager[None]:
        """A block in which every sample has its own task: ``with pool.batch(["a", "b"]): model(x)``.

        The block is this thread's (and context's) own. In another thread, such as one of an executor, a call without tasks is
        refused while the block is open: give them with the call there (``task_ids=``), or open a block there.

        Args:
            tasks: ``(samples,)`` numbers from ``ids``, or names; None among them is the pretrained model. None instead of them
                is a block for the task that is active in the model, whatever blocks other threads have open.
        """
        if tasks is None:
            return self._tuner.calls.of_the_active_task()
        return self._block(self.mixed_batch_of(tasks))

    @contextmanager
    def _block(self, batch: MixedBatch) -> Iterator[None]:
        with self._tuner.calls.block(), self.held(batch):
            yield

    def held(self, batch: MixedBatch) -> AbstractContextManager[None]:
        """A block for one call with tasks that ``mixed_batch_of`` gathered; they may have been removed since."""
        return self._tuner.samples_with_tasks(batch)

    def mixed_batch_of(self, task_ids: Any, beams: int = 1) -> MixedBatch:
        """The coefficients and classifiers of each sample, gathered once for all layers.

        Raises:
            RecastConfigError: if a number is not that of a task, or if gradients are recorded with gradient checkpointing:
                what is computed again in the backward pass would no longer know the tasks.
        """
        if not torch.compiler.is_compiling():
            self._check_batch()
        return hold(self, self.slot, self._layout.slices, task_ids, beams)

    def _check_batch(self) -> None:
        if self._slot.is_deleted:
            self._slot.check(self)
        if torch.is_grad_enabled() and any(map(_is_checkpointed, self._layout.backbone.modules())):
            raise RecastConfigError(
                "a mixed batch cannot be trained with gradient checkpointing, which computes layers again after the call, "
                "when the tasks of its samples are forgotten: turn it off (gradient_checkpointing_disable() of "
                "transformers, set_grad_checkpointing(False) of timm), or call the model under torch.no_grad()"
            )

    def pool_of(self, task_ids: Any, pools: Sequence[TaskPool]) -> TaskPool:
        """The pool whose tasks a call names, of those that the model has; by name they are this one's."""
        return pool_of(task_ids, pools)

    # ---------------------------------------------------------------- finding the task

    def remember(self, name: str, inputs: Any, labels: Tensor | None = None) -> None:
        """Remember what a task's samples look like to the pretrained model, so that ``route`` can choose it.

        Args:
            name: name of the task.
            inputs: samples ``(samples, ...)``, or a dictionary of such tensors that the model takes by name.
            labels: ``(samples,)`` classes; given, each class has a prototype of its own.

        Raises:
            RecastConfigError: if there is no such task, no sample, or not one label for each.
        """
        self.row(name)
        number = int(self.ids([name])[0])
        known = summarise(self.base_features(inputs), labels)
        with self.lock:
            self._remembered[self.rows_of([number])[0]] = known

    def route(self, inputs: Any) -> Tensor:
        """Choose a task for each sample, from what the pretrained model makes of it.

        Args:
            inputs: as for ``remember``.

        Returns:
            ``(samples,)`` numbers of tasks, to be given on as ``task_ids``.

        Raises:
            RecastConfigError: if no task is remembered, there is no sample, or what the model makes of one is not finite.
        """
        features = self.base_features(inputs)
        with self.lock:
            known = {self._ids[row]: remembered for row, remembered in self._remembered.items()}
        return nearest_task(features, known).to(self.table.device)

    def base_features(self, inputs: Any) -> Tensor:
        """What reaches the classifier of the pretrained model, ``(samples, features)`` in float32 on the CPU.

        Of a model without a classifier its output; of features by position their mean.
        """

        def without_tasks(samples: int) -> AbstractContextManager[None]:
            return self.held(self.mixed_batch_of([None] * samples))

        return base_features(self._tuner, self._layout.config.head_module, inputs, without_tasks)


def tuner_of(model: Any) -> RecastModel:
    """The tuner of a model with tasks; refuses anything else (``RecastConfigError``)."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, RecastModel):
        raise RecastConfigError(f"a {type(model).__name__} has no RECAST task: call get_recast_model(model, config) first")
    return tuner


def _task_like(tuner: RecastModel, like: str | None) -> str:
    """The task whose layout a pool's tasks have: the first, unless one is named."""
    names = list(tasks_among(tuner.peft_config))
    like = next(iter(names), None) if like is None else like
    if like not in names:
        raise RecastConfigError(f"like={like!r}: the model has the tasks {', '.join(names) or '(none)'}")
    return like


def _refuse_task_ids(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("task_ids") is not None:
        raise RecastConfigError(
            f"{type(model).__name__} has an argument task_ids of its own, which no pool ever sees: give the tasks by a block, "
            "with pool.batch(names_or_rows): model(...)"
        )


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether a module of transformers or timm is computed again in the backward pass."""
    if getattr(module, "grad_checkpointing", False) is True:
        return True
    return module.training and getattr(module, "gradient_checkpointing", False) is True
