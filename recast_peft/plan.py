"""From a model and a config to a plan: which modules, in which groups, with how many templates.

Nothing is touched: ``plan_recast`` says what a conversion would do. The tuner carries out the same plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import groupby

import torch
from peft import PeftModel
from torch import nn

from .config import RecastConfig
from .errors import RecastTargetError
from .targets import Candidate, check_materialised, find_targets, total_bytes


@dataclass(frozen=True)
class PlannedGroup:
    """One bank to be: layers of one role and shape that share templates.

    Attributes:
        name: of the bank, made from the members' names (``blocks.{0,1}.attn.qkv``).
        members: names of the target modules, in the order of their depth.
        shape: of every member's weight.
        dtype: of every member's weight.
        num_templates: templates in the bank, at most one for each member.
        num_coefficient_sets: K, the sets that each member trains.
    """

    name: str
    members: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_templates: int
    num_coefficient_sets: int

    @property
    def is_exact(self) -> bool:
        """Whether the pretrained weights themselves are the templates."""
        return self.num_templates == len(self.members)

    @property
    def num_coefficients(self) -> int:
        """Numbers that one task trains in this group."""
        return len(self.members) * self.num_templates * self.num_coefficient_sets

    @property
    def weight_bytes(self) -> int:
        """Bytes of the members' pretrained weights."""
        return len(self.members) * self._one

    @property
    def template_bytes(self) -> int:
        """Bytes of the templates; for an exact bank these are the pretrained weights."""
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
    """

    groups: tuple[PlannedGroup, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    model_bytes: int = 0
    keep_base_weights: bool = False

    @property
    def num_coefficients(self) -> int:
        """Numbers that one task trains, heads and biases aside."""
        return sum(group.num_coefficients for group in self.groups)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of all target modules."""
        return tuple(member for group in self.groups for member in group.members)

    @property
    def model_bytes_after(self) -> int:
        """Bytes of the model after the conversion, one task's coefficients aside."""
        change = 0
        for group in self.groups:
            if not group.is_exact:
                change += group.template_bytes - (0 if self.keep_base_weights else group.weight_bytes)
        return self.model_bytes + change

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, a row for each bank."""
        return [
            (
                group.name,
                str(len(group.members)),
                "x".join(map(str, group.shape)),
                f"{group.num_templates}" + (" (exact)" if group.is_exact else ""),
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
        if self.skipped:
            lines.append(f"left out: {'; '.join(f'{name} ({reason})' for name, reason in self.skipped.items())}")
        return "\n".join(lines)


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
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    targets, skipped = find_targets(model, config)
    check_materialised(targets)
    if config.groups is not None:
        groups = _given_groups(targets, config)
    else:
        groups = [_planned(chunk, config) for run in _runs(targets) for chunk in _chunks(run, config)]
        largest = max(len(group.members) for group in groups)
        if config.num_templates is not None and config.num_templates > largest:
            raise RecastTargetError(
                f"num_templates={config.num_templates} is above the size of every group\n  largest group: {largest} layers"
            )
    order = {target.name: i for i, target in enumerate(targets)}
    groups.sort(key=lambda group: order[group.members[0]])
    return RecastPlan(tuple(groups), skipped, total_bytes(model), config.keep_base_weights)


def role_of(name: str) -> str:
    """A module's name with its numbers taken out: layers with one role differ in depth alone.

    >>> role_of("blocks.11.attn.qkv")
    'blocks.*.attn.qkv'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def bank_name(members: list[str]) -> str:
    """A name for the bank of these members: common parts once, the others in braces.

    >>> bank_name(["blocks.0.attn.qkv", "blocks.1.attn.qkv"])
    'blocks.{0,1}.attn.qkv'
    """
    columns = zip(*(member.split(".") for member in members), strict=False)
    if len({member.count(".") for member in members}) > 1:
        return "{" + ",".join(members) + "}"
    return ".".join(parts[0] if len(set(parts)) == 1 else "{" + ",".join(dict.fromkeys(parts)) + "}" for parts in columns)


def _weight_like(target: Candidate) -> tuple[tuple[int, ...], torch.dtype]:
    weight = target.module._parameters.get(target.weight_name or "")
    if weight is None:  # a compressed bank stands for it
        return target.visible.weight_shape, target.visible.weight_dtype  # type: ignore[return-value]
    return tuple(weight.shape), weight.dtype


def _runs(targets: list[Candidate]) -> list[list[Candidate]]:
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
    return PlannedGroup(name or bank_name(names), tuple(names), shape, dtype, templates, config.num_coefficient_sets)


def _given_groups(targets: list[Candidate], config: RecastConfig) -> list[PlannedGroup]:
    by_name = {target.name: target for target in targets}
    groups = []
    for name, names in (config.groups or {}).items():
        members = [by_name[member] for member in names]
        kinds = {_weight_like(member) for member in members}
        if len(kinds) > 1:
            shown = "\n".join(f"  {m.name}: {'x'.join(map(str, _weight_like(m)[0]))} {_weight_like(m)[1]}" for m in members)
            raise RecastTargetError(f"the members of group {name!r} differ in shape or dtype:\n{shown}")
        planned = _planned(members, config, name)
        recipe = (config.recipes or {}).get(name)
        if recipe is not None:
            planned = PlannedGroup(
                name, planned.members, planned.shape, planned.dtype, len(recipe["mix"]), config.num_coefficient_sets
            )
        groups.append(planned)
    return groups
