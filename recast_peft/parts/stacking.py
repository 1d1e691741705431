"""Layers of PEFT's other methods around or inside a RecastLayer: they may merge, but never into a template.

Such a layer merges by writing into the innermost module's weight, which is a template of the whole group. So whenever one is
put around or inside a RecastLayer its class is exchanged for a subclass of itself that, for as long as something of it is
merged, gives it a tensor of its own to write into: the weight of the RECAST active tasks. The pretrained weight stays
apart, and comes back, bit for bit, when the other layer is unmerged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..config import RecastConfig
from ..errors import RecastTargetError
from ..layer import RecastLayer

BOTH = ("around", "inside")

# Methods that stack, and whether their layer may stand around RECAST's or inside it; tests/test_stacking.py runs over PEFT's
# registry and holds this table against what comes out. The others read or replace the innermost weight themselves.
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


class Mixed:
    """What a layer of another method does differently here; its class becomes a subclass of itself with such mixins."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _new_mixed, (type(self)._plain_class, type(self)._mixins), self.__dict__  # type: ignore[attr-defined]


@cache
def _mixed_class(plain: type, mixins: tuple[type[Mixed], ...]) -> type:
    return type(plain.__name__, (*mixins, plain), {"_plain_class": plain, "_mixins": mixins, "__module__": plain.__module__})


def _new_mixed(plain: type, mixins: tuple[type[Mixed], ...]) -> Any:
    cls = _mixed_class(plain, mixins)
    return cls.__new__(cls)  # type: ignore[call-overload]


def mix_in(layer: nn.Module, mixin: type[Mixed], outermost: bool = False) -> None:
    """Exchange a layer's class for a subclass of itself with one more mixin."""
    cls: Any = type(layer)
    plain, mixins = getattr(cls, "_plain_class", cls), getattr(cls, "_mixins", ())
    if mixin not in mixins:
        layer.__class__ = _mixed_class(plain, (mixin, *mixins) if outermost else (*mixins, mixin))  # type: ignore[assignment]


class Stacked(Mixed):
    """What a layer of another method does differently while it shares a weight with a RecastLayer."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)  # type: ignore[misc]
        _refuse_variants(self, self.__dict__["_recast_layer"])

    def merge(self, *args: Any, **kwargs: Any) -> None:
        with self.__dict__["_recast_layer"].written_by_others():
            super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self) -> None:
        with self.__dict__["_recast_layer"].written_by_others():
            super().unmerge()  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        layer: RecastLayer = self.__dict__["_recast_layer"]
        return layer.weight if layer in inner_layers(self) else super().weight  # type: ignore

    def get_base_weight(self) -> Tensor:
        """The weight that the layer computes with: the composed one, differentiable."""
        layer: RecastLayer = self.__dict__["_recast_layer"]
        if layer.held is None and layer in inner_layers(self):  # type: ignore[arg-type]
            return layer.weight
        return super().get_base_weight()  # type: ignore[misc]

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Give back the innermost module: with everything that stands on it merged, or with nothing."""
        layer: RecastLayer = self.__dict__["_recast_layer"]
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge_if_merged()
        return layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)

    def unmerge_if_merged(self) -> None:
        """Unmerge without PEFT's warning where nothing is merged."""
        if self.merged:  # type: ignore[attr-defined]
            self.unmerge()


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
    if making_part.get():
        return
    variants = getattr(other, "lora_variant", None)
    if variants:
        raise RecastTargetError(
            f"{type(next(iter(variants.values()))).__name__.removesuffix('LinearVariant')} reads the pretrained weight itself "
            f"and cannot stand on {layer.module_name}, whose weight RECAST composes: use a plain LoraConfig, or "
            "merge_and_unload one of the two first"
        )


# Methods that look for plain layers of torch, or ask the config of every adapter for fields of their own, before they make
# their layers: on a model with RECAST tasks they fail in ways that do not say why.
BLIND = ("adalora", "frod", "pvera", "randlora", "supertuning", "tinylora", "vera")


class Beside(Mixed):
    """A tuner of another method on a model with RECAST tasks: what is refused there leaves the model as it was."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._check_name(adapter_name)
        with _wholly_or_not(self, adapter_name):
            super()._pre_injection_hook(model, config, adapter_name)  # type: ignore[misc]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with _wholly_or_not(self, adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]

    def _check_name(self, adapter_name: str) -> None:
        # PEFT keeps the configs of all wrappers of a model in one dictionary, and has written the new one over the old
        before = self.__dict__.pop("_configs_before", {})
        if isinstance(before.get(adapter_name), RecastConfig):
            self.peft_config[adapter_name] = before[adapter_name]  # type: ignore[attr-defined]
            raise RecastTargetError(
                f"adapter_name={adapter_name!r}: a RECAST task of this model has this name; give the adapter of "
                f"{method_of(self)} another one"  # type: ignore[arg-type]
            )


@contextmanager
def _wholly_or_not(tuner: Any, adapter_name: str) -> Iterator[None]:
    before = [(module, dict(module._modules)) for module in tuner.model.modules()]
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        method = method_of(tuner)
        for module, children in before:
            module._modules = children
        forget_absent_layers(tuner.model)
        tuner.peft_config.pop(adapter_name, None)
        if method not in BLIND or isinstance(error, RecastTargetError):
            raise
        hint = " It can be put on the model before RECAST, with RECAST on top of it." if STACKABLE.get(method) else ""
        raise RecastTargetError(
            f"{method} cannot stand around RECAST's layers: it finds no module or config there that it knows.{hint} Or "
            f"merge_and_unload the RECAST tasks first.\n{method} says: {error}"
        ) from error


def forget_absent_layers(model: nn.Module) -> None:
    """Make RECAST's layers forget layers of other methods that are no longer in the model."""
    present = {id(module) for module in model.modules()}
    for layer in model.modules():
        if isinstance(layer, RecastLayer):
            layer.other_layers = [other for other in layer.other_layers if id(other) in present]


def _notice(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Called by torch whenever a module gets a child."""
    if name == "model" and isinstance(parent, BaseTuner):
        is_of_peft = type(parent).__module__.startswith("peft.")
        if is_of_peft and any(isinstance(module, RecastLayer) for module in child.modules()):
            mix_in(parent, Beside)
            parent.__dict__["_configs_before"] = dict(getattr(child, "peft_config", {}))
        return
    if name != "base_layer" or not isinstance(parent, BaseTunerLayer):
        return
    chain = [parent, *inner_layers(child)]
    recast = [layer for layer in chain if isinstance(layer, RecastLayer)]
    if not recast:
        return
    for layer in chain:
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, (RecastLayer, Stacked)):
            _stack(layer, recast[-1], "around" if chain.index(layer) < chain.index(recast[-1]) else "inside")


def _stack(other: nn.Module, layer: RecastLayer, place: str) -> None:
    method = method_of(other)
    places = STACKABLE.get(method, ())
    if place not in places:
        hint = " It can be put on the model before RECAST, with RECAST on top of it." if places else ""
        raise RecastTargetError(
            f"{method} cannot stand {place} RECAST's layer of {layer.module_name}: it reads or replaces the pretrained weight "
            f"itself, and the composed weight would be lost.{hint} Methods that can: "
            f"{', '.join(name for name, where in STACKABLE.items() if place in where)}. Or give the two different "
            "target_modules, or merge_and_unload one of them first."
        )
    _refuse_places(other, method, layer, place)
    if getattr(other, "merged_adapters", None):
        raise RecastTargetError(
            f"{method} is merged into {layer.module_name}, so the weight there is not the pretrained one: unmerge_adapter (or "
            "merge_and_unload, if it is to stay) before RECAST is put on the model"
        )
    _refuse_variants(other, layer)
    other.__dict__["_recast_layer"] = layer
    mix_in(other, Stacked)
    layer.other_layers.append(other)


register_module_module_registration_hook(_notice)
