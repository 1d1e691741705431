"""Modules that a task owns whole: those of ``modules_to_save``, and all normalisation layers with ``train_norms``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..composition.quantised import quantised_by
from ..composition.recomputation import strengths_of_call
from ..composition.strength import at_strength
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastTargetError
from ..holders import Entry, exchange, other_names, plain_modules, unwrapped_module
from ..names import lies_in, modules_of, outermost
from ..placement.offloaded import StaysInMemory
from ..validation import did_you_mean
from .base import Piece, Place, Request, TaskPart
from .copies import plain_copy
from .precision import call_rounded, dtypes_of, train_in_float32
from .wrapper import ScaledModule, TaskModule, task_modules, was_replaced

SAVED_BY_TASK_TYPE = {  # what PEFT's models for a task_type add to modules_to_save
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")),
    "QUESTION_ANS": ("qa_outputs",),
}
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
ADDED_BY_TASK_TYPE = {name for names in SAVED_BY_TASK_TYPE.values() for name in names}


def saved_by_task_type(config: RecastConfig) -> list[str] | None:
    """The ``modules_to_save`` of a new task with those that PEFT's model for its ``task_type`` adds."""
    added = SAVED_BY_TASK_TYPE.get(str(config.task_type), ())
    return list(dict.fromkeys((*(config.modules_to_save or ()), *added))) or None


@dataclass(frozen=True)
class SavedModule(Piece):
    """A module of the model of which a task gets a copy."""

    place: str
    module: nn.Module  # the model's own, without its numbers

    def beside(self, owned: Collection[str]) -> list[SavedModule]:
        if lies_in(self.place, owned) or not any(lies_in(name, [self.place]) for name in owned):
            return super().beside(owned)
        if [*self.module.parameters(recurse=False), *self.module.buffers(recurse=False)]:
            raise RecastConfigError(
                f"modules_to_save names {self.place}, which holds tensors of its own beside {sorted(owned)[0]}, that the task "
                "owns already: name other modules of it one by one"
            )
        children = ((f"{self.place}.{name}", child) for name, child in self.module.named_children())
        return [piece for name, child in children if child.state_dict() for piece in SavedModule(name, child).beside(owned)]


class SavedPart(TaskPart):
    """What a config's ``modules_to_save`` names."""

    name = "modules_to_save"
    owns_modules = True

    def names(self, request: Request) -> list[str]:
        """Names of the modules; as PEFT does, a name means every module whose name ends with it.

        Raises:
            RecastTargetError: if the user named one that the model does not have.
        """
        wanted = tuple(request.config.modules_to_save or ())
        known = {name: name for name in plain_modules(request.model)} | other_names(request.model) if wanted else {}
        unknown = [name for name in wanted if not any(place.endswith(name) for place in known)]
        if request.config.task_type is not None or ADDED_BY_TASK_TYPE & {*wanted} - {*unknown}:
            unknown = [name for name in unknown if name not in ADDED_BY_TASK_TYPE]
        if unknown and not request.config.is_stored_task:
            near = did_you_mean(unknown[0], {place.rpartition(".")[2] for place in known})
            raise RecastTargetError(f"modules_to_save names {', '.join(unknown)}, which the model does not have{near}")
        return list(dict.fromkeys(name for place, name in known.items() if place.endswith(wanted)))

    def places(self, request: Request) -> list[str]:
        """Names of the outermost of them: a module inside another one comes with it."""
        return outermost(self.names(request))

    def prepare(self, request: Request) -> list[SavedModule]:
        places = self.places(request)
        modules = plain_modules(request.model) if places else {}
        for name in places:
            kind = type(unwrapped_module(modules[name]))
            if issubclass(kind, CONTAINERS):
                raise RecastTargetError(
                    f"{self.name} names {name}, a {kind.__name__}, which the model asks for its items and never calls: name "
                    "modules that it calls, such as those in it"
                )
        return [SavedModule(name, plain_copy(modules[name], with_numbers=False)) for name in places]

    def check(self, request: Request, pieces: list[SavedModule], owned: Collection[str], compressed: Collection[str]) -> None:
        if pieces and any(layer.merged for layer in modules_of(request.model, BaseTunerLayer)):
            raise RecastConfigError(
                f"{self.name}: a task is merged, and would stay in the copy of {pieces[0].place}: call unmerge_adapter() "
                "first, and merge it again afterwards"
            )
        if pieces and not request.config.is_stored_task:
            _warn_of_ties(request.model, [piece.place for piece in pieces])

    def install(self, place: Place, pieces: list[SavedModule]) -> None:
        modules = plain_modules(place.model) if pieces else {}
        for piece in pieces:
            plain = present = modules[piece.place]
            if not isinstance(present, TaskModule):
                present = (TaskNorm if is_norm(piece.module) else TaskModule)(plain, piece.place)
                exchange(place.model, plain, present)
            own = plain_copy(present.original_module)
            release_running_statistics(own)
            own.train(present.training)
            if isinstance(present, TaskNorm):
                train_in_float32(own)
            present.add(place.adapter_name, own.requires_grad_(True), place.active, place.inference_mode)

    def entries(self, model: nn.Module, adapter_name: str, config: RecastConfig) -> Iterable[Entry]:
        """None beside those of ``TaskModule``; a module that was replaced since is refused (``RecastTargetError``)."""
        held = [m.module_name for m in task_modules(model, adapter_name)]
        for place in self.places(Request(model, config, ())):
            # another part may own it, a module around it or the modules in it
            if not lies_in(place, held) and not any(lies_in(name, [place]) for name in held):
                raise was_replaced(f"{place} of task {adapter_name!r} ({self.name})")
        return ()


def _warn_of_ties(model: nn.Module, saved: list[str]) -> None:
    """Say which modules use a parameter of a saved module and keep the pretrained one."""
    owners: dict[int, list[str]] = {}
    for name, module in plain_modules(model).items():
        for parameter in unwrapped_module(module)._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        own = [name for name in names if lies_in(name, saved)]
        others = [name for name in names if name not in own]
        if own and others:
            warnings.warn(
                f"modules_to_save: a parameter of {', '.join(own)} is also that of {', '.join(others)}, which keeps the "
                f"pretrained one: the task's copy is used by calls of {', '.join(own)} alone, and a module that the model "
                "never calls learns nothing. Name the others too if they are meant; each has a copy of its own.",
                stacklevel=2,
            )


class NormsPart(SavedPart):
    """All normalisation layers (``train_norms``), parameters and running statistics."""

    name = "norms"

    def names(self, request: Request) -> list[str]:
        modules = plain_modules(request.model) if request.config.train_norms else {}
        return [name for name, present in modules.items() if is_norm(unwrapped_module(present))]

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        return "norms (train_norms)" if config.train_norms else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer that holds parameters or running statistics.

    A norm may have an activation inside (timm's ``BatchNormAct2d``), but no parameters of children.
    """
    if "Norm" not in type(module).__name__:
        return False
    holds = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(holds) and not any([*child.parameters(), *child.buffers()] for child in module.children())


class TaskNorm(ScaledModule):
    """The norms of all tasks in the place of one of the model's: by its strength a task's output is mixed with the model's."""

    def called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = call_rounded(module, dtypes_of(unwrapped_module(self.original_module)), args, kwargs)
        factor = self._factor_of(module)
        return own if factor == 1 else at_strength(self.original_module(*args, **kwargs), own, factor)

    def _getattr_wrapped(self, name: str, modules: Any) -> Any:
        value = super()._getattr_wrapped(name, modules)
        dtype = dtypes_of(unwrapped_module(self.original_module)).get(name)
        return value if dtype is None or value.dtype == dtype else value.to(dtype)

    def _factor_of(self, module: nn.Module) -> float:
        return next((scale for name, scale in strengths_of_call(self).items() if self.modules_to_save[name] is module), 1.0)

    def refusal_to_merge(self, adapter_name: str) -> str | None:
        """Two norms of one input are one norm, of the mix of both; not so with statistics, or an activation inside."""
        has_more = bool([*self.original_module.buffers(), *self.original_module.children()])
        if self.scaling.get(adapter_name, 1.0) in (0, 1) or not has_more:
            return None
        return (
            f"a strength of {self.scaling[adapter_name]:g}, and a norm at {self.module_name} that no norm of that strength "
            "stands for (set_scale(name, 1.0) first)"
        )

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        factor, plain = self._factor_of(module), unwrapped_module(self.original_module)
        if not factor:
            return self.original_module
        if factor == 1 and dtypes_of(module) == dtypes_of(plain):
            return module
        for refusal in filter(None, map(self.refusal_to_merge, self.scaling)):
            raise RecastBankError(f"nothing can be merged at {self.module_name}: a task has {refusal}")
        mixed = copy.deepcopy(module)
        with torch.no_grad():
            for own, base in zip(mixed.parameters(), plain.parameters(), strict=True):
                own.data = at_strength(base, own, factor).to(base.dtype)
        return mixed


class KeptStatistics:
    """Stands before a layer of the pretrained model and keeps its running statistics, whoever puts it in training mode.

    ``get_base_model().train()`` and ``outer.train()`` of a model around do not pass by ``RecastModel.train``, and
    ``torch.optim.swa_utils.update_bn`` begins by setting all statistics back.
    """

    def __init__(self, module: nn.Module) -> None:
        is_counted = module._buffers.get("num_batches_tracked") is not None
        self.kept = {name: buffer.detach().clone() for name, buffer in _statistics(module).items()} if is_counted else {}

    def __call__(self, module: nn.Module, args: Any) -> None:
        if module.training:
            self.keep(module)

    def keep(self, module: nn.Module) -> None:
        """Put a layer in evaluation mode, and its statistics back if they were reset."""
        module.train(False)
        if self.kept and int(module.num_batches_tracked) == 0 and int(self.kept["num_batches_tracked"]) > 0:  # type: ignore
            with torch.no_grad():
                for name, buffer in _statistics(module).items():
                    buffer.copy_(self.kept[name])


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None}


def _moves_statistics(module: nn.Module) -> bool:
    """Whether calls in training mode may move what a layer has beside its weights.

    Batch norms have such buffers, and so have EvoNorms, spectral norms and the ranges of I-BERT's activations, under other
    names. Quantised layers have scales in theirs.
    """
    if any(module._buffers.get(name) is not None for name in ("running_mean", "running_var")):
        return True
    if module._modules or isinstance(module, StaysInMemory) or quantised_by(module) is not None:
        return False
    held = (buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set)
    return any(buffer is not None and buffer.is_floating_point() for buffer in held)


def _keepers(module: nn.Module) -> dict[int, KeptStatistics]:
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, KeptStatistics)}


def keep_running_statistics(model: nn.Module) -> None:
    """Let all layers of the pretrained model keep their running statistics; a task's own go on learning."""
    own = {id(m) for wrapper in modules_of(model, TaskModule) for m in wrapper.modules_to_save.modules()}
    for module in modules_of(model, nn.Module):
        if id(module) not in own and not _keepers(module) and _moves_statistics(module):
            module.register_forward_pre_hook(KeptStatistics(module))


def freeze_running_statistics(model: nn.Module) -> None:
    """Put those layers in evaluation mode, and their statistics back if they were reset."""
    for module in list(model.modules()):
        for keeper in _keepers(module).values():
            keeper.keep(module)


def release_running_statistics(model: nn.Module) -> None:
    """Undo ``keep_running_statistics``."""
    for module in list(model.modules()):
        for key in _keepers(module):
            del module._forward_pre_hooks[key]
