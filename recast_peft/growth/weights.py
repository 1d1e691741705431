"""grow_bank and extend_bank: templates learned from the adapters and models one already has.

A source is whatever moved the pretrained weights: an adapter, or a fine-tuned model. Its weight differences are task vectors;
the principal components of the task vectors of a group become templates beside the pretrained weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_templates import NEGLIGIBLE, as_rows, energy_kept, orthonormal_basis, principal_components
from ..composition.compose import made_to_stay
from ..config import RecastConfig
from ..errors import RecastBankError
from ..tasks.plan import plan_recast
from ..validation import check_arguments, flag, listed
from .biases import bias_moves
from .sources import Source, check_bank, check_pretrained, check_sources, origin_of, task_vectors


@made_to_stay()
def grow_bank(
    model: nn.Module,
    sources: Sequence[Source],
    config: RecastConfig | None = None,
    *,
    num_templates: int | None = None,
    rank: int | None = None,
    plain_templates: bool = True,
) -> StoredBank:
    """Make a bank whose templates are the directions in which sources moved the model.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        sources: each of them an adapter of PEFT that can be merged (a folder or a repository, or a loaded model with the
            adapter's name: ``(peft_model, "name")``; RECAST tasks are adapters too), or a fine-tuned form of the model (a
            module, a state dict, a safetensors file or a folder with ``model.safetensors``).
        config: its targets and groups are used; the members of a group share templates. None takes the default targets,
            each in a group of its own.
        num_templates: grown templates of a group at most; None takes all principal components.
        rank: stores each template as a low-rank pair; None stores them dense.
        plain_templates: keep the members' pretrained weights as templates beside the grown ones. Without them a task has
            fewer coefficients; either way zero coefficients give the pretrained model.

    Returns:
        the bank, version 1, to be given as ``RecastConfig(bank=...)``, saved and pushed. Every template has the root mean
        square size of its group's task vectors.

    Raises:
        RecastConfigError: if a number is below 1, there is no source, or the model is converted already.
        RecastBankError: if a source cannot be read or merged, an adapter stands on other weights than the model's, or none of
            the sources moved a target module.
    """
    check_pretrained(model, "grow_bank")
    check_sources(sources, num_templates=num_templates, rank=rank)
    check_arguments(flag, plain_templates=plain_templates)
    plan = plan_recast(model, RecastConfig(group_size=1) if config is None else config)
    targets = {target.name: target for target in plan.candidates}
    vectors = [task_vectors(model, source, targets) for source in sources]
    groups: dict[str, StoredGroup] = {}
    for planned in plan.groups:
        moves = _moves_of(planned.members, vectors)
        grown = principal_components(moves, planned.shape, planned.dtype, num_templates, rank, plain_templates)
        if len(grown) or plain_templates:
            groups[planned.name] = StoredGroup(planned.members, grown=grown)
    if not any(group.grown is not None and len(group.grown) for group in groups.values()):
        raise RecastBankError(
            f"none of the {len(sources)} sources moved a target module\n  targets: {listed(targets, 4)}\n"
            "Give the config the target_modules that the sources were trained on."
        )
    fingerprints = {member: targets[member].fingerprint for group in groups.values() for member in group.members}
    return StoredBank(groups, fingerprints, {"method": "grown", "sources": [*map(origin_of, sources)], "rank": rank})


@made_to_stay()
def extend_bank(
    bank: StoredBank, model: nn.Module, sources: Sequence[Source], *, num_templates: int | None = None
) -> StoredBank:
    """Add templates for further sources to a grown bank: what its templates do not span of their task vectors.

    Tasks on the earlier versions stay as they are to the last bit: the templates they know come first, and are not touched.

    Args:
        bank: as ``grow_bank``, ``grow_bias_bank`` or this function made it; it is not changed.
        model: plain model with its pretrained weights; it is not changed.
        sources: as for ``grow_bank``.
        num_templates: new templates of a group at most; None takes all principal components.

    Returns:
        the bank's next version, under no name yet: save or push it in place of the earlier one, which it contains. The bank
        itself, with a warning, if its templates span the sources already.

    Raises:
        RecastConfigError: if a number is below 1, there is no source, or the model is converted already.
        RecastBankError: if the bank was not grown, stands for other weights, a source cannot be read, or none of them moved
            what the bank has templates for.
    """
    check_bank(bank)
    check_pretrained(model, "extend_bank")
    check_sources(sources, num_templates=num_templates)
    if bank.is_readout:
        raise RecastBankError("a readout does not grow: make another one of more data with readout_bank")
    if bank.is_of_biases:
        return _next_version(bank, bias_moves(bank, model, sources), sources, num_templates)
    if not any(group.grown is not None for group in bank.groups.values()):
        raise RecastBankError("extend_bank needs a bank that grow_bank made; this one has no grown templates")
    config = RecastConfig(groups={name: list(group.members) for name, group in bank.groups.items()})
    targets = {target.name: target for target in plan_recast(model, config).candidates}
    for name in bank.base_fingerprint:
        bank.check_base(name, targets[name].fingerprint)
    vectors = [task_vectors(model, source, targets) for source in sources]
    moves = {name: _moves_of(group.members, vectors) for name, group in bank.groups.items()}
    return _next_version(bank, moves, sources, num_templates)


def _next_version(
    bank: StoredBank, moves: Mapping[str, list[Tensor]], sources: Sequence[Source], num_templates: int | None
) -> StoredBank:
    """A bank with templates for the task vectors of further sources, by group; the bank itself where it spans them."""
    if not any(moves[name] for name in bank.groups if bank.groups[name].grown is not None):
        raise RecastBankError(
            f"none of the {len(sources)} sources moved what the bank has templates for ({listed(bank.groups)}): give "
            "sources that were trained on it"
        )
    counts = {name: len(group.grown) for name, group in bank.groups.items() if group.grown is not None}
    groups = {name: _extended(group, moves[name], num_templates) for name, group in bank.groups.items()}
    if all(group is bank.groups[name] for name, group in groups.items()):
        warnings.warn(
            f"the bank spans all that the {len(sources)} sources moved: it stays version {bank.version}", stacklevel=4
        )
        return bank
    earlier = {"version": bank.version, "fingerprint": bank.fingerprint, "templates": counts}
    made: dict[str, Any] = {"method": bank.mimicry} if isinstance(bank.mimicry, str) else dict(bank.mimicry)
    made["sources"] = [*made.get("sources", ()), *map(origin_of, sources)]
    return StoredBank(groups, bank.base_fingerprint, made, None, bank.version + 1, history=(*bank.history, earlier))


def _moves_of(members: Sequence[str], vectors: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The task vectors of a group that are not zero, source by source."""
    return [vector[member] for vector in vectors for member in members if member in vector and bool(vector[member].any())]


def _extended(group: StoredGroup, moves: list[Tensor], count: int | None) -> StoredGroup:
    """A group with the principal components of what its templates do not span."""
    grown = group.grown
    if grown is None or not moves:
        return group
    rest, old = moves, grown.dense()
    if old:
        basis = orthonormal_basis(old)
        flat = as_rows(moves)
        rest_of = flat - (flat @ basis) @ basis.T
        if float(rest_of.square().sum()) <= NEGLIGIBLE * float(flat.square().sum()):
            return group
        rest = [row.reshape(grown.weight_shape).float() for row in rest_of]
    rank = grown.tensors[0].shape[2] if len(grown.tensors) == 2 else None
    new = principal_components(rest, grown.weight_shape, grown.tensors[0].dtype, count, rank, grown.plain)
    tensors = tuple(torch.cat([a.cpu(), b]) for a, b in zip(grown.tensors, new.tensors, strict=True))
    whole = replace(grown, tensors=tensors)
    return replace(group, grown=replace(whole, energy=(*grown.energy, *energy_kept(moves, whole)[len(grown) :])))
