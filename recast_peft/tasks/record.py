"""The record of a task: what a conversion decides, and what a model says of a task that it has."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..banks.directions_bank import DirectionsBank
from ..banks.template_bank import TemplateBank
from ..config import RecastConfig
from ..errors import RecastTargetError
from ..layer import RecastLayer, fingerprints_of, recast_layers
from ..names import modules_of
from ..options.record import Reference, TaskRecord, mean_fidelity
from ..parts.head import check_head, labels_of
from ..parts.lora import lora_config_of
from ..parts.wrapper import was_replaced
from ..placement.sharded import whole_shape
from ..planning.groups import PlannedGroup, sharing_of
from ..validation import listed
from .backbone import describe_backbone
from .banks import recipes_of, task_bank_reference, task_banks
from .preparation import PreparedTask
from .state import backbone_of, trained_outside_tasks
from .surroundings import are_different, surroundings_fingerprint, warn_of_difference


def planned_record(config: RecastConfig, prepared: PreparedTask, backbone: dict[str, Any] | None) -> TaskRecord:
    """What a conversion is about to decide for a task."""
    plan = prepared.plan
    banks = {group.name: prepared.layers[group.members[0]].bank for group in plan.groups}
    return TaskRecord(
        groups={group.name: list(group.members) for group in plan.groups},
        base_fingerprint=prepared.fingerprints,
        surroundings_fingerprint=prepared.surroundings,
        recipes=recipes_of(banks),
        bank=task_bank_reference(banks),
        partner_banks=prepared.partner_banks,
        num_directions=plan.num_directions,
        num_coefficient_sets=plan.num_coefficient_sets,
        coefficient_sharing=plan.coefficient_sharing,
        lora_config=getattr(plan.lora, "config", None),
        problem_type=config.problem_type,
        backbone=(config.backbone if prepared.is_same_base else None) or backbone,
        fidelity=config.fidelity,
        is_stored=config.is_stored_task,
        renamed=prepared.renamed,
    )


def record_of_task(config: RecastConfig, model: nn.Module, adapter_name: str) -> TaskRecord:
    """What a model says of a task that it has, for the task's file.

    The user of the config may since have put it on another model.

    Raises:
        RecastTargetError: if the task, or a target of it, is no longer in the model.
    """
    backbone = backbone_of(model)
    layers = {name: layer for name, layer in recast_layers(backbone).items() if adapter_name in layer.recast_bank}
    banks = task_banks(backbone, adapter_name)
    _check_is_there(config, adapter_name, layers, banks)
    check_head(backbone, adapter_name, config)
    reference = task_bank_reference(banks)
    _warn_of_what_is_not_saved(model, adapter_name, reference)
    sets = {whole_shape(layer.recast_coefficients[adapter_name])[0] for layer in layers.values()}
    measured = [fidelity for bank in banks.values() for fidelity in bank.fidelity.values()]
    record = TaskRecord(
        groups={name: list(bank.members) for name, bank in banks.items()},
        base_fingerprint=fingerprints_of(layers),
        surroundings_fingerprint=_surroundings_of(model, config, layers),
        recipes=recipes_of(banks),
        bank=reference,
        partner_banks={} if config.record is None else config.record.partner_banks,
        num_directions=max((bank.num_directions for bank in banks.values() if isinstance(bank, DirectionsBank)), default=None),
        num_coefficient_sets=max(sets, default=config.num_coefficient_sets),
        coefficient_sharing=_sharing_of(layers, banks, adapter_name),
        lora_config=lora_config_of(backbone, adapter_name),
        problem_type=labels_of(backbone, adapter_name).problem_type,
        backbone=config.as_chosen().backbone or describe_backbone(backbone, config.revision),
        fidelity=mean_fidelity(measured) or config.as_chosen().fidelity,
        is_stored=config.is_stored_task,
    )
    _warn_of_a_changed_model(backbone, adapter_name, layers, config, record)
    return record


def _check_is_there(
    config: RecastConfig, adapter_name: str, layers: Collection[str], banks: Mapping[str, TemplateBank]
) -> None:
    if config.groups and not layers:
        raise RecastTargetError(
            f"task {adapter_name!r} is no longer in the model, and its file would be empty: unload() or merge_and_unload() "
            "took it out. Save a task before, and the model that is left by its own save_pretrained."
        )
    lost = next((member for bank in banks.values() for member in bank.members if member not in layers), None)
    if lost is not None:
        raise was_replaced(f"{lost}, a target of task {adapter_name!r},")


def _warn_of_what_is_not_saved(model: nn.Module, adapter_name: str, reference: Reference | None) -> None:
    """Warn of a bank that is not stored yet, and of trained parameters that belong to no task."""
    if reference is not None and reference["name"] is None:
        warnings.warn(
            f"Task {adapter_name!r} was trained on a template bank that is not stored yet ({reference['fingerprint']}): "
            "save it once with model.save_bank(folder) before its tasks, or they cannot find it.",
            stacklevel=3,
        )
    outside = trained_outside_tasks(model)
    if outside:
        warnings.warn(
            f"{len(outside)} parameters of the pretrained model are trained and belong to no task ({listed(outside)}): they "
            "are not saved. Give the task modules_to_save=, train_norms=True or bias=, or freeze them: requires_grad_(False).",
            stacklevel=3,
        )


def _warn_of_a_changed_model(
    backbone: nn.Module, adapter_name: str, layers: dict[str, RecastLayer], config: RecastConfig, record: TaskRecord
) -> None:
    """Warn if the model is not the one that the task was put in; ``config`` says what that was, ``record`` what it is now."""
    written = [name for name, layer in layers.items() if layer.is_written_to]
    before, now = config.surroundings_fingerprint, record.surroundings_fingerprint
    is_own = config.base_fingerprint == record.base_fingerprint  # else the config says of another model what lay there
    if written or (is_own and are_different(before, now)):
        where = listed(written) or "beside its targets"
        warnings.warn(
            f"the pretrained model was changed since task {adapter_name!r} was put in ({where}): the task's file does not hold "
            "that, and says that the task belongs to the model as it is now. Change a model before it is converted.",
            stacklevel=3,
        )
    if is_own and config.is_stored_task and config.bias == "none" and before == now:
        warn_of_difference(before, surroundings_fingerprint(backbone, layers), f"task {adapter_name!r}")


def _surroundings_of(model: nn.Module, config: RecastConfig, targets: Collection[str]) -> str | None:
    """What lies beside the targets now; of a stored task what its file says, unless a whole state dict was loaded since."""
    has_loaded = any(layer.has_loaded for layer in modules_of(model, RecastLayer))
    recorded = config.surroundings_fingerprint
    if config.bias != "none":  # trained biases are the task's
        return None if has_loaded else recorded
    if not has_loaded and (recorded is None or config.is_stored_task):
        return recorded
    actual = surroundings_fingerprint(backbone_of(model), targets)
    return actual if has_loaded or are_different(actual, recorded) else recorded


def _sharing_of(layers: dict[str, RecastLayer], banks: dict[str, TemplateBank], adapter_name: str) -> str | int | None:
    coefficients = {name: id(layer.recast_coefficients[adapter_name]) for name, layer in layers.items()}
    groups = [PlannedGroup(b.name, b.members, (), torch.float32, b.num_templates, 1) for b in banks.values()]
    return sharing_of(groups, coefficients)
