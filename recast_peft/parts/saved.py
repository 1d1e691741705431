"""Modules that a task owns whole: those of ``modules_to_save``, and all normalisation layers with ``train_norms``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RecastConfig
from ..holders import Entry, plain_modules, put_at, unwrapped, unwrapped_module
from ..names import lies_in
from .base import Piece, Place, Request, TaskPart
from .wrapper import TaskModule, was_replaced


@dataclass(frozen=True)
class SavedModule(Piece):
    """A module of the model of which a task gets a copy.

    Attributes:
        place: its name in the plain model.
        module: the model's own.
    """

    place: str
    module: nn.Module


class SavedPart(TaskPart):
    """What a config's ``modules_to_save`` names."""

    name = "modules_to_save"
    owns_modules = True

    def names(self, request: Request) -> list[str]:
        """Names of the modules; as PEFT does, a name means every module whose name ends with it."""
        wanted = tuple(request.config.modules_to_save or ())
        return [name for name in plain_modules(request.model) if wanted and name.endswith(wanted)]

    def prepare(self, request: Request) -> list[SavedModule]:
        modules = plain_modules(request.model)
        outermost: list[str] = []  # a module inside another one comes with it
        for name in self.names(request):
            if not lies_in(name, outermost):
                outermost.append(name)
        return [SavedModule(name, unwrapped_module(modules[name])) for name in outermost]

    def install(self, place: Place, pieces: list[SavedModule]) -> None:
        for piece in pieces:
            present = plain_modules(place.model)[piece.place]
            if not isinstance(present, TaskModule):
                present = TaskModule(present, piece.place)
                put_at(place.model, piece.place, present)
            if not present.has_task(place.adapter_name):  # another part may own it already, as a head of another size does
                own = copy.deepcopy(present.original_module)
                release_running_statistics(own)
                own.train(present.training)
                present.add(place.adapter_name, own.requires_grad_(True), place.active, place.inference_mode)

    def entries(self, model: nn.Module, adapter_name: str, config: RecastConfig) -> Iterable[Entry]:
        """None beside those of ``TaskModule``; a module that was replaced since is refused.

        Raises:
            RecastTargetError: if another module is in the place of the task's.
        """
        modules = plain_modules(model)
        for piece in self.prepare(Request(model, config, ())):
            present: Any = unwrapped(modules[piece.place])
            if not (isinstance(present, TaskModule) and present.has_task(adapter_name)):
                raise was_replaced(f"{piece.place} of task {adapter_name!r} ({self.name})")
        return ()


class NormsPart(SavedPart):
    """All normalisation layers (``train_norms``), parameters and running statistics."""

    name = "norms"

    def names(self, request: Request) -> list[str]:
        return find_norms(request.model) if request.config.train_norms else []

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        return "norms (train_norms)" if config.train_norms else None


def find_norms(model: nn.Module) -> list[str]:
    """Names of all normalisation layers of the plain model that hold parameters or running statistics.

    A norm may have an activation inside (timm's ``BatchNormAct2d``), but no parameters of children.
    """
    names = []
    for name, present in plain_modules(model).items():
        module = unwrapped_module(present)
        holds = any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))
        is_leaf = not any(True for child in module.children() for _ in (*child.parameters(), *child.buffers()))
        if "Norm" in type(module).__name__ and holds and is_leaf:
            names.append(name)
    return names


class KeptStatistics:
    """Stands before a layer of the pretrained model and keeps its running statistics, whoever puts it in training mode.

    ``get_base_model().train()`` and ``outer.train()`` of a model around do not pass by ``RecastModel.train``, and
    ``torch.optim.swa_utils.update_bn`` begins by setting all statistics back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.kept = {name: buffer.detach().clone() for name, buffer in _statistics(module).items()}

    def __call__(self, module: nn.Module, args: Any) -> None:
        if module.training:
            self.keep(module)

    def keep(self, module: nn.Module) -> None:
        """Put a layer in evaluation mode, and its statistics back if they were reset."""
        module.train(False)
        counted, kept = module._buffers.get("num_batches_tracked"), self.kept.get("num_batches_tracked")
        if counted is not None and kept is not None and int(counted) == 0 and int(kept) > 0:
            with torch.no_grad():
                for name, buffer in _statistics(module).items():
                    buffer.copy_(self.kept[name])


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None}


def _keepers(module: nn.Module) -> dict[int, KeptStatistics]:
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, KeptStatistics)}


def keep_running_statistics(model: nn.Module) -> None:
    """Let all layers of the pretrained model keep their running statistics; a task's own go on learning."""
    own = {id(m) for wrapper in model.modules() if isinstance(wrapper, TaskModule) for m in wrapper.modules_to_save.modules()}
    for module in model.modules():
        has_statistics = module._buffers.get("running_mean") is not None and id(module) not in own
        if has_statistics and not _keepers(module):
            module.register_forward_pre_hook(KeptStatistics(module))


def freeze_running_statistics(model: nn.Module) -> None:
    """Put those layers in evaluation mode, and their statistics back if they were reset."""
    for module in model.modules():
        for keeper in _keepers(module).values():
            keeper.keep(module)


def release_running_statistics(model: nn.Module) -> None:
    """Undo ``keep_running_statistics``."""
    for module in model.modules():
        for key in _keepers(module):
            del module._forward_pre_hooks[key]
