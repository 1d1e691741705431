"""What holds the parts of tasks: containers by a task's name, and the entries that a task's file has.

A task's state is found by identity. Every module that holds something of tasks is a ``TaskHolder`` and says which tensors a
task has there, in which module they lie, and what they are called in a file. No key is searched for a task's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from . import names
from .errors import RecastConfigError
from .names import BANK_CONTAINER, COMPILED, MODEL_PREFIX, PARTNER_CONTAINER, lies_in, plain_name, unwrapped, without_wrappers
from .placement.offloaded import StaysInMemory, end_offloading, kept_tensor
from .placement.sharded import whole_shape, write


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of a task: what its file calls it, and where it lies."""

    name: str  # in the file: the plain model's name of the module, and what the part calls the tensor; without PEFT's prefix
    module: nn.Module  # that holds the tensor
    attribute: str  # its name in the module
    pack: Callable[[Tensor], Tensor] | None = None  # what is stored in place of the tensor; None stores it as it is
    unpack: Callable[[Tensor], Tensor] | None = None  # the inverse of ``pack``
    packed_shape: tuple[int, ...] | None = None  # of what ``pack`` gives
    file_name: str | None = None  # what a file calls it, if that is not its name in the plain model; reading takes both

    @property
    def tensor(self) -> Tensor:
        """The tensor as it lies in the module, or is kept of it while it is offloaded."""
        module, name = self.module, self.attribute
        known = (kept_tensor(module, name), module._parameters.get(name), module._buffers.get(name))
        held = next((tensor for tensor in known if tensor is not None), None)
        return getattr(module, name) if held is None else held

    @property
    def identity(self) -> int:
        """One number for the entries that are one tensor; what is kept of an offloaded one is read anew each time."""
        held = self.module._parameters.get(self.attribute, self.module._buffers.get(self.attribute))
        return id(self.tensor if held is None else held)

    @property
    def key(self) -> str:
        """The name in the plain model, with PEFT's prefix."""
        return f"{MODEL_PREFIX}{self.name}"

    @property
    def file_key(self) -> str:
        """The name in the file, with PEFT's prefix."""
        return f"{MODEL_PREFIX}{self.file_name or self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is stored."""
        return whole_shape(self.tensor) if self.packed_shape is None else self.packed_shape

    def stored(self, tensor: Tensor) -> Tensor:
        """What a file holds for the tensor."""
        return tensor.detach() if self.pack is None else self.pack(tensor.detach())

    def write(self, values: Tensor) -> None:
        """Put values in: into the tensor itself, or in its place where that holds no numbers (the meta device)."""
        end_offloading(self.module)
        old = self.tensor
        if not old.is_meta:
            write(old, values)
        elif isinstance(old, nn.Parameter):
            new = nn.Parameter(values.to(old.dtype), requires_grad=old.requires_grad)
            self.module._parameters[self.attribute] = new
        else:
            self.module._buffers[self.attribute] = values.to(old.dtype)


def module_entries(name: str, module: nn.Module, **options: Any) -> Iterator[Entry]:
    """The entries of a module that a task owns whole: its parameters and the buffers that a state dict has.

    ``name`` is that of the module in the plain model, ``options`` are for every entry, such as ``pack``.
    """
    for path, owner in module.named_modules(remove_duplicate=False):
        held = [*owner._parameters.items(), *owner._buffers.items()]
        for attribute, tensor in held:
            if tensor is not None and attribute not in owner._non_persistent_buffers_set:
                yield Entry(without_wrappers(".".join(filter(None, (name, path, attribute)))), owner, attribute, **options)


class TaskHolder:
    """What a module that holds parts of tasks can be asked; a mixin of modules.

    A kind of part says here what is different about it; whoever goes through a model asks every holder the same.
    """

    module_name: str  # of its place in the plain model
    adapter_layer_names: tuple[str, ...]  # PEFT's: the containers of what tasks have here
    zeros: Any = None  # those of a pool's slot while no task is in it; see composition/zeros.py
    trained_kind: str | None = None  # ``create_recast_optimizer`` has a group for it; None is for all others
    stands_aside = False  # tasks are merged that have nothing here, so that the active ones do not act
    has_samples_first = False  # seen in a mixed batch
    unmerge: Any
    _disable_adapters = False
    _trainable: Sequence[nn.Parameter] = ()  # before the tasks were switched off

    def numbers_of(self, adapter_name: str) -> Sequence[Tensor]:
        """The numbers of a task that count here and change nothing if they are all zero; none for what no pool holds."""
        return tuple(self.coefficients_of(adapter_name).values())

    def has_task(self, adapter_name: str) -> bool:
        """Whether a task has something here."""
        raise NotImplementedError

    def entries(self, adapter_name: str) -> Iterable[Entry]:
        """The tensors of a task that lie here."""
        return ()

    def coefficients_of(self, adapter_name: str) -> Mapping[str, nn.Parameter]:
        """The coefficients of a task that lie here, ``(sets, templates)`` or ``(templates,)``, by the name of what they mix.

        They are what a row of a pool holds, and what arithmetic on tasks combines.
        """
        return {}

    def bank_of(self, adapter_name: str) -> Any:
        """The templates that a task's coefficients mix here, the same object for tasks that share them; None without any."""
        return None

    def own_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of all tasks here."""
        names = dict.fromkeys(self.adapter_layer_names)  # PEFT's LoRA names some of them twice
        return [parameter for name in names for parameter in getattr(self, name).parameters()]

    def trained_as(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Those of them that have a kind, each with it."""
        return () if self.trained_kind is None else ((self.trained_kind, own) for own in self.own_parameters())

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the tasks on or off: nothing is merged afterwards, and what was frozen before is frozen again."""
        if not enabled:
            self.unmerge()
        if enabled != self._disable_adapters:
            return
        if not enabled:
            self.stands_aside = False
            self._trainable = [parameter for parameter in self.own_parameters() if parameter.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(enabled)
        self._disable_adapters = not enabled

    def merged_into(self) -> Iterable[tuple[nn.Module, str]]:
        """The pretrained parameters that merging tasks changes here, each as its module and its name in it."""
        return ()

    def refusal_to_unload(self, adapter_name: str) -> str | None:
        """What a task has here that acts beside merged weights, and that a model without tasks has no place for."""
        return None

    def refusal_to_merge(self, adapter_name: str) -> str | None:
        """Why what a task has here cannot be merged; None if it can, or there is nothing to merge."""
        return None

    def refusal_to_pool(self, adapter_name: str) -> str | None:
        """What a task has here that no row of a pool can hold, where its config does not say so; None if a row can."""
        return None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse an assignment, such as ``layer.weight = parameter``: it would belong to no task, and reach no call.

        Raises:
            RecastConfigError: saying what can be changed instead.
        """
        raise RecastConfigError(
            f"{name!r} of {self.module_name} cannot be assigned while tasks have something there: change the tasks' own "
            "numbers, or the pretrained model before it is converted (model.unload() gives it back)"
        )


def holders(model: nn.Module, adapter_name: str | None = None, kind: type = TaskHolder) -> list[Any]:
    """Every module of a model that holds something of tasks (or of one of them), each once."""
    found: list[Any] = names.modules_of(model, kind)
    return found if adapter_name is None else [holder for holder in found if holder.has_task(adapter_name)]


def held_entries(model: nn.Module, adapter_name: str, kind: type = TaskHolder) -> list[Entry]:
    """The tensors that a task has in holders."""
    return [entry for holder in holders(model, adapter_name, kind) for entry in holder.entries(adapter_name)]


def trained_kinds(model: nn.Module) -> dict[int, str]:
    """What tasks have in a model, trained or not: the kind of each parameter, by its identity."""
    return {id(parameter): kind for holder in holders(model) for kind, parameter in holder.trained_as()}


# ---------------------------------------------------------------- modules by their names in the plain model


def unwrapped_module(module: nn.Module) -> nn.Module:
    """The model's own module inside whatever wrappers and tuners put around it."""
    while module._modules:  # whatever holds another module has children
        inner = unwrapped(module)
        if isinstance(inner, AuxiliaryTrainingWrapper):
            inner = inner.original_module
        elif isinstance(inner, BaseTunerLayer):
            inner = inner.get_base_layer()
        if inner is module:
            break
        module = inner
    return module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What stands at each place of the plain model now, by the plain names: a wrapper, a tuner's layer or the module itself."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in unwrapped_module(module)._modules.items():
            if child is None or id(child) in seen or name in (BANK_CONTAINER, PARTNER_CONTAINER):
                continue
            seen.add(id(child))
            # what tasks have here was named when it was put in; a wrapper that came later gives it no other name
            inner = unwrapped(child)
            full = inner.module_name if isinstance(inner, TaskHolder) else f"{prefix}{name}"
            found[full] = child
            if child._modules:
                visit(child, f"{full}.")

    visit(model, "")
    return found


def other_names(model: nn.Module) -> dict[str, str]:
    """The further names of modules that stand at several places of the plain model, with those that ``plain_modules`` gives."""
    modules = plain_modules(model)
    first = {id(unwrapped_module(module)): name for name, module in modules.items()}
    tops: dict[str, str] = {}
    for name, module in {"": model, **modules}.items():
        for key, child in unwrapped_module(module)._modules.items():
            known = None if child is None else first.get(id(unwrapped_module(child)))
            full = f"{name}.{key}" if name else key
            if known is not None and full not in modules:
                tops[full] = known
    inside = {f"{other}{name[len(top) :]}": name for other, top in tops.items() for name in modules if lies_in(name, [top])}
    return {other: name for other, name in inside.items() if other not in modules}


def plain_place(model: nn.Module, module: nn.Module) -> str | None:
    """The name in the plain model of a module, which may be one that a task owns; None if it is not in the model."""
    wanted = unwrapped_module(module)
    for name, present in plain_modules(model).items():
        if unwrapped_module(present) is wanted:
            return name
    copies = (name for name, other in model.named_modules() if other is wanted)
    return next((re.sub(r"\.modules_to_save\.[^.]+", "", plain_name(name)) for name in copies), None)


def put_at(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a place of the plain model, in the stead of whatever stands there.

    A tuner's layer takes the place of what stands inside of the modules that tasks own whole there.
    """
    present = plain_modules(model)[name]
    exchange(model, present if isinstance(module, AuxiliaryTrainingWrapper) else shared(present), module)


def exchange(model: nn.Module, present: nn.Module, module: nn.Module) -> None:
    """Put a module in the place of another one, wherever that stands: what a model shares stays shared."""
    for parent in names.modules_of(model, nn.Module):
        for name in [name for name, child in parent._modules.items() if child is present]:
            put_child(parent, name, module)


def shared(present: nn.Module) -> nn.Module:
    """What stands at a place for the tasks that do not own the module there whole."""
    while isinstance(present, AuxiliaryTrainingWrapper):
        present = present.original_module
    return present


def put_child(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of a child. A module of ``torch.compile`` would go on calling the one that was there."""
    setattr(parent, name, module)
    if name == COMPILED:
        parent.__setstate__(parent.__getstate__())  # makes its call anew


# ---------------------------------------------------------------- containers by a task's name

_TAKEN_KEYS = frozenset((*dir(nn.ModuleDict()), *dir(nn.ParameterDict())))
_RESERVED_ENDINGS = ("classifier", "score")  # PEFT's models for a task_type wrap every module whose name ends so


def container_key(name: str) -> str:
    """The key under which a container holds a task of any name: torch wants no dot in it, and none of its own attributes.

    >>> container_key("cats"), container_key("v1.2"), container_key("training")
    ('cats', 'v1%2E2', 'training%')
    """
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"{key}%" if key in _TAKEN_KEYS or key.endswith(_RESERVED_ENDINGS) else key


def task_of_key(key: str) -> str:
    """The inverse of ``container_key``."""
    return (key[:-1] if key.endswith("%") else key).replace("%2E", ".").replace("%25", "%")


class TaskModules(nn.ModuleDict):
    """Modules by the names of tasks; a name can be any string."""

    def __getitem__(self, key: str) -> nn.Module:
        return self._modules[container_key(key)]

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules.pop(container_key(key), None)
        self.add_module(container_key(key), module)

    def __delitem__(self, key: str) -> None:
        del self._modules[container_key(key)]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and container_key(key) in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.keys()))

    def keys(self) -> Any:
        """Names of tasks."""
        return {task_of_key(key): None for key in self._modules}.keys()

    def items(self) -> Any:
        """Names of tasks with their modules."""
        return {task_of_key(key): module for key, module in self._modules.items()}.items()


class Offsets(StaysInMemory):
    """The coefficients of one task in one layer, as a module: so the task's name stands inside the name of the parameter.

    Tools that look for the parameters of an adapter (TRL does, for the reference model of DPO) search for ``.name.``.
    """

    def __init__(self, offsets: nn.Parameter) -> None:
        super().__init__()
        self.offsets = offsets


class TaskParameters(nn.ParameterDict):
    """Parameters by the names of tasks; a name can be any string, and several containers may share one parameter.

    A shared parameter is a parameter of the container that had it first alone: whoever shards a model block by block would
    otherwise meet it in several blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.borrowed: dict[str, Offsets] = {}  # task -> what another container holds

    def __getitem__(self, key: str) -> nn.Parameter:
        return self.holder(key)._parameters["offsets"]  # type: ignore[return-value]

    def __setitem__(self, key: str, value: Any) -> None:
        value = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        if key in self._keys:  # whoever shares it gets the new one too
            self.holder(key).offsets = value
            return
        self._keys[key] = None
        self._modules[container_key(key)] = Offsets(value)

    def __delitem__(self, key: str) -> None:
        del self._keys[key]
        if self.borrowed.pop(key, None) is None:
            del self._modules[container_key(key)]

    def holder(self, key: str) -> Offsets:
        """The module that holds a task's parameter."""
        return self.borrowed[key] if key in self.borrowed else self._modules[container_key(key)]  # type: ignore[return-value]

    def share(self, key: str, holder: Offsets) -> None:
        """Use the parameter of another container for a task."""
        self._keys[key] = None
        self._modules.pop(container_key(key), None)
        self.borrowed[key] = holder

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(value.shape)}" for name, value in self.items())
