"""Compressed models as files of their own: the bank and the rest of the backbone, without the weights that were released.

A task file and the pretrained model give a compressed model back, but on disk that is the whole pretrained model. Stored by
``save_compressed_model`` it is as small on disk as in memory, and is loaded without the pretrained weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..auto import get_recast_model
from ..banks.card import BANK_WEIGHTS, REST_WEIGHTS
from ..banks.files import StoredBank, load_bank
from ..banks.template_bank import PLACEHOLDER, BankBeside
from ..config import RecastConfig, checked_config
from ..errors import RecastBankError, RecastConfigError, RecastLoadError
from ..layer import recast_layers
from ..names import BANK_CONTAINER, PREFIX, plain_name
from ..storage.json_reader import parse_json
from ..storage.pairs import TRIES, companion_of, staged_pairs
from ..storage.tensors import FLOATING, TensorFile, checksum, read_tensors, write_tensors
from ..tasks.banks import stored_bank
from ..tasks.undo import undone_on_failure
from ..validation import a_path, check_arguments

BANK = "recast_bank_checksum"  # the entry of its metadata that says which bank it belongs to


def save_compressed_model(model: PeftModel, path: str | Path, adapter_name: str | None = None) -> StoredBank:
    """Store the compressed backbone of a converted model; its tasks are saved with ``model.save_pretrained`` as ever.

    Args:
        model: as ``get_recast_model`` returns it.
        path: a folder, made if missing.
        adapter_name: the task whose banks are meant; None means the active one.

    Returns:
        the stored bank, under the folder's name.

    Raises:
        RecastConfigError: if the model is not converted, or has no such task.
        RecastBankError: if no bank is compressed, a bank was grown, or a task is merged.
    """
    layers = recast_layers(model)
    if not layers:
        raise RecastConfigError("the model has no RECAST layers: convert it with get_recast_model first")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RecastBankError(f"a task is merged into {merged[0]}: call model.unmerge_adapter() before the model is saved")
    grown = [name for name, layer in layers.items() if any(isinstance(b, BankBeside) for b in layer.recast_bank.values())]
    if grown:
        raise RecastBankError(
            f"the bank of {grown[0]} adds to the pretrained weights, so the model has no compressed form: save the bank "
            "with model.save_bank(folder) and the tasks with model.save_pretrained(folder)"
        )
    bank = stored_bank(model.base_model, adapter_name, "weights")
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
    with staged_pairs(path, {BANK_WEIGHTS: REST_WEIGHTS}) as folder:
        bank.save(folder)
        texts = {"tied": json.dumps(tied), BANK: checksum(bank.tensors())}
        write_tensors(folder / REST_WEIGHTS, rest, texts)
    return bank.under(str(path))


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

    Returns:
        the model, as ``get_recast_model`` returns it.

    Raises:
        RecastBankError: if the folder holds no bank.
        RecastLoadError: if the files are damaged or do not fit, or a tensor of the backbone stays without numbers.
    """
    check_arguments(a_path, path=path)
    bank, rest = _read(Path(path))
    empty = _placeholders(backbone, bank, rest, str(path))
    _check_fit(backbone, rest, {*rest, *empty}, str(path))
    config = copy.deepcopy(checked_config(config))
    config.bank = bank  # type: ignore[assignment]
    config.keep_base_weights = False
    with undone_on_failure(backbone):
        for name, parameter in empty.items():
            module_name, _, weight_name = name.rpartition(".")
            backbone.get_submodule(module_name)._parameters[weight_name] = parameter
        backbone.load_state_dict(rest, strict=False, assign=True)
        if hasattr(backbone, "tie_weights"):
            backbone.tie_weights()  # type: ignore[operator]
        return get_recast_model(backbone, config, adapter_name, **kwargs)


def _read(folder: Path) -> tuple[StoredBank, dict[str, Tensor]]:
    """The bank of a compressed model, and the rest of its backbone, both of one moment.

    Raises:
        RecastLoadError: if one of them is damaged, or they are of different models.
    """
    what = f"{REST_WEIGHTS} in {str(folder)!r}"
    for attempt in range(TRIES):
        bank = load_bank(folder)
        try:
            file = read_tensors(companion_of(folder / BANK_WEIGHTS, folder / REST_WEIGHTS), what, floating=False)
        except RecastLoadError:
            if attempt + 1 < TRIES and not (folder / REST_WEIGHTS).is_file():
                continue  # another process is just putting it in its place
            raise
        if file.metadata.get(BANK) in (None, checksum(bank.tensors())):  # files of earlier versions do not say
            return bank, _with_tied(file, what)
    raise RecastLoadError(
        f"{what} belongs to another bank than the one beside it\n  checksum of its bank: {file.metadata.get(BANK)}\n"
        f"  bank beside it:       {checksum(bank.tensors())}\nStore the compressed model again; nothing was loaded."
    )


def _with_tied(file: TensorFile, what: str) -> dict[str, Tensor]:
    tied = parse_json(file.metadata.get("tied", "{}"), f"'tied' of {what}")
    for name in tied:
        if name in file.tensors or tied.text(name) not in file.tensors:
            raise RecastLoadError(f"{what} ties {name!r} to {tied[name]!r}, which it does not hold. Fetch it again.")
    return {**file.tensors, **{name: file.tensors[tied[name]] for name in tied}}


def _placeholders(backbone: nn.Module, bank: StoredBank, rest: Mapping[str, Tensor], path: str) -> dict[str, nn.Parameter]:
    """Parameters without memory of their own for the weights that the bank stands for, by name; nothing is changed."""
    fitted = [(group.members, group.templates) for group in bank.groups.values() if group.templates is not None]
    released = {member: templates for members, templates in fitted for member in members}
    empty = {}
    for name, parameter in backbone.named_parameters():
        if name in rest:
            continue
        module_name, _, weight_name = name.rpartition(".")
        if module_name not in released or weight_name not in ("weight", "in_proj_weight"):
            raise RecastLoadError(f"{path!r} has no {name}: it was made from another architecture")
        templates = released[module_name]
        if templates.shape[1:] != parameter.shape:
            raise RecastLoadError(
                f"{name} has another shape\n  stored: {tuple(templates.shape[1:])}\n  model:  {tuple(parameter.shape)}"
            )
        empty[name] = nn.Parameter(torch.zeros((), dtype=templates.dtype).expand(templates.shape[1:]), requires_grad=False)
        setattr(empty[name], PLACEHOLDER, bank.base_fingerprint.get(module_name, ""))
    return empty


def _check_fit(backbone: nn.Module, rest: Mapping[str, Tensor], filled: set[str], path: str) -> None:
    """Refuse what does not fit the backbone, before it is touched."""
    own = backbone.state_dict()
    unknown = sorted(set(rest) - set(own))
    if unknown:
        raise RecastLoadError(f"{path!r} does not fit the backbone, which has no {unknown[0]} (and {len(unknown) - 1} others)")
    for name, tensor in rest.items():
        is_number = tensor.dtype in FLOATING if own[name].is_floating_point() else not tensor.is_floating_point()
        if tensor.shape != own[name].shape or not is_number:
            raise RecastLoadError(
                f"{path!r} does not fit the backbone: {name}\n  stored: {tuple(tensor.shape)}, {tensor.dtype}\n"
                f"  model:  {tuple(own[name].shape)}, {own[name].dtype}"
            )
    held = (*backbone.named_parameters(), *backbone.named_buffers())
    hollow = [name for name, tensor in held if tensor.is_meta and name not in filled]
    if hollow:
        raise RecastLoadError(
            f"{', '.join(hollow[:3])} of the backbone hold no numbers and are not stored: build it with "
            "accelerate.init_empty_weights(), which keeps such buffers, or without the meta device"
        )
