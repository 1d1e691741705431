"""Layers of PEFT's other methods around or inside a RecastLayer: they may merge, but never into a template.

Such a layer merges by writing into the innermost module's weight, which is a template of the whole group. So whenever one is
put around or inside a RecastLayer its class is exchanged for a subclass of itself that, for as long as something of it is
merged, gives it a tensor of its own to write into: the weight of the RECAST active tasks. The pretrained weight stays
apart, and comes back, bit for bit, when the other layer is unmerged.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..config import RecastConfig
from ..errors import RecastTargetError
from ..layer import RecastLayer

BOTH = ("around", "inside")
ON_TOP = " It can be put on the model before RECAST, with RECAST on top of it."  # for messages

# Methods that stack, and whether their layer may stand around RECAST's or inside it; tests/parts/test_stacking.py holds this
# table against what comes out, over PEFT's registry. The others read or replace the innermost weight themselves.
STACKABLE: dict[str, tuple[str, ...]] = {
    "adalora": ("inside",),
    "beft": BOTH,
    "boft": BOTH,
    "fourierft": BOTH,
    "gralora": BOTH,
    "hira": ("inside",),
    "ia3": BOTH,
    "lily": BOTH,
    "loha": BOTH,
    "lokr": BOTH,
    "lora": BOTH,
    "miss": BOTH,
    "oft": BOTH,
    "peanut": ("inside",),
    "pvera": ("inside",),
    "randlora": ("inside",),
    "road": BOTH,
    "unilora": BOTH,
    "vblora": BOTH,
    "vera": ("inside",),
    "waveft": BOTH,
}


def inner_layers(module: nn.Module | None) -> list[nn.Module]:
    """A module and what it wraps, from the outside to the innermost module."""
    chain = []
    while module is not None:
        chain.append(module)
        module = module._modules.get("base_layer") if isinstance(module, BaseTunerLayer) else None
    return chain


def method_of(layer: nn.Module) -> str:
    """The name of the PEFT method that a tuner, or a layer of one, belongs to, such as ``"lora"``."""
    for cls in type(layer).__mro__:
        parts = cls.__module__.split(".")
        if parts[:2] == ["peft", "tuners"] and len(parts) > 2 and parts[2] != "tuners_utils":
            return parts[2]
    return type(layer).__name__


if TYPE_CHECKING:
    from peft.tuners.lora import Linear as PeftLayer  # has the verbs that layers of any method have
else:
    PeftLayer = object


class Mixed(PeftLayer):
    """What a layer of another method does differently here; its class becomes a subclass of itself with such mixins."""

    _plain_class: type  # what it was
    _mixins: tuple[type[Mixed], ...]
    recast_beside: tuple[RecastLayer, ...] = ()  # the layer of ours around or inside this one

    @property
    def recast_layer(self) -> RecastLayer | None:
        """That layer; None where there is none."""
        return self.recast_beside[0] if self.recast_beside else None

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Give back the innermost module: with everything that stands on it merged, or with nothing."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        if self.recast_layer is None:
            return self.get_base_layer()
        return self.recast_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new_mixed, (type(self)._plain_class, type(self)._mixins), vars(self)


@cache
def _mixed_class(plain: type, mixins: tuple[type[Mixed], ...]) -> type:
    return type(plain.__name__, (*mixins, plain), {"_plain_class": plain, "_mixins": mixins, "__module__": plain.__module__})


def _new_mixed(plain: type, mixins: tuple[type[Mixed], ...]) -> Any:
    cls: Any = _mixed_class(plain, mixins)
    return cls.__new__(cls)


def mix_in(layer: nn.Module, mixin: type[Mixed], outermost: bool = False) -> None:
    """Exchange a layer's class for a subclass of itself with one more mixin."""
    cls: Any = type(layer)
    plain, mixins = getattr(cls, "_plain_class", cls), getattr(cls, "_mixins", ())
    if mixin not in mixins:
        layer.__class__ = _mixed_class(plain, (mixin, *mixins) if outermost else (*mixins, mixin))


class Stacked(Mixed):
    """What a layer of another method does differently while it shares a weight with a RecastLayer."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)
        _refuse_variants(self, self.recast_beside[0])

    def merge(self, *args: Any, **kwargs: Any) -> None:
        with self.recast_beside[0].written_by_others():
            super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        with self.recast_beside[0].written_by_others():
            super().unmerge()

    @property
    def merged_tasks(self) -> list[str]:
        """The names of the adapters that are merged, as ``merge`` takes them."""
        return list(self.merged_adapters)

    @property
    def weight(self) -> Tensor:
        layer = self.recast_beside[0]
        return layer.weight if layer in inner_layers(self) else super().weight

    def get_base_weight(self) -> Tensor:
        """The weight that the layer computes with: the composed one, differentiable."""
        layer = self.recast_beside[0]
        if layer.held is None and layer in inner_layers(self):
            return layer.weight
        return super().get_base_weight()


def _refuse_places(other: nn.Module, method: str, layer: RecastLayer, place: str) -> None:
    if any(isinstance(module, nn.MultiheadAttention) for module in (*inner_layers(other), *inner_layers(layer))):
        raise RecastTargetError(
            f"{method} and RECAST cannot share {layer.module_name}, a multi-head attention: both exchange the weights of its "
            "projections in each call. Give the two different target_modules, or merge_and_unload one of them first."
        )
    if place == "around" and layer.is_released and not making_part.get():
        raise RecastTargetError(
            f"{method} cannot stand on {layer.module_name}, whose pretrained weight was released for a compressed bank: "
            "convert with keep_base_weights=True, put the other method on the model before RECAST, or give the task a LoRA "
            "part of its own (lora_config)"
        )


# Set while the LoRA part of a task is put in: its layers know how to deal with what other LoRAs must not do.
making_part: ContextVar[bool] = ContextVar("recast_making_part", default=False)


def _refuse_variants(other: Any, layer: RecastLayer) -> None:
    if making_part.get() or getattr(other, "_parts", None) is not None:
        return
    variants = getattr(other, "lora_variant", None)
    if variants:
        raise Adding.refuse(
            f"{type(next(iter(variants.values()))).__name__.removesuffix('LinearVariant')} reads the pretrained weight itself "
            f"and cannot stand on {layer.module_name}, whose weight RECAST composes: use a plain LoraConfig, or "
            "merge_and_unload one of the two first"
        )


# Methods that look for plain layers of torch, or ask the config of every adapter for fields of their own, before they make
# their layers: on a model with RECAST tasks they fail in ways that do not say why.
BLIND = ("adalora", "frod", "pvera", "randlora", "supertuning", "tinylora", "vera")


class TaskConfigs(dict[str, Any]):
    """The configs of a model's adapters: PEFT puts those of all methods into one dictionary, before it makes their layers.

    So this is where an adapter of another method is added to a model with RECAST tasks: what cannot be is refused here, before
    anything is changed, and its layers are looked at as they are made.
    """

    def __setitem__(self, name: str, config: Any) -> None:
        if not isinstance(config, RecastConfig) and any(isinstance(own, RecastConfig) for own in self.values()):
            method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
            self._check(name, method)
            Adding(self, name).start()
        super().__setitem__(name, config)

    def __missing__(self, name: str) -> Any:
        """What PEFT's own model finds under the name of its active task, once that was deleted."""
        if not self:
            return RecastConfig()  # of a task that changes nothing: the model is the pretrained one
        raise KeyError(f"the model has no adapter {name!r}: activate one of {', '.join(self)} with set_adapter(name)")

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several configs."""
        for name, config in dict(*args, **kwargs).items():
            self[name] = config

    def _check(self, name: str, method: str) -> None:
        if isinstance(self.get(name), RecastConfig):
            raise RecastTargetError(
                f"adapter_name={name!r}: a RECAST task of this model has this name; give the adapter of {method} another one"
            )
        if method in BLIND:
            hint = ON_TOP if method in STACKABLE else ""
            raise RecastTargetError(
                f"{method} cannot stand around RECAST's layers: it finds no module or config there that it knows.{hint} Or "
                "merge_and_unload the RECAST tasks first."
            )


class Adding:
    """The time in which PEFT makes the layers of another method's adapter on a model with RECAST tasks.

    torch tells of every module that gets a child; what it tells is listened to for this time alone. What is refused is taken
    back.
    """

    current: Adding | None = None

    def __init__(self, configs: TaskConfigs, adapter_name: str) -> None:
        self.configs, self.adapter_name = configs, adapter_name
        self.replaced: list[tuple[nn.Module, str, nn.Module | None]] = []
        self.layers: list[RecastLayer] = []

    def start(self) -> None:
        """Listen from now on."""
        Adding.end()
        Adding.current, self.handle = self, register_module_module_registration_hook(self._notice)

    @classmethod
    def refuse(cls, reason: str) -> RecastTargetError:
        """Take back what was made so far; the error is to be raised."""
        if cls.current is not None:
            cls.current._take_back()
        return RecastTargetError(reason)

    @classmethod
    def end(cls) -> None:
        """Listen no longer."""
        if cls.current is not None:
            cls.current.handle.remove()
            cls.current = None

    def _notice(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        if isinstance(child, BaseTuner):  # PEFT's model has its tuner: all layers are made
            Adding.end()
        elif isinstance(child, BaseTunerLayer):
            self.replaced.append((parent, name, parent._modules.get(name)))
        if name == "base_layer" and isinstance(parent, BaseTunerLayer):
            try:
                self.layers += stack_around(parent, child)
            except RecastTargetError:
                self._take_back()
                raise

    def _take_back(self) -> None:
        Adding.end()
        for parent, name, before in reversed(self.replaced):
            if before is not None:
                parent._modules[name] = before
        made = {id(parent) for parent, _, _ in self.replaced} | {id(child) for child, _, _ in self.replaced}
        for layer in self.layers:
            layer.other_layers = [other for other in layer.other_layers if id(other) not in made]
        self.configs.pop(self.adapter_name, None)


def layer_around(candidate: Any, fingerprint: str) -> RecastLayer:
    """A layer without any task, ready to be put around a module, and around other methods' layers of it."""
    layer = RecastLayer(candidate.visible, candidate.name, candidate.weight_name, fingerprint)
    layer.train(candidate.visible.training)
    stack_around(layer, candidate.visible)
    return layer


def stack_around(outer: nn.Module, inner: nn.Module) -> list[RecastLayer]:
    """Let layers of other methods, around or inside a RecastLayer, merge into tensors of their own from now on.

    Gives RECAST's layer among them, if there is one; where another method cannot stand there, ``RecastTargetError``.
    """
    chain = [outer, *inner_layers(inner)]
    recast = [layer for layer in chain if isinstance(layer, RecastLayer)]
    for layer in chain if recast else ():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, (RecastLayer, Stacked)):
            _stack(layer, recast[-1], "around" if chain.index(layer) < chain.index(recast[-1]) else "inside")
    return recast[-1:]


def _stack(other: Any, layer: RecastLayer, place: str) -> None:
    method = method_of(other)
    places = STACKABLE.get(method, ())
    if place not in places:
        hint = ON_TOP if places else ""
        raise RecastTargetError(
            f"{method} cannot stand {place} RECAST's layer of {layer.module_name}: it reads or replaces the pretrained weight "
            f"itself, and the composed weight would be lost.{hint} Methods that can: "
            f"{', '.join(name for name, where in STACKABLE.items() if place in where)}. Or give the two different "
            "target_modules, or merge_and_unload one of them first."
        )
    _refuse_places(other, method, layer, place)
    if other.merged_adapters:
        raise RecastTargetError(
            f"{method} is merged into {layer.module_name}, so the weight there is not the pretrained one: unmerge_adapter (or "
            "merge_and_unload, if it is to stay) before RECAST is put on the model"
        )
    _refuse_variants(other, layer)
    other.recast_beside = (layer,)  # in a tuple: it is no child
    mix_in(other, Stacked)
    layer.other_layers.append(other)
