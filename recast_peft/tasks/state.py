"""A task's tensors: gathered from the modules that hold them, under the names of the plain model, and put back the same way.

PEFT hands a model's whole state dict over and takes one back; it finds an adapter by looking for its name in the keys. Here the
modules are asked what they hold (``TaskHolder.entries``), and PEFT's state dict serves for the values alone, where they were
gathered from several processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config import RecastConfig, tasks_among
from ..errors import RecastConfigError
from ..holders import Entry, container_key, held_entries, holders, plain_modules, unwrapped, unwrapped_module
from ..layer import RecastLayer
from ..names import MODEL_PREFIX, modules_of, plain_name, without_wrappers
from ..parts import PARTS
from ..parts.base_biases import biased_modules
from ..parts.wrapper import TaskModule
from ..placement.offloaded import end_offloading, is_offloaded
from ..placement.sharded import is_plain, is_sharded, whole
from ..planning.heads import modules_by


def backbone_of(model: nn.Module) -> nn.Module:
    """The backbone in a ``PeftModel``, whatever is around it (FSDP, ``torch.compile``); any other model itself."""
    inner = unwrapped(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else model


def task_entries(model: nn.Module, adapter_name: str, config: RecastConfig) -> dict[str, Entry]:
    """All tensors of a task by the names that its file has; what several modules share is listed for each of them.

    ``RecastError`` if something that the task owns is no longer in the model.
    """
    backbone = backbone_of(model)
    entries = {entry.key: entry for part in PARTS for entry in part.entries(backbone, adapter_name, config)}
    return {**entries, **{entry.key: entry for entry in held_entries(backbone, adapter_name)}}


def gathered(model: nn.Module, adapter_name: str, config: RecastConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task's tensors as its file holds them.

    Values come from ``state_dict``, where they were gathered from several processes; what it lacks is taken from the model.

    Raises:
        RecastConfigError: if it holds something, but nothing of the task.
    """
    given = {_within(key): value for key, value in state_dict.items()}
    paths = {id(module): path for path, module in model.named_modules()}
    entries = task_entries(model, adapter_name, config)
    keys = {key: _within(f"{paths.get(id(entry.module), '')}.{entry.attribute}") for key, entry in entries.items()}
    is_none_of_it = given and keys and given.keys().isdisjoint(keys.values())
    # of the model's own state dict PEFT leaves out what it takes for another task's, by its name
    if is_none_of_it and not state_dict.keys() <= model.state_dict().keys():
        raise RecastConfigError(
            f"state_dict holds nothing of task {adapter_name!r}, so that other numbers than its own would be saved\n"
            f"  given:    {', '.join(list(state_dict)[:2])}, ...\n  expected: {next(iter(keys.values()))}, ...\n"
            "Give the state dict of this very model, or leave it out to save the numbers that the model has."
        )
    tensors = {}
    for key, entry in entries.items():
        value, own = given.get(keys[key]), entry.tensor
        is_own_shard = value is not None and is_sharded(own) and value.data_ptr() == own.data_ptr()
        if value is None or value.is_meta or is_own_shard:  # offloaded, or not gathered
            value = own
        tensors[entry.file_key] = entry.stored(whole(value))
    return tensors


def _within(key: str) -> str:
    """A key of a state dict as the backbone has it, whatever is around that."""
    return without_wrappers(key).removeprefix(f"module.{MODEL_PREFIX}").removeprefix(MODEL_PREFIX)


def check_base_weights(model: Any, state_dict: Mapping[str, Tensor], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    """Look at the weights and biases below tasks in a state dict that is about to be loaded into a whole model.

    A hook of the backbone, which is the same model with a tuner around it or without one. torch's ``metadata`` says whether
    tensors take the places of the model's, also where these hold no numbers.

    Layers and banks learn that their weight is about to be another one. A state dict that was made while tasks were merged
    holds the merged weights in the place of the pretrained ones.

    Raises:
        RecastConfigError: if tasks are merged in the model, and what is loaded is another weight or bias than lies there.
    """
    if not any(".base_layer." in key for key in state_dict):
        return
    is_assigned = metadata.get("assign_to_params_buffers", False)
    is_emptied = any(layer.is_emptied for layer in modules_of(model, RecastLayer))
    paths = {id(module): path for path, module in model.named_modules()}
    names = {id(unwrapped_module(module)): name for name, module in plain_modules(model).items()}
    written = {holder: list(holder.merged_into()) for holder in holders(model)}
    is_merged = any(holder.merged for holder, parameters in written.items() if parameters)
    chosen = {"none"} if is_merged else {getattr(config, "bias", "none") for config in model.peft_config.values()}
    trained = {id(module) for bias in chosen for _, module in biased_modules(model, bias)}  # they may well be others
    brought = [
        (module, name, given)
        for module, name in dict.fromkeys(chain.from_iterable(written.values()))
        if (given := state_dict.get(f"{prefix}{paths.get(id(module))}.{name}")) is not None
        and (name != "bias" or id(module) not in trained)
    ]
    others = {(m, name): m._parameters[name] for m, name, t in brought if _is_another(m._parameters.get(name), t, is_assigned)}
    differ = list(dict.fromkeys(names.get(id(m), name) for (m, name), own in others.items() if not (is_emptied or own.is_meta)))
    found = ", ".join(differ[:2])
    what = f"the state dict has other weights or biases than the model at {len(differ)} modules with tasks ({found}, ...)"
    if differ and is_merged:
        raise RecastConfigError(f"{what}, where tasks are merged: call unmerge_adapter(), load, and merge again")
    if differ:
        warnings.warn(
            f"{what}: it belongs to other pretrained weights, or was made while tasks were merged, which then count twice. "
            "Call unmerge_adapter() before state_dict().",
            stacklevel=2,
        )
    for layer in modules_of(model, RecastLayer):
        layer.is_emptied &= not brought
        layer.has_loaded |= bool(brought)  # but for biases that tasks train, which files of tasks hold too
        if any(place in others for place in layer.merged_into()):
            layer.forget_fingerprint()
            for bank in layer.recast_bank.values():
                bank.is_outdated = True


def _is_another(own: Tensor | None, given: Tensor, is_assigned: bool) -> bool:
    """Whether what a state dict holds takes the place of other numbers, or of none."""
    if own is None or own.shape != given.shape or not is_plain(own):
        return False
    return (is_assigned and not given.is_meta) if own.is_meta else not torch.equal(given.to(own), own)


def keep_numbers(tuner: Any, adapter_name: str, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Put an adapter's own numbers into a state dict that is about to be loaded into a whole model, so that they stay.

    ``prefix`` is that of the tuner's keys in it.
    """
    paths = {id(module): path for path, module in tuner.named_modules()}
    for entry in held_entries(tuner.model, adapter_name):
        key = f"{prefix}{paths.get(id(entry.module))}.{entry.attribute}"
        if key in state_dict:
            state_dict[key] = entry.tensor
    for wrapper in modules_of(tuner, TaskModule):  # whole modules may be there in one of the two alone, or be larger
        place = f"{prefix}{paths[id(wrapper)]}.modules_to_save.{container_key(adapter_name)}."
        for key in [key for key in state_dict if key.startswith(place)]:
            del state_dict[key]
        own = wrapper.modules_to_save[adapter_name] if adapter_name in wrapper.modules_to_save else nn.Module()
        state_dict.update(own.state_dict(prefix=place, keep_vars=True))


def trained_outside_tasks(model: nn.Module) -> list[str]:
    """The pretrained model's own parameters that are trained and stored with no task, by their names in the plain model.

    Biases that a config chooses (``bias=``) are stored, and PEFT stores embeddings.
    """
    backbone = backbone_of(model)
    stored = {id(parameter) for parameter in shared_entries(model).values()}
    for config in getattr(backbone, "peft_config", {}).values():  # gone once the model is unloaded
        chosen = getattr(config, "bias", "none")
        if chosen != "none" and not isinstance(config, RecastConfig):
            chosen = "all"
        stored.update(id(module._parameters["bias"]) for _, module in biased_modules(backbone, chosen))
    return [
        f"{name}.{key}"
        for name, present in {"": backbone, **plain_modules(backbone)}.items()
        for key, parameter in unwrapped_module(present)._parameters.items()
        if parameter is not None and parameter.requires_grad and id(parameter) not in stored
    ]


@torch.inference_mode(False)
def keep_trained(backbone: Any) -> None:
    """Put what is trained of tasks where it computes, if it is offloaded: no optimizer would find it elsewhere, and each call
    would put another parameter in its place."""
    offloaded = (module._parameters.values() for module in backbone.modules() if is_offloaded(module))
    if not any(held is not None and held.requires_grad for held in chain.from_iterable(offloaded)):
        return  # at every call but the first, which what all tasks have would be asked for
    for name, config in tasks_among(backbone.peft_config).items():
        for entry in task_entries(backbone, name, config).values():
            held = entry.module._parameters.get(entry.attribute)
            if held is not None and held.requires_grad:
                end_offloading(entry.module)


def put_in(model: nn.Module, entries: Mapping[str, Entry], values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a task's tensors into the modules that hold them.

    Returns:
        the tensors by the model's own keys: a state dict that changes nothing, for PEFT to go on with.
    """
    for key, entry in entries.items():
        if key in values:
            entry.write(values[key])
    written = {entry.identity for entry in entries.values()}
    return {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in written}


def shared_entries(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of the base that PEFT stores once its vocabulary was resized: the embeddings, by the names of a file."""
    backbone = backbone_of(model)
    found: dict[str, Tensor] = {}
    embeddings = (*modules_by(backbone, "get_input_embeddings"), *modules_by(backbone, "get_output_embeddings"))
    for name, module in backbone.named_modules() if embeddings else ():
        if module in embeddings:
            found.update({f"{MODEL_PREFIX}{plain_name(f'{name}.{key}')}": p for key, p in module.named_parameters()})
    return found
