"""RecastLayer: one wrapped module, whose weight is composed from its bank and the coefficients of the active tasks.

What holds at every moment (W the pretrained weight, T the templates, d the mean of a task's coefficient sets):

    live      weight == W + sum over active tasks of sum_i d[i] * T[i]      (exact bank)
              weight == sum_i (base[i] + sum over active tasks of d[i]) * T[i]   (compressed bank)
              times the masks of the active tasks that have one here
    merged    base_layer.weight == the live weight of the merged tasks; W is kept beside it
    unmerged  base_layer.weight is W, the very parameter, bit for bit

How a call computes, merges or mixes is told in ``composition/``: calling.py, merging.py, mixing.py, recomputation.py;
what a further call need not find out in known.py.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .banks.template_bank import TemplateBank, follow_device, move_in_place
from .composition.calling import call
from .composition.fingerprint import same_weight, weight_fingerprint
from .composition.kinds import in_and_out_features, kind_of
from .composition.known import know
from .composition.merging import Merging, check_held, follow, refresh
from .composition.mixed_batch import current_batch
from .composition.mixing import call_mixed
from .composition.quantised import restore_class
from .composition.recomputation import CallHistory, call_again, past_state
from .config import RecastConfig
from .errors import RecastConfigError
from .holders import Entry
from .names import COEFFICIENTS, PREFIX, modules_of

INIT_RANGE = (0.1, 0.2)  # sizes of random offsets: none is so small that a test would not see it


class RecastLayer(Merging):
    """A module whose weight is composed from templates: whoever calls it gets the result with the weight of the active tasks.

    Args:
        base_layer: the module to wrap.
        module_name: its name in the plain model.
        weight_name: the parameter that is composed.
        fingerprint: fingerprint of the pretrained weight.
    """

    adapter_layer_names = ("recast_coefficients", "recast_masks")
    other_param_names = ("recast_bank", "coefficient_gradients", "scaling", "without_strength")

    MASKS = "recast_masks"

    def __init__(self, base_layer: nn.Module, module_name: str, weight_name: str, fingerprint: str) -> None:
        super().__init__(base_layer, module_name, weight_name)
        self._fingerprint: str | None = fingerprint
        self._seen = self.weight_sample()
        self.is_written_to = False  # whether the pretrained weight was found to be another one than it was
        self.is_emptied = False  # by to_empty(): its weights are no numbers until a state dict is loaded
        self.has_loaded = False  # whether a whole state dict was loaded, with whatever lies beside tasks
        self.history = CallHistory()
        if not hasattr(base_layer, "in_features"):  # PEFT's layers say how wide they are, whatever they wrap
            self.in_features, self.out_features = in_and_out_features(base_layer, self.weight_shape)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        restore_class(self.get_base_layer())

    @property
    def fingerprint(self) -> str:
        """That of the pretrained weight; taken again after ``forget_fingerprint``, and where someone wrote into the weight."""
        before, sample = self._fingerprint, self.weight_sample()
        is_known = sample is None or self._seen is None or torch.equal(sample, self._seen.to(sample))
        if before is None or not is_known:
            self._fingerprint, self._seen = weight_fingerprint(self.pretrained_weight), sample
            self.is_written_to |= before is not None and not same_weight(before, self._fingerprint)
        return self._fingerprint  # type: ignore[return-value]

    def forget_fingerprint(self) -> None:
        """Other pretrained weights are put in."""
        self._fingerprint = None

    # ---------------------------------------------------------------- tasks

    def entries(self, adapter_name: str) -> Iterator[Entry]:
        if adapter_name in self.recast_coefficients:
            yield Entry(f"{self.module_name}.{COEFFICIENTS}", self.recast_coefficients.holder(adapter_name), "offsets")
        if adapter_name in self.recast_masks:
            mask: Any = self.recast_masks[adapter_name]
            name = f"{self.module_name}.{self.MASKS}.mask"
            yield Entry(name, mask, "scores", mask.pack, mask.unpack, mask.packed_shape)

    def coefficients_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        has = adapter_name in self.recast_coefficients
        return {self.module_name: self.recast_coefficients[adapter_name]} if has else {}

    def bank_of(self, adapter_name: str) -> TemplateBank | None:
        return self.recast_bank.get(adapter_name)

    def merged_into(self) -> Iterator[tuple[nn.Module, str]]:
        yield self.get_base_layer(), self.weight_name

    def trained_as(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from (("coefficients", parameter) for parameter in self.recast_coefficients.parameters())
        yield from (("partners", parameter) for parameter in self.recast_masks.parameters())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether what the task does here can be written as a LoRA of the plain model: a linear layer on an exact bank."""
        kind = kind_of(self.base_layer)
        is_sum = not self.is_compressed and adapter_name not in self.recast_masks
        return is_sum and kind is not None and kind.takes_low_rank

    def update_layer(self, adapter_name: str, bank: TemplateBank, num_coefficient_sets: int, config: RecastConfig) -> None:
        """Give a task its coefficients ``(sets, templates)`` in this layer: zeros, or random for ``init_weights=False``."""
        if not config.train_coefficients:
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: ("recast_coefficients",)}
        shape = (num_coefficient_sets, bank.num_templates)
        with torch.inference_mode(False):  # else the task could never be trained
            if config.init_weights:
                values = torch.zeros(shape)
            else:
                own = zlib.crc32(f"{adapter_name} {self.module_name}".encode())
                generator = torch.Generator().manual_seed(config.seed ^ own)
                values = torch.empty(shape).uniform_(*INIT_RANGE, generator=generator)
                values *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
            self.recast_bank[adapter_name] = bank
            self.coefficient_gradients[adapter_name] = config.coefficient_gradient
            self.recast_coefficients[adapter_name] = nn.Parameter(values.to(self.weight_device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
            self.is_emptied |= values.is_meta and not self.recast_coefficients[name].is_meta
        follow(self, fn)
        return self

    # ---------------------------------------------------------------- computing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module computes, with the composed weight; in a mixed batch with each sample's own."""
        if not torch.compiler.is_compiling() and self.known is not None and self.known.holds(self, args, kwargs):
            return self.known.call(self, args[0])
        batch = current_batch()
        past = past_state(self, batch)
        if past is not None:
            return call_again(self, past, args, kwargs)
        if self.held is not None:
            check_held(self)
        if self.held is not None:
            return self.base_layer(*args, **kwargs)
        if self.is_off(batch):
            if self.merged_adapters:
                self.unmerge()
            return call(self, [], args, kwargs)
        if batch is not None:
            if self.merged_adapters and batch.pool is None:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            return call_mixed(self, batch, args, kwargs)
        if self.merged_adapters:
            return self._call_merged(args, kwargs)
        return self._call_live(args, kwargs)

    def _call_live(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return call(self, self.acting_adapters, args, kwargs)
        has_zeros = self.zeros is not None and self.zeros.are_all(self)
        if not has_zeros:
            know(self)
        return call(self, [] if has_zeros else self.acting_adapters, args, kwargs)

    def _call_merged(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.is_stale:
            refresh(self)
        if torch.compiler.is_compiling():
            return self.base_layer(*args, **kwargs)
        if not torch.is_grad_enabled():
            know(self)
        elif self.training:
            trained = [n for n in self.with_coefficients(self.merged_adapters) if self.recast_coefficients[n].requires_grad]
            if trained:
                warnings.warn(
                    f"task {trained[0]!r} is merged, so its coefficients get no gradient: call unmerge_adapter() to train it, "
                    "or eval() to evaluate it",
                    stacklevel=3,
                )
        return self.base_layer(*args, **kwargs)

    def extra_repr(self) -> str:
        banks = {name: f"{bank.num_templates} templates" for name, bank in self.recast_bank.items()}
        return f"weight={self.weight_name}, tasks={banks}"

    def __repr__(self) -> str:
        return "recast." + super().__repr__()


def fingerprints_of(layers: Mapping[str, RecastLayer]) -> dict[str, str]:
    """Fingerprints of the pretrained weights that lie in layers now, by the names of their modules."""
    return {name: layer.fingerprint for name, layer in layers.items()}


def recast_layers(model: nn.Module) -> dict[str, RecastLayer]:
    """The RECAST layers of one converted model by the names of their modules in the plain model.

    Raises:
        RecastConfigError: if there are several such models, whose names and tasks would stand for one another.
    """
    layers = modules_of(model, RecastLayer)
    found = {layer.module_name: layer for layer in layers}
    converted = [tuner for tuner in modules_of(model, BaseTuner) if tuner.prefix == PREFIX]  # type: ignore[type-abstract]
    if len(found) < len(layers) or len(converted) > 1:
        raise RecastConfigError(
            f"{type(model).__name__} holds several converted models: {len(layers)} RECAST layers have {len(found)} names, and "
            "tasks of one name are not one task. Give one of these models, not the module around them."
        )
    return found
