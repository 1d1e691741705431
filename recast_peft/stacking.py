"""Layers of PEFT's other methods around or inside a RecastLayer: they may merge, but never into a template.

Such a layer merges by writing into the innermost module's weight, which is a template of the whole group. So whenever one is
put around or inside a RecastLayer its class is exchanged for a subclass of itself that, for as long as something of it is
merged, gives it a tensor of its own to write into: the weight of the RECAST tasks in force. The pretrained weight stays
apart, and comes back, bit for bit, when the other layer is unmerged.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .errors import RecastTargetError
from .layer import RecastLayer

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
    """The name of the PEFT method that a tuner layer belongs to, such as ``"lora"``."""
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


def _notice(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Called by torch whenever a module gets a child."""
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
