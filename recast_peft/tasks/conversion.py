"""The steps of a conversion, each a plain function: check, prepare layers and banks, describe, install.

Nothing here changes the model but ``install_banks``, which the tuner calls when all else has succeeded.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..banks.directions_bank import DirectionsBank
from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_bank import GrownBank
from ..banks.template_bank import TemplateBank
from ..composition.fingerprint import is_coarser_form, is_fingerprint, same_weight
from ..config import RecastConfig
from ..errors import RecastBankError, RecastBaseMismatchError, RecastConfigError, RecastLoadError
from ..holders import container_key, holders, put_child
from ..layer import RecastLayer, recast_layers
from ..mimicry import FittedTemplates, Recipe
from ..names import BANK_CONTAINER, PREFIX, modules_of
from ..parts.partner import SideContainer
from ..parts.stacking import layer_around
from ..planning.candidates import Candidate, composed_layer
from ..planning.groups import PlannedGroup
from ..planning.plan import RecastPlan
from ..validation import listed, shown


@dataclass
class PreparedLayer:
    """A layer that is ready to be put in its place."""

    layer: RecastLayer  # new, or the one that is there already
    parent: nn.Module  # the module that holds the target, or the layer that is there already
    child_name: str  # its name in it
    visible_key: str  # the module name at which PEFT's loop comes by
    bank: TemplateBank = field(init=False)  # of the new task; ``prepare_banks`` gives it

    def put_in(self, adapter_name: str, config: RecastConfig, num_coefficient_sets: int, active: list[str]) -> None:
        """Put the layer in its place, with the task's coefficients."""
        if not self.layer.active_adapters:
            self.layer._active_adapter = active
        self.layer.update_layer(adapter_name, self.bank, num_coefficient_sets, config)
        put_child(self.parent, self.child_name, self.layer)


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """Refuse a task name that the model has already."""
    taken = [holder.module_name for holder in holders(model, adapter_name)]
    if taken:
        raise RecastConfigError(
            f"the model is converted already and has a task {adapter_name!r} (on {taken[0]} and {len(taken) - 1} other "
            "modules): choose another adapter_name, or delete_adapter first"
        )


def check_recorded(config: RecastConfig) -> None:
    """Refuse a stored task whose fingerprints are none (``RecastLoadError``)."""
    fields: dict[str, Any] = {f"base_fingerprint[{name!r}]": value for name, value in (config.base_fingerprint or {}).items()}
    if config.surroundings_fingerprint is not None:
        fields["surroundings_fingerprint"] = config.surroundings_fingerprint
    for name, value in fields.items():
        if not is_fingerprint(value):
            folder = None if config.record is None else config.record.folder
            where = "the task" if folder is None else f"the task at {folder!r}"
            raise RecastLoadError(f"{where}: {name}={shown(value)} is not a fingerprint. Fetch the file again.")


def check_fingerprints(
    config: RecastConfig, actual: dict[str, str], entries: dict[str, Tensor] | None, quantised: Collection[str]
) -> bool:
    """Refuse a task that was learned on other pretrained weights; on their quantised form it is taken, with a warning.

    Returns:
        whether the weights are those that the task was made for; a task that has learned nothing yet only warns if not.

    Raises:
        RecastBaseMismatchError: naming the modules that differ.
    """
    recorded = config.base_fingerprint or {}
    differ = [name for name in actual if name in recorded and not same_weight(recorded[name], actual[name])]
    if not differ:
        return True
    coarser = [name for name in differ if name in quantised and is_coarser_form(recorded[name], actual[name])]
    if len(coarser) == len(differ):
        warnings.warn(
            f"the task was learned on weights that are quantised otherwise here ({len(coarser)} of {len(actual)} modules): "
            "what it computes differs by what the quantisation changes",
            stacklevel=2,
        )
        return True
    if entries is not None and not _has_learned(config, entries):
        warnings.warn(
            "The task was made for other pretrained weights, but it has not learned anything yet (all of its coefficients "
            "are zero): it is taken as a fresh task on these weights.",
            stacklevel=2,
        )
        return False
    which = "all of them" if len(differ) == len(actual) else f"{len(differ)} of {len(actual)}"
    raise RecastBaseMismatchError(
        f"the task was learned on other pretrained weights: {which} differ, the first is {differ[0]}\n"
        f"  fingerprint in the task:  {recorded[differ[0]]}\n  fingerprint of the model: {actual[differ[0]]}\n"
        f"differing: {listed(differ, 6)}\n"
        f"Load the weights that the task was learned on (base model of the task: {config.base_model_name_or_path!r})."
    )


def _has_learned(config: RecastConfig, entries: dict[str, Tensor]) -> bool:
    """Whether the numbers of a stored task are more than those of a fresh one: what it trains without coefficients is."""
    if not config.train_coefficients and not all(f".{PREFIX}" in key for key in entries):
        return True
    return any(value.any() for key, value in entries.items() if f".{PREFIX}" in key)


def prepare_layers(targets: list[Candidate], fingerprints: dict[str, str]) -> dict[str, PreparedLayer]:
    """Make a layer for every target that has none; the model is not touched."""
    prepared = {}
    for target in targets:
        layer, parent, child_name = composed_layer(target.visible), target.path[-1][1], target.slot
        if layer is None:
            layer = layer_around(target, fingerprints[target.name])
        else:
            while getattr(parent, child_name) is not layer:  # another tuner's layer stands around it
                parent, child_name = getattr(parent, child_name), "base_layer"
        prepared[target.name] = PreparedLayer(layer, parent, child_name, _visible_key(target))
    return prepared


def _visible_key(target: Candidate) -> str:
    """The name at which PEFT's loop over the modules comes by: it passes over what lies inside a tuner's layer."""
    names = target.place.split(".")
    for depth, (_, holder) in enumerate(target.path[:-1]):
        if isinstance(getattr(holder, names[depth], None), BaseTunerLayer):
            return ".".join(names[: depth + 1])
    return target.place


def prepare_banks(plan: RecastPlan, config: RecastConfig, prepared: dict[str, PreparedLayer]) -> list[TemplateBank]:
    """Give every prepared layer its bank; the compressed banks that are new are returned.

    What takes long or can fail happens here; the templates of recipes are built later, one group after the other.
    """
    if plan.bank is not None:
        for name in (name for name in prepared if name in plan.bank.base_fingerprint):
            plan.bank.check_base(name, prepared[name].layer.fingerprint, RecastBaseMismatchError)
    new: list[TemplateBank] = []
    fitted: dict[str, FittedTemplates] = {}
    for group in plan.groups:
        layers = [prepared[name].layer for name in group.members]
        bank = _bank_beside(group, plan.bank, layers, new) if group.is_grown else _bank_in_use(group, config, layers)
        if bank is None:
            stored_group = None if plan.bank is None else plan.bank.groups.get(group.name)
            found = _found_templates(group, stored_group, config, layers)
            recipe = found if isinstance(found, Recipe) else stored_group.recipe if stored_group is not None else None
            if isinstance(found, FittedTemplates):
                fitted[group.name] = found
            bank = TemplateBank(group.name, group.members, layers, recipe, fitted.get(group.name))
            if found is not None:
                new.append(bank)
        for name in group.members:
            prepared[name].bank = bank
    if fitted:
        groups = {group.name: StoredGroup.of(group.members, fitted.get(group.name)) for group in plan.groups}
        reference = (plan.bank or StoredBank(groups, {}, config.method.to_dict())).reference
        for bank in new:
            bank.stored = reference if bank.name in fitted else None
    return new


def _bank_beside(
    group: PlannedGroup, stored: StoredBank | None, layers: list[RecastLayer], new: list[TemplateBank]
) -> TemplateBank:
    """The bank of a group whose templates stand beside the pretrained weights, that of an earlier task where there is one;
    another is added to the new ones.
    """
    released = [layer.module_name for layer in layers if layer.is_compressed]
    if released:
        what = "a bank of main directions" if stored is None else f"the grown bank {stored.name or 'in memory'}"
        raise RecastBankError(
            f"{what} adds to the pretrained weights, but compressed banks stand for {released[0]} and {len(released) - 1} "
            "others: convert a fresh copy of the pretrained model"
        )
    for bank in (bank for layer in layers for bank in layer.recast_bank.values()):
        if stored is None:
            is_same = isinstance(bank, DirectionsBank) and bank.num_directions == group.num_directions
        else:
            is_same = isinstance(bank, GrownBank) and (bank.members, bank.fingerprint) == (group.members, stored.fingerprint)
        if is_same:
            return bank
    if stored is None:
        new.append(DirectionsBank(group.name, group.members, layers, group.num_directions))
    else:
        grown = stored.groups[group.name].grown
        assert grown is not None
        # one dictionary for all banks of a file, so that they learn its name together
        reference = next((b.stored for b in new if b.stored is not None), None) or stored.reference
        made = stored.version, stored.history, stored.mimicry
        new.append(GrownBank(group.name, group.members, layers, grown, reference, *made))
    return new[-1]


def check_other_tasks(model: nn.Module, new_banks: list[TemplateBank], config: RecastConfig) -> None:
    """Refuse to release pretrained weights under tasks that were learned with them (``RecastBankError``)."""
    tasks = sorted({name for layer in modules_of(model, RecastLayer) for name in layer.recast_bank})
    compressing = [bank for bank in new_banks if not bank.is_anchored]
    if compressing and tasks and not config.keep_base_weights:
        raise RecastBankError(
            f"compressing {compressing[0].name} and {len(compressing) - 1} other banks would release pretrained weights that "
            f"the tasks {', '.join(tasks)} of this model were learned with, and change what they compute. Give "
            "keep_base_weights=True, or compress with the first task."
        )


def share_coefficients(model: nn.Module, adapter_name: str, owners: dict[str, str]) -> None:
    """Let layers of a task use the coefficients of their owners: one parameter in several layers.

    ``owners`` has for every target the one whose coefficients it uses: itself, if it shares none.
    """
    layers = recast_layers(model)
    for name, owner in owners.items():
        if name != owner:
            layers[name].recast_coefficients.share(adapter_name, layers[owner].recast_coefficients.holder(adapter_name))


def _found_templates(
    group: PlannedGroup, stored_group: StoredGroup | None, config: RecastConfig, layers: list[RecastLayer]
) -> Recipe | FittedTemplates | None:
    """What makes a group's templates: a stored bank, a stored recipe, or the mimicry method; None for an exact bank."""
    if stored_group is not None and stored_group.templates is not None:
        assert stored_group.base is not None
        return FittedTemplates(stored_group.templates, stored_group.base)
    if group.is_exact:
        return None
    recipe = (config.recipes or {}).get(group.name)
    if recipe is not None:
        return Recipe.from_lists(recipe)
    return config.method.fit([layer.pretrained_weight for layer in layers], group.num_templates, label=group.name)


def _bank_in_use(group: PlannedGroup, config: RecastConfig, layers: list[RecastLayer]) -> TemplateBank | None:
    """The bank of an earlier task that this group shares, or None; ``RecastBankError`` if it cannot stand beside those."""
    compressed = {id(layer.compressed_bank[0]): layer.compressed_bank[0] for layer in layers if layer.is_compressed}
    if not compressed:
        if not group.is_exact and any(layer.recast_bank for layer in layers):
            names = sorted({name for layer in layers for name in layer.recast_bank})
            raise RecastBankError(
                f"group {group.name} cannot be compressed to {group.num_templates} templates: the pretrained weights of its "
                f"members are the templates of {names}. Compress with the first task, or unload those tasks."
            )
        for bank in {id(b): b for layer in layers for b in layer.recast_bank.values()}.values():
            if bank.members == group.members and bank.is_exact:
                return bank
        return None
    bank = next(iter(compressed.values()))
    same = len(compressed) == 1 and bank.members == group.members and bank.num_templates == group.num_templates
    if not same or not _made_for(bank, group, config):
        raise RecastBankError(
            f"module {group.members[0]} belongs to a compressed bank that the task does not share\n"
            f"  bank of the model: {bank.num_templates} templates for {', '.join(bank.members)}{_identity(bank.stored)}\n"
            f"  bank of the task:  {group.num_templates} templates for {', '.join(group.members)}"
            f"{_identity(config.bank_reference)}{', of other contents' if same else ''}\n"
            "Give the task the same targets, group_size and num_templates, or convert a fresh copy of the pretrained model."
        )
    return bank


def _made_for(bank: TemplateBank, group: PlannedGroup, config: RecastConfig) -> bool:
    """Whether a task that fits a bank's shape was also trained on it, or is new."""
    recipe = (config.recipes or {}).get(group.name)
    if recipe is not None:
        return bank.same_recipe(Recipe.from_lists(recipe))
    reference = config.bank_reference
    if reference is not None and reference["fingerprint"] is not None:
        return bank.stored is not None and bank.stored["fingerprint"] == reference["fingerprint"]
    return not config.is_stored_task  # a stored task without recipe or bank was trained on the pretrained weights themselves


def _identity(reference: object) -> str:
    return f" (bank {reference['name']!r}, {reference['fingerprint']})" if isinstance(reference, dict) else ""


def install_banks(model: nn.Module, banks: list[TemplateBank], keep_base_weights: bool) -> None:
    """Make new compressed banks part of the model and release what they stand for, one group after the other."""
    if banks and not hasattr(model, BANK_CONTAINER):
        setattr(model, BANK_CONTAINER, SideContainer())
    for bank in banks:
        if not bank.is_anchored:
            bank.build()
        getattr(model, BANK_CONTAINER)[container_key(bank.key)] = bank
        for layer in () if bank.is_anchored else bank.layers:
            layer.compressed_bank = (bank,)
            if not keep_base_weights:
                layer.set_weight_parameter(None)
