"""The modules of a model, by their names in the plain model, and which of them could be composed from templates."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..banks.template_bank import PLACEHOLDER
from ..composition.fingerprint import weight_fingerprint
from ..composition.quantised import dequantised, quantised_by
from ..errors import RecastTargetError
from ..holders import TaskHolder, other_names, plain_place
from ..names import BANK_CONTAINER, PARTNER_CONTAINER, ends_in, held_name, modules_of
from ..placement.offloaded import is_offloaded, kept_tensor
from ..placement.sharded import whole, whole_shape
from ..validation import listed

# what libraries put beside a packed weight; compressed-tensors rounds whatever weight lies there in each call
_MARKS_OF_QUANTISATION = ("qweight", "W_q", "quant_state", "weight_packed", "quantization_scheme")
_DEQUANTIZE = "transformers: dequantize=True in its quantization config"


@dataclass(frozen=True)
class Candidate:
    """A module whose weight could be composed."""

    name: str  # in the plain model (no ``base_layer`` of a tuner in it)
    module: nn.Module  # the plain module, whatever tuner layers are around it
    visible: nn.Module  # the module that stands in the model now (a tuner layer, or the module itself)
    weight_name: str | None  # of the parameter that is composed; None for a module that has none
    reason: str | None  # why the module cannot be a target; None if it can
    path: tuple[tuple[str, nn.Module], ...]  # modules from the root to its holder, each with its name in the one before it
    names: tuple[str, ...]  # all of its names: several where the model holds it, or a module around it, at several places

    @property
    def slot(self) -> str:
        """The name under which the last module of the path holds it; a wrapper's own where one stands around it."""
        children = self.path[-1][1]._modules
        return next(name for name, child in children.items() if child is self.visible)

    @property
    def place(self) -> str:
        """Its name in the model as it is, with the names that wrappers put in."""
        return ".".join([name for name, _ in self.path[1:]] + [self.slot])

    @property
    def weight(self) -> Tensor:
        """The parameter that is composed (None while a compressed bank stands for it), or what a quantised one stands for."""
        assert self.weight_name is not None
        if quantised_by(self.module) is not None:
            return dequantised(self.module)
        kept = kept_tensor(self.module, self.weight_name)
        held = getattr(self.module, self.weight_name) if kept is None else None
        return kept if held is None else whole(held)  # type: ignore[return-value]

    @property
    def weight_like(self) -> Any:
        """Shape and dtype of its weight, whatever stands for that; None for a module that has none."""
        is_packed = self.weight_name is not None and quantised_by(self.module) is not None  # it has another shape then
        weight = self.weight if is_packed else self.module._parameters.get(self.weight_name or "")
        if weight is not None:
            return whole_shape(weight), weight.dtype
        layer = composed_layer(self.visible)
        return None if layer is None else (layer.weight_shape, layer.weight_dtype)

    @property
    def fingerprint(self) -> str:
        """That of its pretrained weight, whatever holds the weight's place now."""
        layer = composed_layer(self.visible)
        if layer is not None:
            return layer.fingerprint
        return getattr(self.weight, PLACEHOLDER, None) or weight_fingerprint(self.weight)


def find_candidates(model: nn.Module, parameters: Collection[str] = ()) -> list[Candidate]:
    """All modules of a model in the order of their definition, each with the reason why it cannot be a target, if any.

    ``parameters`` are names, or endings of names, of parameters that are composed in modules which have no weight.

    Raises:
        RecastTargetError: if a part of the model is compiled by TorchScript.
    """
    scripted = modules_of(model, torch.jit.ScriptModule)
    if scripted:
        raise RecastTargetError(
            f"{plain_place(model, scripted[0])} is compiled by TorchScript, which lets nobody look into its parameters: "
            "convert the model before torch.jit.script, or compile with torch.compile"
        )
    owners, places = _places(model, "_parameters"), _places(model, "_modules")
    further: dict[str, list[str]] = defaultdict(list)
    for other, name in other_names(model).items():
        further[name].append(other)
    candidates = []
    for name, visible, path in _walk(model):
        module = visible.get_base_layer() if isinstance(visible, BaseTunerLayer) else visible
        names = (name, *further[name])
        weight_name, reason = _named_parameter(visible, module, names, parameters) or _weight_of(visible, module)
        if weight_name is not None and reason is None:
            reason = _sharing(module, weight_name, owners, places[id(visible)])
        candidates.append(Candidate(name, module, visible, weight_name, reason, path, names))
    return candidates


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[tuple[str, nn.Module], ...]]]:
    """All modules once, by their names in the plain model; what tuners added and what wrappers are is passed over."""
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str, slot: str, path: tuple[tuple[str, nn.Module], ...]) -> Iterator:
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        here = (*path, (slot, inner))
        held = held_name(inner)
        for child_name, child in inner.named_children():
            if child_name in (BANK_CONTAINER, PARTNER_CONTAINER) or id(child) in seen:
                continue
            seen.add(id(child))
            name = prefix if child_name == held else f"{prefix}.{child_name}" if prefix else child_name
            around = here
            while True:
                if isinstance(child, TaskHolder):  # named when it was put in; a wrapper that came later gives it no other name
                    name = child.module_name
                if not isinstance(child, AuxiliaryTrainingWrapper):
                    break
                # tasks own this module whole: the model's own, which is the other tasks', is inside
                around, child_name, child = (*around, (child_name, child)), "original_module", child.original_module
                seen.add(id(child))
            if name and held_name(child) is None:
                yield name, child, around
            yield from visit(child, name, child_name, around)

    yield from visit(model, "", "", ())


def _weight_of(visible: nn.Module, module: nn.Module) -> tuple[str | None, str | None]:
    """The name of the parameter to compose, and why it cannot be composed."""
    kind = type(module).__name__
    name = "weight"
    if isinstance(module, nn.MultiheadAttention):
        name = "in_proj_weight"
        if module._parameters.get(name) is None and name not in _released(visible):
            return name, "its query, key and value have different sizes; only the fused projection is supported"
    if quantised_by(module) is not None:
        return name, None
    if packed := _why_packed(module):
        return name, packed
    if getattr(module, "max_norm", None) is not None:
        return name, f"{kind} rescales its weight in each call (max_norm), so that what tasks are composed from would not stay"
    weight = module._parameters.get(name)
    if weight is not None:
        return name, _why_unfit(weight, kind)
    if name in _released(visible):
        return name, None
    if fused := fused_experts(module):
        reason = (
            f"{kind} holds the weights of its experts in fused parameters ({', '.join(fused)}), not in modules: name one "
            "with target_parameters"
        )
        return None, reason
    if torch.nn.utils.parametrize.is_parametrized(module, name):
        return name, "its weight is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first"
    return None, None


def _named_parameter(
    visible: nn.Module, module: nn.Module, names: Collection[str], parameters: Collection[str]
) -> tuple[str, str | None] | None:
    """The parameter of a module that was named, and why it cannot be composed; None if none was."""
    own = [key for key in module._parameters if any(ends_in(f"{name}.{key}", parameters) for name in names)]
    if not own:
        return None
    layer = composed_layer(visible)
    held = own[0] if layer is None else str(layer.weight_name)
    if len(own) > 1 or held != own[0]:
        both = " and ".join(dict.fromkeys((*own, held)))
        return own[0], f"{both} are of one module, of which one can be composed: name one of them in target_parameters"
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return held, f"it is a {type(module).__name__}: the model asks for its items and never calls it"
    weight = module._parameters[held]
    return held, _why_packed(module) or (None if weight is None else _why_unfit(weight, type(module).__name__))


def _why_packed(module: nn.Module) -> str | None:
    """Why a module of a library that is not known computes with no weight of its own; None if nothing says so."""
    mark = next((mark for mark in _MARKS_OF_QUANTISATION if getattr(module, mark, None) is not None), None)
    if mark is None:
        return None
    kind = type(module).__name__
    return f"{kind} is quantized (it has a {mark}), which is not supported yet; load the model without it ({_DEQUANTIZE})"


def _why_unfit(weight: Tensor, kind: str) -> str | None:
    """Why a weight cannot be composed from templates; None if it can."""
    package = type(weight).__module__.partition(".")[0]
    if package != "torch":  # it may call itself a float32 tensor all the same
        return (
            f"its weight is a {type(weight).__name__} of {package}, a quantized or packed type, which is not supported yet; "
            "load the model without it"
        )
    if is_lazy(weight):
        return f"{kind} is not initialised yet; run the model once before it is converted"
    is_plain = weight.is_floating_point() and weight.element_size() >= 2 and weight.layout == torch.strided
    if not is_plain or hasattr(weight, "quant_state"):
        return (
            f"the weight of {kind} is of {weight.dtype} ({weight.layout}), a sparse, integer or quantized type, which is not "
            f"supported yet; load the model dense and in float32, bfloat16 or float16 ({_DEQUANTIZE})"
        )
    shape = whole_shape(weight)
    if len(shape) < 2:
        return f"the weight of {kind} is a vector of shape {shape}; at least two dimensions are needed"
    if 0 in shape:
        return f"the weight of {kind} holds no numbers: its shape is {shape}"
    return None


def fused_experts(module: nn.Module) -> list[str]:
    """The parameters of a mixture's experts in one tensor each, ``(experts, rows, columns)``; none for other modules."""
    if not re.search(r"expert|moe", type(module).__name__, re.IGNORECASE):
        return []
    return [name for name, p in module._parameters.items() if p is not None and p.ndim == 3 and len(p) > 1]


def _released(visible: nn.Module) -> tuple[str, ...]:
    """The weight that a compressed bank stands for, if there is a layer of ours."""
    layer = composed_layer(visible)
    return (str(layer.weight_name),) if layer is not None and layer.is_compressed else ()


def is_compressed(target: Candidate) -> bool:
    """Whether a compressed bank stands for the target's pretrained weight."""
    return bool(_released(target.visible))


def composed_layer(visible: nn.Module) -> Any:
    """RECAST's layer of a module, also inside layers of other methods; None if there is none."""
    layer: Any = visible
    while isinstance(layer, BaseTunerLayer) and not hasattr(type(layer), "is_compressed"):
        layer = layer.base_layer  # type: ignore[attr-defined]
    return layer if isinstance(layer, BaseTunerLayer) else None


def _sharing(module: nn.Module, weight_name: str, owners: dict[int, list[str]], places: list[str]) -> str | None:
    if len(places) > 1:
        return f"the module is shared by {' and '.join(places)}; a shared module cannot be replaced in one of them alone"
    weight = module._parameters.get(weight_name)
    names = owners.get(id(weight), [])
    if weight is not None and len(names) > 1:
        return f"its weight is tied: one parameter is {' and '.join(names)}; untie it first (clone the weight)"
    return None


def _places(model: nn.Module, kind: str) -> dict[int, list[str]]:
    """For every parameter or module the names of the slots that hold it; the same parent reached by two ways counts once."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, parent in model.named_modules():
        for key, held in getattr(parent, kind).items():
            if held is not None:
                places[id(held)].append(f"{name}.{key}" if name else key)
    return places


def check_materialised(targets: list[Candidate]) -> None:
    """Refuse targets whose weight is on the meta device (``RecastTargetError``)."""
    held = {c.name: c.module._parameters.get(c.weight_name or "") for c in targets if not is_offloaded(c.module)}
    empty = [name for name, weight in held.items() if weight is not None and weight.is_meta]
    if empty:
        raise RecastTargetError(
            f"{len(empty)} target modules are on the meta device and hold no numbers ({listed(empty)}): "
            "load the pretrained weights before the model is converted (low_cpu_mem_usage is for the adapter alone). "
            "PeftModel.from_pretrained takes a model apart that device_map has put on disk: load that model again, and give it "
            "to AutoRecastModel.from_pretrained(task, backbone=model)."
        )


def total_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each counted once."""
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
