"""What the tasks of one pool have in common: which numbers a row holds, on which banks, and how a task is read into one."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..banks.files import find_bank
from ..banks.grown_bank import GrownBank
from ..composition.compose import average_sets
from ..composition.fingerprint import same_weight
from ..config import RecastConfig
from ..errors import RecastBankError, RecastBaseMismatchError, RecastConfigError
from ..holders import plain_modules, unwrapped_module
from ..layer import fingerprints_of, recast_layers
from ..names import COEFFICIENTS, MODEL_PREFIX
from ..options.record import Reference
from ..parts import PARTS, pieces_of
from ..parts.banked import partner_bank
from ..parts.base import Request
from ..parts.bias_part import TaskBiases, bias_coefficients, bias_entry, bias_owners
from ..parts.lora import A_PART
from ..parts.lora_plan import plan_lora_part
from ..parts.readout import ReadoutConfig, readout_holders
from ..parts.saved import saved_by_task_type
from ..planning.plan import SAID_BY_BANK, RecastPlan
from ..tasks.arithmetic import refusals_to_combine
from ..tasks.banks import versions_of
from ..tasks.files import check_entries
from ..tasks.plan import plan_recast
from ..tasks.surroundings import surroundings_fingerprint, warn_of_difference
from ..validation import listed
from .lora import LoraColumns, lora_modules, refusal_of, unlike_pool

CHOICES = (*SAID_BY_BANK, "max_coefficients", "bank")  # by which a config says where its coefficients are, and how many
OF_EVERY_ROW = {"coefficient_sharing": None, "init_weights": True, "train_coefficients": True}  # choices a fresh row lacks


class PoolLayout:
    """The layout of a pool's rows.

    Attributes:
        sizes: numbers of a row, by target module, by the names of biases, and last by those of the factors of a LoRA part.
        slices: columns of a row, by the same names.
        width: numbers of one task.
        lora: the LoRA part of the tasks; without columns if they have none.
        bank: fingerprint of the stored bank that the config names.
        readout: fingerprint of the bank by which the tasks' classifiers read several blocks.
    """

    def __init__(self, backbone: nn.Module, config: RecastConfig, slot: str) -> None:
        self.backbone, self.config, self.slot = backbone, config, slot
        self.layers = {name: layer for name, layer in recast_layers(backbone).items() if slot in layer.recast_bank}
        self.bias_owners = bias_owners(backbone, slot)
        self.lora = LoraColumns(backbone, slot, config)
        self.bank, self.readout = _fingerprint(config.bank_reference), readout_fingerprint(config)
        self._surroundings: str | None = None
        self.sizes = {name: layer.recast_bank[slot].num_templates for name, layer in self.layers.items()}
        self.sizes.update({name: owner.offset.numel() for name, owner in self.bias_owners.items()})
        self.sizes.update(self.lora.sizes)
        ends = list(accumulate(self.sizes.values(), initial=0))
        self.slices = {name: slice(*columns) for name, columns in zip(self.sizes, pairwise(ends), strict=True)}
        self.width = ends[-1]

    # ---------------------------------------------------------------- banks

    @property
    def versions(self) -> tuple[str, ...]:
        """Fingerprints of the stored bank that the tasks are on, and of its earlier versions; empty for other banks."""
        for layer in self.layers.values():
            bank = layer.recast_bank.get(self.slot)
            if bank is None:
                raise slot_was_deleted(self.slot)
            if isinstance(bank, GrownBank):
                return versions_of(bank)
            if bank.stored is not None and bank.recipe is None:
                return (str(bank.stored["fingerprint"]),)
        return ()

    @property
    def bias_versions(self) -> tuple[str | None, ...]:
        """Fingerprints of the bank of biases that the tasks are on, and of its earlier versions; (None,) without one."""
        bank = partner_bank(self.backbone, self.slot, TaskBiases)
        return (None,) if bank is None else versions_of(bank)

    def biases(self) -> dict[str, Any]:
        """Which coefficients of biases a row holds, and on which bank; empty without any."""
        sizes = {name: self.sizes[name] for name in self.bias_owners}
        return {"bank": self.bias_versions[0], "coefficients": sizes} if sizes else {}

    # ---------------------------------------------------------------- does a task fit?

    def check_config(self, what: str, config: RecastConfig) -> None:
        """Refuse a saved task with other targets or banks, or made for other pretrained weights."""
        self._check_banks(what, config)
        self.check_fingerprint(what, config.base_fingerprint or {})
        self.check_surroundings(what, config.surroundings_fingerprint)

    def _check_banks(self, what: str, config: RecastConfig) -> None:
        if banks_of(config) != banks_of(self.config):
            raise _other_layout(what, config, self.config)
        self._check_bank(what, config)
        self._check_biases(what, config)
        self.check_readout(what, readout_fingerprint(config))

    def check_choices(self, name: str, config: RecastConfig) -> bool:
        """Refuse a config for a fresh task that owns modules, that has other targets, sizes or another LoRA part than the pool,
        or that asks for less than a row trains.

        One that names neither targets nor sizes has the pool's.

        Returns:
            whether it has the LoRA part of the pool.
        """
        what = f"task {name!r}"
        refuse_parts(name, config)
        self._check_biases(what, config)
        self.check_readout(what, readout_fingerprint(config))
        self.check_modules(name, config.as_chosen(modules_to_save=saved_by_task_type(config)))
        idle = [f"{field}={value!r}" for field, usual in OF_EVERY_ROW.items() if (value := getattr(config, field)) != usual]
        most = config.max_coefficients
        if most is not None and most < self.width - self.lora.width:
            idle.append(f"max_coefficients={most}")
        if idle:
            raise RecastConfigError(
                f"fresh task {name!r} of a pool cannot have {', '.join(idle)}: its row has {self.width} numbers, offsets of "
                "its own for each layer, which start at zero and are all trained. Leave it out, or train the task as an "
                "adapter (model.add_adapter) and put that into the pool."
            )
        is_like_pool = config.groups is None and all(getattr(config, choice) is None for choice in CHOICES)
        layers = list(self.layers)
        lora = plan_lora_part(self.backbone, config, layers) if is_like_pool else self._checked_plan(what, config).lora
        if lora is not None:
            self.lora.check(what, lora.config, lora.targets)
        return is_like_pool or lora is not None

    def _checked_plan(self, what: str, config: RecastConfig) -> RecastPlan:
        if config.bank is not None:
            self._check_bank(what, config)
        plan = plan_recast(self.backbone, config)
        groups = {group.name: list(group.members) for group in plan.groups}
        sizes = {member: group.num_templates for group in plan.groups for member in group.members}
        own = {member: self.sizes[member] for member in self.layers}
        own_kind = self.config.groups, self.config.num_directions
        if (groups, plan.num_directions) != own_kind or (sizes != own and not self.versions):
            asked = config.as_chosen(groups=groups, num_directions=plan.num_directions)
            raise _other_layout(what, asked, self.config)
        return plan

    def check_modules(self, name: str, config: RecastConfig) -> None:
        """Refuse a task that owns modules whole (``modules_to_save``, also those that PEFT adds for a ``task_type``)."""
        modules = pieces_of(Request(self.backbone, config, tuple(self.layers), counting=True)) if config.modules_to_save else ()
        refuse(name, [part.name for part, own in modules if own and part.name == "modules_to_save"])

    def check_surroundings(self, what: str, recorded: str | None) -> None:
        """Warn of what was learned where the model has other weights or norms beside the targets."""
        if recorded is not None and self._surroundings is None:
            self._surroundings = surroundings_fingerprint(self.backbone, self.layers)
        warn_of_difference(recorded, self._surroundings, what)

    def _check_biases(self, what: str, config: RecastConfig) -> None:
        """Refuse coefficients of biases that the pool's are not; a task without any has zeros there."""
        partner = config.partner("bias")
        if partner is None:
            return
        own = self.config.partner("bias")
        given = _fingerprint(config.partner_bank("bias"))
        if own is None or given not in self.bias_versions or (given is None and partner.target_modules != own.target_modules):
            has = "coefficients of biases that are not the pool's"
            raise unlike_pool(what, has, _shown_biases(config), _shown_biases(self.config))

    def check_readout(self, what: str, fingerprint: str | None) -> None:
        """Refuse a task whose classifier reads by another bank than those of the pool."""
        if fingerprint != self.readout:
            has = "a classifier that reads otherwise than those of the pool (by another readout, or none)"
            raise unlike_pool(what, has, fingerprint or "none", self.readout or "none", "with its readout")

    def check_reader(self, what: str) -> None:
        """Refuse a task without a classifier where all read by a readout: the model's own was trained on other features."""
        if self.readout is None:
            return
        modules = plain_modules(self.backbone)
        for place in (holder.place for holder in readout_holders(self.backbone, self.slot)):
            if not isinstance(unwrapped_module(modules[place]), nn.Identity):
                raise RecastBankError(
                    f"{what} has no classifier of its own, and the tasks of the pool have a readout, which changes what "
                    f"{place} reads: the model's own was trained on other features. Give the task one (num_classes=), or make "
                    "a pool for it: TaskPool(model, like=<a task without a readout>)."
                )

    def check_fingerprint(self, what: str, recorded: Mapping[str, str]) -> None:
        """Refuse what was made for other pretrained weights."""
        own = fingerprints_of(self.layers)
        differ = [name for name in own if name in recorded and not same_weight(recorded[name], own[name])]
        if differ:
            raise RecastBaseMismatchError(
                f"{what} was made for other pretrained weights: {len(differ)} of {len(own)} modules differ "
                f"({', '.join(differ[:3])}, ...). Load the weights that it was made for."
            )

    def _check_bank(self, what: str, config: RecastConfig) -> None:
        fingerprint = _fingerprint(config.bank_reference)
        if fingerprint not in (self.versions or (None,)):
            raise self.other_bank(what, fingerprint)

    def other_bank(self, what: str, fingerprint: str | None) -> RecastBankError:
        """Says that something is on another bank than the pool."""
        own = f"{self.versions[0]}{' or an earlier version' if len(self.versions) > 1 else ''}" if self.versions else None
        none = "no stored bank"
        return unlike_pool(what, "another template bank than the pool", fingerprint or none, own or none, "on its bank")

    # ---------------------------------------------------------------- reading a task

    def fresh_row(self, name: str, config: RecastConfig | None) -> Tensor:
        """The row of a task that changes nothing yet; see ``check_choices`` for what a config may say."""
        row, seed = torch.zeros(self.width), 0 if config is None else config.seed
        if config is None or self.check_choices(name, config):
            self.lora.fresh(row, self.slices, torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())))
        return row

    def row_of(self, what: str, entries: Mapping[str, Tensor], own: Mapping[str, tuple[int, ...]], has_biases: bool) -> Tensor:
        """A task's row, from the entries of its file.

        ``own`` has the shapes of what the task has beside its coefficients.

        Raises:
            RecastLoadError: if entries are missing, unknown, or of another shape.
        """
        keys = {f"{MODEL_PREFIX}{name}.{COEFFICIENTS}": name for name in self.layers}
        biases = {bias_entry(name): name for name in self.bias_owners} if has_biases else {}
        factors = {entry.key: name for name, entry in self.lora.entries.items()}
        shapes: dict[str, tuple[int, ...]] = {f"{MODEL_PREFIX}{key}": shape for key, shape in own.items()}
        is_grown, are_biases_grown = bool(self.versions), bool(biases) and len(self.bias_versions) > 1
        for key, name in keys.items():  # the number of sets may differ from task to task: what is stored is their mean
            sets = len(entries[key]) if key in entries and entries[key].ndim == 2 else 1
            shapes[key] = (sets, self._size(name, entries.get(key), is_grown))
        for key, name in biases.items():
            shapes[key] = (self._size(name, entries.get(key), are_biases_grown),)
        if any(key in entries for key in factors):
            shapes.update({key: self.lora.entries[name].shape for key, name in factors.items()})
        check_entries(what, entries, shapes)
        return self._row({name: entries[key] for key, name in {**keys, **biases, **factors}.items() if key in entries})

    def _size(self, name: str, given: Tensor | None, is_grown: bool) -> int:
        """How many coefficients a task has: fewer than the pool's where it is on an earlier version of a bank."""
        most = self.sizes[name]
        return min(most, given.shape[-1]) if is_grown and given is not None and given.ndim else most

    def _row(self, values: Mapping[str, Tensor]) -> Tensor:
        row = torch.zeros(self.width)
        for name, value in values.items():
            numbers = value.detach().float().cpu()
            numbers = average_sets(numbers) if name in self.layers else numbers.flatten()
            start = self.slices[name].start
            row[start : start + len(numbers)] = numbers  # zero for templates that an earlier version of a bank lacks
        return row

    def has_biases(self, entries: Mapping[str, Tensor]) -> bool:
        """Whether there are coefficients of biases among the entries of a task."""
        return any(bias_entry(key) in entries for key in self.bias_owners)

    def row_of_adapter(self, adapter: str, config: RecastConfig) -> Tensor:
        """The row of a task that the model has.

        Raises:
            RecastBankError: if it has other targets or banks.
            RecastConfigError: if it owns what a pool cannot hold.
        """
        what = f"task {adapter!r} of the model"
        refuse_parts(adapter, config)  # by the names of its options, before what holds them is asked
        refuse(adapter, refusals_to_combine(self.backbone, adapter, config), config.lora_config)
        self._check_banks(what, config)
        factors = self.lora.entries_of(adapter)
        self.lora.check(what, config.lora_config, lora_modules(factors))
        own = {name: layer.recast_coefficients[adapter] for name, layer in self.layers.items()}
        return self._row({**own, **bias_coefficients(self.backbone, adapter), **factors})


def slot_was_deleted(slot: str) -> RecastConfigError:
    """That the adapter of a pool is no longer there."""
    return RecastConfigError(
        f"the adapter {slot!r}, which this pool writes into, was deleted from the model: make a new TaskPool"
    )


def same_layout(first: RecastConfig, second: RecastConfig) -> bool:
    """Whether tasks with these configs can be in one pool."""
    return _layout_of(first) == _layout_of(second)


def refuse_parts(name: str, config: RecastConfig) -> None:
    """Refuse a task whose config asks for what a pool cannot hold."""
    owned = [text for part in PARTS if (text := part.refusal_to_combine(config)) is not None]
    refuse(name, owned, config.lora_config)


def refuse(name: str, owned: Sequence[str], lora: Any = None) -> None:
    """Refuse a task for what it owns, if there is anything but a LoRA part (None: it has none) of two factors."""
    refusals = [text for text in (*owned, refusal_of(lora)) if text is not None and text != A_PART]
    if refusals:
        whole = any("modules_to_save" in text for text in refusals)
        held = "A classifier that num_classes= or id2label= gives can be held. " if whole else ""
        raise RecastConfigError(
            f"a pool cannot hold task {name!r}: it owns {listed(refusals)} beside its coefficients. {held}"
            "Keep it as an adapter (model.load_adapter)."
        )


def banks_of(config: RecastConfig) -> tuple[Any, ...]:
    """Which banks a task is on that no file holds: the same numbers mean something else on others, even of the same size."""
    return config.groups, config.recipes, config.num_directions


def readout_fingerprint(config: RecastConfig) -> str | None:
    """Of the bank of the readout that a config names."""
    return _fingerprint(config.partner_bank(ReadoutConfig.method))


def _fingerprint(reference: Reference | None) -> str | None:
    """Of the bank that a reference means; a config for a fresh task may say where it lies, and no more."""
    if reference is None:
        return None
    known = reference["fingerprint"]
    return find_bank(reference).fingerprint if known is None else known


def _layout_of(config: RecastConfig) -> tuple[Any, ...]:
    partner = config.partner("bias")
    biases = None if partner is None else (partner.target_modules, config.partner_bank("bias"))
    return *banks_of(config), _fingerprint(config.bank_reference), biases, readout_fingerprint(config)


def _shown_biases(config: RecastConfig) -> str:
    partner, bank = config.partner("bias"), config.partner_bank("bias")
    if partner is None:
        return "none"
    if bank is not None:
        return f"those of the bank {bank['name'] or 'in memory'}, fingerprint {bank['fingerprint']}"
    return f"one for each bias of {partner.target_modules or 'all layers'}"


def _other_layout(what: str, config: RecastConfig, own: RecastConfig) -> RecastBankError:
    return unlike_pool(what, "other target modules or banks than the pool", _shown_groups(config), _shown_groups(own))


def _shown_groups(config: RecastConfig) -> str:
    groups = config.groups or {}
    names = sorted(member for members in groups.values() for member in members)
    between = f" between {config.num_directions} directions" if config.num_directions else ""
    return f"{len(groups)} banks{between}, {len(names)} modules ({', '.join(names[:2])}, ...)"
