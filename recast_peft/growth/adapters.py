"""compress_adapters: existing LoRAs become one bank of low-rank templates and a few numbers each.

A LoRA moves a weight by a low-rank product. The principal components of what several of them do to a group of modules, each
rounded to a low rank, become the templates of the group, and every LoRA the coefficients that come nearest to it: all of it in
closed form, and without a dense matrix, since inner products of low-rank products are small.

Related: EigenLoRAx (Kaushik et al., arXiv 2502.04700) and Share (Kaushik et al., arXiv 2602.06043) take principal components of
the two factors of many LoRAs, apart from each other, and train a new task's coefficients on them; BOLT (Park et al.,
arXiv 2512.02441) takes singular directions of task vectors. Here the components are of the product, so that a module has one
coefficient for each template, and tasks are linear in what they store.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv3d
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..auto import with_task
from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_templates import GrownTemplates, factorise, principal_mix
from ..composition.compose import made_to_stay
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError
from ..layer import recast_layers
from ..names import check_adapter_name, plain_name, unwrapped
from ..options.lora import WRITING_INITS
from ..planning.groups import PlannedGroup, as_matrix
from ..planning.table import text_table
from ..tasks.plan import plan_recast
from ..validation import COUNT, check_arguments, optional
from .sources import check_bank, check_layers, check_pretrained, check_same_base, loaded, origin_of, told

Adapter = str | Path | PeftModel | tuple[PeftModel, str]
Pair = tuple[Tensor, Tensor]  # (rows, rank) and (rank, columns): their product is what comes to a weight as a matrix


@dataclass(frozen=True, eq=False)
class CompressedAdapters:
    """What ``compress_adapters`` found; ``print`` shows it as a table.

    Attributes:
        bank: the templates, to be given as ``RecastConfig(bank=...)``, saved and pushed.
        coefficients: by adapter and by module ``(templates,)``.
        errors: by adapter: the norm of the difference of all weights, in units of what the adapter does to them.
        bytes_before: bytes of all the adapters' matrices.
        bytes_after: bytes of the bank and of all coefficients.
        left_out: by adapter, what it has beside low-rank matrices on the target modules, and so is lost.
    """

    bank: StoredBank
    coefficients: Mapping[str, Mapping[str, Tensor]]
    errors: Mapping[str, float]
    bytes_before: int
    bytes_after: int
    left_out: Mapping[str, tuple[str, ...]]

    def apply_to(self, model: nn.Module, bank: StoredBank | None = None) -> PeftModel:
        """Put the adapters on a model as RECAST tasks, to be saved, pushed, trained on and served as any others.

        Args:
            model: plain, with the weights that the adapters were made for, which is converted; or a model with tasks.
            bank: the bank under the name where it was stored, for tasks that will be saved; None is ``self.bank``.

        Returns:
            the model with the tasks, the last of them active.

        Raises:
            RecastBankError: if the bank is another one.
            RecastConfigError: if the model has a task of one of the names.
        """
        bank = bank or self.bank
        check_bank(bank)
        if bank.fingerprint != self.bank.fingerprint:
            raise RecastBankError(
                f"the coefficients belong to another bank\n  bank of the coefficients: {self.bank.fingerprint}\n"
                f"  bank given:               {bank.fingerprint} ({bank.name or 'in memory'})"
            )
        taken = [name for name in self.coefficients if isinstance(model, PeftModel) and name in model.peft_config]
        if taken:
            raise RecastConfigError(f"the model has a task {taken[0]!r} already: delete_adapter first")
        for name, numbers in self.coefficients.items():
            config = RecastConfig(bank=bank)  # type: ignore[arg-type]
            model = with_task(model, config, name)
            with torch.no_grad():
                for module, layer in recast_layers(model).items():
                    if name in layer.recast_coefficients:
                        layer.recast_coefficients[name].copy_(numbers[module])
        assert isinstance(model, PeftModel)
        return model

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values, ready for JSON."""
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {"errors": dict(self.errors), "left_out": {k: list(v) for k, v in self.left_out.items()}, **sizes}

    def __str__(self) -> str:
        count = sum(len(v) for v in next(iter(self.coefficients.values())).values())
        rows = [(name, f"{count:,}", f"{error:.3f}", ", ".join(self.left_out[name])) for name, error in self.errors.items()]
        table = text_table(("adapter", "trainable parameters", "relative error", "left out"), rows)
        return f"{table}\n{self.bytes_before:,} bytes of adapters, {self.bytes_after:,} of the bank and the tasks"


@made_to_stay()
def compress_adapters(
    model: nn.Module,
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    config: RecastConfig | None = None,
    *,
    num_templates: int,
    rank: int | None = None,
    progress: bool = True,
) -> CompressedAdapters:
    """Turn LoRAs of one model into a bank of templates and a few coefficients for each of them, without training.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        adapters: LoRAs, each a folder, a repository on the Hub, a ``PeftModel`` (its active adapter) or ``(peft_model, name)``;
            by the names that the tasks are to have, or a list.
        config: its targets and groups are used; the members of a group share templates. None takes all modules that an
            adapter moves, each a group.
        num_templates: templates of a group at most; an adapter has as many coefficients for each module.
        rank: rank of a template's low-rank pair; None is the largest rank of the adapters. A larger one keeps more of
            components that mix several adapters.
        progress: show a progress bar over the groups, where they take over two seconds.

    Returns:
        the bank, the coefficients of every adapter, its error, and the bytes before and after. ``apply_to`` makes tasks of
        them. Where adapters have little in common the error says so; as many templates as adapters, of a rank that is large
        enough, have none.

    Raises:
        RecastConfigError: if a number is below 1, names are missing or double, or the model is converted already.
        RecastBankError: if an adapter cannot be read, is no plain LoRA or stands on other weights than the model's, or none of
            them moves a target module.
    """
    check_pretrained(model, "compress_adapters")
    check_arguments(COUNT, num_templates=num_templates)
    check_arguments(optional(COUNT), rank=rank)
    named = _named(adapters)
    found = _read(model, named)
    moved = sorted({module for own in found.values() for module in own.pairs})
    if not moved:
        raise RecastBankError(f"none of the adapters {', '.join(named)} moves a module of the model")
    plan = plan_recast(model, RecastConfig(target_modules=moved, group_size=1) if config is None else config)
    rank = rank or max(left.shape[1] for own in found.values() for left, _ in own.pairs.values())
    groups: dict[str, StoredGroup] = {}
    coefficients: dict[str, dict[str, Tensor]] = {name: {} for name in found}
    kept = dict.fromkeys(found, 0.0)
    for planned in tqdm(plan.groups, desc="groups", delay=2, disable=not progress):
        owners = [(name, member) for member in planned.members for name in found if member in found[name].pairs]
        if not owners:
            continue
        templates, numbers, energies = _fitted(planned, [found[n].pairs[m] for n, m in owners], num_templates, rank)
        groups[planned.name] = StoredGroup(planned.members, grown=templates)
        for own in coefficients.values():
            own.update({member: torch.zeros(len(templates)) for member in planned.members})
        for (name, member), own_numbers, energy in zip(owners, numbers, energies, strict=True):
            coefficients[name][member] = own_numbers
            kept[name] += energy
    if not groups:
        raise RecastBankError("none of the adapters moves a target module of the config")
    targets = {target.name: target for target in plan.candidates}
    fingerprints = {member: targets[member].fingerprint for group in groups.values() for member in group.members}
    made = {"method": "grown", "sources": [*map(origin_of, named.values())], "rank": rank, "of": "adapters"}
    bank = StoredBank(groups, fingerprints, made)
    wholes = {name: sum(float(_inner_products([pair], [pair])) for pair in found[name].pairs.values()) for name in found}
    errors = {name: max(0.0, 1 - kept[name] / whole) ** 0.5 if whole else 0.0 for name, whole in wholes.items()}
    numbers_of_all = sum(v.numel() for own in coefficients.values() for v in own.values())
    before = sum(own.nbytes for own in found.values())
    left_out = {name: own.beside for name, own in found.items()}
    return CompressedAdapters(bank, coefficients, errors, before, bank.nbytes + 4 * numbers_of_all, left_out)


# ---------------------------------------------------------------- closed form


def _fitted(
    planned: PlannedGroup, moves: Sequence[Pair], count: int, rank: int
) -> tuple[GrownTemplates, list[Tensor], list[float]]:
    """Templates of one group, and for each move its coefficients and the squared norm that they give."""
    gram = _inner_products(moves, moves)
    total = float(gram.trace())
    templates = _rounded(moves, principal_mix(gram, count), rank)
    own = _inner_products(templates, templates)  # (templates, templates)
    seen = _inner_products(templates, moves)  # (templates, moves)
    shares = []
    for first in range(1, len(templates) + 1):
        numbers = torch.linalg.lstsq(own[:first, :first], seen[:first], driver="gelsd").solution  # at last of all templates
        shares.append(float((numbers * seen[:first]).sum()) / total)
    tensors = tuple(torch.stack(side).to(planned.dtype).contiguous() for side in zip(*templates, strict=True))
    grown = GrownTemplates(tensors, tuple(planned.shape), plain=False, energy=tuple(shares))
    return grown, list(numbers.T.float()), (numbers * seen).sum(0).tolist()


def _inner_products(first: Sequence[Pair], second: Sequence[Pair]) -> Tensor:
    """Inner products ``(first, second)`` of low-rank products in float64: <L R, M S> = sum of (L^T M) * (R S^T)."""
    left, right = _side_by_side(first)
    other_left, other_right = _side_by_side(second)
    terms = (left.T @ other_left) * (right @ other_right.T)  # (numbers, numbers)
    rows = torch.stack([block.sum(0) for block in terms.split([pair[0].shape[1] for pair in first])])
    return torch.stack([block.sum(1) for block in rows.split([pair[0].shape[1] for pair in second], dim=1)], dim=1)


def _side_by_side(pairs: Sequence[Pair]) -> Pair:
    return torch.cat([left.double() for left, _ in pairs], dim=1), torch.cat([right.double() for _, right in pairs])


def _rounded(moves: Sequence[Pair], weights: Tensor, rank: int) -> list[Pair]:
    """The nearest low-rank pair of every weighted sum of moves; weights ``(moves, sums)``."""
    left, right = _side_by_side(moves)
    rows, small_left = torch.linalg.qr(left)
    columns, small_right = torch.linalg.qr(right.T)
    repeats = torch.tensor([pair[0].shape[1] for pair in moves])
    cores = torch.stack([small_left * mix.repeat_interleave(repeats) @ small_right.T for mix in weights.T])
    return [(rows @ left, right @ columns.T) for left, right in zip(*factorise(cores, rank), strict=True)]


# ---------------------------------------------------------------- reading adapters


def _named(adapters: Sequence[Adapter] | Mapping[str, Adapter]) -> dict[str, str | Path | tuple[PeftModel, str]]:
    """The adapters by the names that their tasks are to have; those of a loaded model with the name that they have there."""
    if isinstance(adapters, (str, Path, PeftModel)) or not isinstance(adapters, Collection) or not len(adapters):
        raise RecastConfigError("adapters: expected a list of LoRAs, or a mapping of names to LoRAs, at least one")
    named: dict[str, Any] = {}
    for name, adapter in adapters.items() if isinstance(adapters, Mapping) else [(None, adapter) for adapter in adapters]:
        if isinstance(adapter, PeftModel):
            active = list(adapter.active_adapters)
            if len(active) != 1:
                raise RecastConfigError(
                    f"the model has {len(active)} active adapters: give (model, name) for each that is meant"
                )
            adapter = adapter, active[0]
        is_loaded = isinstance(adapter, tuple) and [*map(type, adapter[1:])] == [str] and isinstance(adapter[0], PeftModel)
        if not is_loaded and not isinstance(adapter, (str, Path)):
            which = type(adapter).__name__ if name is None else name
            raise RecastConfigError(
                f"the adapter {which!r} is a {type(adapter).__name__}: expected a LoRA's folder, a PeftModel, or (model, name)"
            )
        if name is None:
            name = adapter[1] if isinstance(adapter, tuple) else Path(adapter).name
        if name in named:
            raise RecastConfigError(f"two adapters would be called {name!r}: give a mapping of names to adapters")
        check_adapter_name(name)
        named[name] = adapter
    return named


class _Found(NamedTuple):
    """What is read of a LoRA: its matrices by module, their bytes, and what else it has."""

    pairs: dict[str, Pair]
    nbytes: int
    beside: tuple[str, ...]


def _read(model: nn.Module, named: Mapping[str, str | Path | tuple[PeftModel, str]]) -> dict[str, _Found]:
    """The low-rank matrices of every adapter; those of files are read onto one copy of the model."""
    holder = model
    found: dict[str, _Found] = {}
    for place, (name, adapter) in enumerate(named.items()):
        if not isinstance(adapter, tuple):
            # under a name that PEFT takes: those of tasks are free
            adapter = _load(holder, str(adapter), f"adapter {place}"), f"adapter {place}"
            holder = adapter[0]
        found[name] = _matrices(model, *adapter, name)
        beside = ", ".join(found[name].beside)
        if beside:
            warnings.warn(f"the adapter {name!r} has more than low-rank matrices, which is left out: {beside}", stacklevel=4)
    return found


def _load(model: nn.Module, path: str, name: str) -> PeftModel:
    with told(f"the source {path!r} cannot be read"):
        config = PeftConfig.from_pretrained(path)
    if not isinstance(config, LoraConfig):
        raise RecastBankError(
            f"the adapter {path!r} is of type {config.peft_type}: compress_adapters reads LoRAs; grow_bank takes whatever can "
            "be merged"
        )
    return loaded(model, path, name, autocast_adapter_dtype=False)


def _matrices(model: nn.Module, peft_model: PeftModel, adapter: str, name: str) -> _Found:
    if adapter not in peft_model.peft_config:
        raise RecastBankError(f"the model has no adapter {adapter!r}; it has {', '.join(peft_model.peft_config)}")
    config = _plain_lora(peft_model.peft_config[adapter], name)
    pairs: dict[str, Pair] = {}
    size, beside = 0, [] if config.bias == "none" else [f"biases (bias={config.bias!r})"]
    modules = dict(unwrapped(model).named_modules(remove_duplicate=False))
    for place, layer in peft_model.get_base_model().named_modules():
        module = plain_name(place)
        if isinstance(layer, AuxiliaryTrainingWrapper) and adapter in layer._adapters:
            beside.append(module)
        if not isinstance(layer, LoraLayer) or adapter not in (*layer.lora_A, *layer.lora_embedding_A):
            continue
        is_grouped = getattr(layer.get_base_layer(), "groups", 1) > 1  # its product is no matrix product
        if not isinstance(layer, (Linear, Conv1d, Conv2d, Conv3d)) or is_grouped:
            beside.append(module)
            continue
        check_same_base(layer, modules.get(module), name, module)
        weight = getattr(modules.get(module), "weight", None)
        pairs[module] = _pair(layer, adapter)
        if not all(side.isfinite().all() for side in pairs[module]):
            raise RecastBankError(f"the adapter {name!r} holds numbers that are not finite at {module}: leave it out")
        wanted = None if weight is None else as_matrix(weight.shape)
        given = (len(pairs[module][0]), pairs[module][1].shape[1])
        if given != wanted:
            raise RecastBankError(
                f"the adapter {name!r} does not fit the model at {module}\n  adapter: {given}\n  model:   {wanted}"
            )
        size += sum(part[adapter].weight.nbytes for part in (layer.lora_A, layer.lora_B))  # type: ignore[misc]
        if layer.lora_B[adapter].bias is not None:
            beside.append(f"the bias of {module}")
    return _Found({module: pair for module, pair in pairs.items() if pair[0].any() and pair[1].any()}, size, tuple(beside))


def _plain_lora(config: PeftConfig, name: str) -> LoraConfig:
    check_layers(config, name)
    if not isinstance(config, LoraConfig):
        what = f"is of type {config.peft_type}"
    elif str(config.init_lora_weights).lower().startswith(WRITING_INITS):
        what = f"is started with init_lora_weights={config.init_lora_weights!r}, which changes the weights that it adds to"
    else:
        variants = {f.name for f in fields(config) if f.metadata.get("is_lora_variant")} - {"velora_config"}  # trains otherwise
        more = [name for name in sorted(variants) if getattr(config, name)]
        if not more:
            return config
        what = f"has {more[0]}={getattr(config, more[0])!r}, which is more than a product or another one"
    raise RecastBankError(
        f"the adapter {name!r} {what}: compress_adapters reads LoRAs, which add a low-rank product to a weight; "
        "grow_bank takes whatever can be merged"
    )


def _pair(layer: Any, adapter: str) -> Pair:
    """What a LoRA adds to a weight, as a product of two matrices in float32 on the CPU."""
    right, left = (part[adapter].weight.detach().float().cpu().flatten(1) for part in (layer.lora_A, layer.lora_B))
    left = left * layer.scaling[adapter]
    return (right.T, left.T) if getattr(layer, "fan_in_fan_out", False) else (left, right)
