"""Groups: layers of one role and shape, in runs of consecutive depth, that share a bank and perhaps their coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch

from ..banks.files import StoredBank
from ..config import RecastConfig
from ..errors import RecastBankError, RecastTargetError
from ..names import bank_name, block_of, role_of
from ..options.checks import SHARING
from .candidates import Candidate, composed_layer

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class PlannedGroup:
    """One bank to be: layers of one role and shape that share templates.

    Attributes:
        name: name of the bank, made from the members' names (``blocks.{0,1}.attn.qkv``).
        members: names of the target modules, in the order of their depth.
        shape: shape of every member's weight.
        dtype: dtype of every member's weight.
        num_templates: templates in the bank; at most one for each member, unless the bank was grown.
        num_coefficient_sets: K, the sets that each member trains.
        fitted: whether the templates are fitted or stored, even where there are as many as members.
        grown_bytes: bytes of the grown templates, or of the main directions; None for banks of pretrained weights alone.
        num_directions: directions of the one weight on either side, between which the templates are; 0 for other banks.
    """

    name: str
    members: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_templates: int
    num_coefficient_sets: int
    fitted: bool = False
    grown_bytes: int | None = None
    num_directions: int = 0

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
        return self.num_templates * self._one if self.grown_bytes is None else self.grown_bytes

    @property
    def _one(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_groups(runs: list[list[Candidate]], config: RecastConfig) -> list[PlannedGroup]:
    """Cut runs of layers into groups as a config says."""
    return [_planned(chunk, config) for run in runs for chunk in _chunks(run, config)]


def shown_sharing(sharing: str | int) -> str:
    """What layers share their offsets, in words."""
    return SHARING[sharing] if isinstance(sharing, str) else f"{sharing} consecutive banks of a role"


def coefficient_owners(groups: Sequence[PlannedGroup], sharing: str | int | None) -> dict[str, str]:
    """For every target the one whose offsets it uses: itself, if nothing is shared.

    Args:
        groups: groups of the plan.
        sharing: ``"roles"``: the first target of the same block, place in its bank and number of templates;
            ``"blocks"``: the first member of its bank; ``"all"``: both; a number: of so many consecutive banks of its role
            the first; None: itself.
    """
    if isinstance(sharing, int):
        return _shared_by_neighbours(groups, sharing)
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


def _shared_by_neighbours(groups: Sequence[PlannedGroup], count: int) -> dict[str, str]:
    """Banks of one role in the order of their depth, ``count`` at a time; roles with fewer banks make one sequence together."""
    roles = by_key(groups, lambda group: role_of(group.members[0]))
    sequences = [sorted(banks, key=lambda bank: _depth(bank.members[0])) for banks in roles.values() if len(banks) >= count]
    sequences.append([bank for banks in roles.values() if len(banks) < count for bank in banks])
    owners: dict[str, str] = {}
    for sequence in sequences:
        first: dict[tuple[int, int, int], str] = {}
        for i, group in enumerate(sequence):
            for place, member in enumerate(group.members):
                owners[member] = first.setdefault((i // count, place, group.num_templates), member)
    return owners


def sharing_of(groups: Sequence[PlannedGroup], owned: Mapping[str, int]) -> str | int | None:
    """Which way of sharing explains the parameters that layers have in common; None if nothing is, or no way does.

    ``owned`` has for each target module something that says which parameter it uses.
    """
    different = len(set(owned.values()))
    for sharing in (*SHARING, *range(2, len(groups) + 1)) if different < len(owned) else ():
        owners = coefficient_owners(groups, sharing)
        if len(set(owners.values())) == different and all(owned[name] == owned[owner] for name, owner in owners.items()):
            return sharing
    return None


def count_coefficients(groups: Sequence[PlannedGroup], sharing: str | int | None) -> int:
    """Numbers that one task trains in these groups."""
    owners = coefficient_owners(groups, sharing)
    return sum(g.num_templates * g.num_coefficient_sets for g in groups for member in g.members if owners[member] == member)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The sides of a weight as a matrix: the first dimension, and the others together."""
    return shape[0], torch.Size(shape[1:]).numel()


def most_directions(targets: Sequence[Candidate], budget: int) -> int:
    """The most directions of each weight for which a task keeps a budget; 0 where even one is too many."""
    ranks = [min(as_matrix(target.weight_like[0])) for target in targets]
    count = 0
    while count < max(ranks, default=0) and sum(min(count + 1, rank) ** 2 for rank in ranks) <= budget:
        count += 1
    return count


def layer_runs(targets: list[Candidate]) -> list[list[Candidate]]:
    """Targets of one role, in the order of depth, cut wherever the shape, dtype or class changes."""
    runs = []
    for members in by_key(targets, lambda target: role_of(target.name)).values():
        members = sorted(members, key=lambda target: _depth(target.name))
        runs += [list(run) for _, run in groupby(members, key=lambda t: (t.weight_like, type(t.module)))]
    return runs


def by_key(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items in lists by what a function gives for them, in their order."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _depth(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _chunks(run: list[Candidate], config: RecastConfig) -> list[list[Candidate]]:
    if config.num_groups is None:
        size = config.effective_group_size
        assert size is not None
        return [run[i : i + size] for i in range(0, len(run), size)]
    places = np.array_split(np.arange(len(run)), min(config.num_groups, len(run)))
    return [[run[place] for place in chunk] for chunk in places]


def _planned(members: list[Candidate], config: RecastConfig, name: str | None = None) -> PlannedGroup:
    names = [member.name for member in members]
    shape, dtype = members[0].weight_like
    templates = min(config.num_templates or len(members), len(members))
    fitted = config.method.fits_full_banks and len(members) > 1 and config.recipes is None
    planned = PlannedGroup(name or bank_name(names), tuple(names), shape, dtype, templates, config.num_coefficient_sets, fitted)
    if config.num_directions is None:
        return planned
    rows, columns = as_matrix(shape)
    r = min(config.num_directions, rows, columns)
    held = r * (rows + columns) * dtype.itemsize
    return replace(planned, num_templates=r * r, fitted=True, grown_bytes=held, num_directions=r)


def given_groups(targets: list[Candidate], config: RecastConfig, bank: StoredBank | None) -> list[PlannedGroup]:
    by_name = {target.name: target for target in targets}
    groups = []
    for name, names in (config.groups or {}).items():
        members = [by_name[member] for member in names]
        kinds = {member.weight_like for member in members}
        if len(kinds) > 1:
            shown = "\n".join(f"  {m.name}: {'x'.join(map(str, m.weight_like[0]))} {m.weight_like[1]}" for m in members)
            raise RecastTargetError(f"the members of group {name!r} differ in shape or dtype:\n{shown}")
        planned = _planned(members, config, name)
        held = getattr(composed_layer(members[0].visible), "compressed_bank", ())
        recipe = (config.recipes or {}).get(name)
        if recipe is not None:
            planned = replace(planned, num_templates=len(recipe["mix"]), fitted=False)
        elif bank is not None:
            planned = _from_bank(planned, bank)
        elif config.bank_reference is not None and held:
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
