"""The LoRA part of a task: PEFT's own LoRA layers under the task's name, which belong to the task as its coefficients do.

PEFT makes the layers; they stand around RECAST's layers or around plain modules. Each becomes a subclass of itself that obeys
the model's tasks alone, takes the tasks of a mixed batch, and gives the pretrained weight back to the last bit when unmerged.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..composition.blocks import with_attribute, with_variable
from ..composition.lazy_weight import of_no_sample
from ..composition.mixed_batch import current_batch
from ..composition.quantised import quantised_by
from ..composition.recomputation import CallHistory, strengths_of_call
from ..config import RecastConfig
from ..errors import RecastBankError, RecastTargetError
from ..holders import Entry, container_key, plain_modules, put_child, shared, task_of_key, unwrapped_module
from ..layer import RecastLayer
from ..names import lies_in, modules_of, unwrapped
from ..placement.offloaded import at_hand
from .base import Place, Request, TaskPart
from .lora_plan import LoraPlan, adds_to_output, lora_entries, plan_lora_part
from .lora_pool import PooledPart, one_task_for_all
from .lora_strength import PartStrength, keys_of, part_layers
from .stacking import Adding, inner_layers, making_part, mix_in, stack_around

A_PART = "a LoRA part"  # as messages call it


@dataclass
class LoraParts:
    """What the layers of all LoRA parts of a model share."""

    tasks: Mapping[str, PeftConfig]  # the configs of the model's adapters by name: the very dictionary of the tuner
    configs: dict[str, LoraConfig] = field(default_factory=dict)  # of the parts by task, with their targets named
    beside: RecastLayer | None = None  # a layer of the tasks' coefficients

    @property
    def are_left_out(self) -> bool:
        """Whether no task is active, but adapters of other methods in the same model: then the parts are not told of them."""
        active = [] if self.beside is None else self.beside.active_adapters
        return bool(active) and not self.has_tasks(active)

    def has_tasks(self, names: Iterable[str]) -> bool:
        """Whether tasks are among adapters."""
        return any(isinstance(self.tasks.get(name), RecastConfig) for name in names)


# Set while the layers compute: variants that read the weight beside them (DoRA) then read the composed one, or what is given.
_computing: ContextVar[Any] = ContextVar("recast_lora_part_computes", default=False)


class PartLayer(PartStrength, PooledPart):
    """What a LoRA layer does differently as a part of RECAST tasks.

    PEFT's layers hold a task under ``container_key`` of its name, so that a name can be any string.
    """

    base_layer: nn.Module
    module_name: str
    _parts: LoraParts
    trained_kind = "lora"
    _takes = ""  # the name of the module's first argument, by which it may be given

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active tasks; names that are no tasks are those of another wrapper's adapters, which are no business here."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not names or self._parts.has_tasks(names):
            super().set_adapter(keys_of(names), inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make tasks trainable or frozen here."""
        super().set_requires_grad(keys_of(adapter_names), requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a task's part; which task is active next says the model's own verb."""
        key = container_key(adapter_name)
        active = [name for name in self.active_adapters if name != key]
        self._active_adapter = active
        super().delete_adapter(key)
        self._active_adapter = active
        self._parts.configs.pop(adapter_name, None)

    def has_task(self, adapter_name: str) -> bool:
        return container_key(adapter_name) in self._get_available_adapters()

    def entries(self, adapter_name: str) -> Iterator[Entry]:
        yield from lora_entries(self.module_name, self, container_key(adapter_name))

    def tasks_of_call(self) -> tuple[str, ...]:
        """The tasks whose part is computed in a call, but for those of a batch, as PEFT calls them."""
        acting = () if self.disable_adapters or self.merged else self.active_adapters
        return tuple(name for name in acting if name in self.scaling)

    def refusal_to_merge(self, adapter_name: str) -> str | None:
        plain = super().get_base_layer()
        if container_key(adapter_name) in self.lora_variant:  # DoRA scales what is put out, with what a partner adds to it
            hooks = (*self.base_layer._forward_hooks.values(), *plain._forward_hooks.values())
            if any(hook.partners.has_task(adapter_name) for hook in hooks if hasattr(hook, "partners")):
                return f"a LoRA part on {self.module_name} that scales its output, with the coefficient of its bias in it"
        library = quantised_by(plain)
        said = f"a LoRA part on {self.module_name}, whose weight is quantised by {library} and cannot hold it"
        return said if library is not None and self.has_task(adapter_name) else None

    def merged_into(self) -> Iterator[tuple[nn.Module, str]]:
        plain = super().get_base_layer()
        yield from ((plain, name) for name in ("weight", "bias") if name == "weight" or any(self.lora_bias.values()))

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        if not making_part.get():
            raise Adding.refuse(
                "a LoRA cannot share its targets with the LoRA part of RECAST tasks, which has layers there already: give it "
                "other target_modules, give the task another lora_config, or merge_and_unload one of the two first"
            )
        super().update_layer(*args, **kwargs)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters or self.stands_aside or self._switched_off or self._parts.are_left_out

    def get_base_layer(self) -> nn.Module:
        """The innermost module; while a variant computes with its weight, RECAST's layer, whose weight is composed."""
        plain = super().get_base_layer()
        layer, given = self.recast_layer, _computing.get()
        if layer is None or not given:
            return plain
        return layer if layer in inner_layers(self.base_layer) else plain if given is True else given

    # ---------------------------------------------------------------- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into tensors of its own; the pretrained ones are kept beside them."""
        keys = None if adapter_names is None else keys_of(adapter_names)
        wanted = check_adapters_to_merge(self, keys)
        new = [name for name in wanted if name in self._get_available_adapters()]
        if not new:
            return
        if refusal := self.refusal_to_merge(task_of_key(new[0])):
            raise RecastBankError(f"nothing can be merged: the task has {refusal}")
        if not self._kept:
            self._kept = self._written_parameters()
            for parameter, values in self._kept:
                parameter.data = values.clone()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=new)
        except BaseException:
            if not self.merged:
                self._put_back()
            raise

    def unmerge(self) -> None:
        """Put the pretrained parameters back: the very tensors that were there before."""
        if not self.merged:
            return
        with with_variable(_computing, False):
            super().unmerge()
        self._put_back()

    def _written_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters that merging may write to, but for the weight that RECAST's layer looks after."""
        composed = None if self.recast_layer is None else self.recast_layer.weight_name
        parameters = self.get_base_layer()._parameters.items()
        return [(parameter, parameter.data) for name, parameter in parameters if parameter is not None and name != composed]

    def _put_back(self) -> None:
        for parameter, values in self._kept:
            parameter.data = values
        self._kept = []

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self._kept = [(parameter, fn(values)) for parameter, values in self._kept]
        return super()._apply(fn, recurse)

    # ---------------------------------------------------------------- computing

    @property
    def weight(self) -> Tensor:
        """The weight with what the active tasks' LoRA adds to it, differentiable, for models that read it."""
        return self.with_part(super().weight)

    def with_part(self, weight: Tensor) -> Tensor:
        """A weight with what the active tasks' LoRA adds to it, differentiable; as it is while that is merged or off."""
        if self.disable_adapters or self.merged:
            return weight
        if current_batch() is not None:
            return of_no_sample(weight, one_task_for_all(self))  # T5 reads its dtype
        added = weight
        for name in self.active_adapters:
            if name in self.lora_variant:
                with with_variable(_computing, SimpleNamespace(weight=weight)):
                    added = added + (self.lora_variant[name].merge_safe(self, name, weight) - weight)
            elif name in self._get_available_adapters():
                added = added + self.get_delta_weight(name).to(weight.dtype)
        return added

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("adapter_names", None)  # of another wrapper, whose adapters are none of the tasks
        if not args and self._takes in kwargs:
            args = (kwargs.pop(self._takes),)
        strengths = strengths_of_call(self)
        if strengths is self.scaling:
            return self._call(*args, **kwargs)
        with with_attribute((self,), "scaling", strengths):  # those of the forward pass, which is computed again
            return self._call(*args, **kwargs)

    def _call(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = current_batch()
        is_alone = batch is None and not self.merged
        if is_alone and not torch.compiler.is_compiling() and self.zeros is not None and self.zeros.are_all(self):
            return self.base_layer(x, *args, **kwargs)
        if self._by_weight and not (self.disable_adapters or self.merged):
            if batch is None:
                return torch.func.functional_call(self.get_base_layer(), {"weight": self.weight}, (x, *args), kwargs)
            if batch.pool is None:
                raise one_task_for_all(self)
        if batch is not None:
            samples = batch.samples_in(x, self)
            if batch.pool is not None:
                return self.call_from_pool(batch, x, args, kwargs)
            repeats = batch.repeats(samples)
            kwargs["adapter_names"] = [name for name in keys_of(batch.names) for _ in range(repeats)]
        if not self.lora_variant:
            return super().forward(x, *args, **kwargs)
        with with_variable(_computing, True):
            return super().forward(x, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: what a task adds here is more than its LoRA."""
        return False


class _PartMaker(LoraModel):
    """PEFT's tuner for LoRA, for the time in which it makes the layers of one task."""

    def __init__(self, model: nn.Module, adapter_name: str, config: LoraConfig, plan: LoraPlan, active: list[str]) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.peft_config: dict[str, Any] = {adapter_name: config}
        self.active_adapter = active
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        present = plain_modules(model)
        targets = {id(shared(unwrapped(present[name]))) for name in plan.targets}
        self._targets = {key for key, module in model.named_modules() if id(module) in targets}

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config  # the plan has found the targets

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

    def _create_and_replace(self, config: Any, name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:  # type: ignore
        with at_hand(unwrapped_module(target)):  # beside whose weight PEFT puts the factors
            super()._create_and_replace(config, name, target, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        put_child(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Nothing: the model's own tuner does it, for both parts."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Nothing: RECAST's tuner has done it."""


def lora_config_of(model: nn.Module, adapter_name: str) -> LoraConfig | None:
    """The config of a task's LoRA part, as the model has it; None if the task has none."""
    return next((layer._parts.configs[adapter_name] for layer in part_layers(model, adapter_name)), None)


class LoraPart(TaskPart):
    """A low-rank part of the task (``lora_config``)."""

    name = "lora"

    def prepare(self, request: Request) -> list[LoraPlan]:
        plan = plan_lora_part(request.model, request.config, request.targets)
        return [] if plan is None else [plan]

    def check(self, request: Request, pieces: list[LoraPlan], owned: Collection[str], compressed: Collection[str]) -> None:
        modules = plain_modules(request.model) if pieces else {}
        for plan in pieces:
            for name in plan.targets:
                _check_target(name, shared(modules[name]), plan.config, owned, compressed)

    def install(self, place: Place, pieces: list[LoraPlan]) -> None:
        for plan in pieces:
            _install(place, plan)

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        return None if config.lora_config is None else A_PART


def _check_target(name: str, module: Any, lora: LoraConfig, owned: Collection[str], compressed: Collection[str]) -> None:
    """Refuse a target that is another method's LoRA, the task's own classifier, or has no pretrained weight."""
    if lies_in(name, owned):
        raise RecastTargetError(f"lora_config: {name} is trained whole with this task; leave it out with exclude_modules")
    if name in compressed and (lora.use_dora or lora.init_lora_weights == "mica"):
        raise RecastTargetError(
            f"lora_config: {'DoRA' if lora.use_dora else 'MiCA'} starts from the pretrained weight of {name}, and a "
            "compressed bank stands for it: use a plain LoraConfig, other target_modules, or an exact bank"
        )
    if isinstance(module, LoraLayer) and not isinstance(module, PartLayer):
        raise RecastTargetError(
            f"lora_config: another LoRA stands on {name} ({', '.join(sorted(module._get_available_adapters()))}): give the "
            "part other target_modules, or merge_and_unload that LoRA first"
        )


def _install(place: Place, plan: LoraPlan) -> None:
    model = place.model
    parts = next((layer._parts for layer in part_layers(model)), None) or LoraParts(place.tuner.peft_config)
    parts.tasks = place.tuner.peft_config  # a new one, if diffusers has deleted all tasks
    parts.beside = next(iter(modules_of(model, RecastLayer)), None)
    config = copy.deepcopy(plan.config)
    # the plan has found the targets; PEFT would warn of what is left out as of what is not there
    config.inference_mode, config.target_modules, config.exclude_modules = place.inference_mode, None, None
    # beside a packed weight a pair is what it is beside others: PEFT's layers for those write into it, or leave ours out
    modules = (unwrapped_module(present) for name, present in plain_modules(model).items() if name in plan.targets)
    config._register_custom_module({type(m): Linear for m in modules if quantised_by(m) is not None})
    key, active = container_key(place.adapter_name), list(place.tuner.active_adapters)
    with with_variable(making_part, True):
        maker = _PartMaker(model, key, config, plan, keys_of(active))
        with with_attribute(modules_of(model, RecastLayer), "_switched_off", True):  # initialise from pretrained weights
            LoraModel.inject_adapter(maker, model, key, low_cpu_mem_usage=place.low_cpu_mem_usage)
        names = {id(unwrapped_module(module)): name for name, module in plain_modules(model).items()}
        layers: list[Any] = modules_of(model, LoraLayer)
        for layer in [layer for layer in layers if key in layer._get_available_adapters()]:
            _adopt(layer, parts, key, names[id(unwrapped_module(layer))])
            layer.set_adapter(active, place.inference_mode)
    parts.configs[place.adapter_name] = plan.config


def _adopt(layer: Any, parts: LoraParts, key: str, module_name: str) -> None:
    layer._parts, layer.module_name = parts, module_name
    stack_around(layer, layer.base_layer)
    mix_in(layer, PartLayer, outermost=True)
    vars(layer).setdefault("history", CallHistory())
    layer._by_weight = not adds_to_output(layer.get_base_layer())
    layer._takes = next(iter(inspect.signature(layer.get_base_layer().forward).parameters), "")
    composed = layer.recast_layer
    if composed is not None and composed.is_released:  # there is no weight beside which PEFT would have put it
        layer._move_adapter_to_device_of_base_layer(key, composed.weight_device)
