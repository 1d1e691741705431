"""Weights that are stored in fewer bits than they compute in: what they stand for, by the libraries that make them.

bitsandbytes, HQQ and torchao are told apart as PEFT does it (``dequantize_module_weight``); quanto's tensors by their package.
Nothing is imported for it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

_BITSANDBYTES = ("Params4bit", "Int8Params")


def quantised_by(module: nn.Module) -> str | None:
    """The library whose quantised weight a linear layer holds; None for any other weight."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter:
        return None
    if weight is None:
        return "hqq" if getattr(module, "W_q", None) is not None else None
    if type(weight).__name__ in _BITSANDBYTES:
        return "bitsandbytes"
    package = type(weight).__module__
    return next((name for name in ("torchao", "optimum.quanto") if package.startswith(name)), None)


def dequantised(module: Any) -> Tensor:
    """The weight that a quantised module computes with, ``(out, in)``; a copy, of which nothing is kept."""
    with torch.no_grad():
        if quantised_by(module) == "optimum.quanto":
            return module.weight.dequantize()
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Int8Params":  # the scales move to the module at its first call
            scale = module.state.SCB if weight.SCB is None else weight.SCB
            return weight.data.float() * (scale.float() / 127).view(-1, 1)
        return dequantize_module_weight(module).detach()


def device_of_weight(module: Any) -> torch.device:
    """Where a quantised weight lies."""
    weight = module._parameters.get("weight")
    return (module.W_q if weight is None else weight).device
