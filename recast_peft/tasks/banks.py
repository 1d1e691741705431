"""The template banks of a model's tasks: which there are, and as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_bank import GrownBank
from ..banks.template_bank import TemplateBank
from ..composition.compose import average_sets
from ..errors import RecastBankError, RecastConfigError
from ..layer import recast_layers
from ..options.record import Reference
from ..parts.banked import partner_bank
from ..parts.bias_part import TaskBiases
from ..parts.readout import TaskReadouts
from ..validation import check_arguments, check_is_task, one_of


def recast_banks(model: nn.Module) -> dict[str, TemplateBank]:
    """The template banks of a model by name, in the order of their first member."""
    banks: dict[str, TemplateBank] = {}
    for layer in recast_layers(model).values():
        for bank in (*layer.compressed_bank, *layer.recast_bank.values()):
            banks.setdefault(bank.key, bank)
    return banks


def task_banks(model: nn.Module, adapter_name: str) -> dict[str, TemplateBank]:
    """The banks of one task by name, in the order of their first member."""
    layers = [layer for layer in recast_layers(model).values() if adapter_name in layer.recast_bank]
    return {bank.name: bank for bank in (layer.recast_bank[adapter_name] for layer in layers)}


def task_bank_reference(banks: dict[str, TemplateBank]) -> Reference | None:
    """The stored bank that a task is on, if its banks are no mix of the pretrained weights."""
    return next((dict(bank.stored) for bank in banks.values() if bank.stored is not None and bank.recipe is None), None)


def recipes_of(banks: dict[str, TemplateBank]) -> dict[str, dict[str, list[list[float]]]] | None:
    """How a task stores the mixes of compressed banks, None without any; ``RecastBankError`` if a state dict brought others."""
    foreign = next((name for name, bank in banks.items() if bank.is_foreign), None)
    if foreign is not None:
        raise RecastBankError(
            f"the templates of bank {foreign!r} came with a state dict, and are not those that the model made or read: a task "
            "on them could not be loaded. Convert a model with the weights that they are of, and load the state dict into that."
        )
    return {name: bank.recipe.to_lists() for name, bank in banks.items() if bank.recipe is not None} or None


def _bank_of_weights(model: nn.Module, adapter_name: str, method: dict[str, Any]) -> StoredBank:
    """The banks of a task as they are stored (``RecastBankError`` if all follow from the model); ``method`` is the config's."""
    banks = task_banks(model, adapter_name)
    layers = recast_layers(model)
    version = 1
    history: tuple[Mapping[str, Any], ...] = ()
    made: str | Mapping[str, Any] = method
    groups = {}
    for name, bank in banks.items():
        if isinstance(bank, GrownBank):
            groups[name] = StoredGroup(bank.members, grown=bank.grown_templates)
            version, history, made = bank.version, bank.history, bank.made
        elif bank.templates is None or bank.base_coefficients is None:
            groups[name] = StoredGroup(bank.members)
        else:
            groups[name] = StoredGroup(bank.members, bank.templates.data, bank.base_coefficients, bank.recipe)
    reference = task_bank_reference(banks) or {"name": None, "fingerprint": ""}
    fingerprints = {member: layers[member].fingerprint for bank in banks.values() for member in bank.members}
    fingerprint = reference["fingerprint"] or ""
    return StoredBank(groups, fingerprints, made, reference["name"], version, fingerprint, history)


def versions_of(bank: StoredBank | GrownBank) -> tuple[str, ...]:
    """The fingerprints of a bank and of its earlier versions."""
    return (bank.fingerprint, *(str(entry["fingerprint"]) for entry in bank.history))


def collapse_coefficient_sets(model: nn.Module, adapter_name: str | None = None) -> None:
    """Replace the K coefficient sets of a task by their mean: the same model, to the last bit, with K = 1.

    Args:
        model: a converted model, as ``get_recast_model`` returns it.
        adapter_name: the task; None means all of them.

    Raises:
        RecastConfigError: if there is no such task.
    """
    layers = recast_layers(model)
    tasks = {name for layer in layers.values() for name in layer.recast_coefficients}
    if not tasks:
        raise RecastConfigError("the model has no RECAST task: convert it with get_recast_model first")
    if adapter_name is not None:
        check_is_task(adapter_name, sorted(tasks))
    configs = getattr(model, "peft_config", {})
    for task in sorted(tasks) if adapter_name is None else [adapter_name]:
        held = [(layer, layer.recast_coefficients[task]) for layer in layers.values() if task in layer.recast_coefficients]
        means = {id(old): average_sets(old.detach()).unsqueeze(0).clone() for _, old in held}  # while all of them are held
        collapsed = {id(old): nn.Parameter(means[id(old)], requires_grad=old.requires_grad) for _, old in held}
        for layer, old in held:
            layer.recast_coefficients[task] = collapsed[id(old)]  # shared coefficients stay shared
        if task in configs:
            configs[task].record = replace(configs[task].record, num_coefficient_sets=1)


def stored_bank(tuner: Any, adapter_name: str | None, of: str) -> StoredBank:
    """The bank of a task that ``save_bank`` and ``push_bank_to_hub`` store; the arguments are theirs.

    Raises:
        RecastBankError: if the banks follow from the pretrained weights, or there is no bank of biases.
        RecastConfigError: if there is no such task, or ``of`` is neither ``"weights"`` nor ``"biases"`` nor ``"readout"``.
    """
    name: Any = next(iter(tuner.active_adapters), None) if adapter_name is None else adapter_name
    check_is_task(name, tuner.peft_config)
    check_arguments(one_of("weights", "biases", "readout"), of=of)
    if of == "weights":
        return _bank_of_weights(tuner.model, name, tuner.peft_config[name].method.to_dict())
    bank = partner_bank(tuner.model, name, TaskBiases if of == "biases" else TaskReadouts)
    if bank is None:
        raise RecastBankError(f"task {name!r} is on no bank of {of}: there is nothing to store")
    return bank


def remember_stored_bank(tuner: Any, stored: StoredBank) -> StoredBank:
    """Note where a bank was stored, for the tasks that are saved from now on; gives the bank back."""
    versions = versions_of(stored)
    if not (stored.is_of_biases or stored.is_readout):
        for bank in recast_banks(tuner.model).values():
            if bank.stored is not None and bank.stored["fingerprint"] in versions:
                bank.stored["name"] = stored.name
        return stored
    for config in tuner.peft_config.values():
        record: Any = getattr(config, "record", None)
        for partner, reference in () if record is None else record.partner_banks.items():
            if reference["fingerprint"] in versions:
                banks = {**record.partner_banks, partner: {**reference, "name": stored.name}}
                config.record = replace(record, partner_banks=banks)
    return stored
