"""From a model and a config to a plan: which modules, in which groups, with how many templates.

Nothing is touched: ``plan_recast`` says what a conversion would do. The tuner carries out the same plan.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..banks.files import HOW_TO_LOAD, StoredBank, StoredGroup, find_bank
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastTargetError
from ..names import bank_name, block_of, role_of
from ..parts.lora_plan import LoraPlan, plan_lora_part
from .targets import Candidate, check_materialised, composed_layer, find_targets, total_bytes


@dataclass(frozen=True)
class PlannedGroup:
    """One bank to be: layers of one role and shape that share templates.

    Attributes:
        name: of the bank, made from the members' names (``blocks.{0,1}.attn.qkv``).
        members: names of the target modules, in the order of their depth.
        shape: of every member's weight.
        dtype: of every member's weight.
        num_templates: templates in the bank; at most one for each member, unless the bank was grown.
        num_coefficient_sets: K, the sets that each member trains.
        fitted: whether the templates are fitted or stored, even where there are as many as members.
        grown_bytes: of the grown templates; None for a bank that was not grown.
    """

    name: str
    members: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_templates: int
    num_coefficient_sets: int
    fitted: bool = False
    grown_bytes: int | None = None

    @property
    def is_grown(self) -> bool:
        """Whether there are grown templates beside (or in place of) the pretrained weights, which are kept."""
        return self.grown_bytes is not None

    @property
    def is_exact(self) -> bool:
        """Whether the pretrained weights themselves are the templates."""
        return self.num_templates == len(self.members) and not self.fitted

    @property
    def num_coefficients(self) -> int:
        """Numbers that one task trains in this group, if it shares none with other layers."""
        return len(self.members) * self.num_templates * self.num_coefficient_sets

    @property
    def weight_bytes(self) -> int:
        """Bytes of the members' pretrained weights."""
        return len(self.members) * self._one

    @property
    def template_bytes(self) -> int:
        """Bytes of the templates; for an exact bank these are the pretrained weights, of a grown one those beside them."""
        if self.grown_bytes is not None:
            return self.grown_bytes
        return self.num_templates * self._one

    @property
    def _one(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class RecastPlan:
    """What a conversion would do; ``print(plan)`` shows it as a table.

    Attributes:
        groups: the banks to be, in the order of their first member.
        skipped: modules that matched but are left out, with the reason.
        model_bytes: bytes of the model as it is.
        keep_base_weights: whether compressed members keep their pretrained weights.
        coefficient_sharing: which layers share their offsets: None, ``"roles"``, ``"blocks"`` or ``"all"``.
        reason: what was chosen to keep the budget, and why; empty without ``max_coefficients``.
        bank: the stored bank that the task is on, if it is not in the model yet.
        lora: what the task's LoRA part would be; None for a task without one.
        candidates: the target modules.
        partners: of the task: ``method -> place -> numbers that it trains there``.
        train_coefficients: whether the coefficients are trained.
    """

    groups: tuple[PlannedGroup, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    model_bytes: int = 0
    keep_base_weights: bool = False
    coefficient_sharing: str | None = None
    reason: str = ""
    bank: StoredBank | None = field(default=None, repr=False, compare=False)
    lora: LoraPlan | None = None
    candidates: tuple[Candidate, ...] = field(default=(), repr=False, compare=False)
    partners: dict[str, dict[str, int]] = field(default_factory=dict)
    train_coefficients: bool = True

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
        return 0 if self.lora is None else self.lora.num_numbers

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
                f"{group.num_templates}" + (" (exact)" if group.is_exact else " (grown)" if group.is_grown else ""),
                str(group.num_coefficients),
                f"{group.template_bytes:,}",
            )
            for group in self.groups
        ]

    def __str__(self) -> str:
        header = ("bank", "members", "shape", "templates", "coefficients", "template bytes")
        rows = self.rows()
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

        def line(cells: tuple[str, ...]) -> str:
            first, *rest = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
            return "  ".join((first, *rest)).rstrip()

        lines = [line(header), "  ".join("-" * w for w in widths), *map(line, rows)]
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
            lines.append(f"offsets are shared between {SHARING[self.coefficient_sharing]}")
        if not self.train_coefficients:
            lines.append("the coefficients stay at zero (train_coefficients=False)")
        for method, places in self.partners.items():
            shown = ", ".join(list(places)[:3]) + (", ..." if len(places) > 3 else "")
            lines.append(f"partner {method}: {len(places)} places ({shown}), {sum(places.values()):,} numbers per task")
        if self.reason:
            lines.append(self.reason)
        if self.skipped:
            lines.append(f"left out: {'; '.join(f'{name} ({reason})' for name, reason in self.skipped.items())}")
        return "\n".join(lines)


def planned_partners(model: nn.Module, config: RecastConfig, targets: list[str]) -> dict[str, dict[str, int]]:
    """Where a task's partners would stand, and how many numbers they train there."""
    from ..parts.places import prepare_partners  # it stands above the plan

    planned: dict[str, dict[str, int]] = {}
    for partner in prepare_partners(model, config, targets, torch.device("meta")):
        numbers = sum(parameter.numel() for parameter in partner.module.parameters())
        planned.setdefault(partner.config.method, {})[partner.candidate.name] = numbers
    return planned


def plan_recast(model: nn.Module, config: RecastConfig) -> RecastPlan:
    """Say what converting ``model`` with ``config`` would do, without touching either.

    Args:
        model: any ``nn.Module``; on a model that is converted already, the plan is that of a further adapter.
        config: what to target and how to group it.

    Returns:
        the plan. Layers of the same role (the same name but for its numbers), shape and dtype are put into groups of
        consecutive depth (paper, section 3.1).

    Raises:
        RecastTargetError: if nothing can be targeted, a target is not supported, or groups that were given do not fit.
        RecastConfigError: if an argument is of another kind, or a budget cannot be kept.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, RecastConfig):
        raise RecastConfigError(
            f"plan_recast({type(model).__name__}, {type(config).__name__}): expected an nn.Module and a RecastConfig"
        )
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    bank = _bank_of(model, config)
    if bank is not None and bank.is_of_biases:
        raise RecastBankError(
            f"the bank {bank.name or 'in memory'} holds templates of biases: give it as "
            "RecastConfig(partners=[BiasConfig(bank=...)])"
        )
    if bank is not None and config.groups is None:
        config = with_fields(config, groups={name: list(group.members) for name, group in bank.groups.items()})
    targets, skipped = find_targets(model, config)
    check_materialised(targets)
    reason = ""
    if config.groups is not None:
        groups = _given_groups(targets, config, bank)
    else:
        runs = layer_runs(targets)
        if config.max_coefficients is not None:
            config, reason = choose_sizes(runs, config)
        groups = plan_groups(runs, config)
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
        plan_lora_part(model, config, [target.name for target in targets]),
        tuple(targets),
        planned_partners(model, config, [target.name for target in targets]),
        config.train_coefficients,
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
    if not isinstance(config.bank, dict):
        return None
    if config.bank_in_memory is not None:
        return config.bank_in_memory
    wanted = config.bank["fingerprint"]
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
            f"  bank of the task:  {config.bank['name']!r}, fingerprint {wanted}\n"
            f"  bank of the model: {references[0]['name']!r}, fingerprint {references[0]['fingerprint']}\n"
            f"Load the task on a fresh copy of the pretrained model. {HOW_TO_LOAD}"
        )
    folder = config.__dict__.get("_origin", (None,))[0]
    return find_bank(config.bank, folder)


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
        groups = {name: StoredGroup(bank.members, grown=bank.grown) for name, bank in held[own].items()}
        one = next(iter(held[own].values()))
        bank = StoredBank(groups, fingerprints, one.made, one.stored["name"], one.version, own, one.history).at(fingerprint)
        if bank is not None:
            return bank
    return None


def with_fields(config: RecastConfig, **fields: Any) -> RecastConfig:
    """A shallow copy of a config with other values, unchecked."""
    other = RecastConfig.__new__(RecastConfig)
    other.__dict__.update(config.__dict__)
    other.__dict__.update(fields)
    return other


def plan_groups(runs: list[list[Candidate]], config: RecastConfig) -> list[PlannedGroup]:
    """Cut runs of layers into groups as a config says."""
    return [_planned(chunk, config) for run in runs for chunk in _chunks(run, config)]


SHARING: dict[str, str] = {
    "roles": "the roles of a block",
    "blocks": "the members of a bank",
    "all": "the roles of a block and the members of a bank",
}


def coefficient_owners(groups: Sequence[PlannedGroup], sharing: str | None) -> dict[str, str]:
    """For every target the one whose offsets it uses: itself, if nothing is shared.

    Args:
        groups: of the plan.
        sharing: ``"roles"``: the first target of the same block, place in its bank and number of templates;
            ``"blocks"``: the first member of its bank; ``"all"``: both; None: itself.
    """
    owners: dict[str, str] = {}
    first: dict[tuple[str, int, int], str] = {}
    for group in groups:
        for place, member in enumerate(group.members):
            if sharing in ("blocks", "all") and place > 0:
                owners[member] = owners[group.members[0]]
            elif sharing in ("roles", "all"):
                owners[member] = first.setdefault((block_of(member), place, group.num_templates), member)
            else:
                owners[member] = member
    return owners


def count_coefficients(groups: Sequence[PlannedGroup], sharing: str | None) -> int:
    """Numbers that one task trains in these groups."""
    owners = coefficient_owners(groups, sharing)
    return sum(g.num_templates * g.num_coefficient_sets for g in groups for member in g.members if owners[member] == member)


def choose_sizes(runs: list[list[Candidate]], config: RecastConfig) -> tuple[RecastConfig, str]:
    """Choose what a config leaves open so that a task needs at most ``max_coefficients`` numbers.

    What was given is kept: ``group_size`` or ``num_groups``, ``num_templates``, ``coefficient_sharing``. Of the rest, the
    most numbers that fit are taken, first without sharing, then with as little sharing as will do; coefficient sets are
    given up before layers share, as they add nothing that can be expressed. Fewer templates than layers are never chosen:
    they change the model, and a smaller group saves as many numbers.

    Returns:
        the config with its choices, and a sentence that says what they are and why.

    Raises:
        RecastConfigError: if nothing fits; the message says how many numbers the smallest choice needs.
    """
    assert config.max_coefficients is not None
    budget, longest = config.max_coefficients, max(map(len, runs))
    fixed_size = config.group_size is not None or config.num_groups is not None
    sizes: list[int | None] = [None] if fixed_size else list(range(longest, (config.num_templates or 1) - 1, -1)) or [longest]
    sharings = [config.coefficient_sharing] if config.coefficient_sharing else [None, *SHARING]
    all_sets = sorted({config.num_coefficient_sets, 1}, reverse=True)
    smallest = None
    for sharing in sharings:
        for sets in all_sets:
            options = []
            for size in sizes:
                choice = with_fields(config, num_coefficient_sets=sets, coefficient_sharing=sharing)
                if size is not None:
                    choice.__dict__["group_size"] = size
                options.append((count_coefficients(plan_groups(runs, choice), sharing), choice))
            least = min(count for count, _ in options)
            smallest = least if smallest is None else min(smallest, least)
            fitting = [option for option in options if option[0] <= budget]
            if fitting:
                count, choice = max(fitting, key=lambda option: option[0])
                return choice, _explain(count, choice, config, least if sharing is None else None)
    raise RecastConfigError(
        f"max_coefficients={budget} cannot be kept with what the config gives\n  numbers of the smallest choice: {smallest}\n"
        "Give fewer target_modules, or leave group_size, num_templates and coefficient_sharing open."
    )


def _explain(count: int, choice: RecastConfig, config: RecastConfig, least: int | None) -> str:
    parts = [
        f"num_groups={choice.num_groups}" if choice.num_groups is not None else f"group_size={choice.effective_group_size}"
    ]
    parts.append(f"num_templates={choice.num_templates or 'as many as layers (exact)'}")
    parts.append(f"num_coefficient_sets={choice.num_coefficient_sets}")
    if choice.num_coefficient_sets < config.num_coefficient_sets:
        parts[-1] += f" (down from {config.num_coefficient_sets}, which describes the same weights)"
    if choice.coefficient_sharing is not None:
        parts.append(f"coefficient_sharing={choice.coefficient_sharing!r}")
    why = "the largest choice within the budget"
    if least is None and config.coefficient_sharing is None:
        why += "; without sharing no choice keeps it"
    return f"max_coefficients={config.max_coefficients}: {', '.join(parts)} needs {count} numbers, {why}"


def _weight_like(target: Candidate) -> tuple[tuple[int, ...], torch.dtype]:
    weight = target.module._parameters.get(target.weight_name or "")
    if weight is None:  # a compressed bank stands for it
        layer = composed_layer(target.visible)
        return layer.weight_shape, layer.weight_dtype
    return tuple(weight.shape), weight.dtype


def layer_runs(targets: list[Candidate]) -> list[list[Candidate]]:
    """Targets of one role, in the order of depth, cut wherever the shape, dtype or class changes."""
    roles: dict[str, list[Candidate]] = {}
    for target in targets:
        roles.setdefault(role_of(target.name), []).append(target)
    runs = []
    for members in roles.values():
        members = sorted(members, key=lambda t: [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", f".{t.name}.")])
        runs += [list(run) for _, run in groupby(members, key=lambda t: (_weight_like(t), type(t.module)))]
    return runs


def _chunks(run: list[Candidate], config: RecastConfig) -> list[list[Candidate]]:
    if config.num_groups is None:
        size = config.effective_group_size
        assert size is not None
        return [run[i : i + size] for i in range(0, len(run), size)]
    count = min(config.num_groups, len(run))
    small, larger = divmod(len(run), count)
    chunks, start = [], 0
    for i in range(count):
        size = small + (1 if i < larger else 0)
        chunks.append(run[start : start + size])
        start += size
    return chunks


def _planned(members: list[Candidate], config: RecastConfig, name: str | None = None) -> PlannedGroup:
    names = [member.name for member in members]
    shape, dtype = _weight_like(members[0])
    templates = min(config.num_templates or len(members), len(members))
    fitted = config.method.fits_full_banks and len(members) > 1 and config.recipes is None
    return PlannedGroup(name or bank_name(names), tuple(names), shape, dtype, templates, config.num_coefficient_sets, fitted)


def _given_groups(targets: list[Candidate], config: RecastConfig, bank: StoredBank | None) -> list[PlannedGroup]:
    by_name = {target.name: target for target in targets}
    groups = []
    for name, names in (config.groups or {}).items():
        members = [by_name[member] for member in names]
        kinds = {_weight_like(member) for member in members}
        if len(kinds) > 1:
            shown = "\n".join(f"  {m.name}: {'x'.join(map(str, _weight_like(m)[0]))} {_weight_like(m)[1]}" for m in members)
            raise RecastTargetError(f"the members of group {name!r} differ in shape or dtype:\n{shown}")
        planned = _planned(members, config, name)
        held = getattr(composed_layer(members[0].visible), "compressed_bank", ())
        recipe = (config.recipes or {}).get(name)
        if recipe is not None:
            planned = replace(planned, num_templates=len(recipe["mix"]), fitted=False)
        elif bank is not None:
            planned = _from_bank(planned, bank)
        elif config.bank is not None and held:
            planned = replace(planned, num_templates=held[0].num_templates, fitted=True)
        groups.append(planned)
    return groups


def _from_bank(planned: PlannedGroup, bank: StoredBank) -> PlannedGroup:
    """The group as a stored bank has it."""
    stored = bank.groups.get(planned.name)
    shape = None if stored is None else stored.weight_shape
    if stored is None or stored.members != planned.members or shape not in (None, planned.shape):
        has = "no such group" if stored is None else f"{shape or planned.shape} for {', '.join(stored.members)}"
        raise RecastBankError(
            f"the template bank {bank.name!r} does not fit group {planned.name!r}\n  in the bank:  {has}\n"
            f"  in the model: {planned.shape} for {', '.join(planned.members)}"
        )
    grown = stored.grown
    bytes_of_grown = None if grown is None else sum(t.numel() for t in grown.tensors) * planned.dtype.itemsize
    return replace(planned, num_templates=stored.num_templates, fitted=stored.kind != "exact", grown_bytes=bytes_of_grown)
