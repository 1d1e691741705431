"""grow_bias_bank: templates of biases, from the ways in which earlier tasks moved them.

Biases are a hundredth of a model's numbers, and training them all (BitFit) is about as good as a LoRA. What several tasks did
to the biases of a block has a few principal components; each of them is a template that spans all biases of the block, so that
a new task moves them together with one coefficient for each template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_templates import principal_components
from ..composition.compose import made_to_stay
from ..composition.fingerprint import weight_fingerprint
from ..composition.kinds import kind_of
from ..errors import RecastBankError, RecastTargetError
from ..names import bank_name, block_of, lies_in, role_of
from ..parts import BiasConfig
from ..parts.bias import member_parameter
from ..parts.places import places_of
from ..planning.candidates import Candidate, find_candidates
from ..planning.groups import by_key
from ..planning.heads import head_names
from ..validation import COUNT, check_arguments, flag, listed
from .sources import Source, check_pretrained, check_sources, moves_by_source, origin_of


@made_to_stay()
def grow_bias_bank(
    model: nn.Module,
    sources: Sequence[Source],
    *,
    num_templates: int | None = None,
    group_size: int = 1,
    target_modules: Sequence[str] | str | None = None,
    scales: bool = False,
) -> StoredBank:
    """Make a bank whose templates are the directions in which sources moved the biases of a model.

    The shift of a norm is a bias as well, so that this serves CNNs too, whose convolutions have none.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        sources: as for ``grow_bank``: adapters that trained biases (``bias="all"`` of any method of PEFT, ``BiasConfig``), or
            fine-tuned forms of the model.
        num_templates: number of templates of a group at most; None takes all principal components, one for each source.
        group_size: blocks whose biases share templates and coefficients: a task trains (blocks / group_size) x templates
            numbers.
        target_modules: the modules whose biases take part: names, or a regular expression for whole names. None takes those
            of all layers and norms in the model's numbered blocks.
        scales: the scales of the norms among them take part too: a template spans them and the biases together.

    Returns:
        the bank, version 1, to be given as ``BiasConfig(bank=...)``, saved and pushed. A template is as long as the root mean
        square of its group's task vectors: a coefficient of 1 moves the biases about as far as a source did.

    Raises:
        RecastConfigError: if a number is below 1, there is no source, or the model is converted already.
        RecastTargetError: if target modules have no bias, or name nothing.
        RecastBankError: if a source cannot be read, or none of them moved a bias.
    """
    check_pretrained(model, "grow_bias_bank")
    check_sources(sources, num_templates=num_templates)
    check_arguments(COUNT, group_size=group_size)
    check_arguments(flag, scales=scales)
    places = bias_places(model, target_modules)
    if not places:
        raise RecastTargetError("no layer or norm in the model's numbered blocks has a bias: name target_modules, or grow_bank")
    biases = {place.name: cast(Tensor, place.module.bias) for place in places}
    if scales:
        biases |= {f"{place.name}.weight": place.module.weight for place in places if is_affine_norm(place.module)}  # type: ignore[misc]
    vectors = [_moves(model, source, biases) for source in sources]
    moved = {name for vector in vectors for name, move in vector.items() if bool(move.any())}
    if not moved:
        raise RecastBankError(
            f"none of the {len(sources)} sources moved a bias of the model\n  looked at: {listed(biases, 4)}\n"
            'Give adapters that trained biases (bias="all" in their configs, or the partner BiasConfig), or fine-tuned models.'
        )
    groups = {}
    for name, modules in _groups(places, moved, group_size).items():
        members = (*modules, *(f"{module}.weight" for module in modules if f"{module}.weight" in biases))
        widths = tuple(biases[member].numel() for member in members)
        moves = _joined(members, widths, vectors)
        grown = principal_components(moves, (sum(widths),), torch.float32, num_templates, None, False)
        groups[name] = StoredGroup(members, grown=grown, widths=widths)
    fingerprints = {member: weight_fingerprint(biases[member]) for group in groups.values() for member in group.members}
    return StoredBank(groups, fingerprints, {"method": "grown", "sources": [*map(origin_of, sources)], "of": "biases"})


def bias_moves(bank: StoredBank, model: nn.Module, sources: Sequence[Source]) -> dict[str, list[Tensor]]:
    """How far sources moved the biases of a bank's groups: by group the task vectors that are not zero.

    Raises:
        RecastBankError: if the bank stands for other biases, or a source cannot be read.
    """
    places = {candidate.name: candidate for candidate in find_candidates(model)}
    biases = {}
    for group in bank.groups.values():
        for member, width in zip(group.members, group.widths or (), strict=True):
            biases[member] = member_parameter(places, member, width)
            bank.check_base(member, weight_fingerprint(biases[member]))
    vectors = [_moves(model, source, biases) for source in sources]
    return {name: _joined(group.members, group.widths or (), vectors) for name, group in bank.groups.items()}


def bias_places(model: nn.Module, target_modules: Sequence[str] | str | None = None) -> list[Candidate]:
    """The modules whose biases take part: those that are named, or all layers and norms in the model's numbered blocks."""
    candidates, heads = find_candidates(model), head_names(model)
    partner = BiasConfig(target_modules=target_modules)  # type: ignore[arg-type]
    if target_modules is not None:
        return places_of(partner, candidates, heads, ())
    numbered = [c for c in candidates if any(part.isdecimal() for part in c.name.split("."))]
    return [c for c in numbered if not lies_in(c.name, heads) and partner.refusal(c) is None]


def is_affine_norm(module: nn.Module) -> bool:
    """Whether a module is a norm whose scale multiplies what it puts out, channel by channel, before its bias is added."""
    kind, scale, bias = kind_of(module), module._parameters.get("weight"), module._parameters.get("bias")
    if kind is None or scale is None or bias is None:
        return False
    return kind.name.startswith("norm") and scale.shape == bias.shape


def _moves(model: nn.Module, source: Source, biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far a source moved biases, and scales of norms, by a bank's members."""
    scales = {name for name in biases if name.endswith(".weight") and name.removesuffix(".weight") in biases}
    named = {name: (name if name in scales else f"{name}.bias", values) for name, values in biases.items()}
    moves = moves_by_source(model, source, named)
    for name, move in moves.items():
        if name in scales:  # a channel with a scale of zero shows nothing of itself in the output, so it stays
            scale = biases[name].detach().float().cpu().abs()
            move[scale < 1e-2 * scale.square().mean().sqrt()] = 0.0
    return moves


def _groups(places: Sequence[Candidate], moved: set[str], size: int) -> dict[str, tuple[str, ...]]:
    """Members of every group: the modules of consecutive blocks that differ in their number alone."""
    names = [place.name for place in places if not moved.isdisjoint((place.name, f"{place.name}.weight"))]
    blocks = by_key(names, block_of)
    chunks = [run[i : i + size] for run in by_key(blocks, role_of).values() for i in range(0, len(run), size)]
    return {bank_name(chunk): tuple(name for block in chunk for name in blocks[block]) for chunk in chunks}


def _joined(members: Sequence[str], widths: Sequence[int], vectors: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The task vectors of a group's biases side by side, ``(sum of widths,)``, source by source; zero ones are left out."""
    zeros = {member: torch.zeros(width) for member, width in zip(members, widths, strict=True)}
    joined = [torch.cat([vector.get(member, zero) for member, zero in zeros.items()]) for vector in vectors]
    return [move for move in joined if move.any()]
