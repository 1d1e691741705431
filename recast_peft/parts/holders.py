"""What holds the partners of all tasks that stand at one place, and lets those of the task in force act.

Each is a ``ModulesToSaveWrapper`` of PEFT, so that saving, loading, activating, disabling and deleting a task treat it as PEFT
treats any module that is saved whole. partner_places.py puts them in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..banks.files import StoredBank
from ..composition.mixed_batch import MixedBatch, current_batch
from ..errors import RecastTargetError
from ..names import MODEL_PREFIX, PARTNER_CONTAINER, place_key
from ..parts import BiasConfig
from .bias import BiasCoefficient, BiasMix, BiasTemplates


class PartnerContainer(nn.ModuleDict):
    """The partners of all places: ``place -> method -> TaskPartners``."""

    def forward(self, x: Any) -> Any:
        """Give back the input: a model that is an ``nn.Sequential`` calls all of its children."""
        return x


class TaskPartners(ModulesToSaveWrapper):
    """The partners of one kind that stand at one place, by task; the active task's is in force."""

    def __init__(self, place: str) -> None:
        nn.Module.__init__(self)
        self.place = place
        self.hosts: tuple[nn.Module, ...] = ()  # the module at the place; in a tuple, since it is no child
        self.original_module = nn.Identity()
        self.modules_to_save = nn.ModuleDict()
        self._adapters: set[str] = set()
        self._active_adapter = []
        self._disable_adapters = False

    def add(self, adapter_name: str, module: nn.Module, active: bool, inference_mode: bool) -> None:
        """Give a task its partner; it is in force if ``active``."""
        self.modules_to_save[adapter_name] = module
        self._adapters.add(adapter_name)
        if active:
            self.set_adapter([adapter_name], inference_mode=inference_mode)
        else:
            module.requires_grad_(False)

    is_mergeable = False  # whether what it does can be written into a parameter of the place

    def adapt(self, x: Any, y: Any) -> Any:
        """The output of the place with the partner of the task in force, or of each sample's own task.

        Args:
            x: the input of the place.
            y: its output.
        """
        if self.disable_adapters:
            return y
        tasks = self._by_task
        active = [name for name in self.active_adapters if name in tasks]
        batch = current_batch()
        if not active and batch is None:
            return y
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise RecastTargetError(
                f"{self.place} takes a {type(x).__name__} and gives a {type(y).__name__}; a partner can stand only where both "
                "are tensors: name other modules with its target_modules"
            )
        if batch is None:
            return self._adapted(active[0], x, y)
        if batch.pool is not None:
            return self._adapted_from_pool(batch, y)
        for key, indices in batch.rows(len(x)).items():
            if isinstance(key, str) and key in tasks:
                rows = batch.index(indices, y.device)
                y = y.index_copy(0, rows, self._adapted(key, x[rows], y[rows]))
        return y

    @property
    def _by_task(self) -> nn.ModuleDict:
        """``modules_to_save`` without PEFT's look-up, which takes longer than all else that a call does here."""
        return cast(nn.ModuleDict, self._modules["modules_to_save"])

    def _adapted(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        return self._by_task[adapter_name](x, y)

    def _adapted_from_pool(self, batch: MixedBatch, y: Tensor) -> Tensor:
        return y  # a pool holds none of them


class TaskBiases(TaskPartners):
    """The same for partners that act on the bias of the place; they can be merged into it.

    While they are merged the pretrained bias is kept beside it, and comes back as the very tensor that it was.
    """

    is_mergeable = True
    pretrained_bias: Tensor | None

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.register_buffer("pretrained_bias", None, persistent=False)
        self.merged_adapters = []
        self.banks = nn.ModuleDict()  # fingerprint -> templates of this bias

    def add(self, adapter_name: str, module: nn.Module, active: bool, inference_mode: bool) -> None:
        """Give a task its coefficients; tasks on one bank share its templates."""
        if isinstance(module, BiasMix):
            fingerprint = module.shared[0].bank.fingerprint
            if fingerprint not in self.banks:
                self.banks[fingerprint] = module.shared[0]
            module.shared = (cast(BiasTemplates, self.banks[fingerprint]),)
        super().add(adapter_name, module, active, inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Delete a task, and the templates that no other task uses."""
        super().delete_adapter(adapter_name, new_active_adapters)
        used = {id(m.shared[0]) for m in self.modules_to_save.values() if isinstance(m, BiasMix)}
        for fingerprint in [key for key, templates in self.banks.items() if id(templates) not in used]:
            del self.banks[fingerprint]

    def pretrained(self) -> Tensor:
        """The bias as it was before any task was merged."""
        return self._bias if self.pretrained_bias is None else self.pretrained_bias

    @property
    def _bias(self) -> nn.Parameter:
        return cast(nn.Parameter, self.hosts[0].bias)

    def adapt(self, x: Any, y: Any) -> Any:
        """The output with the bias of the task in force; it has it already where that is merged."""
        if self.merged_adapters and current_batch() is None:
            return y
        return super().adapt(x, y)

    def _adapted(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        if self.merged_adapters:
            return y
        return self._by_task[adapter_name](y, self._bias)

    def _adapted_from_pool(self, batch: MixedBatch, y: Tensor) -> Tensor:
        """The output with every sample's own row of a pool's table; what is merged is no part of any sample's task."""
        if self.pretrained_bias is not None:
            back = self.pretrained_bias - self._bias
            module = cast(BiasCoefficient, next(iter(self.modules_to_save.values())))
            y = y + (back.view(-1, *[1] * (y.ndim - 2)) if module.channels > 0 else back).to(y.dtype)
        slot = batch.pool.slot if batch.pool is not None else ""
        if slot not in self.modules_to_save:
            return y
        offsets = batch.offsets(self.key_of(slot), len(y))
        assert offsets is not None
        return cast(BiasCoefficient, self.modules_to_save[slot]).by_sample(y, self.pretrained(), offsets)

    def key_of(self, adapter_name: str) -> str:
        """The name of a task's coefficients of this bias: that of the bias, or of the first one in its group."""
        return f"{cast(BiasCoefficient, self.modules_to_save[adapter_name]).owner or self.place}.bias"

    def merge_in_place(self, adapter_name: str) -> None:
        """Merge a task in place of what is merged now, into the same storage."""
        if self.pretrained_bias is None:
            self.merge([adapter_name])
        elif adapter_name in self.modules_to_save:
            change = cast(BiasCoefficient, self.modules_to_save[adapter_name]).change(self.pretrained_bias)
            with torch.no_grad():
                self._bias.data.copy_(self.pretrained_bias + change)
            self.merged_adapters = [adapter_name]

    def merge(self, adapter_names: Sequence[str]) -> None:
        """Write the tasks' biases into the module, beside those that are merged already."""
        new = [n for n in adapter_names if n in self.modules_to_save and n not in self.merged_adapters]
        if not new:
            return
        merged = [*self.merged_adapters, *new]
        parameter = self._bias
        pretrained = parameter.data if self.pretrained_bias is None else self.pretrained_bias
        with torch.no_grad():
            changes = torch.stack([cast(BiasCoefficient, self.modules_to_save[name]).change(pretrained) for name in merged])
            composed = (pretrained + changes.sum(0)).to(pretrained.dtype)
        self.pretrained_bias, parameter.data = pretrained, composed
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Put the pretrained bias back: the very tensor that was there before."""
        if self.pretrained_bias is not None:
            self._bias.data, self.pretrained_bias = self.pretrained_bias, None
        self.merged_adapters = []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Put a task in force; as PEFT does with layers, what is merged is unmerged first."""
        self.unmerge()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the tasks on or off; what is merged comes out of the bias when they are switched off."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)


class PartnerHook:
    """Stands behind a module and lets the partners of its place change its output."""

    def __init__(self, partners: TaskPartners) -> None:
        self.partners = partners

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return self.partners.adapt(args[0] if args else next(iter(kwargs.values()), None), output)


# ---------------------------------------------------------------- finding them, and all of them at once


def partner_holders(model: nn.Module) -> list[TaskPartners]:
    """What holds the partners that act on outputs, one for each place and method."""
    return [module for module in model.modules() if isinstance(module, TaskPartners)]


def bias_holders(model: nn.Module, adapter_name: str) -> list[TaskBiases]:
    """What holds a task's coefficients of biases, one for each bias."""
    return [h for h in partner_holders(model) if isinstance(h, TaskBiases) and adapter_name in h.modules_to_save]


def bias_owners(model: nn.Module, adapter_name: str) -> dict[str, BiasCoefficient]:
    """What owns a task's coefficients of biases, each ``(templates,)``, by the name of its (first) bias."""
    modules = [(h.key_of(adapter_name), h.modules_to_save[adapter_name]) for h in bias_holders(model, adapter_name)]
    return {key: cast(BiasCoefficient, module) for key, module in modules if "offset" in module._parameters}


def bias_coefficients(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """A task's coefficients of biases ``(templates,)``, by the name of the bias that owns them."""
    return {key: module.offset for key, module in bias_owners(model, adapter_name).items()}


def bias_bank_of(model: nn.Module, adapter_name: str) -> StoredBank | None:
    """The bank of a task's coefficients of biases; None if each bias is its own template."""
    modules = (holder.modules_to_save[adapter_name] for holder in bias_holders(model, adapter_name))
    return next((module.shared[0].bank for module in modules if isinstance(module, BiasMix)), None)


def bias_entry(key: str) -> str:
    """The name that the coefficients of a bias, named as ``bias_coefficients`` names them, have in a task's file."""
    return f"{MODEL_PREFIX}{PARTNER_CONTAINER}.{place_key(key.removesuffix('.bias'))}.{BiasConfig().method}.offset"


def merge_partners(model: nn.Module, adapter_names: Collection[str] | None) -> None:
    """Merge those partners that can be merged, after the coefficients of the same tasks; None means the tasks in force."""
    for holder in partner_holders(model):
        if isinstance(holder, TaskBiases) and not holder.disable_adapters:
            holder.merge(list(holder.active_adapters if adapter_names is None else adapter_names))


def unmerge_partners(model: nn.Module) -> None:
    """Undo ``merge_partners``, to the last bit."""
    for holder in partner_holders(model):
        if isinstance(holder, TaskBiases):
            holder.unmerge()
