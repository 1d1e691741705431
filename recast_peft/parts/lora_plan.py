"""What the LoRA part of a task would be: its target modules and its numbers, found before a model is touched."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from ..composition.kinds import in_and_out_features, kind_of
from ..composition.quantised import quantised_by
from ..config import RecastConfig
from ..errors import RecastTargetError
from ..holders import Entry, module_entries
from ..planning.candidates import Candidate, find_candidates
from ..planning.roles import SHORTHANDS
from ..planning.targets import find_targets
from .base import Piece


@dataclass(frozen=True)
class LoraPlan(Piece):
    """The LoRA part to be."""

    targets: tuple[str, ...]  # names of its target modules in the plain model
    entry_shapes: dict[str, tuple[int, ...]] = field(repr=False)  # of its parameters, by the keys of a task's file
    config: LoraConfig = field(repr=False)  # with its targets named, as it is stored with the task

    @property
    def place(self) -> str:  # type: ignore[override]
        """The first target module."""
        return self.targets[0]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.entry_shapes

    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.entry_shapes.values())


def plan_lora_part(model: nn.Module, config: RecastConfig, recast_targets: Sequence[str]) -> LoraPlan | None:
    """Say what the LoRA part of a task would be, without touching the model; None for a task without one.

    ``recast_targets`` are the modules that get coefficients; they are the LoRA part's targets too, unless it names others.

    Raises:
        RecastTargetError: if its targets are not found, or PEFT has no LoRA layer for one of them.
    """
    if config.lora_config is None:
        return None
    lora: Any = copy.deepcopy(config.lora_config)
    if not config.init_weights:
        lora.init_lora_weights = False
    candidates = find_candidates(model)
    targets = _find_targets(model, candidates, lora, recast_targets)
    if lora.target_modules is None or _is_shorthand(lora.target_modules):
        lora.target_modules = these_modules([c.name for c in targets], candidates)
        lora.exclude_modules = lora.layers_to_transform = lora.layers_pattern = None  # the names say it all
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        _check_target(target, lora)
        shapes.update(_shapes_of(target, lora))
    return LoraPlan(tuple(target.name for target in targets), shapes, lora)


def takes_lora(target: Candidate) -> bool:
    """Whether a LoRA of rank 1 can stand on a module."""
    lora = LoraConfig(r=1)
    try:
        _check_target(target, lora)
        _shapes_of(target, lora)
    except RecastTargetError:
        return False
    return True


def _find_targets(
    model: nn.Module, candidates: list[Candidate], lora: LoraConfig, recast_targets: Sequence[str]
) -> list[Candidate]:
    wanted = lora.target_modules
    if wanted is None:
        # the choice of layers restricts RECAST's targets too, by the last part of the name: a whole name would pass it by
        own = [c for c in candidates if c.name in set(recast_targets)]
        targets = [c for c in own if any(_is_meant(lora, [name.rpartition(".")[2]], name) for name in c.names)]
    elif _is_shorthand(wanted):
        targets, _ = find_targets(model, RecastConfig(target_modules=wanted, exclude_modules=lora.exclude_modules))
    else:
        # containers match by their name too; what has no weight of its own is passed over
        own = [c for c in candidates if c.weight_name is not None]
        targets = [c for c in own if any(check_target_module_exists(lora, name) for name in c.names)]
    targets = [c for c in targets if all(_is_meant(lora, [name], name) for name in c.names)]  # none is left out
    if not targets:
        raise RecastTargetError(
            f"lora_config: target_modules={wanted!r} not found in the base model, or all of them were left out "
            f"(exclude_modules={lora.exclude_modules!r}, layers_to_transform={lora.layers_to_transform!r})"
        )
    return targets


def _is_shorthand(wanted: Any) -> bool:
    return isinstance(wanted, str) and wanted in SHORTHANDS


def _is_meant(lora: LoraConfig, names: list[str], key: str) -> bool:
    named: Any = copy.copy(lora)
    named.target_modules = set(names)
    return bool(check_target_module_exists(named, key))


def these_modules(names: Sequence[str], candidates: list[Candidate]) -> Any:
    """Target modules of a LoRA that mean these modules and no others, since PEFT takes a name for an ending too.

    Returns:
        a set of the shortest endings that do; a pattern of whole names where another module's name ends in one of them.
    """
    wanted = set(names)
    others = [other for c in candidates if c.name not in wanted for other in c.names]
    if any(other.endswith(tuple(f".{name}" for name in wanted)) for other in others):
        return "|".join(re.escape(name) for name in sorted(wanted))
    return set(_find_minimal_target_modules(wanted, others)) if others else wanted


def _check_target(target: Candidate, lora: LoraConfig) -> None:
    if target.reason is not None:
        raise RecastTargetError(f"lora_config: {target.name} cannot be a target: {target.reason}")
    library = quantised_by(target.module)
    if library is not None and (lora.use_dora or lora.init_lora_weights == "mica"):
        raise RecastTargetError(
            f"lora_config: {target.name} ({type(target.module).__name__}) is quantised by {library}, so that a LoRA part "
            "cannot read its weight: leave out use_dora and init_lora_weights='mica', or load the model in float32, bfloat16 "
            "or float16"
        )
    if lora.lora_bias and getattr(target.module, "bias", None) is None:
        raise RecastTargetError(f"lora_config: lora_bias needs a bias to be merged into, and {target.name} has none")
    if (lora.lora_bias or lora.lora_dropout) and not adds_to_output(target.module):
        raise RecastTargetError(
            f"lora_config: {target.name} ({type(target.module).__name__}) is computed by its weight, which lora_dropout and "
            "lora_bias are no part of: set both to 0, or leave the module out"
        )
    attention = [m for m in (target.module, *(m for _, m in target.path)) if isinstance(m, nn.MultiheadAttention)]
    if attention:
        raise RecastTargetError(
            f"lora_config: {target.name} belongs to torch's multi-head attention, which reads the weights of its projections.\n"
            "PEFT's LoRA writes into them in each call, and does nothing where torch's encoder passes the call by. Give the "
            "LoRA part other target_modules; coefficients can be there."
        )


def adds_to_output(module: nn.Module) -> bool:
    """Whether a low-rank pair beside a module gives what the pair added to its weight would give.

    PEFT's LoRA of a convolution knows neither dilation nor padding with other values than zeros, and what a subclass does in a
    forward of its own nobody knows.
    """
    kind = kind_of(module)
    return kind is not None and kind.takes_lora(module)


def rank_and_alpha(lora: Any, module_name: str) -> tuple[int, float]:
    """The rank of a LoRA at a module, and what its product is multiplied with before it is divided by the rank."""
    patterns = ((lora.rank_pattern, lora.r), (lora.alpha_pattern, lora.lora_alpha))
    rank, alpha = (pattern.get(get_pattern_key(pattern.keys(), module_name), usual) for pattern, usual in patterns)
    return rank, alpha


def _shapes_of(target: Candidate, lora: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of what PEFT would make for a module, from a layer made on the meta device; where it makes none, an error."""
    name = "task"
    rank, alpha = rank_and_alpha(lora, target.name)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # they come again when the layer is made
            LoraModel._check_target_module_compatiblity(cast(Any, None), lora, target.path[0][1], target.slot)
            layer = LoraModel._create_new_module(
                lora, name, _stand_in(target), device_map=None, r=rank, lora_alpha=alpha, target_name=target.name
            )
            if isinstance(layer, LoraLayer):
                layer.get_delta_weight(name)  # type: ignore[attr-defined]  # else it could not be merged
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecastTargetError(
            f"lora_config: PEFT has no such LoRA for {target.name} ({type(target.module).__name__}): {error}\n"
            "Leave the module out with exclude_modules, or change what the LoRA asks for."
        ) from error
    if not isinstance(layer, LoraLayer):
        raise RecastTargetError(f"lora_config: PEFT makes no LoRA layer for {target.name} ({type(target.module).__name__})")
    return {entry.name: entry.shape for entry in lora_entries(target.name, layer, name)}


def _stand_in(target: Candidate) -> nn.Module:
    """A copy of a plain module with parameters that hold no numbers; the module itself is left alone."""
    if quantised_by(target.module) is not None:
        return nn.Linear(*in_and_out_features(target.module, ()), bias=getattr(target.module, "bias", None) is not None)
    twin = copy.copy(target.module)
    twin._parameters = {
        key: None if value is None else nn.Parameter(value.to("meta"), requires_grad=False)
        for key, value in target.module._parameters.items()
    }
    assert target.weight_name is not None
    if twin._parameters.get(target.weight_name) is None:  # a compressed bank stands for it
        shape, dtype = target.weight_like
        twin._parameters[target.weight_name] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    return twin


def lora_entries(module_name: str, layer: LoraLayer, key: str) -> Iterator[Entry]:
    """The tensors of one adapter in a LoRA layer, by the names that PEFT's files give them."""
    for attribute in dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names)):
        container = getattr(layer, attribute)
        if not isinstance(container, (nn.ModuleDict, nn.ParameterDict)) or key not in container:
            continue
        if isinstance(container, nn.ParameterDict):
            yield Entry(f"{module_name}.{attribute}", container, key)
            continue
        for entry in module_entries(f"{module_name}.{attribute}", container[key]):
            # PEFT's files name DoRA's magnitudes without the module that holds them
            short = entry.name.removesuffix(".weight") if attribute == "lora_magnitude_vector" else entry.name
            yield replace(entry, name=short)
