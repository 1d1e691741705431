"""Everything that a conversion decides, checks and builds before a model is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from ..banks.template_bank import TemplateBank
from ..composition.parallel import split_of
from ..composition.quantised import quantised_by
from ..config import RecastConfig
from ..errors import RecastConfigError
from ..names import bank_name
from ..parts import pieces_of
from ..parts.base import Place, Request
from ..parts.partner import attach_partners
from ..parts.saved import keep_running_statistics
from ..placement.sharded import check_may_be_added_to
from ..planning.candidates import check_materialised
from ..planning.groups import by_key
from ..planning.plan import RecastPlan, plan_layers
from ..planning.renamed import Renaming, find_renamed, renamed_fields
from .conversion import (
    PreparedLayer,
    check_fingerprints,
    check_name_is_free,
    check_other_tasks,
    check_recorded,
    prepare_banks,
    prepare_layers,
)
from .files import check_task_file
from .surroundings import surroundings_fingerprint, warn_of_difference


@dataclass
class PreparedTask:
    """A task that is ready to be put on a model."""

    plan: RecastPlan  # what it targets, in which groups
    layers: dict[str, PreparedLayer]  # by module name
    banks: list[TemplateBank]  # the compressed and grown banks that are new
    pieces: list[tuple[Any, list[Any]]]  # of every part, what it gets
    fingerprints: dict[str, str]  # of the pretrained weights of its target modules
    surroundings: str | None  # a fingerprint of what the model has beside the targets
    renamed: Callable[[str], str | None] | None  # how a module that its file names is called in the model, if otherwise
    is_same_base: bool  # whether these are the weights that the task was made for
    config: RecastConfig  # the task's, its modules called as they are in the model

    @property
    def partner_banks(self) -> dict[str, Any]:
        """The stored banks that partners are on, by the partner's name."""
        found = {part.name: part.bank_reference(pieces) for part, pieces in self.pieces}
        return {name: reference for name, reference in found.items() if reference is not None}

    @cached_property
    def visible(self) -> dict[str, list[PreparedLayer]]:
        """The layers by the module name at which PEFT's loop comes by."""
        return by_key(self.layers.values(), lambda layer: layer.visible_key)

    def rename(self, config: RecastConfig) -> None:
        """Let the config of the task, which is in the model now, call modules as the model does."""
        for name in () if self.renamed is None else ("head_module", "modules_to_save", "partners"):
            setattr(config, name, getattr(self.config, name))

    def install_parts(self, place: Place) -> None:
        """Put in what the task gets beside its coefficients."""
        for part, pieces in self.pieces:
            if pieces:
                part.install(place, pieces)
        keep_running_statistics(place.model)
        attach_partners(place.model)  # a layer may stand around a module now that had none


def prepare_task(model: nn.Module, config: RecastConfig, adapter_name: str) -> PreparedTask:
    """Plan, check (``RecastError``) and build a task; the model is not touched."""
    check_may_be_added_to(model, config.inference_mode)
    check_recorded(config)
    config = under_names_of(model, config)
    plan = plan_layers(model, config)
    targets = list(plan.candidates)
    check_materialised(targets)
    check_name_is_free(model, adapter_name)
    fingerprints = {target.name: target.fingerprint for target in targets}
    # what a file is for is compared with what it holds before anything of that size is built
    request = Request(model, config, plan.targets, counting=True)
    counted = pieces_of(request)
    shapes = {key: shape for _, pieces in counted for piece in pieces for key, shape in piece.shapes().items()}
    entries = check_task_file(model, config, plan, shapes)
    quantised = {target.name for target in targets if quantised_by(target.module) is not None}
    is_same_base = check_fingerprints(config, fingerprints, entries, quantised)
    surroundings = config.surroundings_fingerprint
    if config.record is None or not config.record.is_stored or config.record.renamed is not None:
        surroundings = surroundings_fingerprint(model, plan.targets)
    elif is_same_base and surroundings is not None:
        warn_of_difference(surroundings, surroundings_fingerprint(model, plan.targets))
    layers = prepare_layers(targets, fingerprints)
    banks = prepare_banks(plan, config, layers)
    compressed = {name for name, layer in layers.items() if not layer.bank.is_anchored}
    if compressed and any(split_of(target.module._parameters.get(target.weight_name or "")) is not None for target in targets):
        raise RecastConfigError(
            "weights that are spread over processes by tensor parallelism cannot be compressed: leave out num_templates and "
            "bank, or load the model without tp_plan"
        )
    owned = {piece.place for part, pieces in counted for piece in pieces if part.owns_modules}
    for part, pieces in counted:
        part.check(request, pieces, owned, compressed)
    check_other_tasks(model, banks, config)
    pieces = pieces_of(replace(request, counting=False))
    lora = next((piece for part, own in pieces for piece in own if part.name == "lora"), None)
    renamed = None if config.record is None else config.record.renamed
    plan = replace(plan, lora=lora)
    return PreparedTask(plan, layers, banks, pieces, fingerprints, surroundings, renamed, is_same_base, config)


def under_names_of(model: nn.Module, config: RecastConfig) -> RecastConfig:
    """A stored task's config with its modules called as they are in a model, where they are found by their weights.

    Returns:
        the config itself if all of its names are there, or none was found.
    """
    record = config.record
    if record is None or not record.is_stored or record.bank is not None:
        return config
    found = find_renamed(model, record.groups, record.base_fingerprint, record.key_mapping)
    if not found and not record.key_mapping:
        return config
    pairs = {member: found.get(member, member) for own in record.groups.values() for member in own}
    members = {name: [pairs[member] for member in own] for name, own in record.groups.items()}
    new_names = {name: bank_name(own) for name, own in members.items()}
    groups = {new_names[name]: own for name, own in members.items()}
    recipes = record.recipes and {new_names[name]: recipe for name, recipe in record.recipes.items()}
    fingerprints = {found.get(name, name): value for name, value in record.base_fingerprint.items()}
    called = Renaming(model, pairs, record.key_mapping)
    renamed = replace(record, groups=groups, recipes=recipes, base_fingerprint=fingerprints, renamed=called)
    return config.as_chosen(**renamed_fields(config.as_chosen(record=renamed), called))
