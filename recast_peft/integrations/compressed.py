"""Compressed models as files of their own: the bank and the rest of the backbone, without the weights that were released.

A task file and the pretrained model give a compressed model back, but on disk that is the whole pretrained model. Stored by
``save_compressed_model`` it is as small on disk as in memory, and is loaded without the pretrained weights.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..auto import get_recast_model
from ..banks.files import StoredBank, load_bank
from ..banks.grown_bank import GrownBank
from ..banks.template_bank import PLACEHOLDER
from ..config import RecastConfig
from ..errors import RecastBankError, RecastLoadError
from ..layer import recast_layers
from ..names import BANK_CONTAINER, PREFIX, plain_name
from ..tasks.banks import stored_bank_of

REST_WEIGHTS = "recast_backbone.safetensors"


def save_compressed_model(model: PeftModel, path: str | Path, adapter_name: str | None = None) -> StoredBank:
    """Store the compressed backbone of a converted model; its tasks are saved with ``model.save_pretrained`` as ever.

    Args:
        model: as ``get_recast_model`` returns it.
        path: a folder, made if missing.
        adapter_name: the task whose banks are meant; None means the active one.

    Returns:
        the stored bank, under the folder's name.

    Raises:
        RecastBankError: if no bank is compressed, a bank was grown, or a task is merged.
    """
    layers = recast_layers(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RecastBankError(f"a task is merged into {merged[0]}: call model.unmerge_adapter() before the model is saved")
    grown = [name for name, layer in layers.items() if any(isinstance(b, GrownBank) for b in layer.recast_bank.values())]
    if grown:
        raise RecastBankError(
            f"the bank of {grown[0]} adds to the pretrained weights, so the model has no compressed form: save the bank "
            "with model.save_bank(folder) and the tasks with model.save_pretrained(folder)"
        )
    bank = stored_bank_of(model, adapter_name or model.active_adapter).save(path)
    replaced = {
        f"{layer.module_name}.{layer.weight_name}" for layer in layers.values() if layer.is_compressed and not layer.is_released
    }
    rest: dict[str, Tensor] = {}
    tied: dict[str, str] = {}  # a name whose tensor stands in the file under another one
    stored: dict[tuple, str] = {}
    for key, value in model.get_base_model().state_dict().items():
        name = plain_name(key)
        if f".{PREFIX}" in key or key.startswith(f"{BANK_CONTAINER}.") or ".modules_to_save." in key or name in replaced:
            continue
        place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,)
        if place in stored:
            tied[name] = stored[place]
            continue
        stored[place] = name
        rest[name] = value.detach().cpu().contiguous().clone()  # parts of one storage are stored one by one
    save_file(rest, Path(path) / REST_WEIGHTS, metadata={"format": "pt", "tied": json.dumps(tied)})
    return bank


def load_compressed_model(
    backbone: nn.Module, path: str | Path, config: RecastConfig | None = None, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Build a converted model from what ``save_compressed_model`` stored, without the pretrained weights.

    Args:
        backbone: a model of the same architecture with any weights. On the meta device (``with torch.device("meta")``, or
            ``accelerate.init_empty_weights()``, which keeps buffers that are not stored) no memory is spent on weights that
            are not needed.
        path: the folder.
        config: config of the first task; its bank is set. None means ``RecastConfig()``.
        adapter_name: name of the first task.
        kwargs: passed on to ``get_recast_model``.

    Raises:
        RecastLoadError: if the files are damaged or do not fit, or a tensor of the backbone stays without numbers.
    """
    bank = load_bank(path)
    try:
        with safe_open(Path(path) / REST_WEIGHTS, framework="pt") as file:
            rest = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            rest.update({name: rest[other] for name, other in json.loads(file.metadata()["tied"]).items()})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RecastLoadError(f"{REST_WEIGHTS} in {str(path)!r} cannot be read: {error}") from error
    released = {}
    for group in bank.groups.values():
        if group.templates is not None:
            released.update(dict.fromkeys(group.members, group.templates))
    parameters = {name: parameter for name, parameter in backbone.named_parameters() if name not in rest}
    for name in parameters:
        module_name, _, weight_name = name.rpartition(".")
        if module_name not in released or weight_name not in ("weight", "in_proj_weight"):
            raise RecastLoadError(f"{str(path)!r} has no {name}: it was made from another architecture")
        templates = released[module_name]
        if templates.shape[1:] != parameters[name].shape:
            raise RecastLoadError(
                f"{name} has another shape\n  stored: {tuple(templates.shape[1:])}\n  model:  {tuple(parameters[name].shape)}"
            )
        empty = nn.Parameter(torch.zeros((), dtype=templates.dtype).expand(templates.shape[1:]), requires_grad=False)
        setattr(empty, PLACEHOLDER, bank.base_fingerprint.get(module_name, ""))
        backbone.get_submodule(module_name)._parameters[weight_name] = empty
    try:
        backbone.load_state_dict(rest, strict=False, assign=True)
    except RuntimeError as error:
        raise RecastLoadError(f"{str(path)!r} does not fit the backbone: {error}") from error
    if hasattr(backbone, "tie_weights"):
        backbone.tie_weights()  # type: ignore[operator]
    empty_names = [n for n, t in (*backbone.named_parameters(), *backbone.named_buffers()) if t.is_meta]
    if empty_names:
        raise RecastLoadError(
            f"{', '.join(empty_names[:3])} of the backbone hold no numbers and are not stored: build it with "
            "accelerate.init_empty_weights(), which keeps such buffers, or without the meta device"
        )
    config = RecastConfig() if config is None else copy.deepcopy(config)
    config.bank = bank  # type: ignore[assignment]
    config.keep_base_weights = False
    return get_recast_model(backbone, config, adapter_name, **kwargs)
