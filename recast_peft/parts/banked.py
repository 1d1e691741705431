"""Partners on a stored bank: how their options name it, and how it is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..banks.files import StoredBank, find_bank, how_to_load
from ..errors import RecastBankError, RecastConfigError
from ..holders import holders
from ..options.checks import bank
from ..options.partner import PartnerConfig
from ..options.record import Reference, bank_to_use, reference_of
from ..placement.offloaded import StaysInMemory
from .base import Request
from .partner import TaskPartners


@dataclass(frozen=True, kw_only=True)
class BankedPartnerConfig(PartnerConfig):
    """A partner that can be on a bank, which says where it stands.

    Args:
        target_modules: where it stands without a bank.
        bank: the bank, or the name of a folder or repository where it lies. Stored configs hold
            ``{"name": ..., "fingerprint": ...}``.
    """

    bank_maker: ClassVar[str]  # the function that makes such banks; their groups are of the kind that the partner's name says

    bank: StoredBank | dict[str, str | None] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bank is None:
            return
        if self.target_modules is not None:
            raise RecastConfigError(
                f"{type(self).__name__}(bank=..., target_modules={self.target_modules!r}): the bank says which modules take "
                "part; give one of the two"
            )
        self.check(bank, "bank")

    @property
    def bank_reference(self) -> Reference | None:
        return reference_of(self.bank)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "bank": self.bank_reference}


class OfBank(StaysInMemory):
    """A module with tensors of a bank, which no state dict holds: wherever it goes they come from the bank.

    ``to_empty`` would leave it without numbers; and they keep their dtype, whatever that of the weights becomes.

    Args:
        bank: the bank.
        device: where they lie at first.
        tensors: the bank's, by the names of the buffers.
    """

    def __init__(self, bank: StoredBank, device: torch.device, **tensors: Tensor) -> None:
        super().__init__()
        self.bank, self.of_bank = bank, tensors
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OfBank:
        for name in [name for name in self.of_bank if getattr(self, name).is_meta]:  # from where nothing can be moved
            self._buffers[name] = self.of_bank[name]
        super()._apply(fn, recurse)
        for name, tensor in self.of_bank.items():
            self._buffers[name] = tensor.to(getattr(self, name).device)
        return self


def partner_bank(model: nn.Module, adapter_name: str, kind: type[TaskPartners]) -> StoredBank | None:
    """The bank that a task's partners of a kind are on: its coefficients of biases, or its readout; None without one."""
    held = (holder.bank_of(adapter_name) for holder in holders(model, adapter_name, kind))
    return next((templates.bank for templates in held if templates is not None), None)


def bank_of_partner(request: Request, partner: BankedPartnerConfig, held: Iterable[StoredBank]) -> StoredBank:
    """The bank that a partner names, from memory, from the model (``held``) or from its file.

    Raises:
        RecastBankError: if none is named or found, or it is of another kind.
    """
    record = request.config.record
    named = bank_to_use(partner.bank, record, partner.method)
    if named is None:
        raise RecastBankError(f"{type(partner).__name__} needs a bank, and neither the config nor the stored task names one")
    if isinstance(named, StoredBank):
        found = named
    else:
        same = [bank for bank in held if bank.fingerprint == named["fingerprint"]]
        hint = how_to_load("partners", f"[{type(partner).__name__}(bank=load_bank(folder_or_repository))]")
        found = next(iter(same), None) or find_bank(named, None if record is None else record.folder, hint)
    if all(group.kind != partner.method for group in found.groups.values()):
        raise RecastBankError(
            f"the bank {found.name or 'in memory'} is of another kind: give it as {found.field}; a bank for here is made by "
            f"{partner.bank_maker}"
        )
    return found
