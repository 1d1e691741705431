"""RecastLayer: one wrapped module, whose weight is composed from its bank and the coefficients of the active tasks.

What holds at every moment (W the pretrained weight, T the templates, d the mean of a task's coefficient sets):

    live      weight == W + sum over active tasks of sum_i d[i] * T[i]      (exact bank)
              weight == sum_i (base[i] + sum over active tasks of d[i]) * T[i]   (compressed bank)
              times the masks of the active tasks that have one here
    merged    base_layer.weight == the live weight of the merged tasks; W is kept beside it
    unmerged  base_layer.weight is W, the very tensor, bit for bit
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .banks.template_bank import TemplateBank, follow_device, move_in_place
from .composition.cached_weights import keeps_weight, kept_weight
from .composition.coefficient_gradients import EXACT, Estimate, estimate_of
from .composition.compose import average_sets, compose_into, compose_weight, mix_by_sample
from .composition.kinds import add_bias, in_and_out_features, is_lazily_readable, kind_of, positions_of
from .composition.lazy_weight import LazyWeight, is_read_by_the_model, is_read_lazily
from .composition.mixed_batch import NO_TASK, MixedBatch, current_batch
from .composition.recomposed import call_recomposed, can_recompose
from .errors import RecastBankError
from .holders import Entry, TaskHolder, TaskModules, TaskParameters
from .names import BASE_ADAPTER, COEFFICIENTS

INIT_RANGE = (0.1, 0.2)  # sizes of random offsets: none is so small that a test would not see it

# Positions of a task's samples below which n products are cheaper than composing a weight for each task; measured on a CPU by
# examples/benchmarks/mixed_batch.py.
PRODUCT_LIMIT = 64

# Attributes by which accelerate marks the module that it hooked; they belong to the wrapped module alone.
_NOT_FORWARDED = frozenset({"_hf_hook", "_old_forward"})


class RecastLayer(nn.Module, BaseTunerLayer, TaskHolder):
    """A module whose weight is composed from templates.

    Whoever calls it gets the wrapped module's result with the composed weight; whoever reads its ``weight`` (or, of a
    multi-head attention, ``in_proj_weight``) gets the composed weight, differentiable; any other attribute is the wrapped
    module's.

    Args:
        base_layer: the module to wrap.
        module_name: its name in the plain model.
        weight_name: the parameter that is composed.
        fingerprint: of the pretrained weight.
    """

    adapter_layer_names = ("recast_coefficients", "recast_masks")
    other_param_names = ("recast_bank", "recast_partners", "coefficient_gradients")

    MASKS = "recast_masks"

    recast_pretrained: Tensor | None

    def __init__(self, base_layer: nn.Module, module_name: str, weight_name: str, fingerprint: str) -> None:
        super().__init__()
        self.module_name = module_name
        self.other_layers: list[Any] = []  # layers of PEFT's other methods around or inside this one; see stacking.py
        self._held: tuple[str, ...] | None = None  # tasks in the weight that those are merged into; None: none is merged
        self.idle_slot: str | None = None  # an adapter that no task of its pool is in: it counts as none
        self.base_layer = base_layer
        self.weight_name = weight_name
        self.fingerprint = fingerprint
        self.recast_coefficients = TaskParameters()  # task -> (sets, templates)
        self.recast_masks = TaskModules()  # task -> what changes its composed weight; see partners/piggyback.py
        self.recast_bank: dict[str, TemplateBank] = {}  # task -> bank; a plain dict: the bank belongs to the group
        self.coefficient_gradients: dict[str, str | float] = {}  # task -> how gradients of its coefficients are formed
        self._estimated_calls = 0
        self._exchanges = 0  # of weights on merging and unmerging; odd in the middle of one
        self.recast_partners: dict[str, tuple[str, ...]] = {}  # task -> what it has beside its coefficients
        self.compressed_bank: tuple[TemplateBank, ...] = ()  # empty, or the one bank that stands for the weight
        self.register_buffer("recast_pretrained", None, persistent=False)  # the pretrained weight while merged
        self._disable_adapters = False
        self._switched_off = False  # inside RecastModel.disable_part("recast")
        self._active_adapter = []
        self._trainable: list[nn.Parameter] = []  # before the tasks were switched off
        self.merged_adapters = []
        if not hasattr(base_layer, "in_features"):  # PEFT's layers say how wide they are, whatever they wrap
            self.in_features, self.out_features = in_and_out_features(base_layer, self.weight_shape)

    # ---------------------------------------------------------------- weights

    @property
    def is_compressed(self) -> bool:
        """Whether a compressed bank stands for the pretrained weight."""
        return bool(self.compressed_bank)

    @property
    def is_released(self) -> bool:
        """Whether the pretrained weight was given up for the compressed bank."""
        if not self.compressed_bank:
            return False
        holds_other = self.merged or self._held is not None
        return self.recast_pretrained is None and (holds_other or self._weight_parameter is None)

    @property
    def disable_adapters(self) -> bool:
        """Whether the tasks are switched off here, all of them or their coefficients alone."""
        return self._disable_adapters or self._switched_off

    @property
    def pretrained_weight(self) -> Tensor:
        """The pretrained weight, also while something is merged into the wrapped module.

        Raises:
            RecastBankError: if it was released when the bank was compressed.
        """
        kept = self._buffers["recast_pretrained"]
        if kept is not None:
            return kept
        weight = self._weight_parameter
        if weight is None or self.is_released:
            raise RecastBankError(
                f"the pretrained weight of {self.module_name} was released when its bank was compressed; "
                "convert with keep_base_weights=True to keep it"
            )
        beside_others = current_batch() is not None and not torch.compiler.is_compiling()
        return self._pristine(weight) if beside_others and type(weight) is nn.Parameter and not weight.requires_grad else weight

    def _pristine(self, parameter: nn.Parameter) -> Tensor:
        """The pretrained weight as a tensor of its own, which stays what it is when another thread merges."""
        while True:
            exchanges, kept = self._exchanges, self._buffers["recast_pretrained"]
            weight = parameter.detach() if kept is None else kept
            if exchanges == self._exchanges and exchanges % 2 == 0:
                return weight
            time.sleep(0)  # another thread is between taking the one out and putting the other in

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        if self.compressed_bank:
            return tuple(self._bank_templates.shape[1:])
        return tuple(self.pretrained_weight.shape)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        if self.compressed_bank:
            return self._bank_templates.dtype
        return self.pretrained_weight.dtype

    @property
    def weight_device(self) -> torch.device:
        """Device of the weight."""
        weight = self._weight_parameter
        return self._bank_templates.device if weight is None else weight.device

    @property
    def _bank_templates(self) -> Tensor:
        templates = self.compressed_bank[0].templates
        assert templates is not None
        return templates

    def get_base_layer(self) -> nn.Module:
        """The innermost module. PEFT's own asks every module for an attribute that it lacks, which is slow at every call."""
        base = self._modules["base_layer"]
        return base.get_base_layer() if isinstance(base, BaseTunerLayer) else base  # type: ignore[return-value]

    @property
    def _weight_parameter(self) -> nn.Parameter | None:
        return self.get_base_layer()._parameters.get(self.weight_name)

    @property
    def weight(self) -> Tensor:
        """The weight that a call would use now: composed, differentiable."""
        if self.weight_name != "weight":
            raise AttributeError(f"{type(self.base_layer).__name__} has no attribute 'weight'")
        lazy = self._lazy_weight()
        return self.effective_weight() if lazy is None else lazy

    def _lazy_weight(self) -> Tensor | None:
        """The composed weight of a plain layer for a reader who may want no more than its dtype; None for all others."""
        if not is_lazily_readable(self.base_layer) or self._held is not None:
            return None
        if current_batch() is not None and is_read_by_the_model():
            return LazyWeight(self.effective_weight, self.weight_shape, self.weight_dtype, self.weight_device)  # raises if used
        if not is_read_lazily() or self.merged or keeps_weight(self):
            return None
        tasks = self._tasks_in_force()
        if any(name in self.recast_masks for name in tasks):
            return None
        parts = self._parts(tasks)
        if parts is None:
            return None
        banks, anchored, coefficients = parts
        coefficients = coefficients.clone()  # as they are now
        device = self.weight_device

        def compose() -> Tensor:
            with torch.no_grad():
                templates = [template for bank in banks for template in bank.get_templates(device)]
                weight = compose_weight(self.pretrained_weight if anchored else None, templates, coefficients)
                return weight.requires_grad_()

        return LazyWeight(compose, self.weight_shape, self.weight_dtype, device)

    def effective_weight(self) -> Tensor:
        """The weight that a call would use now.

        Raises:
            RecastBankError: inside a mixed batch, in which there is no one weight for all samples.
        """
        if current_batch() is not None:
            raise RecastBankError(
                f"the model reads the weight of {self.module_name} instead of calling the module, so it cannot have "
                "another task for each sample: pass one task at a time instead of adapter_names"
            )
        if self._held is not None:
            self._check_held()
        if self._held is not None or (self.merged and not self.disable_adapters):
            return self._weight_parameter  # type: ignore[return-value]
        return self._as_pretrained(self._weight_for([] if self.disable_adapters else self.active_adapters))

    def _as_pretrained(self, weight: Tensor) -> Tensor:
        """A composed weight, marked like a pretrained one where no gradient is recorded; others are left as they are.

        torch chooses among matrix products by whether the weight requires a gradient, also where none is recorded: only
        marked so does the composed weight give the unconverted model's output to the last bit.
        """
        own = weight is self._weight_parameter or weight is self.recast_pretrained
        if not own and not torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler chooses by itself
            weight.requires_grad_()
        return weight

    def compose(self, adapters: Sequence[str], out: Tensor | None = None) -> Tensor:
        """The weight for the given tasks together (their offsets add); tasks without coefficients here add nothing.

        Args:
            adapters: the tasks.
            out: a tensor to write the weight into, where nothing is differentiated.

        Returns:
            shaped like the weight and in its dtype; for no task at all the pretrained weight itself, or what the
            compressed bank makes of it where that was released.
        """
        masks = [self.recast_masks[name] for name in adapters if name in self.recast_masks]
        terms = self._terms(self._with_coefficients(adapters))
        if out is not None and not masks and terms is not None:
            return compose_into(out, *terms)
        weight = self.pretrained_weight if terms is None else compose_weight(*terms)
        for mask in masks:
            weight = mask(weight)
        return weight if out is None else out.copy_(weight)

    def has_task(self, adapter: str) -> bool:
        """Whether a task changes this weight."""
        return adapter in self.recast_coefficients or adapter in self.recast_masks

    def entries(self, adapter_name: str) -> Iterator[Entry]:
        if adapter_name in self.recast_coefficients:
            yield Entry(f"{self.module_name}.{COEFFICIENTS}", self.recast_coefficients.holder(adapter_name), "offsets")
        if adapter_name in self.recast_masks:
            mask: Any = self.recast_masks[adapter_name]
            name = f"{self.module_name}.{self.MASKS}.mask"
            yield Entry(name, mask, "scores", lambda scores: mask.pack(), mask.unpack, mask.packed_shape)

    def coefficients_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        has = adapter_name in self.recast_coefficients
        return {self.module_name: self.recast_coefficients[adapter_name]} if has else {}

    def bank_of(self, adapter_name: str) -> TemplateBank | None:
        return self.recast_bank.get(adapter_name)

    def trained_as(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from (("coefficients", parameter) for parameter in self.recast_coefficients.parameters())
        yield from (("partners", parameter) for parameter in self.recast_masks.parameters())

    def refusal_to_pool(self, adapter_name: str) -> str | None:
        return "masks on its weights" if adapter_name in self.recast_masks else None

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the tasks on or off; what was frozen before is frozen afterwards."""
        if enabled == self._disable_adapters:
            if enabled:
                for parameter in self._trainable:
                    parameter.requires_grad_(True)
                self._disable_adapters, self._trainable = False, []
                return
            own = (*self.recast_coefficients.parameters(), *self.recast_masks.parameters())
            self._trainable = [parameter for parameter in own if parameter.requires_grad]
            super().enable_adapters(False)

    def _with_coefficients(self, adapters: Sequence[str]) -> list[str]:
        return [name for name in self._present(adapters) if name in self.recast_coefficients]

    def _terms(self, adapters: Sequence[str]) -> tuple[Tensor | None, list[Tensor], Tensor] | None:
        """Anchor, templates and coefficients of the weight for tasks that are present; None for the pretrained weight."""
        parts = self._parts(adapters)
        if parts is None:
            return None
        banks, anchored, coefficients = parts
        device = self.weight_device
        templates = [template for bank in banks for template in bank.get_templates(device)]
        return self.pretrained_weight if anchored else None, templates, coefficients

    def _parts(self, adapters: Sequence[str]) -> tuple[list[TemplateBank], bool, Tensor] | None:
        """Banks, whether the pretrained weight is added, and coefficients; None for the pretrained weight alone."""
        device = self.weight_device
        if self.compressed_bank and (adapters or self.is_released):
            bank = self.compressed_bank[0]
            coefficients = bank.base_of(self.module_name)
            for name in adapters:
                coefficients = coefficients + average_sets(self.recast_coefficients[name])
            return [bank], False, coefficients.to(device)
        if not adapters:
            return None
        offsets: dict[int, Tensor] = {}
        banks: dict[int, TemplateBank] = {}
        for name in adapters:
            bank, offset = self.recast_bank[name], average_sets(self.recast_coefficients[name])
            banks[id(bank)] = bank
            offsets[id(bank)] = offsets[id(bank)] + offset if id(bank) in offsets else offset
        coefficients = torch.cat([offsets[key] for key in banks]) if len(banks) > 1 else offsets[id(bank)]
        return list(banks.values()), True, coefficients.to(device)

    def _weight_for(self, adapters: Sequence[str]) -> Tensor:
        """``compose``, or the weight that was composed before where it is kept and still holds."""
        if not keeps_weight(self) or any(name in self.recast_masks for name in adapters):
            return self.compose(adapters)
        parts = self._parts(self._with_coefficients(adapters))
        if parts is None:
            return self.pretrained_weight
        banks, anchored, coefficients = parts
        sources = [source for bank in banks for source in bank.sources()]
        if anchored:
            sources.append(self.pretrained_weight)
        return kept_weight(self, sources, coefficients, lambda: self.compose(adapters))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a task adds to the weight without it, shaped like the weight, in its dtype; zero without coefficients here."""
        if adapter in self.recast_masks:
            return self.compose([adapter]) - self.compose([])
        if adapter not in self.recast_coefficients:
            return torch.zeros(self.weight_shape, dtype=self.weight_dtype, device=self.weight_device)
        device = self.weight_device
        offsets = average_sets(self.recast_coefficients[adapter]).to(device)
        return compose_weight(None, self.recast_bank[adapter].get_templates(device), offsets, self.weight_dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the task can be written as a LoRA of the plain model: linear layers on exact banks, without partners."""
        if self.is_compressed or adapter_name in self.recast_partners:
            return False
        kind = kind_of(self.base_layer)
        return kind is not None and kind.takes_low_rank

    # ---------------------------------------------------------------- tasks

    def update_layer(
        self,
        adapter_name: str,
        bank: TemplateBank,
        num_coefficient_sets: int,
        init_weights: bool = True,
        seed: int = 0,
        inference_mode: bool = False,
        train_coefficients: bool = True,
        coefficient_gradient: str | float = EXACT,
    ) -> None:
        """Give a task its coefficients ``(sets, templates)`` in this layer: zeros, or random for ``init_weights=False``."""
        if not train_coefficients:
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: ("recast_coefficients",)}
        shape = (num_coefficient_sets, bank.num_templates)
        if init_weights:
            values = torch.zeros(shape)
        else:
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(f"{adapter_name} {self.module_name}".encode()))
            values = torch.empty(shape).uniform_(*INIT_RANGE, generator=generator)
            values *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
        self.recast_bank[adapter_name] = bank
        self.coefficient_gradients[adapter_name] = coefficient_gradient
        self.recast_coefficients[adapter_name] = nn.Parameter(values.to(self.weight_device))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # unlike PEFT's: the device alone, since coefficients stay in float32 beside weights of any dtype, and in place, since
        # a parameter may be frozen, and several layers' own
        device = device or self.weight_device
        if adapter_name in self.recast_coefficients:
            move_in_place([self.recast_coefficients[adapter_name]], device)
        if adapter_name in self.recast_masks:
            move_in_place(self.recast_masks[adapter_name].parameters(), device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RecastLayer:
        kept = {name: parameter.data for name, parameter in self.recast_coefficients.items()}
        super()._apply(fn, recurse)
        for name, values in kept.items():
            if not values.is_meta:
                self.recast_coefficients[name].data = follow_device(fn, values)
        return self

    # ---------------------------------------------------------------- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the composed weight into the wrapped module; the pretrained weight is kept beside it.

        Args:
            safe_merge: refuse a weight that is not finite, before anything is changed.
            adapter_names: the tasks to merge; None means the active ones.

        Raises:
            ValueError: for ``safe_merge``, if the composed weight is not finite.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        new = self._present(adapter_names)
        if not new:
            return
        merged = [*self.merged_adapters, *new]
        if self._held is not None:
            self._check_held(merged)
            self.merged_adapters = merged
            return
        with torch.no_grad():
            weight = self.compose(merged)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {new[-1]} seems to be broken")
        if self.merged:
            self._weight_parameter.data = weight  # type: ignore[union-attr]
        else:
            self._put_weight(weight)
        self.merged_adapters = merged

    def merge_in_place(self, adapter_names: list[str]) -> None:
        """Merge tasks in place of those that are merged now, into the same storage.

        The first call makes the storage; from then on no tensor is made or exchanged, only numbers are written.
        """
        present = self._present(adapter_names)
        if self._held is not None:
            raise self._held_error(present)
        if not self.merged:
            self.merge(adapter_names=present)
            return
        parameter = self._weight_parameter
        assert parameter is not None
        with torch.no_grad():
            self.compose(present, out=parameter.data)
        self.merged_adapters = present

    def unmerge(self) -> None:
        """Put the pretrained weight back: the very tensor that was there before."""
        if not self.merged:
            return
        if self._held is not None:  # the weight goes back when the other layers are unmerged
            self.merged_adapters = []
            return
        self._put_weight(None)
        self.merged_adapters = []

    @contextmanager
    def written_by_others(self) -> Iterator[None]:
        """A block in which a layer of another method writes into the innermost weight: it gets a tensor of its own.

        The tensor holds the weight of the tasks in force, so that what is merged on it is right for any method. It stays for as
        long as something of another method is merged.
        """
        if self._held is None:
            held = tuple(self.merged_adapters or self._tasks_in_force())
            if not self.merged:
                with torch.no_grad():
                    self._put_weight(self.compose(held))
            self._held = held
        try:
            yield
        finally:
            if not any(other.merged for other in self.other_layers):
                if self.merged:
                    with torch.no_grad():
                        self._weight_parameter.data = self.compose(self.merged_adapters)  # type: ignore[union-attr]
                else:
                    self._put_weight(None)
                self._held = None

    def _put_weight(self, weight: Tensor | None) -> None:
        """Put a composed weight into the wrapped module, the pretrained one aside; or for None that one back, if it is kept."""
        self._exchanges += 1
        try:
            self._exchange_weight(weight)
        finally:
            self._exchanges += 1

    def _exchange_weight(self, weight: Tensor | None) -> None:
        parameter = self._weight_parameter
        if weight is None and self.recast_pretrained is None:
            self._set_weight_parameter(None)
        elif weight is None:
            parameter.data, self.recast_pretrained = self.recast_pretrained, None  # type: ignore[union-attr]
        elif parameter is None:
            self._set_weight_parameter(nn.Parameter(weight, requires_grad=False))
        else:
            self.recast_pretrained = parameter.data
            parameter.data = weight.clone() if weight is parameter else weight

    def _tasks_in_force(self) -> list[str]:
        if self.disable_adapters:
            return []
        return self._present(self.merged_adapters or self.active_adapters)

    def _present(self, adapters: Sequence[str]) -> list[str]:
        """Those of the given tasks that change this weight."""
        return [name for name in adapters if self.has_task(name) and name != self.idle_slot]

    def _check_held(self, wanted: Sequence[str] | None = None) -> None:
        """Refuse to compute with a weight into which others were merged on top of other tasks than the wanted ones."""
        for other in self.other_layers:
            if other.merged and other.disable_adapters:
                other.unmerge()
        wanted = self._tasks_in_force() if wanted is None else wanted
        if self._held is not None and set(self._held) != set(wanted):
            raise self._held_error(wanted)

    def _held_error(self, wanted: Sequence[str]) -> RecastBankError:
        merged = sorted({name for other in self.other_layers for name in other.merged_adapters})
        return RecastBankError(
            f"adapters of another method ({', '.join(merged)}) are merged into {self.module_name} on top of other tasks\n"
            f"  tasks merged below:  {', '.join(self._held or ()) or 'none'}\n"
            f"  tasks wanted now:    {', '.join(wanted) or 'none'}\n"
            "Unmerge them first (unmerge_adapter of the model that they belong to), change the tasks, and merge again."
        )

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Give back the wrapped module as an ordinary one, with the tasks merged into it or not.

        A weight that was released for a compressed bank comes back as the bank composes it.
        """
        inside = [other for other in self.other_layers if other in self.modules()]
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            for other in inside:
                other.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            for other in inside:
                other.unmerge_if_merged()
            self.unmerge()
        base = self.get_base_layer()
        if self._weight_parameter is None:
            with torch.no_grad():
                self._set_weight_parameter(nn.Parameter(self.compose([]), requires_grad=False))
        for name, child in base.named_children():  # a multi-head attention may have a wrapped output projection
            if isinstance(child, RecastLayer):
                setattr(base, name, child.unload_and_optionally_merge_module(merge, safe_merge, adapter_names))
        return base

    def _set_weight_parameter(self, parameter: nn.Parameter | None) -> None:
        self.get_base_layer()._parameters[self.weight_name] = parameter

    def release_pretrained_weight(self) -> None:
        """Give up the pretrained weight of a member of a compressed bank."""
        assert self.compressed_bank
        assert not self.merged
        self._set_weight_parameter(None)

    # ---------------------------------------------------------------- computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module computes, with the composed weight; in a mixed batch with each sample's own."""
        if self._held is not None:
            self._check_held()
        if self._held is not None:
            return self.base_layer(*args, **kwargs)
        batch = current_batch()
        if self.disable_adapters and (batch is None or batch.is_off or self._switched_off):
            if self.merged:
                self.unmerge()
            return self._call([], args, kwargs)
        if batch is not None:
            return self._mixed_batch_forward(batch, args, kwargs)
        if self.merged:
            return self.base_layer(*args, **kwargs)
        return self._call(self.active_adapters, args, kwargs)

    def _call(self, adapters: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        direct = self._direct_call(args, kwargs) if torch.is_grad_enabled() else None
        if direct is not None and not any(name in self.recast_masks for name in adapters):
            terms = self._terms(self._with_coefficients(adapters))
            if terms is not None and can_recompose(self.base_layer, args[0], *terms):
                return call_recomposed(self.base_layer, direct, args[0], *terms, self._estimate(adapters))
        return self._call_with(self._weight_for(adapters), args, kwargs)

    def _estimate(self, adapters: Sequence[str]) -> Estimate | None:
        """How the coefficients' gradient of this call is formed: exactly, unless all active tasks ask for the same estimate."""
        asked = {self.coefficient_gradients.get(name, EXACT) for name in self._with_coefficients(adapters)}
        if len(asked) != 1 or asked == {EXACT}:
            return None
        self._estimated_calls += 1
        offset = zlib.crc32(self.module_name.encode()) / 2**32
        return estimate_of(asked.pop(), offset, self._estimated_calls)

    def _direct_call(self, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Tensor] | None:
        """The plain function that stands for a call of the wrapped module, if there is one."""
        if len(args) != 1 or kwargs or _is_hooked(self.base_layer):
            return None
        kind = kind_of(self.base_layer)
        return None if kind is None else kind.call

    def _call_with(self, weight: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        if weight is self._weight_parameter:
            return self.base_layer(*args, **kwargs)
        weight = self._as_pretrained(weight)
        base = self.base_layer
        direct = self._direct_call(args, kwargs)
        if direct is not None:
            return direct(base, weight, args[0])
        if self.weight_name in base.__dict__:  # FSDP puts the gathered weight here, in front of the parameter
            gathered = base.__dict__[self.weight_name]
            base.__dict__[self.weight_name] = weight
            try:
                return base(*args, **kwargs)
            finally:
                base.__dict__[self.weight_name] = gathered
        depth = len(self.other_layers) and sum(other in self.modules() for other in self.other_layers)
        name = "base_layer." * depth + self.weight_name  # inside layers of other methods
        return torch.func.functional_call(base, {name: weight}, args, kwargs)

    def _mixed_batch_forward(self, batch: MixedBatch, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.merged and batch.pool is None:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
        if isinstance(self.base_layer, nn.MultiheadAttention) or not args or not isinstance(args[0], Tensor):
            raise RecastBankError(
                f"{self.module_name} ({type(self.base_layer).__name__}) cannot have another task for each sample: "
                "pass one task at a time instead of adapter_names"
            )
        if batch.pool is not None:
            return self._pool_forward(batch, args, kwargs)
        # tasks without coefficients here share the base's rows
        rows: dict[str, list[int]] = {}
        for key, indices in batch.rows(len(args[0])).items():
            name = str(key)
            rows.setdefault(name if self.has_task(name) else BASE_ADAPTER, []).extend(indices)
        return self._call_by_rows(batch, [(self.compose([name]), indices) for name, indices in rows.items()], args, kwargs)

    def _pool_forward(self, batch: MixedBatch, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Every sample with its own row of a pool's table."""
        x = args[0]
        offsets = batch.offsets(self.module_name, len(x))  # (samples, templates)
        if offsets is None:
            return self._call([], args, kwargs)
        assert batch.pool is not None
        bank = self.recast_bank[batch.pool.slot]
        direct = self._direct_call(args, kwargs)
        keeps_base = self.is_compressed and not self.is_released  # the pretrained weight is no mix of the templates then
        if direct is not None and not keeps_base:
            terms, scale, pairs = bank.product_terms(self.module_name, offsets, self.weight_device)
            if self._products_are_cheaper(x, len(terms), batch):  # low-rank pairs cost next to nothing
                mixed = self._mixed_products(direct, x, terms, scale)
                return mixed if pairs is None else pairs.add_to(mixed, x)
        templates = bank.get_templates(self.weight_device)
        anchor = None if self.compressed_bank else self.pretrained_weight
        base = bank.base_row(self.module_name, offsets) if anchor is None else offsets.new_zeros(())
        weights = []
        for key, indices in batch.rows(len(x)).items():
            offset = offsets[indices[0]]
            if key == NO_TASK and not self.is_released:
                weights.append((self.pretrained_weight, indices))
            else:
                weights.append((compose_weight(anchor, templates, offset if anchor is not None else base + offset), indices))
        return self._call_by_rows(batch, weights, args, kwargs)

    def _mixed_products(
        self, direct: Callable[..., Tensor], x: Tensor, terms: Sequence[Tensor], scale: Tensor | None
    ) -> Tensor:
        """The output with each sample's own mix of weights; a single weight is scaled by way of the input."""
        if len(terms) > 1:
            assert scale is not None
            mixed = mix_by_sample(lambda term: direct(self.base_layer, term, x, False), terms, scale)
            return add_bias(mixed, self.base_layer)
        if scale is not None:
            x = x * scale.view(len(x), *[1] * (x.ndim - 1)).to(x.dtype)
        return direct(self.base_layer, terms[0], x)

    def _products_are_cheaper(self, x: Tensor, templates: int, batch: MixedBatch) -> bool:
        """Whether n products for the whole batch cost less than composing a weight for each task.

        Composing touches n weights a task; n products do (n - 1) more multiplications with every position of its samples. On
        an accelerator what counts is that a weight for each task means a handful of kernels for each. A compiled region takes
        the products always: which samples share a task is not known when it is compiled.
        """
        if torch.compiler.is_compiling():
            return True
        if x.device.type != "cpu":
            return len(batch.rows(len(x))) > 1
        positions = positions_of(self.base_layer, x) / max(1, len(batch.rows(len(x))))  # of a task
        return positions * (templates - 1) < PRODUCT_LIMIT * templates

    def _call_by_rows(
        self, batch: MixedBatch, weights: list[tuple[Tensor, list[int]]], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        x, *rest = args
        if len(weights) == 1:
            return self._call_with(weights[0][0], args, kwargs)
        parts, order = [], []
        for weight, indices in weights:
            parts.append(self._call_with(weight, (x[batch.index(indices, x.device)], *rest), kwargs))
            order += indices
        # back to the order of the samples
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(parts)[batch.index(inverse, x.device)]

    def __getattr__(self, name: str) -> Any:
        for kind in ("_modules", "_buffers"):  # what a call asks for most; torch's own look-up takes several times as long
            held = self.__dict__.get(kind)
            if held is not None and name in held:
                return held[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name in _NOT_FORWARDED or name.startswith("__"):
                raise
            if name == self.__dict__.get("weight_name") and name != "weight":
                return self.effective_weight()
            return getattr(base, name)

    def extra_repr(self) -> str:
        banks = {name: f"{bank.num_templates} templates" for name, bank in self.recast_bank.items()}
        return f"weight={self.weight_name}, tasks={banks}"

    def __repr__(self) -> str:
        return "recast." + super().__repr__()


def _is_hooked(module: nn.Module) -> bool:
    """Whether something beside the module's own forward runs when it is called."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def recast_layers(model: nn.Module) -> dict[str, RecastLayer]:
    """The RECAST layers of a model by the names of their modules in the plain model."""
    return {m.module_name: m for m in model.modules() if isinstance(m, RecastLayer)}
