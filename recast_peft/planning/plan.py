"""From a model and a config to a plan: which modules, in which groups, with how many templates. Nothing is touched."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..banks.files import StoredBank, StoredGroup, find_bank, how_to_load
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastTargetError
from ..options.record import bank_to_use
from ..validation import listed
from .budget import DEFAULT_BUDGET, fit_budget
from .candidates import Candidate, total_bytes
from .groups import PlannedGroup, by_key, count_coefficients, given_groups, layer_runs, plan_groups, shown_sharing
from .table import text_table
from .targets import find_targets


@dataclass(frozen=True)
class RecastPlan:
    """What a conversion would do; ``print(plan)`` shows it as a table.

    Attributes:
        groups: the banks to be, in the order of their first member.
        skipped: modules that matched but are left out, with the reason.
        model_bytes: bytes of the model as it is.
        keep_base_weights: whether compressed members keep their pretrained weights.
        coefficient_sharing: which layers share their offsets: None, ``"roles"``, ``"blocks"``, ``"all"``, or how many
            consecutive banks of a role.
        reason: what was chosen to keep the budget, and why; empty where there was nothing to choose.
        bank: the stored bank that the task is on, if it is not in the model yet.
        lora: what the task's LoRA part would be (a ``LoraPlan``); None for a task without one.
        candidates: the target modules.
        parts: what the task gets beside its coefficients and its LoRA: ``part -> place -> trainable parameters``.
        train_coefficients: whether the coefficients are trained.
        num_directions: directions of each weight, as far as it has so many; None where the templates are others.
    """

    groups: tuple[PlannedGroup, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    model_bytes: int = 0
    keep_base_weights: bool = False
    coefficient_sharing: str | int | None = None
    reason: str = ""
    bank: StoredBank | None = field(default=None, repr=False, compare=False)
    lora: Any = None
    candidates: tuple[Candidate, ...] = field(default=(), repr=False, compare=False)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    train_coefficients: bool = True
    num_directions: int | None = None

    @property
    def num_coefficient_sets(self) -> int:
        """K, the coefficient sets of every layer."""
        return max(group.num_coefficient_sets for group in self.groups)

    @property
    def num_coefficients(self) -> int:
        """Coefficients that one task trains; heads, biases and a LoRA part are not counted."""
        return count_coefficients(self.groups, self.coefficient_sharing)

    @property
    def num_lora_numbers(self) -> int:
        """Numbers of the task's LoRA part."""
        return 0 if self.lora is None else self.lora.num_parameters()

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of all target modules."""
        return tuple(member for group in self.groups for member in group.members)

    @property
    def model_bytes_after(self) -> int:
        """Bytes of the model after the conversion, one task's coefficients aside."""
        change = 0
        for group in self.groups:
            if group.is_grown:
                change += group.template_bytes
            elif not group.is_exact:
                change += group.template_bytes - (0 if self.keep_base_weights else group.weight_bytes)
        return self.model_bytes + change

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, a row for each bank."""
        return [
            (
                group.name,
                str(len(group.members)),
                "x".join(map(str, group.shape)),
                f"{group.num_templates}" + kind_of_bank(group),
                str(group.num_coefficients),
                f"{group.template_bytes:,}",
            )
            for group in self.groups
        ]

    def __str__(self) -> str:
        header = ("bank", "members", "shape", "templates", "coefficients", "template bytes")
        lines = [text_table(header, self.rows())]
        lines.append(
            f"{len(self.groups)} banks, {len(self.targets)} target modules, {self.num_coefficients} numbers per task; "
            f"model {self.model_bytes:,} bytes before, {self.model_bytes_after:,} after"
        )
        if self.lora is not None:
            lines.append(
                f"LoRA part: {self.num_lora_numbers} numbers per task on {len(self.lora.targets)} target modules, "
                f"{self.num_coefficients + self.num_lora_numbers} with the coefficients"
            )
        if self.coefficient_sharing is not None:
            lines.append(f"offsets are shared between {shown_sharing(self.coefficient_sharing)}")
        if not self.train_coefficients:
            lines.append("the coefficients stay at zero (train_coefficients=False)")
        for name, places in self.parts.items():
            count = f"{len(places)} place{'s' if len(places) > 1 else ''}"
            lines.append(f"{name}: {count} ({listed(places)}), {sum(places.values()):,} trainable parameters per task")
        if self.reason:
            lines.append(self.reason)
        lines += _shown_reasons(self.skipped)
        return "\n".join(lines)


def kind_of_bank(group: PlannedGroup) -> str:
    """What the templates of a bank are, in a word or two behind their number."""
    if group.num_directions:
        return f" ({group.num_directions} directions)"
    return " (exact)" if group.is_exact else " (grown)" if group.is_grown else ""


def _shown_reasons(skipped: dict[str, str]) -> list[str]:
    """A line for each reason, with the modules that were left out for it."""
    names = by_key(skipped, skipped.__getitem__)
    return [f"left out: {', '.join(n[:3])}{f' and {len(n) - 3} more' if len(n) > 3 else ''} ({r})" for r, n in names.items()]


SAID_BY_BANK = (
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("group_size", "num_groups", "num_templates", "num_directions"),
)


def _warn_of_what_a_bank_says(config: RecastConfig) -> None:
    idle = [f"{name}={value!r}" for name in SAID_BY_BANK if (value := getattr(config, name)) is not None]
    if idle:
        warnings.warn(f"the bank says which modules are targets and how: {', '.join(idle)} is not looked at", stacklevel=3)


def plan_layers(model: nn.Module, config: RecastConfig) -> RecastPlan:
    """The plan of a task without its parts beside the coefficients; see ``plan_recast`` for what is raised."""
    if not isinstance(model, nn.Module) or not isinstance(config, RecastConfig):
        raise RecastConfigError(
            f"plan_recast({type(model).__name__}, {type(config).__name__}): expected an nn.Module and a RecastConfig"
        )
    bank = _bank_of(model, config)
    if bank is not None and (bank.is_of_biases or bank.is_readout):
        raise RecastBankError(f"the bank {bank.name or 'in memory'} holds no templates of weights: give it as {bank.field}")
    if bank is not None and config.groups is None:
        _warn_of_what_a_bank_says(config)
        config = config.as_chosen(groups={name: list(group.members) for name, group in bank.groups.items()})
    targets, skipped = find_targets(model, config)
    reason = ""
    if config.groups is not None:
        groups = given_groups(targets, config, bank)
    else:
        found = targets
        targets, config, reason = fit_budget(found, config)
        kept_to = f"{config.max_coefficients or f'the default of {DEFAULT_BUDGET}'} numbers"
        left_out = f"it is left out to keep {kept_to}; target_modules would name it"
        skipped.update({target.name: left_out for target in found if target not in targets})
        groups = plan_groups(layer_runs(targets), config)
        largest = max(len(group.members) for group in groups)
        if config.num_templates is not None and config.num_templates > largest:
            raise RecastTargetError(
                f"num_templates={config.num_templates} is above the size of every group\n  largest group: {largest} layers"
            )
    order = {target.name: i for i, target in enumerate(targets)}
    groups.sort(key=lambda group: order[group.members[0]])
    plan = RecastPlan(
        tuple(groups),
        skipped,
        total_bytes(model),
        config.keep_base_weights,
        config.coefficient_sharing,
        reason,
        bank,
        candidates=tuple(targets),
        num_directions=max(group.num_directions for group in groups) or None,
        train_coefficients=config.train_coefficients,
    )
    if config.max_coefficients is not None and plan.num_coefficients > config.max_coefficients:
        raise RecastConfigError(
            f"the groups that were given need more numbers than max_coefficients allows\n  needed:  {plan.num_coefficients}\n"
            f"  allowed: {config.max_coefficients}"
        )
    return plan


def _bank_of(model: nn.Module, config: RecastConfig) -> StoredBank | None:
    """The stored bank that a config names; None if it names none, or one that the model has already.

    Raises:
        RecastBankError: if it is not found, or the model has another one.
    """
    named = bank_to_use(config.bank, config.record)
    if named is None or isinstance(named, StoredBank):
        return named
    wanted = named["fingerprint"]
    grown = held_grown_bank(model, wanted)
    if grown is not None:
        return grown
    held: list[Any] = [bank for m in model.modules() for bank in getattr(m, "compressed_bank", ())]
    references = [bank.stored for bank in held if bank.stored is not None]
    if wanted is not None and config.groups is not None and references:
        if any(reference["fingerprint"] == wanted for reference in references):
            return None
        raise RecastBankError(
            f"the task was trained on another template bank than that of the model\n"
            f"  bank of the task:  {named['name']!r}, fingerprint {wanted}\n"
            f"  bank of the model: {references[0]['name']!r}, fingerprint {references[0]['fingerprint']}\n"
            f"Load the task on a fresh copy of the pretrained model. {how_to_load()}"
        )
    return find_bank(named, None if config.record is None else config.record.folder)


def held_grown_bank(model: nn.Module, fingerprint: str | None) -> StoredBank | None:
    """The grown bank of a fingerprint, put together from the banks that the model's tasks use; None if it has none."""
    held: dict[str, dict[str, Any]] = {}  # fingerprint -> banks by name
    fingerprints: dict[str, str] = {}
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "recast_bank")]
    for module in modules:
        for bank in module.recast_bank.values():
            if hasattr(bank, "history") and fingerprint is not None:
                held.setdefault(bank.stored["fingerprint"], {})[bank.name] = bank
                fingerprints[module.module_name] = module.fingerprint
    for own in sorted(held, key=lambda own: own != fingerprint):  # that very version before one that contains it
        groups = {name: StoredGroup(bank.members, grown=bank.grown_templates) for name, bank in held[own].items()}
        one = next(iter(held[own].values()))
        bank = StoredBank(groups, fingerprints, one.made, one.stored["name"], one.version, own, one.history).at(fingerprint)
        if bank is not None:
            return bank
    return None
