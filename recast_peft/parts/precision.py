"""What a task trains beside a model in half precision is float32, as coefficients are: small steps are lost in bfloat16, and
gradients of float16 cannot be unscaled (``GradScaler``). The model computes with it as if it had the dtype of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..placement.offloaded import execution_device, kept_tensor

HALF = (torch.float16, torch.bfloat16)


def dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes of a module's own parameters by their names."""
    return {name: parameter.dtype for name, parameter in module._parameters.items() if parameter is not None}


def train_in_float32(module: nn.Module) -> None:
    """Let the parameters of a module that a task owns be float32 where they are in half precision; buffers stay."""
    for parameter in module.parameters():
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()


def call_rounded(module: nn.Module, dtypes: Mapping[str, torch.dtype], args: Any, kwargs: Any) -> Any:
    """Call a module as one whose own parameters have other dtypes; gradients reach those that it has.

    The module is left as it is, for other threads that call it.
    """
    if all(dtypes.get(name, dtype) == dtype for name, dtype in dtypes_of(module).items()):
        return module(*args, **kwargs)
    if torch.compiler.is_compiling():
        own = {name: parameter.to(dtypes[name]) for name, parameter in module._parameters.items() if parameter is not None}
        return torch.func.functional_call(module, own, args, kwargs)
    twin = copy.copy(module)
    for name in ("forward", "_old_forward", "_hf_hook"):  # of accelerate, which would call the module itself
        twin.__dict__.pop(name, None)
    twin._parameters = {name: _at_hand(module, name, dtypes.get(name)) for name in module._parameters}  # type: ignore[misc]
    twin._buffers = {name: _at_hand(module, name, None) for name in module._buffers}
    return twin(*args, **kwargs)


def _at_hand(module: nn.Module, name: str, dtype: torch.dtype | None) -> Tensor | None:
    """A tensor of a module where it computes, from where it is kept while the module is offloaded."""
    kept = kept_tensor(module, name)
    held = module._parameters.get(name, module._buffers.get(name)) if kept is None else kept.to(execution_device(module))
    return held if held is None or dtype is None else held.to(dtype)
