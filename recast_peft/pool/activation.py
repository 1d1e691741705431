"""The slot: the one adapter of the model that a pool writes its active task into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..composition.compose import without_autocast
from ..composition.merging import check_writable, held_error, layers_on_top
from ..composition.zeros import Zeros
from ..errors import RecastBankError, RecastConfigError
from ..model import RecastModel
from ..parts.bias_part import bias_holders
from ..parts.head import TaskHead, task_head, task_heads
from ..parts.head_building import Labels
from ..parts.lora_strength import PartStrength
from ..parts.readout import readout_holders
from ..tasks.verbs import merged_tasks
from .heads import StoredHead
from .layout import PoolLayout, slot_was_deleted


class Slot:
    """An adapter whose coefficients and classifier are those of one task of a pool, or of none.

    Its verbs wait for calls that are on their way: no call sees half of a task.
    """

    def __init__(self, model: PeftModel, tuner: RecastModel, name: str, layout: PoolLayout) -> None:
        self.model, self.tuner, self.name, self.layout = model, tuner, name, layout
        self._holders = bias_holders(layout.backbone, name)
        layers = layout.layers.values()
        # layers whose bank only approximates the pretrained weight that they keep: no coefficients give it back
        keep_base = [layer for layer in layers if layer.is_compressed and not layer.is_released]
        self._zeros = Zeros(name)
        # layers first: when they are unmerged, a LoRA part has nothing to compose again below it
        self._with_numbers: list[Any] = [*layers, *layout.lora.layers, *self._holders]
        for holder in self._with_numbers:
            holder.zeros = self._zeros
        # what acts even where all coefficients are zero
        self._idle: list[Any] = [*keep_base, *readout_holders(layout.backbone, name)]
        self._heads: list[TaskHead] = task_heads(layout.backbone)
        self._places: set[str] = set()  # names of the modules in whose place they stand
        self._shown: tuple[TaskHead, StoredHead] | None = None  # the active task's, and where it stands
        self.holds: str | None = None  # the task that is written into it

    @property
    def active(self) -> str | None:
        """The task that is active, or None for the pretrained model and for an ordinary adapter."""
        return self.holds if self.is_active() else None

    def is_active(self) -> bool:
        """Whether the slot is the model's active adapter."""
        return list(self.model.active_adapters) == [self.name]

    @property
    def is_deleted(self) -> bool:
        """Whether the slot was deleted; an ordinary task may have its name by now."""
        return all(pool.slot != self.name for pool in self.tuner.task_pool)

    def check(self, pool: Any) -> None:
        """Refuse a slot that was deleted, or is another pool's by now."""
        if self.is_deleted:
            raise slot_was_deleted(self.name)
        if not any(other is pool for other in self.tuner.task_pool):
            raise RecastConfigError(
                f"another TaskPool has been made for the adapter {self.name!r} since, and its task may be active there: "
                "activate tasks of that pool, or give each pool a slot of its own (slot=)"
            )

    def activate(self, name: str, row: Tensor, head: StoredHead | None, merge: bool) -> None:
        """Make a task active; see ``TaskPool.activate``."""
        self._check_writable(name, merge)
        try:
            self._make_active()
            if not merge:
                self._unmerge()
            row = self._write(row)
            if merge:
                self._merge(row)
            self._show(head)
        except BaseException:  # a part of the one task and a part of the other are no task
            self.deactivate()
            raise
        self.holds = name

    def deactivate(self) -> None:
        """Make the pretrained model active, to the last bit (the slot's coefficients are zero)."""
        self._check_writable(None, False)
        self._make_active()
        self._unmerge()
        torch._foreach_zero_(self._numbers())
        self._zeros.note(self._with_numbers)
        for layer in self._idle:
            layer.idle_slot = self.name
        self._show(None)
        self.holds = None

    @contextmanager
    def kept_aside(self) -> Iterator[tuple[str | None, bool]]:
        """A block that may activate tasks; ordinary adapters that were active or merged before come back at its end,
        unless they were deleted in it: then the pretrained model is active.

        The block gets the pool's task that was active, and whether it was merged, to activate it again by itself.
        """
        merged = any(layer.merged for layer in self.layout.layers.values())
        ordinary = None if self.is_active() else (list(self.model.active_adapters), self.model.active_adapter)
        trainable = [(p, p.requires_grad) for p in self.model.parameters()] if ordinary is not None else []
        merged_before = [] if ordinary is None else merged_tasks(self.tuner.model)  # they need not be the active ones
        try:
            yield self.active, merged
        finally:
            known = self.tuner.peft_config.keys()
            if ordinary is not None and known >= set(ordinary[0]):  # not deleted in the block
                self.model.active_adapter = ordinary[1]
                self.tuner.set_adapter(ordinary[0])
                for parameter, requires_grad in trainable:
                    parameter.requires_grad_(requires_grad)
                merged_before = [name for name in merged_before if name in known]
                if merged_before:
                    self.tuner.merge_adapter(adapter_names=merged_before)

    def make_place_for(self, head_name: str) -> None:
        """Let the model have a classifier for each task in this place."""
        if head_name not in self._places:
            self._places.add(head_name)
            wrapper = task_head(self.layout.backbone, head_name)
            if not any(known is wrapper for known in self._heads):
                self._heads.append(wrapper)

    def _check_writable(self, name: str | None, merge: bool) -> None:
        """Refuse what would fail after the first number was written, or leave what is merged another task's."""
        layout = self.layout
        refusals = [part.refusal_to_merge(self.name) for part in layout.lora.layers] if merge else []
        for refusal in filter(None, refusals):
            raise RecastBankError(f"task {name!r} cannot be merged: it has {refusal}. Activate it without merge=True.")
        for layer in layout.layers.values():
            if layer.held is not None and any(not isinstance(other, PartStrength) for other in layers_on_top(layer)):
                raise held_error(layer, [] if name is None else [name])
            if merge and not layer.merged:
                check_writable(layer)
        if merge and any(part._switched_off for part in (*layout.layers.values(), *layout.lora.layers)):
            raise RecastConfigError("tasks are merged whole: leave the block of disable_part() first")

    def _make_active(self) -> None:
        if not self.is_active():
            self.model.active_adapter = self.name
            self.tuner.set_adapter(self.name, inference_mode=True)
        self._zeros.forget()
        for layer in self._idle:
            layer.idle_slot = None

    def _numbers(self) -> list[Tensor]:
        """Where a row's numbers lie, in the row's order."""
        tensors: list[Tensor] = [layer.recast_coefficients[self.name] for layer in self.layout.layers.values()]
        tensors += [owner.offset for owner in self.layout.bias_owners.values()]
        tensors += [entry.tensor for entry in self.layout.lora.entries.values()]
        return [tensor.data for tensor in tensors]

    def _write(self, row: Tensor) -> Tensor:
        """Put a row's numbers where they lie; returns the row, on their device."""
        targets = self._numbers()
        row = row.detach().to(targets[0].device)
        parts = row.split([target.numel() for target in targets])
        torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(parts, targets, strict=True)])
        return row

    @torch.no_grad()
    @without_autocast()
    def _merge(self, row: Tensor) -> None:
        """Merge what a row was written into, in place of what is merged now."""
        parts, slices, layers = self.layout.lora.layers, self.layout.slices, self.layout.layers
        for part in parts:
            part.merge_in_place(self.name)
        beside = {id(layer) for part in parts for layer in part.recast_beside}
        end = max((slices[name].stop for name in layers), default=0)
        factors = row[:end].unsqueeze(1).unbind()  # of all layers at once
        for name, layer in layers.items():
            if id(layer) not in beside:
                layer.merge_in_place([self.name], factors[slices[name]])
        for holder in self._holders:
            holder.merge_in_place(self.name)

    def _unmerge(self) -> None:
        for holder in self._with_numbers:
            holder.unmerge()

    def _show(self, head: StoredHead | None) -> None:
        """Make a classifier active; at every other place the model's own."""
        if self._shown is not None:
            self._shown[1].shown_by(None)
            self._shown = None
        # make_place_for has seen to it; a search through the model would take longer than all the rest
        shown = None if head is None else next(w for w in self._heads if w.module_name == head.kind.name)
        for wrapper in self._heads:
            if wrapper is not shown and self.name in wrapper._active_adapter:
                wrapper.show(self.name, None)
        if shown is not None and head is not None:
            shown.show(self.name, head)
            self._shown = shown, head
            head.shown_by(self)

    def labels_now(self) -> Labels | None:
        """What the model says of the classes of the task that it shows; None once the slot is no longer the pool's."""
        is_own = any(pool._slot is self for pool in self.tuner.task_pool)
        return self._shown[0].labels_of(self.name) if is_own and self._shown is not None else None
