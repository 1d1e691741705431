"""Modules whose weights accelerate brings to a device for each of their calls, and takes away again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module has its weights during its calls alone."""
    return _hook_of(module) is not None


def kept_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of an offloaded module, from where it is kept; None for any other."""
    hook = _hook_of(module)
    held = module._parameters.get(name, module._buffers.get(name))
    return None if hook is None or held is None or not held.is_meta else hook.weights_map[name]


def kept_weights(module: nn.Module) -> dict[int, Any]:
    """A memo for ``deepcopy`` of an offloaded module: what holds the weights of the whole model is not copied with it."""
    hooks = [hook for each in module.modules() if (hook := _hook_of(each)) is not None]
    return {id(hook.weights_map): hook.weights_map for hook in hooks}


def copy_at_hand(module: nn.Module) -> Any:
    """A copy of a module that has its numbers for good, where it computes, if the module is offloaded."""
    copied = copy.deepcopy(module, kept_weights(module))
    for each in copied.modules():
        end_offloading(each)
    return copied


def execution_device(module: nn.Module) -> torch.device:
    """Where an offloaded module computes."""
    device = _hook_of(module).execution_device
    return torch.device("cpu" if device is None else device)


def computing_device(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where a tensor of a module is when the module computes."""
    return execution_device(module) if tensor.is_meta and is_offloaded(module) else tensor.device


def like_weights(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the first floating-point parameter of modules computes, and its dtype; the CPU and float32 without any."""
    held = ((m, p) for module in modules for m in module.modules() for p in m.parameters(recurse=False))
    found = ((computing_device(m, p), p.dtype) for m, p in held if p.is_floating_point())
    return next(found, (torch.device("cpu"), torch.float32))


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """A block in which a module has its weights, as in its calls, if it is offloaded."""
    hook = _hook_of(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def bring_back(module: nn.Module, name: str, device: Any) -> None:
    """Put a tensor of a module, if it is offloaded, on a device, with a storage of its own."""
    kept = kept_tensor(module, name)
    if kept is None:
        return
    own, held = kept.to(device, copy=True), module._parameters.get(name)
    if held is None:
        module._buffers[name] = own
    else:
        # the parameter stays the same object: an optimizer may have it already
        torch.utils.swap_tensors(held, nn.Parameter(own, requires_grad=held.requires_grad))


def end_offloading(module: nn.Module) -> None:
    """Put what an offloaded module has where it computes, for good: elsewhere what is written or trained is lost."""
    if is_offloaded(module):
        for name in [*module._parameters, *module._buffers]:
            bring_back(module, name, execution_device(module))
        hook = _hook_of(module)
        hook.offload, hook.weights_map = False, None  # a copy of the module would copy all weights of the model


class StaysInMemory(nn.Module):
    """A module whose parameters others read: no call of its own would bring them from where accelerate keeps them."""

    is_called = False  # whether it has calls too, which would take them away again

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_hf_hook" and self.is_called:
            end_offloading(self)
        elif name == "_hf_hook" and (hook := _hook_of(self)) is not None:  # accelerate has offloaded every parameter
            for held in self._parameters:
                bring_back(self, held, hook.original_devices.get(held))


def _hook_of(module: nn.Module) -> Any:
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return None
    return next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)
