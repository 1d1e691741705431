"""The model's own biases, trained and stored with a task (``bias="all"`` or ``"recast_only"``), as PEFT's other methods do it.

They are no copies: a model can have one such task, and a switch to another task does not bring the pretrained biases back, but
freezes them: that task's file would not hold what it trains of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from ..config import RecastConfig
from ..holders import Entry, plain_modules, unwrapped_module
from ..layer import RecastLayer
from ..names import lies_in, modules_of
from ..validation import listed
from .base import TaskPart
from .bias_part import bias_holders
from .lora_strength import part_layers
from .wrapper import task_modules


class BaseBiasesPart(TaskPart):
    """What a config's ``bias`` names."""

    name = "biases"

    def entries(self, model: nn.Module, adapter_name: str, config: RecastConfig) -> Iterator[Entry]:
        composed, kept = _with_layers(model), _kept_biases(model)
        for name, module in biased_modules(model, config.bias):
            # PEFT's files name the bias of a target as it lies in the tuner's layer
            file_name = f"{name}.base_layer.bias" if name in composed else None
            own = kept.get(id(module._parameters["bias"]))  # while what tasks add to it is merged
            before = None if own is None else kept.get(id(own), own)
            pack = None if before is None else lambda _, before=before: before.detach()
            yield Entry(f"{name}.bias", module, "bias", pack, file_name=file_name)

    def refusal_to_combine(self, config: RecastConfig) -> str | None:
        return None if config.bias == "none" else f"biases of the model (bias={config.bias!r})"


def _kept_biases(model: nn.Module) -> dict[int, Tensor]:
    """What parameters were before something was merged into them, or put in their place, by the id of the parameter now."""
    kept = {id(parameter): values for layer in part_layers(model) for parameter, values in layer._kept}
    holders = (holder for holder in bias_holders(model) if "bias" in holder.kept)
    return {**kept, **{id(holder.hosts[0]._parameters["bias"]): holder.kept["bias"] for holder in holders}}


def biased_modules(model: nn.Module, bias: str, targets: Collection[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules whose bias belongs to a task, by their names in the plain model.

    ``bias`` is ``"none"``, ``"all"`` or ``"recast_only"``: those of the modules that have coefficients or a LoRA part, and of
    ``targets``, which are going to have some.
    """
    for name, module in _own_modules(model, bias, targets):
        if module._parameters.get("bias") is not None:
            yield name, module


def _own_modules(model: nn.Module, bias: str, targets: Collection[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    if bias == "none":
        return
    composed = {*_with_layers(model), *targets}
    for name, present in plain_modules(model).items():
        if bias == "all" or name in composed:
            yield name, unwrapped_module(present)


def _with_layers(model: nn.Module) -> set[str]:
    return {layer.module_name for layer in (*modules_of(model, RecastLayer), *part_layers(model))}


def train_biases(model: nn.Module, adapter_name: str, bias: str, inference_mode: bool) -> None:
    """Let a task's biases learn, in the modules of both of its parts and whichever tasks were there before."""
    for layer in modules_of(model, RecastLayer) if bias != "none" else ():
        layer.without_strength[adapter_name] = f"the model's own biases (bias={bias!r})"
    others = ((name, module) for name, module in _own_modules(model, bias) if "bias" not in module._parameters)
    frozen = [name for name, module in others if isinstance(getattr(module, "bias", None), Tensor)]
    if frozen:
        warnings.warn(
            f"bias={bias!r} does not train the biases of {listed(frozen)}: they are "
            "no parameters there, as in layers of GPTQ, AWQ and HQQ",
            stacklevel=2,
        )
    _let_learn(model, adapter_name, bias, not inference_mode)


def switch_biases(model: nn.Module, configs: Mapping[str, RecastConfig], adapter_names: Collection[str], learn: bool) -> None:
    """Let the biases that a task trains learn while it is active, and warn of them while others are."""
    for name, config in configs.items():
        if config.bias == "none":
            continue
        _let_learn(model, name, config.bias, learn and name in adapter_names)
        if adapter_names and name not in adapter_names:
            warnings.warn(
                f"the model's own biases stay as task {name!r} (bias={config.bias!r}) has trained them, and "
                f"{listed(list(adapter_names))} computes with them: partners=['bias'] gives a task biases of its own instead",
                stacklevel=4,
            )


def _let_learn(model: nn.Module, adapter_name: str, bias: str, learn: bool) -> None:
    owned = [m.module_name for m in task_modules(model, adapter_name)]
    for name, module in biased_modules(model, bias):
        if not lies_in(name, owned):  # else the task has a copy that is called
            module._parameters["bias"].requires_grad_(learn)  # type: ignore[union-attr]
