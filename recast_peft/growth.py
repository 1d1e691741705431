"""grow_bank and extend_bank: templates learned from the adapters and models one already has.

A source is whatever moved the pretrained weights: an adapter, or a fine-tuned model. Its weight differences are task vectors;
the principal components of the task vectors of a group become templates beside the pretrained weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .bank_files import StoredBank, StoredGroup
from .config import RecastConfig
from .errors import RecastBankError, RecastConfigError, RecastError
from .fingerprint import same_weight, weight_fingerprint
from .grown_templates import GrownTemplates, energy_kept, factorise, orthonormal_basis
from .layer import RecastLayer
from .mimicry import gram_matrix
from .plan import plan_recast
from .report import table
from .targets import Candidate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Source = str | Path | nn.Module | tuple[PeftModel, str] | Mapping[str, Tensor]
CHECKPOINTS = ("model.safetensors", "pytorch_model.safetensors")
NEGLIGIBLE = 1e-10  # share of the energy below which a component is rounding


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
        model: plain, with its pretrained weights; it is not changed.
        sources: each of them an adapter of PEFT that can be merged (a folder or a repository, or a loaded model with the
            adapter's name: ``(peft_model, "name")``; RECAST tasks are adapters too), or a fine-tuned form of the model (a
            module, a state dict, a safetensors file or a folder with ``model.safetensors``).
        config: its targets and groups are used; the members of a group share templates. None takes a group for each module.
        num_templates: grown templates of a group at most; None takes all principal components.
        rank: stores each template as a low-rank pair; None stores them dense.
        plain_templates: keep the members' pretrained weights as templates beside the grown ones. Without them a task has
            fewer coefficients; either way zero coefficients give the pretrained model.

    Returns:
        the bank, version 1, to be given as ``RecastConfig(bank=...)``, saved and pushed. Every template has the root mean
        square size of its group's task vectors.

    Raises:
        RecastConfigError: if a number is below 1, there is no source, or the model is converted already.
        RecastBankError: if a source cannot be read, or none of them moved a target module.
    """
    if any(isinstance(module, RecastLayer) for module in model.modules()):
        raise RecastConfigError(
            "grow_bank needs the plain pretrained model; this one is converted already (see model.unload())"
        )
    _check_sizes(sources, num_templates, rank)
    plan = plan_recast(model, config or RecastConfig(group_size=1))
    targets = {target.name: target for target in plan.candidates}
    vectors = [task_vectors(model, source, targets) for source in sources]
    groups: dict[str, StoredGroup] = {}
    for planned in plan.groups:
        moves = _moves_of(planned.members, vectors)
        grown = _components(moves, planned.shape, planned.dtype, num_templates, rank, plain_templates)
        if len(grown) or plain_templates:
            groups[planned.name] = StoredGroup(planned.members, grown=grown)
    if not any(group.grown is not None and len(group.grown) for group in groups.values()):
        raise RecastBankError(
            f"none of the {len(sources)} sources moved a target module\n  targets: {', '.join(list(targets)[:4])}, ...\n"
            "Give the config the target_modules that the sources were trained on."
        )
    members = {member for group in groups.values() for member in group.members}
    fingerprints = {name: weight_fingerprint(target.weight) for name, target in targets.items() if name in members}
    made = {"method": "grown", "sources": [_origin_of(source) for source in sources], "rank": rank}
    return StoredBank(groups, fingerprints, made)


def extend_bank(
    bank: StoredBank, model: nn.Module, sources: Sequence[Source], *, num_templates: int | None = None
) -> StoredBank:
    """Add templates for further sources to a grown bank: what its templates do not span of their task vectors.

    Tasks on the earlier versions stay as they are to the last bit: the templates they know come first, and are not touched.

    Args:
        bank: as ``grow_bank`` or this function made it; it is not changed.
        model: plain, with its pretrained weights; it is not changed.
        sources: as for ``grow_bank``.
        num_templates: new templates of a group at most; None takes all principal components.

    Returns:
        the bank's next version, under no name yet: save or push it in place of the earlier one, which it contains.

    Raises:
        RecastConfigError: if a number is below 1, or there is no source.
        RecastBankError: if the bank was not grown, stands for other weights, or a source cannot be read.
    """
    _check_sizes(sources, num_templates, None)
    if not any(group.grown is not None for group in bank.groups.values()):
        raise RecastBankError("extend_bank needs a bank that grow_bank made; this one has no grown templates")
    config = RecastConfig(groups={name: list(group.members) for name, group in bank.groups.items()})
    targets = {target.name: target for target in plan_recast(model, config).candidates}
    for name, fingerprint in bank.base_fingerprint.items():
        if not same_weight(fingerprint, weight_fingerprint(targets[name].weight)):
            raise RecastBankError(
                f"the bank {bank.name or 'in memory'} was made for other pretrained weights; {name} differs\n"
                f"  fingerprint in the bank:  {fingerprint}\n"
                f"  fingerprint of the model: {weight_fingerprint(targets[name].weight)}"
            )
    vectors = [task_vectors(model, source, targets) for source in sources]
    counts = {name: len(group.grown) for name, group in bank.groups.items() if group.grown is not None}
    groups = {name: _extended(group, _moves_of(group.members, vectors), num_templates) for name, group in bank.groups.items()}
    earlier = {"version": bank.version, "fingerprint": bank.fingerprint, "templates": counts}
    made = _made_from_more(bank.mimicry, [_origin_of(source) for source in sources])
    return StoredBank(groups, bank.base_fingerprint, made, None, bank.version + 1, history=(*bank.history, earlier))


def _check_sizes(sources: Sequence[Source], num_templates: int | None, rank: int | None) -> None:
    if isinstance(sources, (str, Path, Mapping, nn.Module)) or not len(sources):
        raise RecastConfigError(
            f"sources={sources if isinstance(sources, (str, Path)) else type(sources).__name__!r}: "
            "expected a list with at least one source"
        )
    for name, value in (("num_templates", num_templates), ("rank", rank)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RecastConfigError(f"{name}={value!r}: expected a whole number of at least 1, or None")


def _moves_of(members: Sequence[str], vectors: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The task vectors of a group that are not zero, source by source."""
    return [vector[member] for vector in vectors for member in members if member in vector and bool(vector[member].any())]


def _components(
    moves: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype, count: int | None, rank: int | None, plain: bool
) -> GrownTemplates:
    """The principal components of task vectors (not centred: what they have in common counts too), largest first."""
    if not moves:
        tensors = _tensors_of(torch.zeros((0, *shape)), rank, dtype)
        return GrownTemplates(tensors, tuple(shape), plain)
    gram = gram_matrix(moves)  # (vectors, vectors)
    values, mix = torch.linalg.eigh(gram)
    values, mix = values.flip(0), mix.flip(1)
    kept = int((values > NEGLIGIBLE * values.sum()).sum())
    kept = min(kept, count or kept)
    size = (values.sum() / len(moves)).sqrt()  # the root mean square norm of the task vectors
    # the sign of a component is free: its largest share is positive
    signs = torch.gather(mix, 0, mix.abs().argmax(0, keepdim=True)).sign()[0]
    scale = (signs * size / values.clamp_min(1e-300).sqrt())[:kept]
    flat = torch.stack([move.reshape(-1) for move in moves]).double()
    templates = ((mix[:, :kept] * scale).T @ flat.cpu()).float().reshape(kept, *shape)
    tensors = _tensors_of(templates, rank, dtype)
    grown = GrownTemplates(tensors, tuple(shape), plain)
    return replace(grown, energy=energy_kept(moves, grown))


def _tensors_of(templates: Tensor, rank: int | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tensors = (templates,) if rank is None else factorise(templates, rank)
    return tuple(t.to(dtype) for t in tensors)


def _extended(group: StoredGroup, moves: list[Tensor], count: int | None) -> StoredGroup:
    """A group with the principal components of what its templates do not span."""
    grown = group.grown
    if grown is None or not moves:
        return group
    rest, old = moves, grown.dense()
    if old:
        basis = orthonormal_basis(old)
        flat = torch.stack([move.reshape(-1).double().cpu() for move in moves])
        rest_of = flat - (flat @ basis) @ basis.T
        if float(rest_of.square().sum()) <= NEGLIGIBLE * float(flat.square().sum()):
            return group
        rest = [row.reshape(grown.weight_shape).float() for row in rest_of]
    rank = grown.tensors[0].shape[2] if len(grown.tensors) == 2 else None
    new = _components(rest, grown.weight_shape, grown.tensors[0].dtype, count, rank, grown.plain)
    tensors = tuple(torch.cat([a.cpu(), b]) for a, b in zip(grown.tensors, new.tensors, strict=True))
    whole = replace(grown, tensors=tensors)
    return replace(group, grown=replace(whole, energy=(*grown.energy, *energy_kept(moves, whole)[len(grown) :])))


# ---------------------------------------------------------------- sources


def task_vectors(model: nn.Module, source: Source, targets: Mapping[str, Candidate]) -> dict[str, Tensor]:
    """How far a source moved every target's weight, ``(*weight_shape)`` in float32 by module name.

    Raises:
        RecastBankError: if the source cannot be read or does not fit the model.
    """
    weights = _weights_of(model, source)
    vectors = {}
    for name, target in targets.items():
        moved = weights.get(f"{name}.{target.weight_name}")
        if moved is None:
            continue
        if moved.shape != target.weight.shape:
            raise RecastBankError(
                f"the source {_shown(source)} does not fit the model: {name} has another shape\n"
                f"  source: {tuple(moved.shape)}\n  model:  {tuple(target.weight.shape)}"
            )
        vectors[name] = moved.detach().float().cpu() - target.weight.detach().float().cpu()
    if not vectors:
        raise RecastBankError(
            f"the source {_shown(source)} has none of the target modules\n  targets: {', '.join(list(targets)[:4])}, ..."
        )
    return vectors


def _weights_of(model: nn.Module, source: Source) -> Mapping[str, Tensor]:
    """A source's weights by the names of the plain model."""
    if isinstance(source, Mapping):
        return source
    if isinstance(source, tuple):
        return _merged(*source)
    if isinstance(source, PeftModel):
        return _merged(source, source.active_adapters)
    if isinstance(source, nn.Module):
        return source.state_dict()
    path = Path(source)
    files = [path] if path.is_file() else [path / name for name in CHECKPOINTS if (path / name).is_file()]
    try:
        if files:
            return load_file(files[0])
        loaded = _loaded(model, str(source))
    except RecastError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RecastBankError(
            f"the source {str(source)!r} cannot be read: {error}\nExpected a saved adapter (a folder or a repository), a "
            f"safetensors file, or a folder with {CHECKPOINTS[0]}."
        ) from error
    return loaded.merge_and_unload().state_dict()


def _loaded(model: nn.Module, name: str) -> PeftModel:
    """A saved adapter on a copy of the model; a head of its own does not matter, and need not have this model's classes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), name, ignore_mismatched_sizes=True)
    for warning in caught:
        lines = str(warning.message).splitlines()
        misshaped = [line for line in lines if "found shape" in line]
        # what is left out must be a head: an adapter without its matrices would seem to move nothing
        wrong = [line for line in misshaped if ".modules_to_save." not in line]
        if wrong:
            raise RecastBankError(f"the source {name!r} does not fit the model: {wrong[0]}")
        if not misshaped:
            warnings.warn(warning.message, stacklevel=2)
    return loaded


def _merged(model: PeftModel, names: str | list[str]) -> dict[str, Tensor]:
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise RecastBankError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(model.peft_config)}")
    with torch.no_grad():
        return copy.deepcopy(model).merge_and_unload(adapter_names=names).state_dict()


def _origin_of(source: Source) -> str:
    """A source in a few words, for the bank's card; of a path on this machine the last part alone."""
    if isinstance(source, (str, Path)):
        return Path(source).name if Path(source).exists() else str(source)
    if isinstance(source, tuple):
        return f"adapter {source[1]!r}"
    if isinstance(source, PeftModel):
        return f"adapter {', '.join(map(repr, source.active_adapters))}"
    return f"weights of {type(source).__name__}" if isinstance(source, nn.Module) else "a state dict"


def _made_from_more(mimicry: str | Mapping[str, Any], sources: list[str]) -> dict[str, Any]:
    made = {"method": mimicry} if isinstance(mimicry, str) else dict(mimicry)
    return {**made, "sources": [*made.get("sources", ()), *sources]}


def _shown(source: Source) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else f"of type {type(source).__name__}"


# ---------------------------------------------------------------- report


@dataclass(frozen=True)
class GrownGroup:
    """One group of a grown bank.

    Attributes:
        bank: its name.
        members: target modules in it.
        num_templates: all templates, the plain ones included.
        num_grown: grown templates.
        energy: share of the sources' squared norm that the first 1, 2, ... grown templates keep.
        nbytes: bytes of the grown templates as they are stored.
    """

    bank: str
    members: int
    num_templates: int
    num_grown: int
    energy: tuple[float, ...]
    nbytes: int


@dataclass(frozen=True)
class GrowthReport:
    """What ``growth_report`` found; ``print(report)`` shows it as a table, ``report.plot()`` as a picture."""

    groups: tuple[GrownGroup, ...]
    version: int

    @property
    def num_coefficients(self) -> int:
        """Numbers that one task trains on the bank, with one coefficient set and nothing shared."""
        return sum(group.members * group.num_templates for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return asdict(self)

    def plot(self) -> Figure:
        """The energy kept per number of templates (needs matplotlib)."""
        from .plotting import plot_growth

        return plot_growth(self)

    def __str__(self) -> str:
        most = max(group.num_grown for group in self.groups)
        header = ("bank", "members", "templates", "bytes", *(f"energy {i + 1}" for i in range(most)))
        rows = []
        for group in self.groups:
            energy = [f"{share:.3f}" for share in group.energy] + [""] * (most - len(group.energy))
            counts = (str(group.members), str(group.num_templates), f"{group.nbytes:,}")
            rows.append((group.bank, *counts, *energy))
        return f"{table(header, rows)}\nversion {self.version}, {self.num_coefficients} numbers per task"


def growth_report(bank: StoredBank) -> GrowthReport:
    """How much of its sources a grown bank keeps, group by group and per number of templates.

    Of a bank that was extended, the energy of every template is that of the sources it was made from.

    Raises:
        RecastBankError: if the bank was not grown.
    """
    groups = tuple(
        GrownGroup(name, len(g.members), g.num_templates, len(g.grown), g.grown.energy, g.grown.nbytes)
        for name, g in bank.groups.items()
        if g.grown is not None
    )
    if not groups:
        raise RecastBankError("growth_report needs a bank that grow_bank made; this one has no grown templates")
    return GrowthReport(groups, bank.version)
