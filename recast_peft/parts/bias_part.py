"""The part of a task that ``BiasConfig`` asks for: what holds coefficients of biases in a model, and how they are put in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..banks.files import StoredBank
from ..composition.fingerprint import weight_fingerprint
from ..composition.kinds import kind_of
from ..composition.mixed_batch import MixedBatch, current_batch
from ..config import RecastConfig
from ..errors import RecastTargetError
from ..holders import holders
from ..names import MODEL_PREFIX
from ..options.partner import PartnerConfig
from ..placement.offloaded import is_offloaded, kept_tensor
from ..planning.candidates import Candidate
from ..planning.reading import is_also_read
from ..validation import listed
from .banked import bank_of_partner
from .base import Request
from .bias import BiasCoefficient, BiasConfig, BiasMix, BiasTemplates, member_parameter, scaled_by
from .partner import PartnerHook, PartnerPart, PreparedPartner, TaskPartners, entry_prefix


class TaskBiases(TaskPartners):
    """The coefficients of one bias, by task; they can be merged into it.

    While they are merged the pretrained parameter is kept beside it, and comes back as the very object that it was.
    """

    trained_kind = "biases"
    adds_when_merged = True

    def __init__(self, place: str, method: str) -> None:
        super().__init__(place, method)
        self.kept: dict[str, nn.Parameter] = {}  # the model's own (a norm's scale too) while others are merged in their place

    def _coefficient(self, adapter_name: str) -> BiasCoefficient:
        return cast(BiasCoefficient, self.modules_to_save[adapter_name])

    def add(self, adapter_name: str, module: nn.Module, active: bool, inference_mode: bool) -> None:
        """Give a task its coefficients; tasks on one bank share its templates."""
        if isinstance(module, BiasMix):
            held = (templates for templates in self.templates if templates.bank.fingerprint == module.shared.bank.fingerprint)
            module.shared = next(held, module.shared)
        super().add(adapter_name, module, active, inference_mode)

    @property
    def templates(self) -> list[BiasTemplates]:
        """Those of this bias that tasks on banks mix."""
        return [module.shared for module in self.modules_to_save.values() if isinstance(module, BiasMix)]

    # ---------------------------------------------------------------- what a holder can be asked

    def coefficients_of(self, adapter_name: str) -> Mapping[str, nn.Parameter]:
        module = self._coefficient(adapter_name)
        return {self.key_of(adapter_name): module.offset} if "offset" in module._parameters else {}

    def numbers_of(self, adapter_name: str) -> Sequence[Tensor]:
        return (self._coefficient(adapter_name).numbers,) if self.has_task(adapter_name) else ()

    def bank_of(self, adapter_name: str) -> Any:
        module = self._coefficient(adapter_name) if self.has_task(adapter_name) else None
        return module.shared if isinstance(module, BiasMix) else None

    def merged_into(self) -> Iterator[tuple[nn.Module, str]]:
        scales = any(self._coefficient(name).scale_templates() is not None for name in self._adapters)
        yield from ((self.hosts[0], name) for name in ("bias", "weight") if name == "bias" or scales)

    def key_of(self, adapter_name: str) -> str:
        """The name of a task's coefficients of this bias: that of the bias, or of the first one in its group."""
        return f"{self._coefficient(adapter_name).owner or self.place}.bias"

    def refusal_to_merge(self, adapter_name: str) -> str | None:
        is_away = self.has_task(adapter_name) and is_offloaded(self.hosts[0])
        return f"a bias at {self.place}, which is offloaded: nothing can be merged into it" if is_away else None

    # ---------------------------------------------------------------- computing

    def _now(self, name: str = "bias") -> nn.Parameter:
        kept = kept_tensor(self.hosts[0], name)  # while the module is offloaded
        return getattr(self.hosts[0], name) if kept is None else kept  # type: ignore[return-value]

    def pretrained(self, name: str = "bias") -> Tensor:
        """The bias, or a norm's scale (its ``"weight"``), as it was before any task was merged."""
        return self.kept[name] if name in self.kept else self._now(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TaskBiases:
        super()._apply(fn, recurse)
        for parameter in self.kept.values():
            parameter.data = fn(parameter.data)
        return self

    def attach(self, place: nn.Module, visible: nn.Module) -> None:
        kind = kind_of(place)
        self.hosts = (place,)
        if kind is not None and kind.reads_sum is not None:  # an activation follows inside: what it gets has the bias in it
            place.get_submodule(kind.reads_sum).register_forward_pre_hook(PartnerHook(self, before=True), with_kwargs=True)
        else:
            super().attach(place, visible)

    def tasks_of_call(self) -> tuple[str, ...]:
        return () if self._merged is not None else super().tasks_of_call()

    def adapt(self, x: Any, y: Any) -> Any:
        """The output with the bias of the active task; it has it already where that is merged."""
        batch = current_batch()
        if self._merged is not None and (batch is None or batch.pool is None):
            return y
        if batch is None and not torch.compiler.is_compiling() and self.zeros is not None and self.zeros.are_all(self):
            return y
        return super().adapt(x, y)

    def _adapted(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        module = self._coefficient(adapter_name)
        return module(y, self._now(), None if module.scale_templates() is None else self._now("weight"))

    def _adapted_from_pool(self, batch: MixedBatch, y: Tensor) -> Tensor:
        """The output with every sample's own row of a pool's table; what is merged is no part of any sample's task."""
        if self.kept:
            module = cast(BiasCoefficient, next(iter(self.modules_to_save.values())))
            if "weight" in self.kept:
                merged = module.along_channels(self._now(), y)
                y = (y - merged) * module.along_channels(self.kept["weight"] / self._now("weight"), y) + merged
            y = y + module.along_channels(self.kept["bias"] - self._now(), y)
        slot = batch.slot
        if not self.has_task(slot):
            return y
        offsets = batch.offsets(self.key_of(slot), len(y))
        assert offsets is not None
        module = self._coefficient(slot)
        scale = None if module.scale_templates() is None else self.pretrained("weight")
        return module(y, self.pretrained(), scale, self.scaling.get(slot, 1.0) * offsets)

    # ---------------------------------------------------------------- merging

    def merge(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write the tasks' biases (None: those of the active ones) into the module.

        Raises:
            ValueError: for ``safe_merge``, if the bias is not finite; nothing is changed then.
        """
        wanted = self._active_adapter if adapter_names is None else adapter_names
        new = [name for name in wanted if name in self._adapters]
        composed = self._composed(new)
        if safe_merge and not all(torch.isfinite(values).all() for values in composed.values()):
            raise ValueError(f"NaNs detected in the merged biases. The adapter {new[-1]} seems to be broken")
        for name, values in composed.items():
            if name not in self.kept:  # other modules may have the same parameter
                self.kept[name] = self._now(name)
                self.hosts[0]._parameters[name] = nn.Parameter(values, requires_grad=False)
            self._now(name).data = values
        super().merge(adapter_names)

    def merge_in_place(self, adapter_name: str) -> None:
        """Merge a task in place of what is merged now, into the same storage."""
        composed = self._composed([adapter_name] if self.has_task(adapter_name) else [])
        if not composed or composed.keys() != self.kept.keys():
            self.unmerge()
            self.merge([adapter_name])
            return
        with torch.no_grad():
            for name, values in composed.items():
                self._now(name).data.copy_(values)
        self._merged = [adapter_name]

    def _composed(self, adapter_names: Sequence[str]) -> dict[str, Tensor]:
        """The bias with what tasks add to it, and the scale of a norm if they move it."""
        moves: dict[str, list[Tensor]] = {"bias": [], "weight": []}
        with torch.no_grad():
            for name in adapter_names:
                task, factor = self._coefficient(name), self.scaling.get(name, 1.0)
                moves["bias"].append(factor * task.change(self.pretrained()))
                growth = task.scale_change()
                moves["weight"] += [] if growth is None else [factor * growth]
            sums = {name: self.pretrained(name) + torch.stack(own).sum(0) for name, own in moves.items() if own}
            return {name: values.to(self.pretrained(name).dtype) for name, values in sums.items()}

    def rescaled(self) -> None:
        if self._merged is not None:
            for name, values in self._composed(self.merged_adapters).items():
                self._now(name).data = values

    def unmerge(self) -> None:
        """Put the pretrained bias back: the very parameter that was there before."""
        for name in [*self.kept]:
            self.hosts[0]._parameters[name] = self.kept.pop(name)
        super().unmerge()


class BiasPart(PartnerPart):
    """Coefficients of biases: one for each, or those of the templates of a bank."""

    def __init__(self) -> None:
        super().__init__(BiasConfig, TaskBiases)

    def _prepared(self, request: Request, partner: PartnerConfig, candidates: list[Candidate]) -> list[PreparedPartner]:
        assert isinstance(partner, BiasConfig)
        prepare = super()._prepared if partner.bank is None else self._banked
        prepared = list(prepare(request, partner, candidates))
        if not request.counting:
            _warn_of_readers([piece.candidate for piece in prepared])
        return prepared

    def _banked(self, request: Request, partner: Any, candidates: list[Candidate]) -> Iterator[PreparedPartner]:
        banks = [templates.bank for holder in bias_holders(request.model) for templates in holder.templates]
        bank = bank_of_partner(request, partner, banks)
        return _on_bank(request, replace(partner, bank=bank), bank, candidates)

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        return None  # they are rows of numbers, as the coefficients of weights are


def _warn_of_readers(candidates: list[Candidate]) -> None:
    """Say where a task's bias may be left out of a call."""
    read = [candidate.name for candidate in candidates if is_also_read(candidate, "bias")]
    if read:
        warnings.warn(
            f"the model calls {listed(read)} and also computes with the bias by itself: what a task adds to it acts there only "
            "where the module is called, or once the task is merged. If outputs before and after merge_adapter() differ, name "
            "other modules with BiasConfig(target_modules=[...])",
            stacklevel=2,
        )


def _on_bank(request: Request, partner: BiasConfig, bank: StoredBank, candidates: list[Candidate]) -> Iterator[PreparedPartner]:
    """What a task trains on a bank of biases: the first bias of every group owns the group's coefficients."""
    places = {candidate.name: candidate for candidate in candidates}
    held = {holder.place: holder for holder in bias_holders(request.model)}
    for group in bank.groups.values():
        owner: BiasMix | None = None
        scales: dict[str, Tensor] = {}
        for member, templates in group.by_member().items():
            norm, own = scaled_by(member, places), member_parameter(places, member, templates.shape[1])
            holder = held.get(norm or member)
            pretrained = own if holder is None else holder.pretrained("bias" if norm is None else "weight")
            if not request.counting and not pretrained.is_meta:
                bank.check_base(member, weight_fingerprint(pretrained))
            if norm is not None:
                scales[norm] = templates
        for member, templates in group.by_member().items():
            if scaled_by(member, places) is not None:
                continue
            refusal = partner.refusal(places[member])
            if refusal is not None:
                raise RecastTargetError(f"partner bias cannot stand at {member}, which its bank names: {refusal}")
            host = places[member].module
            like = request.like(host)
            of_norm = {"scales": scales[member]} if member in scales else {}
            shared = BiasTemplates(bank, like["device"], templates=templates, **of_norm)
            module = BiasMix(host, shared, member, owner, **like)
            owner = owner or module
            yield PreparedPartner(partner, places[member], module.train(host.training))


def bias_holders(model: nn.Module, adapter_name: str | None = None) -> list[TaskBiases]:
    """What holds coefficients of biases, one for each bias; of one task, or of all."""
    return holders(model, adapter_name, TaskBiases)


def bias_owners(model: nn.Module, adapter_name: str) -> dict[str, BiasCoefficient]:
    """What owns a task's coefficients of biases, each ``(templates,)``, by the name of its (first) bias."""
    held = bias_holders(model, adapter_name)
    return {h.key_of(adapter_name): h._coefficient(adapter_name) for h in held if h.coefficients_of(adapter_name)}


def bias_coefficients(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """A task's coefficients of biases ``(templates,)``, by the name of the bias that owns them."""
    return {key: module.offset for key, module in bias_owners(model, adapter_name).items()}


def bias_entry(key: str) -> str:
    """The name that the coefficients of a bias, named as ``bias_coefficients`` names them, have in a task's file."""
    return f"{MODEL_PREFIX}{entry_prefix(key.removesuffix('.bias'), BiasConfig().method)}.offset"
