"""The part of a task that ``BiasConfig`` asks for: what holds coefficients of biases in a model, and how they are put in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..banks.files import StoredBank, find_bank, how_to_load
from ..composition.fingerprint import weight_fingerprint
from ..composition.kinds import kind_of
from ..composition.mixed_batch import MixedBatch, current_batch
from ..config import RecastConfig
from ..errors import RecastBankError, RecastTargetError
from ..names import MODEL_PREFIX
from ..options.partner import PartnerConfig
from ..options.record import bank_to_use
from ..planning.candidates import Candidate
from .base import Request, device_and_dtype
from .bias import BiasCoefficient, BiasConfig, BiasMix, BiasTemplates, bias_of, channels_of, scaled_by
from .partner import PartnerHook, PartnerPart, PreparedPartner, TaskPartners, entry_prefix, partner_holders


class TaskBiases(TaskPartners):
    """The coefficients of one bias, by task; they can be merged into it.

    While they are merged the pretrained bias is kept beside it, and comes back as the very tensor that it was.
    """

    adds_when_merged = True
    pretrained_bias: Tensor | None
    pretrained_scale: Tensor | None

    def __init__(self, place: str, method: str) -> None:
        super().__init__(place, method)
        self.register_buffer("pretrained_bias", None, persistent=False)
        self.register_buffer("pretrained_scale", None, persistent=False)
        self.banks = nn.ModuleDict()  # fingerprint -> templates of this bias

    def _coefficient(self, adapter_name: str) -> BiasCoefficient:
        return cast(BiasCoefficient, self.modules_to_save[adapter_name])

    def add(self, adapter_name: str, module: nn.Module, active: bool, inference_mode: bool) -> None:
        """Give a task its coefficients; tasks on one bank share its templates."""
        if isinstance(module, BiasMix):
            fingerprint = module.shared[0].bank.fingerprint
            if fingerprint not in self.banks:
                self.banks[fingerprint] = module.shared[0]
            module.shared = (cast(BiasTemplates, self.banks[fingerprint]),)
        super().add(adapter_name, module, active, inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Delete a task, and the templates that no other task uses."""
        super().delete_adapter(adapter_name, new_active_adapters)
        used = {id(m.shared[0]) for m in self.modules_to_save.values() if isinstance(m, BiasMix)}
        for fingerprint in [key for key, templates in self.banks.items() if id(templates) not in used]:
            del self.banks[fingerprint]

    # ---------------------------------------------------------------- what a holder can be asked

    def coefficients_of(self, adapter_name: str) -> Mapping[str, nn.Parameter]:
        module = self._coefficient(adapter_name)
        return {self.key_of(adapter_name): module.offset} if "offset" in module._parameters else {}

    def bank_of(self, adapter_name: str) -> Any:
        module = self._coefficient(adapter_name) if self.has_task(adapter_name) else None
        return module.shared[0] if isinstance(module, BiasMix) else None

    def trained_as(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (("biases", parameter) for parameter in self.modules_to_save.parameters())

    def key_of(self, adapter_name: str) -> str:
        """The name of a task's coefficients of this bias: that of the bias, or of the first one in its group."""
        return f"{self._coefficient(adapter_name).owner or self.place}.bias"

    def refusal_to_merge(self, adapter_name: str) -> str | None:
        return None

    def refusal_to_pool(self, adapter_name: str) -> str | None:
        return None

    # ---------------------------------------------------------------- computing

    @property
    def _bias(self) -> nn.Parameter:
        return cast(nn.Parameter, self.hosts[0].bias)

    def pretrained(self) -> Tensor:
        """The bias as it was before any task was merged."""
        return self._bias if self.pretrained_bias is None else self.pretrained_bias

    @property
    def _scale(self) -> nn.Parameter:
        return cast(nn.Parameter, self.hosts[0].weight)

    def pretrained_scale_of_norm(self) -> Tensor:
        """The scale of a norm as it was before any task was merged."""
        return self._scale if self.pretrained_scale is None else self.pretrained_scale

    def attach(self, place: nn.Module, visible: nn.Module) -> None:
        kind = kind_of(place)
        self.hosts = (place,)
        if kind is not None and kind.reads_sum is not None:  # an activation follows inside: what it gets has the bias in it
            place.get_submodule(kind.reads_sum).register_forward_pre_hook(PartnerHook(self, before=True), with_kwargs=True)
        else:
            super().attach(place, visible)

    def adapt(self, x: Any, y: Any) -> Any:
        """The output with the bias of the active task; it has it already where that is merged."""
        if self._merged is not None and current_batch() is None:
            return y
        return super().adapt(x, y)

    def _adapted(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        if self._merged is not None:
            return y
        module = self._coefficient(adapter_name)
        return module(y, self._bias, None if module.scale_templates() is None else self._scale)

    def _adapted_from_pool(self, batch: MixedBatch, y: Tensor) -> Tensor:
        """The output with every sample's own row of a pool's table; what is merged is no part of any sample's task."""
        if self.pretrained_bias is not None:
            module = cast(BiasCoefficient, next(iter(self.modules_to_save.values())))
            if self.pretrained_scale is not None:
                merged = module._along(self._bias, y).to(y.dtype)
                y = (y - merged) * module._along(self.pretrained_scale / self._scale, y).to(y.dtype) + merged
            y = y + module._along(self.pretrained_bias - self._bias, y).to(y.dtype)
        slot = batch.pool.slot if batch.pool is not None else ""
        if not self.has_task(slot):
            return y
        offsets = batch.offsets(self.key_of(slot), len(y))
        assert offsets is not None
        module = self._coefficient(slot)
        scale = None if module.scale_templates() is None else self.pretrained_scale_of_norm()
        return module.by_sample(y, self.pretrained(), offsets, scale)

    # ---------------------------------------------------------------- merging

    def merge(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Write the tasks' biases into the module.

        Raises:
            ValueError: for ``safe_merge``, if the bias is not finite; nothing is changed then.
        """
        new = [name for name in adapter_names if name in self._adapters]
        if new:
            composed, scale = self._composed(new), self._composed_scale(new)
            if safe_merge and not all(torch.isfinite(t).all() for t in (composed, scale) if t is not None):
                raise ValueError(f"NaNs detected in the merged biases. The adapter {new[-1]} seems to be broken")
            pretrained = self.pretrained() if self.pretrained_bias is not None else self._bias.data
            self.pretrained_bias, self._bias.data = pretrained, composed
            if scale is not None:
                kept = self._scale.data if self.pretrained_scale is None else self.pretrained_scale
                self.pretrained_scale, self._scale.data = kept, scale
        super().merge(adapter_names)

    def merge_in_place(self, adapter_name: str) -> None:
        """Merge a task in place of what is merged now, into the same storage."""
        scale = self._composed_scale([adapter_name]) if self.has_task(adapter_name) else None
        is_there = self.pretrained_bias is not None and (scale is None) == (self.pretrained_scale is None)
        if not is_there or not self.has_task(adapter_name):
            self.unmerge()
            self.merge([adapter_name])
            return
        with torch.no_grad():
            self._bias.data.copy_(self._composed([adapter_name]))
            if scale is not None:
                self._scale.data.copy_(scale)
        self._merged = [adapter_name]

    def _composed(self, adapter_names: Sequence[str]) -> Tensor:
        pretrained = self.pretrained().detach()
        with torch.no_grad():
            changes = torch.stack([self._coefficient(name).change(pretrained) for name in adapter_names])
            return (pretrained + changes.sum(0)).to(pretrained.dtype)

    def _composed_scale(self, adapter_names: Sequence[str]) -> Tensor | None:
        """The scale of a norm with what tasks add to it; None if they leave it."""
        with torch.no_grad():
            changes = [change for n in adapter_names if (change := self._coefficient(n).scale_change()) is not None]
            if not changes:
                return None
            pretrained = self.pretrained_scale_of_norm().detach()
            return (pretrained + torch.stack(changes).sum(0)).to(pretrained.dtype)

    def unmerge(self) -> None:
        """Put the pretrained bias back: the very tensor that was there before."""
        if self.pretrained_bias is not None:
            self._bias.data, self.pretrained_bias = self.pretrained_bias, None
        if self.pretrained_scale is not None:
            self._scale.data, self.pretrained_scale = self.pretrained_scale, None
        super().unmerge()


class BiasPart(PartnerPart):
    """Coefficients of biases: one for each, or those of the templates of a bank."""

    def __init__(self) -> None:
        super().__init__(BiasConfig, TaskBiases)

    def _prepared(self, request: Request, partner: PartnerConfig, candidates: list[Candidate]) -> list[PreparedPartner]:
        assert isinstance(partner, BiasConfig)
        if partner.bank is None:
            return super()._prepared(request, partner, candidates)
        bank = _bank_of(request, partner)
        return list(_on_bank(request, replace(partner, bank=bank), bank, candidates))

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        return None  # they are rows of numbers, as the coefficients of weights are


def _bank_of(request: Request, partner: BiasConfig) -> StoredBank:
    """The bank that a partner names, from memory, from the model or from its file.

    Raises:
        RecastBankError: if it is not found, or is a bank of weights.
    """
    record = request.config.record
    named = bank_to_use(partner.bank, record, partner.method)
    assert named is not None
    banks = [cast(BiasTemplates, t).bank for holder in bias_holders(request.model) for t in holder.banks.values()]
    if isinstance(named, StoredBank):
        bank = named
    else:
        same = [bank for bank in banks if bank.fingerprint == named["fingerprint"]]
        hint = how_to_load("partners", "[BiasConfig(bank=load_bank(folder_or_repository))]")
        bank = next(iter(same), None) or find_bank(named, None if record is None else record.folder, hint)
    if not bank.is_of_biases:
        raise RecastBankError(
            f"the bank {bank.name or 'in memory'} holds templates of weights: give it as RecastConfig(bank=...); "
            "a bank of biases is made by grow_bias_bank"
        )
    return bank


def _on_bank(request: Request, partner: BiasConfig, bank: StoredBank, candidates: list[Candidate]) -> Iterator[PreparedPartner]:
    """What a task trains on a bank of biases: the first bias of every group owns the group's coefficients."""
    places = {candidate.name: candidate for candidate in candidates}
    held = {holder.place: holder for holder in bias_holders(request.model)}
    for group in bank.groups.values():
        owner: BiasMix | None = None
        scales: dict[str, Tensor] = {}
        for member, templates in group.biases().items():
            norm = scaled_by(member, places)
            if norm is not None:
                scale = bias_of(places, member, templates.shape[1])
                kept = held[norm].pretrained_scale_of_norm() if norm in held else scale
                if not request.counting and not kept.is_meta:
                    bank.check_base(member, weight_fingerprint(kept))
                scales[norm] = templates
        for member, templates in group.biases().items():
            if scaled_by(member, places) is not None:
                continue
            bias = bias_of(places, member, templates.shape[1])
            refusal = partner.refusal(places[member])
            if refusal is not None:
                raise RecastTargetError(f"partner bias cannot stand at {member}, which its bank names: {refusal}")
            pretrained = held[member].pretrained() if member in held else bias
            if not request.counting and not pretrained.is_meta:
                bank.check_base(member, weight_fingerprint(pretrained))
            like = device_and_dtype(request.model, places[member].module, request.counting)
            channels = channels_of(places[member].module)
            assert channels is not None
            module = BiasMix(
                channels, BiasTemplates(bank, templates, like["device"], scales.get(member)), member, owner, **like
            )
            owner = owner or module
            yield PreparedPartner(partner, places[member], module.train(places[member].module.training))


def bias_config(config: RecastConfig) -> BiasConfig | None:
    """What a config says of coefficients of biases."""
    return next((partner for partner in config.partners or () if isinstance(partner, BiasConfig)), None)


def bias_bank_of(model: nn.Module, adapter_name: str) -> StoredBank | None:
    """The bank of a task's coefficients of biases; None if each bias is its own template."""
    shared = (holder.bank_of(adapter_name) for holder in bias_holders(model))
    return next((templates.bank for templates in shared if templates is not None), None)


def bias_holders(model: nn.Module, adapter_name: str | None = None) -> list[TaskBiases]:
    """What holds coefficients of biases, one for each bias; of one task, or of all."""
    held = [holder for holder in partner_holders(model) if isinstance(holder, TaskBiases)]
    return held if adapter_name is None else [holder for holder in held if holder.has_task(adapter_name)]


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
