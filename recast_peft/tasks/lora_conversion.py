"""A RECAST task as a LoRA file, for servers that know LoRA alone, with the error of every layer.

What a task adds to a weight is a mix of whole pretrained weights, so its rank is full in general and a LoRA of low rank only
comes near it. The report says how near, layer by layer. The factorisation is PEFT's (``peft.tuners.lora.conversion``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.conversion import convert_to_lora as peft_convert_to_lora
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ..composition.kinds import kind_of
from ..composition.strength import at_full_strength, warn_of_strength
from ..config import RecastConfig, tasks_among
from ..errors import RecastConfigError
from ..holders import module_entries
from ..layer import recast_layers
from ..names import MODEL_PREFIX, plain_name
from ..parts.copies import plain_copy
from ..parts.lora_plan import these_modules
from ..parts.wrapper import ScaledModule
from ..planning.candidates import find_candidates
from ..planning.table import text_table
from ..storage.atomic import staged_folder
from ..validation import check_is_peft_model, check_is_task, listed


@dataclass(frozen=True)
class LayerConversion:
    """How well a LoRA of one layer reproduces what the task adds to its weight.

    Attributes:
        module: name of the target module.
        rank: rank of the LoRA.
        full_rank: the rank from which the LoRA is exact: the smaller side of the weight.
        relative_error: Frobenius norm of what is missing, in units of what the task adds.
        energy_kept: 1 - relative_error squared.
        weight_error: norm of what is missing in units of the task's composed weight.
    """

    module: str
    rank: int
    full_rank: int
    relative_error: float
    energy_kept: float
    weight_error: float


@dataclass(frozen=True)
class LoraConversionReport:
    """The errors of a conversion; ``print(report)`` shows them as a table.

    Attributes:
        layers: one row for each target module.
        recast_numbers: trainable parameters of the task, its coefficients.
        lora_numbers: parameters of the LoRA, modules that are saved whole aside.
    """

    layers: tuple[LayerConversion, ...]
    recast_numbers: int
    lora_numbers: int

    @property
    def worst_relative_error(self) -> float:
        """The largest error of a layer."""
        return max(layer.relative_error for layer in self.layers)

    @property
    def mean_relative_error(self) -> float:
        """The mean of the layers' errors."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (c.module, f"{c.rank} of {c.full_rank}", *(f"{v:.4f}" for v in (c.relative_error, c.energy_kept, c.weight_error)))
            for c in self.layers
        ]
        return text_table(("module", "rank", "error of the difference", "energy kept", "error of the weight"), rows) + (
            f"\nmean error {self.mean_relative_error:.4f}, worst {self.worst_relative_error:.4f} of what the task adds; "
            f"{self.lora_numbers} numbers in place of {self.recast_numbers}\n"
            "What a RECAST task adds to a weight has full rank in general: a LoRA is exact at full rank only."
        )


def convert_to_lora(
    model: PeftModel, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> tuple[LoraConfig, dict[str, Tensor], LoraConversionReport]:
    """Convert a task to a LoRA of the plain pretrained model; the model is not changed.

    Unlike PEFT's function of this name it names the targets of the LoRA one by one (so ``target_modules=None``, shorthands
    and exclusions of the task work), takes the task's own classifier and normalisation layers along as ``modules_to_save``,
    and reports the errors.

    Args:
        model: model with a RECAST task on linear layers and exact banks.
        rank: rank of every layer; or a share of the energy in (0, 1], for which each layer gets the smallest rank that
            keeps it.
        adapter_name: the task.
        progressbar: show a progress bar over the layers.

    Returns:
        the LoRA's config, its state dict as a file holds it, and the errors.

    Raises:
        RecastConfigError: if the rank or the task cannot be used, or the task has modules that no LoRA describes.
    """
    check_is_peft_model(model)
    tasks = tasks_among(model.peft_config)
    check_is_task(adapter_name, tasks)
    config = tasks[adapter_name]
    layers = {n: layer for n, layer in recast_layers(model).items() if adapter_name in layer.recast_coefficients}
    unfit = [name for name, layer in layers.items() if not layer.supports_lora_conversion(adapter_name)]
    if config.lora_config is not None:
        raise _no_lora(adapter_name, "a LoRA part beside its coefficients, and no one rank describes both")
    if config.partners:
        raise _no_lora(adapter_name, f"the partners {', '.join(p.method for p in cast(Any, config.partners))}")
    if config.bias != "none":
        raise _no_lora(adapter_name, f"biases of its own (bias={config.bias!r})")
    if unfit:
        raise _no_lora(adapter_name, f"{len(unfit)} of {len(layers)} modules on no exact banks or not linear ({listed(unfit)})")
    _check_rank(rank, min(min(layer.weight_shape) for layer in layers.values()))
    owned = _owned_modules(model, adapter_name)
    warn_of_strength(model, adapter_name, "the LoRA", stacklevel=3)
    seen: Any = _WeightsAlone(model, adapter_name, sorted(layers))
    with at_full_strength(model):
        lora_config, state = peft_convert_to_lora(seen, rank, adapter_name, progressbar)
        measured = tuple(_measure(name, layer, adapter_name, state) for name, layer in layers.items())
    lora_config.target_modules = these_modules(sorted(layers), find_candidates(model.get_base_model()))
    lora_config.modules_to_save = sorted(owned) or None
    for name, module in owned.items():
        state.update({f"{MODEL_PREFIX}{e.name}": e.tensor.detach().clone() for e in module_entries(name, module)})
    report = LoraConversionReport(
        measured,
        sum({id(p): p.numel() for p in (layer.recast_coefficients[adapter_name] for layer in layers.values())}.values()),
        sum(value.numel() for key, value in state.items() if ".lora_" in key),
    )
    return lora_config, state, report


def save_as_lora(
    path: str | os.PathLike, model: PeftModel, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> LoraConversionReport:
    """Write a task as a LoRA that PEFT and LoRA servers load; see ``convert_to_lora`` for what can be converted.

    Args:
        path: folder of the LoRA, made if missing.
        model: model with a RECAST task on linear layers and exact banks; it is not changed.
        rank: as for ``convert_to_lora``.
        adapter_name: name of the task.
        progressbar: show a progress bar over the layers.

    Returns:
        the errors, which are also written to ``conversion.txt`` beside the LoRA.

    Raises:
        RecastConfigError: as ``convert_to_lora``; nothing is written then.
    """
    lora_config, state, report = convert_to_lora(model, rank, adapter_name, progressbar)
    with staged_folder(path) as folder:
        save_file({key: value.cpu().contiguous() for key, value in state.items()}, folder / SAFETENSORS_WEIGHTS_NAME)
        lora_config.save_pretrained(str(folder))
        (folder / "conversion.txt").write_text(f"{report}\n", encoding="utf-8")
    return report


def _no_lora(task: str, has: str) -> RecastConfigError:
    return RecastConfigError(
        f"task {task!r} cannot be converted to a LoRA: it has {has}. Keep it as a RECAST task, or, if "
        "all that it has can be merged, export the whole model (model.merge_and_unload())."
    )


def _check_rank(rank: int | float, full_rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise RecastConfigError(f"rank={rank!r}: expected a whole number, or a share of the energy in (0, 1]")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise RecastConfigError(f"rank={rank!r}: a share of the energy lies in (0, 1]; a rank is a whole number")
    if isinstance(rank, int) and not 1 <= rank <= full_rank:
        raise RecastConfigError(f"rank={rank!r}: expected 1 to {full_rank}, the full rank of the smallest target")


class _WeightsAlone:
    """A model as PEFT's conversion is to see it: targets by name, without what tasks have beside weights, which it refuses."""

    def __init__(self, model: PeftModel, adapter_name: str, targets: list[str]) -> None:
        config, left_out = cast(RecastConfig, model.peft_config[adapter_name]), ("layers_to_transform", "layers_pattern")
        named = config.as_chosen(target_modules=targets, modules_to_save=None, **dict.fromkeys(left_out))
        self.peft_config, self._model = {adapter_name: named}, model

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """By the names of the plain model; the LoRA parts are those of other tasks."""
        named = self._model.named_modules()
        return ((plain_name(name), module) for name, module in named if not isinstance(module, (ScaledModule, LoraLayer)))

    def modules(self) -> Iterator[nn.Module]:
        return (module for _, module in self.named_modules())


def _owned_modules(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """What a task owns whole, by the names of the plain model; refused if no LoRA could put it in the place of the model's."""
    owned = {}
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            module, place = wrapper.modules_to_save[adapter_name], plain_name(name).removeprefix(MODEL_PREFIX)
            like = plain_copy(wrapper, with_numbers=False).state_dict().keys()
            if like and module.state_dict().keys() != like:  # a backbone without a classifier has nothing there
                has = f"a {type(module).__name__} at {place}, and a LoRA brings modules like the model's own alone"
                raise _no_lora(adapter_name, has)
            owned[place] = module
    return owned


def _measure(name: str, layer: Any, adapter_name: str, state: dict[str, Tensor]) -> LayerConversion:
    a, b = (state[f"{MODEL_PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
    product = b @ a
    with torch.no_grad():
        delta = cast(Tensor, layer.get_delta_weight(adapter_name)).double()
        whole = layer.compose([adapter_name]).double().norm()
    kind = kind_of(layer.get_base_layer())
    missing = (delta - (product if kind is None else kind.as_matrix(product))).norm()
    relative = float(missing / delta.norm()) if delta.any() else 0.0
    return LayerConversion(name, a.shape[0], min(delta.shape), relative, 1 - relative**2, float(missing / whole))
