"""A task's own classifier: of its own size, stored and swapped with the task, and label names that follow the active task."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..composition.mixed_batch import MixedBatch
from ..config import RecastConfig
from ..errors import RecastConfigError, RecastTargetError
from ..holders import Entry, TaskHolder, holders, module_entries, plain_modules, put_at, unwrapped, unwrapped_module
from ..names import lies_in
from ..placement.offloaded import copy_at_hand
from ..planning.heads import head_names, modules_by
from ..validation import check_arguments, of_type
from .base import Place, Request, TaskPart
from .head_building import (
    Labels,
    PreparedHead,
    PrototypeHead,
    class_names,
    classes_of,
    guessed_problem_type,
    label_config,
    names_every_class,
    owner_of,
    prepare_head,
    read_labels,
    write_labels,
    write_timm_labels,
)
from .precision import HALF
from .wrapper import TaskModule


class TaskHead(TaskModule):
    """The heads of all tasks in place of the model's own; the model names the classes of the one that is called."""

    what = "num_classes"
    trained_kind = "classifier"

    def __init__(self, module_to_save: nn.Module, module_name: str, owner: nn.Module) -> None:
        super().__init__(module_to_save, module_name)
        self._owner = (owner,)  # in a tuple: the head is a part of its owner, not the other way round
        self._labels: dict[str | None, Labels] = {None: read_labels(owner)}  # by task; None: the model's own
        self._named: str | None = None  # the task whose labels the model shows; None for its own
        self._stored_dtype: dict[str, torch.dtype] = {}

    def put(self, adapter_name: str, head: PreparedHead, active: bool = False, inference_mode: bool = False) -> None:
        """Give a task its head."""
        self._labels[adapter_name] = self._with_kind_of_loss(head.labels)
        if head.stored_dtype is not None:
            self._stored_dtype[adapter_name] = head.stored_dtype
        self.add(adapter_name, head.module, active, inference_mode)

    def _with_kind_of_loss(self, labels: Labels) -> Labels:
        """Labels of a task with the model's kind of loss, where they say none and there are as many classes."""
        same = labels.num_classes == self._labels[None].num_classes
        inherited = self._labels[None].problem_type if same else None
        return dataclasses.replace(labels, problem_type=labels.problem_type or inherited)

    def adopt(self, wrapper: TaskModule) -> None:
        """Take over the modules of a plain wrapper that stood here before."""
        for name, module in wrapper.modules_to_save.items():
            self.modules_to_save[name] = module
            self._adapters.add(name)
        self._active_adapter = list(wrapper._active_adapter)
        self._disable_adapters = wrapper._disable_adapters

    def show(self, slot: str, head: Any | None) -> None:
        """Call a head of a pool (``StoredHead``) under the name of its slot; None calls the model's own.

        The numbers of a head like the one in the slot are copied into it, so that a compiled model goes on; another one takes
        its place.
        """
        self._note_labels()
        self._merged = None
        if head is None:
            self._adapters.discard(slot)  # its module waits for the next head like it, and is no task's until then
            self._active_adapter = []
            self._write_labels()
            return
        present = dict(self.modules_to_save.items()).get(slot)
        if present is not None and head.fits(present):
            numbers = head.state()
            for key, value in present.state_dict().items():
                value.copy_(numbers[key])
            self._labels[slot] = self._with_kind_of_loss(head.labels)
        else:
            self.put(slot, PreparedHead(self.module_name, head.copy(), head.labels, head.stored_dtype))
        self._adapters.add(slot)
        self._active_adapter = [slot]
        self._write_labels()

    def num_classes(self, adapter_name: str) -> int | None:
        """Of how many classes a task's head was made; None if it is one of ``modules_to_save``, and the model does not say."""
        return self._labels.get(adapter_name, self._labels[None]).num_classes

    def prepared(self, name: str, adapter_name: str) -> PreparedHead:
        """A copy of a task's head, to be put elsewhere."""
        module = copy_at_hand(self.modules_to_save[adapter_name]).requires_grad_(False)
        self._note_labels()
        labels = self._labels.get(adapter_name, self._labels[None])
        if not labels.num_classes:  # one of ``modules_to_save``, and the model does not say
            labels = dataclasses.replace(labels, num_classes=classes_of(module))
        return PreparedHead(name, module, labels, self._stored_dtype.get(adapter_name))

    # ---------------------------------------------------------------- tasks

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        self._labels.pop(adapter_name, None)
        self._stored_dtype.pop(adapter_name, None)
        super().delete_adapter(adapter_name, new_active_adapters)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        self._note_labels()
        names = [name for name in self._adapters if self.modules_to_save[name] is module]
        labels = self._labels.get(names[0] if names else None, self._labels[None])
        write_labels(self._owner[0], labels)
        if names:
            write_timm_labels(self._owner[0], labels)
        module = module.as_linear() if isinstance(module, PrototypeHead) else module
        is_rounded = self.dtype_of_model in HALF and any(p.dtype == torch.float32 for p in module.parameters())
        return copy.deepcopy(module).to(self.dtype_of_model) if is_rounded else module

    def changed(self) -> None:
        """Let the model's config name the classes of the head that is called."""
        self._note_labels()
        self._write_labels()

    def relabel(self, adapter_name: str, id2label: dict[int, str] | None, problem_type: str | None) -> None:
        """Name the classes and the kind of loss of a task's head that has the numbers of another one now."""
        labels = self._labels.get(adapter_name)
        if labels is not None:  # one of ``modules_to_save`` has those of the model
            self._labels[adapter_name] = dataclasses.replace(labels, id2label=id2label, problem_type=problem_type)
            self._write_labels()

    def labels_of(self, adapter_name: str) -> Labels | None:
        """Kind of loss and names of classes of a task's own head: given, found, or set in the model's config since."""
        self._note_labels()
        return self._labels.get(adapter_name)

    def check_loss(self, batch: MixedBatch, labels: Tensor) -> None:
        """Refuse a loss that transformers would compute as that of the active task, if it is another one's.

        Raises:
            RecastConfigError: if tasks of the batch have another kind of loss or number of classes than the model shows.
        """
        owner = self._owner[0]
        if batch.is_off or label_config(owner) is None:
            return
        known = batch.pool.labels if batch.pool is not None else self._labels
        called = [known.get(key) or self._labels[None] for key in batch.rows(len(batch))]  # type: ignore[arg-type]
        now = read_labels(owner)
        shown = (now.problem_type or guessed_problem_type(now, labels), now.num_classes)
        kinds = sorted({found.problem_type for found in called if found.problem_type is not None})
        widest = max(found.num_classes or 0 for found in called)
        if set(kinds) - {shown[0]} or widest != shown[1]:
            raise RecastConfigError(
                "labels were given to a batch of several tasks, whose loss the model would compute as the active task's\n"
                f"  its kind and classes:   {shown[0]}, {shown[1]}\n  those of the batch:     {', '.join(kinds)}, {widest}\n"
                "Leave labels out and compute the loss from the logits, or call one task at a time with set_adapter."
            )

    def _note_labels(self) -> None:
        """Keep what the model's config says now, a user's or a guess, for the head that is shown."""
        if label_config(self._owner[0]) is None:
            return
        now = read_labels(self._owner[0])
        shown = self._labels.get(self._named)
        if shown is None or now.num_classes != shown.num_classes:
            return  # the task was deleted
        is_renamed = now.id2label != class_names(shown) and names_every_class(now)
        self._labels[self._named] = dataclasses.replace(now, id2label=now.id2label if is_renamed else shown.id2label)

    def _write_labels(self) -> None:
        task = self.shown_task
        self._named = task if task in self._labels else None
        write_labels(self._owner[0], self._labels[self._named])

    def entries(self, adapter_name: str) -> Iterable[Entry]:
        dtype = self._stored_dtype.get(adapter_name)
        pack = None if dtype is None else (lambda values: values.to(dtype) if values.is_floating_point() else values)
        return module_entries(self.module_name, self.modules_to_save[adapter_name], pack=pack)

    def refusal_to_pool(self, adapter_name: str) -> str | None:
        """None for what ``num_classes`` makes, and for copies of the model's that are like it: a pool holds heads."""
        is_like_those = adapter_name in self._labels or classes_of(self.modules_to_save[adapter_name]) is not None
        return None if is_like_those else super().refusal_to_pool(adapter_name)

    def _module_of(self, key: str | int, batch: MixedBatch) -> nn.Module:
        if isinstance(key, int):
            return batch.pool.head(key) or self.original_module  # type: ignore[union-attr]
        return super()._module_of(key, batch)

    def called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a head gives; one in float32 behind a model in half precision gives it in that."""
        x: Any = next(iter(args), None)
        held = chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else ()  # a pool's are functions
        own: Any = next(iter(held), None)
        is_mixed = isinstance(x, Tensor) and x.dtype in HALF and own is not None and own.dtype == torch.float32
        if not is_mixed or torch.is_autocast_enabled(x.device.type):
            return module(*args, **kwargs)
        return module(x.float(), *args[1:], **kwargs).to(x.dtype)


def split_logits(logits: Tensor) -> list[Tensor]:
    """Cut the padding off the logits of a batch in which every sample has its own task.

    Args:
        logits: ``(samples, ..., classes)`` of ``model(x, task_ids=...)``; narrower classifiers are padded with -inf.

    Returns:
        one tensor ``(..., classes)`` a sample, as wide as its task's classifier.

    Raises:
        RecastConfigError: if they are no such tensor.
    """
    check_arguments(of_type(Tensor), logits=logits)
    if logits.ndim < 2 or not logits.shape[-1]:
        raise RecastConfigError(f"logits of shape {tuple(logits.shape)} were given: expected (samples, ..., classes)")
    real = logits != -math.inf  # what overflowed, or is no number, is a logit
    real = real.flatten(1, -2).any(dim=1) if logits.ndim > 2 else real
    widths = (real * torch.arange(1, logits.shape[-1] + 1, device=logits.device)).amax(dim=-1)
    return [row[..., : int(width)] for row, width in zip(logits, widths, strict=True)]


def task_heads(model: nn.Module, adapter_name: str | None = None) -> list[TaskHead]:
    """Every place of a model where tasks (or one of them) have classifiers of their own."""
    return holders(model, adapter_name, TaskHead)


def task_head(model: nn.Module, name: str) -> TaskHead:
    """The container of all tasks' heads; it is put in place of the model's own head if it is not there yet."""
    present = plain_modules(model)[name]
    if isinstance(present, TaskHead):
        return present
    owner = owner_of(model, name)
    if isinstance(present, TaskModule):
        wrapper = TaskHead(present.original_module, name, owner)
        wrapper.adopt(present)
    else:
        wrapper = TaskHead(present, name, owner)
    put_at(model, name, wrapper)
    return wrapper


def labels_of(model: nn.Module, adapter_name: str) -> Labels:
    """Names of classes and kind of loss of a task's own classifier, as far as they are known; nothing if it has none."""
    found = (head.labels_of(adapter_name) for head in task_heads(model, adapter_name))
    return next((labels for labels in found if labels is not None), Labels(None))


def check_head(model: nn.Module, adapter_name: str, config: RecastConfig) -> None:
    """Refuse a config that does not speak of the task's head, or was changed since (``RecastTargetError``)."""
    for head in task_heads(model, adapter_name):
        if config.num_classes is None and adapter_name in head._labels:
            raise RecastTargetError(
                f"{adapter_name!r} holds the classifier of a pool's task, of which its config does not say, so that its file "
                "would not load: make a task of it and save that, "
                f"model.base_model.add_weighted_adapter([{adapter_name!r}], [1.0], name, heads='first')"
            )
        found = head.num_classes(adapter_name)
        if None not in (found, config.num_classes) and found != config.num_classes:
            raise RecastTargetError(
                f"the config of task {adapter_name!r} was changed since it was made\n  its num_classes: {config.num_classes}\n"
                f"  of its head:     {found}\nPut back what it was, or add a task: add_adapter(name, RecastConfig(...))."
            )


class HeadPart(TaskPart):
    """A classifier of the task's own (``num_classes``)."""

    name = "head"
    owns_modules = True

    def prepare(self, request: Request) -> list[PreparedHead]:
        head = prepare_head(request.model, request.config, request.counting)
        return [] if head is None else [head]

    def install(self, place: Place, pieces: list[PreparedHead]) -> None:
        for head in pieces:
            if any(tensor.dtype in HALF for tensor in head.module.state_dict().values()):
                head.module.float()  # steps are lost in bfloat16, and gradients of float16 cannot be unscaled (GradScaler)
            task_head(place.model, head.place).put(place.adapter_name, head, place.active, place.inference_mode)

    def entries(self, model: nn.Module, adapter_name: str, config: RecastConfig) -> Iterable[Entry]:
        """None beside those of ``TaskHead``; a head that was replaced since, or is trained and no task's, is refused.

        Raises:
            RecastTargetError: if the task's head is no longer in the model, or the model's own is trained.
        """
        if config.num_classes is not None and not task_heads(model, adapter_name):
            raise RecastTargetError(
                f"the head of task {adapter_name!r} ({config.num_classes} classes) is no longer in the model: another module "
                "was put in its place after the conversion (reset_classifier, or an assignment), which belongs to no task and "
                "would not be saved. Change the head before the model is converted, or add a task with the head that you want: "
                "add_adapter(name, RecastConfig(num_classes=...))."
            )
        name = _head_trained_outside_tasks(model)
        if name is not None:
            raise RecastTargetError(
                f"{name} is trained, but belongs to no task and would not be saved: another module was put there after "
                "the conversion (reset_classifier, or an assignment), or the model's own was unfrozen. Give the task a "
                f"classifier with num_classes=, or modules_to_save=[{name!r}], or freeze it: requires_grad_(False)."
            )
        return ()


def _head_trained_outside_tasks(model: nn.Module) -> str | None:
    """The name of a head of the model's own whose weights are trained; biases are a choice of ``bias=``, and PEFT stores what
    reads words out."""
    modules, embeddings = plain_modules(model), modules_by(model, "get_output_embeddings")
    for head in sorted(head_names(model)):
        within = [module for name, module in modules.items() if lies_in(name, [head])]
        own = [unwrapped_module(m) for m in within if not isinstance(unwrapped(m), TaskHolder)]
        trained = [p for m in own if m not in embeddings for key, p in m._parameters.items() if p is not None and key != "bias"]
        if any(parameter.requires_grad for parameter in trained):
            return head
    return None
