"""One call of a layer: which way it takes to compute with a composed weight.

A module of a known kind is called by a plain function that is given the weight; where gradients are recorded it composes the
weight again in the backward pass (recomposed.py). Any other module is called as it is, with its weight exchanged for the call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecastBankError
from ..placement.offloaded import is_offloaded
from .coefficient_gradients import EXACT
from .compose import Terms, compose_weight, marked
from .composed import STANDS_FOR, ComposedModule
from .kinds import LINEAR, composes_cheaply, kind_of, takes_core
from .outputs import call_from_outputs, computes_from_outputs, is_out_of_reach
from .parallel import split_of, spread_like
from .quantised import quantised_by
from .recomposed import call_recomposed, can_recompose, product_of_one

# Weights are exchanged for a call by one thread at a time: another one would take the exchanged weight for the module's own,
# and put it back for good.
_EXCHANGE = threading.RLock()


def call(
    layer: ComposedModule,
    adapters: Sequence[str],
    args: tuple,
    kwargs: dict[str, Any],
    values: Mapping[str, Tensor] | None = None,
) -> Any:
    """What the wrapped module computes with the weight of the given tasks; those without coefficients here add nothing.

    ``values`` are coefficients by task in place of those that the layer holds now.

    Raises:
        RecastBankError: where a quantised module cannot be called with another weight.
    """
    if layer.instead is not None:
        return call_with(layer, layer.instead(layer), args, kwargs)
    if cores := _beside_the_weight(layer, adapters, args, kwargs):
        others = [name for name in adapters if name not in cores]
        is_alone = not layer.present(others) and layer.kept_weight is None
        y = layer.base_layer(args[0]) if is_alone else call(layer, others, args, kwargs, values)
        for name in cores:
            offsets = layer.offset(name, values)[None].to(args[0].device)
            product = layer.recast_bank[name].core_product(offsets)
            held = layer.weight_parameter
            y = (product if split_of(held) is None else product.split_like(held)).add_to(y, args[0])
        return y
    if is_out_of_reach(layer):
        if len(given := (*args, *kwargs.values())) == 1 and computes_from_outputs(layer, adapters):
            return call_from_outputs(layer, adapters, given[0], values)
        if not layer.present(adapters) and not layer.is_released:
            return layer.base_layer(*args, **kwargs)
        if direct_call(layer, args, kwargs) is None:
            _check_reads_weight(layer)
    direct = direct_call(layer, args, kwargs)
    terms: Terms | None = None if direct is None or layer.is_masked(adapters) else layer.terms(adapters, values)
    if direct is None or terms is None:
        return call_with(layer, layer.compose(adapters, values=values), args, kwargs)
    return call_composed(layer, direct, args[0], terms, adapters)


def _beside_the_weight(layer: ComposedModule, adapters: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """The tasks whose templates add to the output by narrow products, which takes no weight of the module's size."""
    cores = [name for name in layer.with_coefficients(adapters) if layer.recast_bank[name].is_factored]
    is_product = takes_core(layer.base_layer) and not composes_cheaply(layer.base_layer)
    if not cores or layer.is_masked(adapters) or len(args) != 1 or kwargs or not is_product:
        return []
    return cores if not is_hooked(layer.base_layer) or is_out_of_reach(layer) else []


def call_composed(
    layer: ComposedModule, direct: Callable[..., Tensor], x: Tensor, terms: Terms, adapters: Sequence[str]
) -> Tensor:
    """What the wrapped module computes with a weight that is composed for the call; a plain function stands for the module."""
    base = layer.base_layer
    if can_recompose(base, x, *terms):
        return call_recomposed(base, x, *terms, _gradient_way(layer, adapters))
    if not torch.is_grad_enabled() and (y := product_of_one(base, x, *terms)) is not None:
        return y
    return direct(base, marked(compose_weight(*terms)), x)


def _gradient_way(layer: ComposedModule, adapters: Sequence[str]) -> str:
    """How the coefficients' gradient is formed: exactly, unless all active tasks ask for the same estimate."""
    asked = {layer.coefficient_gradients.get(name, EXACT) for name in layer.with_coefficients(adapters)}
    return asked.pop() if len(asked) == 1 else EXACT


def direct_call(layer: ComposedModule, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Tensor] | None:
    """The plain function that stands for a call of the wrapped module, if there is one."""
    if len(args) != 1 or kwargs or is_hooked(layer.base_layer):
        return None
    kind = kind_of(layer.base_layer)
    return None if kind is None else kind.call


def call_with(layer: ComposedModule, weight: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the wrapped module computes with a weight."""
    base = layer.base_layer
    direct = direct_call(layer, args, kwargs)
    if direct is not None:
        return direct(base, marked_as_pretrained(layer, weight), args[0])
    held = layer.weight_parameter
    if weight is held:
        return base(*args, **kwargs)
    _check_reads_weight(layer)
    if split_of(held) is not None:
        return _call_exchanged(layer, spread_like(weight, held), args, kwargs)
    weight = marked_as_pretrained(layer, weight)
    if torch.compiler.is_compiling():
        return _call_exchanged(layer, weight, args, kwargs)
    if weight is not layer.pretrained:
        setattr(weight, STANDS_FOR, layer.pretrained)  # for threads that look for the pretrained weight meanwhile
    with _EXCHANGE:
        return _call_exchanged(layer, weight, args, kwargs)


def _check_reads_weight(layer: ComposedModule) -> None:
    """Refuse (``RecastBankError``) another weight for a module that computes with its packed one, or gets one in the call."""
    inner = layer.get_base_layer()
    if is_offloaded(inner):
        raise RecastBankError(
            f"{layer.module_name} ({type(inner).__name__}) is offloaded, and what its task has there needs the weight itself: "
            "on offloaded linear layers groups of neighbours and main directions compute without it. Keep this module on a "
            "device, or leave it out of the task"
        )
    library = quantised_by(inner)
    if library is not None and kind_of(inner) is not LINEAR:
        raise RecastBankError(
            f"{layer.module_name} ({type(inner).__name__}) is quantised by {library}, and has hooks, another method's layer "
            "around it, or was called with more than its input: it would be called with its own weight in place of the task's. "
            "Take them off, or give one task at a time, without masks and compressed banks"
        )


def _call_exchanged(layer: ComposedModule, weight: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    base = layer.base_layer
    if layer.weight_name in base.__dict__:  # FSDP puts the gathered weight here, in front of the parameter
        gathered = base.__dict__[layer.weight_name]
        base.__dict__[layer.weight_name] = weight
        try:
            return base(*args, **kwargs)
        finally:
            base.__dict__[layer.weight_name] = gathered
    name = "base_layer." * len(layer.layers_inside) + layer.weight_name
    return torch.func.functional_call(base, {name: weight}, args, kwargs)


def marked_as_pretrained(layer: ComposedModule, weight: Tensor) -> Tensor:
    """A composed weight, marked like a pretrained one where no gradient is recorded; others are left as they are."""
    return weight if weight is layer.weight_parameter or weight is layer.pretrained else marked(weight)


def is_hooked(module: nn.Module) -> bool:
    """Whether something beside the module's own forward runs when it is called."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
