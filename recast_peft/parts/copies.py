"""Copies of parts of a model as they were before any task came."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..holders import unwrapped_module
from ..placement.offloaded import kept_weights


def plain_copy(module: nn.Module, with_numbers: bool = True) -> Any:
    """A copy of a part of the model as it was before any task came: without wrappers, layers of tuners, modules of tasks.

    Without numbers its parameters and buffers are on the meta device.
    """
    # what modules note of their own tensors (pruning, ``weight_norm``) torch refuses to copy
    noted = [value for m in module.modules() for value in vars(m).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in noted if with_numbers and not tensor.is_leaf}
    for tensor in () if with_numbers else (*noted, *module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    memo.update(kept_weights(module))
    for wrapper in [m for m in module.modules() if unwrapped_module(m) is not m][::-1]:  # the innermost first
        inner = unwrapped_module(wrapper)
        own = memo[id(wrapper)] = memo[id(inner)] if id(inner) in memo else copy.deepcopy(inner, memo)
        if getattr(wrapper, "is_released", False):  # a compressed bank stands for its weight
            weight: Any = wrapper.compose([]).detach().clone()  # type: ignore[operator]
            own._parameters[str(wrapper.weight_name)] = nn.Parameter(weight if with_numbers else weight.to("meta"))
    return memo.get(id(module)) or copy.deepcopy(module, memo)
