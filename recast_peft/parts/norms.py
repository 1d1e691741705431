"""Normalisation layers: the pretrained model's by default, a task's own if it asks for them."""

from __future__ import annotations

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .head import PreparedHead


def find_norms(model: nn.Module) -> list[str]:
    """Names of all normalisation layers of the plain model that hold parameters or running statistics."""
    names = []
    for name, module in model.named_modules():
        if ".modules_to_save." in name or isinstance(module, ModulesToSaveWrapper):
            continue
        holds = bool(module._parameters) or bool(module._buffers)
        if "Norm" in type(module).__name__ and holds and not any(True for _ in module.children()):
            names.append(name.replace(".original_module", ""))
    return names


def own_shapes(model: nn.Module, head: PreparedHead | None, norms: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a task brings beside its coefficients, by the names that the task file has."""
    shapes = {} if head is None else head.shapes()
    for name in norms:
        module = model.get_submodule(name)
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        shapes.update({f"{name}.{key}": tuple(value.shape) for key, value in original.state_dict().items()})
    return shapes


def install_norms(model: nn.Module, adapter_name: str, names: list[str], active: bool, inference_mode: bool) -> None:
    """Give a task its own copies of normalisation layers, in PEFT's container for modules that are saved whole."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        wrapper = getattr(parent, child)
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.update(adapter_name)
        else:
            wrapper = ModulesToSaveWrapper(wrapper, adapter_name)
            setattr(parent, child, wrapper)
            wrapper.set_adapter([])
        if active:
            wrapper.set_adapter([adapter_name], inference_mode=inference_mode)
        else:
            wrapper.modules_to_save[adapter_name].requires_grad_(False)


def freeze_running_statistics(model: nn.Module) -> None:
    """Put the pretrained model's layers with running statistics in evaluation mode; a task's own go on learning."""
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None and ".modules_to_save." not in f".{name}.":
            module.train(False)
