"""A layer computed from outputs: no weight is composed, and none has to be readable.

    y = base((1 + d_own) x) + sum over neighbours i of d_i T_i(x)

with T_i the product of a neighbour's module, called as it is, without its bias. The layer's own coefficient scales the input,
so that a fresh task changes nothing to the last bit. Gradients flow through the modules' own, whatever their weights are:
quantised, or brought from elsewhere for the time of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import RecastBankError
from ..placement.offloaded import is_offloaded
from ..placement.sharded import is_plain, is_spread_in_calls
from .composed import ComposedModule
from .parallel import for_neighbour, for_own
from .quantised import quantised_by


def is_out_of_reach(layer: ComposedModule) -> bool:
    """Whether a layer's weight cannot be written, and is better not read: quantised, or on no device but during a call."""
    base = layer.get_base_layer()
    weight = base._parameters.get(layer.weight_name)
    if weight is not None and is_plain(weight):
        return is_offloaded(base)
    return quantised_by(base) is not None or is_offloaded(base) or (weight is not None and is_spread_in_calls(weight))


def computes_from_outputs(layer: ComposedModule, adapters: Sequence[str]) -> bool:
    """Whether a call of a layer takes the way from outputs: its weight is out of reach, and every template is a neighbour's."""
    if not is_out_of_reach(layer) or layer.compressed_bank or layer.is_masked(adapters):
        return False
    names = layer.with_coefficients(adapters)
    return bool(names) and all(layer.recast_bank[name].is_exact for name in names)


def call_from_outputs(
    layer: ComposedModule, adapters: Sequence[str], x: Tensor, values: Mapping[str, Tensor] | None = None
) -> Tensor:
    """What the wrapped module computes with the weight of the given tasks.

    ``values`` are coefficients by task in place of those that the layer holds now.

    Raises:
        RecastBankError: where the coefficients would be trained, and the wrapped module gives no gradient of its input.
    """
    factors: dict[ComposedModule, Tensor] = {}
    for name in layer.with_coefficients(adapters):
        offsets = layer.offset(name, values).to(x.device)
        for member, offset in zip(layer.recast_bank[name].layers, offsets.unbind(), strict=True):
            factors[member] = factors[member] + offset if member in factors else offset
    scale = factors.pop(layer, None)
    held = layer.weight_parameter
    scaled = x if scale is None else x * (1 + for_own(scale, held))
    y = layer.base_layer(scaled)
    if torch.is_grad_enabled() and scaled.requires_grad and not y.requires_grad:
        raise RecastBankError(
            f"{layer.module_name} cannot be trained: {type(layer.get_base_layer()).__name__} gives no gradient of its input. "
            "Load the model with a kernel that does (GPTQ and AWQ: backend='auto_trainable'), or compute without gradients"
        )
    for neighbour, factor in factors.items():
        y = y + for_neighbour(factor, held) * _product(neighbour, x)
    return y


def _product(neighbour: ComposedModule, x: Tensor) -> Tensor:
    base = neighbour.get_base_layer()
    y, bias = base(x), getattr(base, "bias", None)
    if bias is not None and (bias.is_meta or is_spread_in_calls(bias)):  # it is there during the call alone
        return y - base(x.new_zeros((*[1] * (x.ndim - 1), x.shape[-1])))
    return y if bias is None else y - bias
