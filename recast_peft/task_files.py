"""What must hold of a task's file before a model is touched, and when its numbers are put in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from .config import RecastConfig
from .errors import RecastError, RecastLoadError
from .registration import PREFIX

if TYPE_CHECKING:
    from .plan import RecastPlan

COEFFICIENTS = f"{PREFIX}coefficients"
MODEL_PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """A module's name in the plain model: without what PEFT and wrappers put in.

    >>> plain_name("attn.base_layer.out_proj")
    'attn.out_proj'
    """
    return re.sub(r"(^|\.)(base_layer|original_module|_fsdp_wrapped_module|_orig_mod)(?=\.|$)", "", name).removeprefix(".")


def check_task_file(model: nn.Module, config: RecastConfig, plan: RecastPlan) -> dict[str, Tensor] | None:
    """Check the file of coefficients of a config that was read from a saved task, before the model is touched.

    Does nothing for a config that was not read by ``from_pretrained``, or that belongs to no saved task.

    Returns:
        the file's entries, or None if there is no file to check.

    Raises:
        RecastLoadError: if the file cannot be read, or entries are missing, unexpected, wrongly shaped or not finite.
    """
    origin = config.__dict__.pop("_origin", None)
    if origin is None or config.groups is None:
        return None
    folder, hub_kwargs = origin
    try:
        entries = load_peft_weights(folder, device="cpu", **hub_kwargs)
    except RecastError:
        raise
    except Exception as error:
        raise RecastLoadError(f"the coefficients of the task at {folder!r} cannot be read: {error}") from error
    expected = {
        f"{MODEL_PREFIX}{member}.{COEFFICIENTS}": (group.num_coefficient_sets, group.num_templates)
        for group in plan.groups
        for member in group.members
    }
    plain = {
        f"{MODEL_PREFIX}{plain_name(key)}": tuple(value.shape)
        for key, value in model.state_dict().items()
        if ".modules_to_save." not in key
    }
    required = dict(expected)
    for name in config.modules_to_save or ():
        inside = re.compile(rf"^{re.escape(MODEL_PREFIX)}(.*\.)?{re.escape(name)}\.")
        required.update({key: shape for key, shape in plain.items() if inside.match(key)})
    given = {plain_name(key): value for key, value in entries.items()}
    known = {**plain, **required}
    unexpected = [key for key in given if key not in known]
    _raise_if_damaged(f"the task at {folder!r}", [key for key in required if key not in given], unexpected, given, known)
    return given


def check_state_dict(model: nn.Module, adapter_name: str, entries: dict[str, Tensor]) -> None:
    """Check what is about to be put into a model that has the task's layers already.

    Args:
        model: the model, with or without PEFT's wrapper around it.
        adapter_name: the task.
        entries: tensors by the model's own keys.

    Raises:
        RecastLoadError: if entries are missing, unexpected, wrongly shaped or not finite.
    """
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wanted = [key for key in own if key.endswith(f".{COEFFICIENTS}.{adapter_name}")]
    given = {key if key in own else key.removeprefix(MODEL_PREFIX): value for key, value in entries.items()}
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in own]
    _raise_if_damaged(f"task {adapter_name!r}", missing, unexpected, given, own)


def _raise_if_damaged(
    what: str,
    missing: list[str],
    unexpected: list[str],
    given: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    misshaped = [
        f"{key}: {tuple(value.shape)} given, {shapes[key]} expected"
        for key, value in given.items()
        if key in shapes and tuple(value.shape) != shapes[key]
    ]
    broken = [k for k, v in given.items() if v.is_floating_point() and not v.is_meta and not torch.isfinite(v).all()]
    lists = {"missing": missing, "unexpected": unexpected, "wrongly shaped": misshaped, "not finite": broken}
    found = {kind: entries for kind, entries in lists.items() if entries}
    if not found:
        return
    lines = []
    for kind, entries in found.items():
        more = f", ... ({len(entries)} in all)" if len(entries) > 4 else ""
        lines.append(f"  {kind}: {', '.join(entries[:4])}{more}")
    raise RecastLoadError(
        f"{what} does not fit the model:\n" + "\n".join(lines) + "\nNothing was loaded. Fetch the file again, or load it on "
        "the architecture and with the groups that it was made for."
    )
