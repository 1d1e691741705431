"""Weights that are stored in fewer bits than they compute in: what they stand for, by the libraries that make them.

bitsandbytes, HQQ, torchao and gptqmodel (GPTQ and AWQ) are told apart as PEFT does it (``dequantize_module_weight``,
``is_gptqmodel_quant_linear``); quanto's tensors by their package. Nothing is imported for it.
"""

from __future__ import annotations

import copy
import sys
from itertools import chain
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import is_gptqmodel_quant_linear
from torch import Tensor, nn

from ..errors import RecastBankError

_MARKS_OF_BITSANDBYTES = {"Params4bit": "quant_state", "Int8Params": "SCB"}  # what each keeps beside its packed numbers
_BITSANDBYTES = tuple(_MARKS_OF_BITSANDBYTES)
_GPTQMODEL = ("gptq", "awq")  # it has kernels of other methods too
_ROWS = 1024  # of a packed weight that are unpacked at a time


def quantised_by(module: nn.Module) -> str | None:
    """The library whose quantised weight a linear layer holds; None for any other weight."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter:
        return None
    if weight is None:
        if getattr(module, "W_q", None) is not None:
            return "hqq"
        return "gptqmodel" if _is_of_gptqmodel(module) else None
    if type(weight).__name__ in _BITSANDBYTES:
        return "bitsandbytes"
    package = type(weight).__module__
    return next((name for name in ("torchao", "optimum.quanto") if package.startswith(name)), None)


def _is_of_gptqmodel(module: nn.Module) -> bool:
    methods = getattr(type(module), "SUPPORTS_METHODS", None)  # PEFT's question would import the library
    if not methods or not any(getattr(method, "value", method) in _GPTQMODEL for method in methods):
        return False
    return is_gptqmodel_quant_linear(module) and not type(module).__name__.endswith("Embeddings")


def restore_class(module: nn.Module) -> None:
    """Give a packed weight of bitsandbytes its class back, which pickle forgets: its numbers would be taken for the weight."""
    weight = module._parameters.get("weight")
    marks = vars(weight) if type(weight) is nn.Parameter else {}
    for name, mark in _MARKS_OF_BITSANDBYTES.items():
        homes = (getattr(sys.modules.get(cls.__module__), name, None) for cls in type(module).__mro__)
        if mark in marks and (known := next(filter(None, homes), None)) is not None:
            weight.__class__ = known


def dequantised(module: Any) -> Tensor:
    """The weight that a quantised module computes with, ``(out, in)``; a copy, of which nothing is kept."""
    with torch.no_grad():
        library = quantised_by(module)
        if library == "optimum.quanto":
            return module.weight.dequantize()
        if library == "gptqmodel":
            dtype = getattr(getattr(module, "scales", None), "dtype", torch.float16)
            return _unpacked(module, dtype if dtype.is_floating_point else torch.float16)
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Int8Params":  # the scales move to the module at its first call
            scale = module.state.SCB if weight.SCB is None else weight.SCB
            return weight.data.float() * (scale.float() / 127).view(-1, 1)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):  # since a call without gradients
            return _unpacked(module, torch.float32)
        return dequantize_module_weight(module).detach()


def _unpacked(module: Any, dtype: torch.dtype) -> Tensor:
    """What a linear layer makes of unit vectors: libraries pack weights in a dozen ways, and few of them can unpack them."""
    twin = copy.copy(module)  # the layer itself is left as it is, for other threads that call it
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin.bias = None
    width, device = module.in_features, device_of_weight(module)
    starts = range(0, width, _ROWS)
    units = (torch.eye(min(_ROWS, width - start), width, dtype=dtype, device=device).roll(start, 1) for start in starts)
    return torch.cat([twin(unit) for unit in units]).T.contiguous()  # (in, out) -> (out, in)


def device_of_weight(module: Any) -> torch.device:
    """Where a quantised weight lies; ``RecastBankError`` if the module holds no tensor at all."""
    weight = module._parameters.get("weight")
    held = next(chain(module.parameters(), module.buffers()), None) if weight is None else weight
    if held is None:
        raise packed_since(module)
    return held.device


def packed_since(module: nn.Module) -> RecastBankError:
    """The error about a module that packed its weight where nobody else finds it, as ``torch.ao.quantization`` does."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    return RecastBankError(
        f"a {kind} stands where tasks had a module with a weight: it was quantised after the conversion, and "
        "its own weight can be neither read nor exchanged any more. Quantise a model without tasks (model.merge_and_unload()), "
        "or quantise before the conversion by a library that RECAST knows, such as torchao"
    )
