"""What is done to all parts of tasks at once: activating, deleting, merging, unmerging and taking a model apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn

from ..composition.compose import without_autocast
from ..errors import RecastBankError, RecastConfigError
from ..holders import TaskHolder, held_entries, holders
from ..layer import RecastLayer
from ..names import BANK_CONTAINER, PARTNER_CONTAINER, modules_of
from ..parts.lora_strength import PartStrength, part_layers
from ..parts.partner import detach_partners
from ..parts.saved import release_running_statistics
from ..parts.wrapper import TaskModule, task_modules
from .undo import undone_on_failure


def activate(model: nn.Module, adapter_names: Sequence[str], inference_mode: bool) -> None:
    """Make the tasks' parts active beside their coefficients, which PEFT's own verb reaches."""
    found = holders(model)  # a walk passes the modules of every task: one for all
    _bring_back(found)
    beside: list[Any] = [holder for holder in found if isinstance(holder, (TaskModule, PartStrength))]
    for holder in beside:
        holder.unmerge()
        holder.set_adapter(list(adapter_names), inference_mode)


def is_frozen(model: nn.Module, adapter_names: Sequence[str]) -> bool:
    """Whether nothing of some tasks is trained."""
    return not any(entry.tensor.requires_grad for name in adapter_names for entry in held_entries(model, name))


def delete(model: nn.Module, adapter_name: str) -> None:
    """Take a task out of every module that holds something of it."""
    for holder in holders(model):
        if isinstance(holder, RecastLayer):  # PEFT would choose the next active task here, layer by layer
            holder._active_adapter = [name for name in holder.active_adapters if name != adapter_name]
        holder.delete_adapter(adapter_name)
    container: Any = model._modules.get(BANK_CONTAINER, nn.ModuleDict())
    used = {id(bank) for layer in modules_of(model, RecastLayer) for bank in layer.recast_bank.values()}
    for key, bank in list(container.items()):
        if bank.is_anchored and id(bank) not in used:  # a compressed one is what the model is made of
            del container[key]


# ---------------------------------------------------------------- merging


def merged_tasks(model: nn.Module) -> list[str]:
    """The tasks that are merged now."""
    merged = [name for layer in modules_of(model, RecastLayer) for name in layer.merged_adapters]
    shown = [name for module in task_modules(model) for name in module._merged or ()]
    return list(dict.fromkeys([*merged, *shown]))


def active_tasks(model: nn.Module, adapter_names: Sequence[str]) -> list[str]:
    """The active tasks: those of the model, and those that layers were given by themselves, as PEFT's users do for several."""
    of_layers = (name for layer in modules_of(model, RecastLayer) for name in layer.active_adapters if layer.has_task(name))
    return list(dict.fromkeys([*adapter_names, *of_layers]))


def check_mergeable(model: nn.Module, adapter_names: Sequence[str], unload: bool) -> None:
    """Refuse to merge tasks with a part that no weight can hold, or while one of their two parts is switched off.

    ``unload``: into a model that has no place for tasks any more.

    Raises:
        RecastBankError: naming the task and its part.
        RecastConfigError: inside a block of ``disable_part``.
    """
    for holder in holders(model):
        for name in filter(holder.has_task, adapter_names):
            refusal = holder.refusal_to_merge(name) or (holder.refusal_to_unload(name) if unload else None)
            if refusal is not None:
                raise RecastBankError(
                    f"task {name!r} has {refusal}; nothing was changed. Leave it unmerged, or activate and merge a task "
                    "without it."
                )
    if any(getattr(layer, "_switched_off", False) for layer in (*part_layers(model), *modules_of(model, RecastLayer))):
        raise RecastConfigError("tasks are merged whole: leave the block of disable_part() first")


def merge(model: nn.Module, adapter_names: Sequence[str], safe_merge: bool, others: list[str] | None) -> None:
    """Merge tasks beside those that are merged already; what fails leaves nothing merged that was not merged before.

    ``others`` are the adapters that layers of other methods merge; None means their active ones.
    """
    before = merged_tasks(model)
    if others is not None and not others:
        return  # as with PEFT's own methods, an empty list merges nothing
    if before and not set(adapter_names) - set(before):
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=4)  # as PEFT's own methods say
    wanted = [*before, *(name for name in adapter_names if name not in before)]
    for part in part_layers(model):  # a LoRA part is merged on top of its task's coefficients, whatever was merged before
        part.unmerge()
    try:
        _merge_all(model, wanted, safe_merge)
        for layer in _layers_of_others(model):
            with onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=others)
    except BaseException:
        unmerge(model)
        if before:
            _merge_all(model, before, False)
        raise


@without_autocast()
def _merge_all(model: nn.Module, wanted: list[str], safe_merge: bool) -> None:
    for layer in (*modules_of(model, RecastLayer), *part_layers(model)):
        _let_stand_aside(layer, not any(map(layer.has_task, wanted)))
        new = [name for name in wanted if layer.has_task(name) and name not in layer.merged_adapters]
        if new:
            with onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=new)
    for module in task_modules(model):
        module.merge(wanted, safe_merge)


def unmerge(model: nn.Module) -> None:
    """Put everything back that was there before tasks were merged, to the last bit."""
    for module in task_modules(model):
        module.unmerge()
    _bring_back(holders(model))
    for layer in (*part_layers(model), *_layers_of_others(model), *modules_of(model, RecastLayer)):
        if layer.merged:
            with onload_layer(layer):
                layer.unmerge()


def _bring_back(found: list[Any]) -> None:
    for layer in found:
        if isinstance(layer, (PartStrength, RecastLayer)):
            _let_stand_aside(layer, False)


def _let_stand_aside(layer: Any, aside: bool) -> None:
    if layer.stands_aside != aside:  # torch looks long at what is assigned
        layer.stands_aside = aside


def _layers_of_others(model: nn.Module) -> list[Any]:
    """The tuner layers of other methods."""
    return [m for m in modules_of(model, BaseTunerLayer) if not isinstance(m, TaskHolder)]


# ---------------------------------------------------------------- taking a model apart


@contextmanager
def taken_apart(tuner: Any, adapter_names: list[str] | None, safe_merge: bool) -> Iterator[None]:
    """A block in which PEFT takes a model's layers out, one after the other; what hangs beside them comes out too.

    If it fails, as a safe merge does, the model is as it was before. ``adapter_names`` stay merged; None gives the pretrained
    model.
    """
    model = tuner.model
    with undone_on_failure(model), without_autocast():
        if adapter_names and part_layers(model):  # a LoRA part is merged on top of the coefficients of the active tasks
            tuner.unmerge_adapter()
            tuner.set_adapter(adapter_names, inference_mode=True)
        beside = model._modules.get(PARTNER_CONTAINER)
        for module in () if beside is None else task_modules(beside):
            if adapter_names is None:
                module.unmerge()
            else:
                module.merge(adapter_names, safe_merge)
        detach_partners(model)
        model._modules.pop(PARTNER_CONTAINER, None)
        with _renamed_base_layers(model):
            yield
    model._modules.pop(BANK_CONTAINER, None)
    release_running_statistics(model)


@contextmanager
def _renamed_base_layers(model: nn.Module) -> Iterator[None]:
    """Give a model's own ``base_layer``, as timm's DLA has, another name for a while: PEFT takes it for a layer of its own."""
    name, other = "base_layer", "base_layer_of_the_model"
    parents = [m for m in model.modules() if name in m._modules and not isinstance(m, BaseTunerLayer)]
    try:
        for parent in parents:
            parent._modules = {other if key == name else key: child for key, child in parent._modules.items()}
        yield
    finally:
        for parent in parents:
            parent._modules = {name if key == other else key: child for key, child in parent._modules.items()}
