"""LoRA parts of a pool's tasks: merged one after the other in one storage, and one for each sample of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..composition.kinds import CONVOLUTIONS
from ..composition.mixed_batch import MixedBatch
from ..composition.mixing import call_mixed
from ..errors import RecastBankError
from ..holders import TaskHolder, container_key
from .stacking import Mixed


class PooledPart(Mixed, TaskHolder):
    """What a LoRA part's layer does for the tasks of a pool; a mixin of PEFT's layers."""

    _plain_class: Any
    _by_weight = False  # computed by the weight, where the pair beside the module says something else
    _switched_off = False  # inside RecastModel.disable_part("lora")
    _kept: list[tuple[nn.Parameter, Tensor]] = []  # the pretrained parameters while something is merged

    def numbers_of(self, adapter_name: str) -> Sequence[Tensor]:
        """The two factors of a task."""
        key = container_key(adapter_name)
        held: list[Any] = [factors[key] for factors in (self.lora_A, self.lora_B) if key in factors]
        return [factor.weight for factor in held]

    def merge_in_place(self, adapter_name: str) -> None:
        """Merge a task, with its coefficients, in place of what is merged now, into the same storage.

        Raises:
            RecastBankError: if something of another method is merged here.
        """
        composed = self.recast_layer
        others = [] if composed is None else [other for other in composed.other_layers if other.merged and other is not self]
        if not self.merged or others:
            if composed is not None:
                composed.merge_in_place([adapter_name])
            self.merge(adapter_names=[adapter_name])
            return
        with torch.no_grad():
            for parameter, values in self._kept:
                parameter.data.copy_(values)
            if composed is not None:
                composed.compose(composed.present([adapter_name]), out=composed.weight_parameter.data)
        self.merged_adapters.clear()
        self._plain_class.merge(self, adapter_names=[container_key(adapter_name)])

    def call_from_pool(self, batch: MixedBatch, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output with the two factors of each sample's own task; what is merged is no part of any.

        Raises:
            RecastBankError: if the module is computed by its weight, or what is merged cannot be left out.
        """
        y = self._call_unmerged(batch, x, args, kwargs)
        slot = batch.slot
        if not self.has_task(slot) or self._switched_off or (self._disable_adapters and batch.is_off) or not len(x):
            return y
        if self._by_weight:
            raise one_task_for_all(self)
        key = container_key(slot)
        pair: dict[str, Any] = {"lora_A": self.lora_A[key], "lora_B": self.lora_B[key]}
        added = self.lora_dropout[key](x.to(pair["lora_A"].weight.dtype))
        for name, module in pair.items():
            factors = batch.offsets(f"{self.module_name}.{name}.weight", len(x))
            assert factors is not None
            added = product_by_sample(module, added, factors.to(added.dtype).view(len(x), *module.weight.shape))
        return torch.add(y, added, alpha=self.scaling[key]).to(y.dtype)

    def _call_unmerged(self, batch: MixedBatch, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What lies below, without what is merged here."""
        if not self.merged:
            return self.base_layer(x, *args, **kwargs)
        composed = self.recast_layer
        if composed is self.base_layer:  # it keeps the pretrained weight, and takes what is merged for its own
            return call_mixed(composed, batch, (x, *args), kwargs)
        base = self.base_layer
        names = {id(parameter): name for name, parameter in base._parameters.items()}
        if composed is not None or any(id(parameter) not in names for parameter, _ in self._kept):
            raise RecastBankError(
                f"a LoRA part is merged into {self.module_name}, where other layers stand between: unmerge it before samples "
                "have tasks of their own (pool.deactivate(), or unmerge_adapter())"
            )
        kept = {names[id(parameter)]: values for parameter, values in self._kept}
        return torch.func.functional_call(base, kept, (x, *args), kwargs)


def product_by_sample(module: Any, x: Tensor, weights: Tensor) -> Tensor:
    """What a linear layer or a convolution without a bias computes with a weight for each sample.

    Args:
        module: the layer.
        x: ``(samples, ..., in)``; of a convolution ``(samples, in, ...)``.
        weights: ``(samples, *shape of the layer's weight)``.
    """
    # by x.shape: len(x) would be a constant of a graph that is traced
    if isinstance(module, nn.Linear):
        return (x.reshape(x.shape[0], -1, x.shape[-1]) @ weights.mT).view(*x.shape[:-1], weights.shape[1])
    if is_of_places(module):
        return (weights.flatten(2) @ x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])
    convolution = CONVOLUTIONS[module.weight.ndim]  # all samples as the groups of one
    groups = x.shape[0] * module.groups
    joined = x.reshape(1, -1, *x.shape[2:])
    y = convolution(joined, weights.flatten(0, 1), None, module.stride, module.padding, module.dilation, groups)
    return y.view(x.shape[0], -1, *y.shape[2:])


def is_of_places(module: Any) -> bool:
    """Whether a linear layer or a convolution computes every place of its input by itself."""
    if isinstance(module, nn.Linear):
        return True
    return {*module.kernel_size, *module.stride, module.groups} == {1} and not any(module._reversed_padding_repeated_twice)


def one_task_for_all(layer: Mixed) -> RecastBankError:
    """Says that a module cannot have a LoRA part for each sample."""
    return RecastBankError(
        f"the LoRA part on {type(layer.get_base_layer()).__name__} is computed by its weight, which is one for all samples: "
        "pass one task at a time instead of adapter_names"
    )
