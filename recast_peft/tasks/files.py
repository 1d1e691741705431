"""What must hold of a task's file before a model is touched, and when its numbers are put in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from ..config import RecastConfig
from ..errors import RecastError, RecastLoadError
from ..names import COEFFICIENTS, MODEL_PREFIX, plain_name

if TYPE_CHECKING:
    from ..planning.plan import RecastPlan


def check_task_file(
    model: nn.Module, config: RecastConfig, plan: RecastPlan, own: dict[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor] | None:
    """Check the file of coefficients of a config that was read from a saved task, before the model is touched.

    Does nothing for a config that was not read by ``from_pretrained``, or that belongs to no saved task.

    Args:
        model: as it is before the task.
        config: of the task.
        plan: what it targets.
        own: shapes of what the task brings beside its coefficients (its head), by the names of the plain model.

    Returns:
        the file's entries, or None if there is no file to check.

    Raises:
        RecastLoadError: if the file cannot be read, or entries are missing, unexpected, wrongly shaped or not finite.
    """
    if config.record is None or config.record.origin is None:
        return None
    folder, hub_kwargs = config.record.origin
    try:
        entries = load_peft_weights(folder, device="cpu", **hub_kwargs)
    except RecastError:
        raise
    except Exception as error:
        raise RecastLoadError(f"the coefficients of the task at {folder!r} cannot be read: {error}") from error
    required: dict[str, tuple[int, ...]] = {
        f"{MODEL_PREFIX}{member}.{COEFFICIENTS}": (group.num_coefficient_sets, group.num_templates)
        for group in plan.groups
        for member in group.members
    }
    plain = {
        f"{MODEL_PREFIX}{plain_name(key)}": tuple(value.shape)
        for key, value in model.state_dict().items()
        if ".modules_to_save." not in key
    }
    for name in config.modules_to_save or ():
        inside = re.compile(rf"^{re.escape(MODEL_PREFIX)}(.*\.)?{re.escape(name)}\.")
        required.update({key: shape for key, shape in plain.items() if inside.match(key)})
    required.update({f"{MODEL_PREFIX}{key}": shape for key, shape in (own or {}).items()})
    given = {plain_name(key): value for key, value in entries.items()}
    known = {**plain, **required}
    may_hold = _shared_parts(model, config)  # anything else of the base would be overwritten for every task
    unexpected = [key for key in given if key not in required and not (key in plain and may_hold.search(key))]
    raise_if_damaged(f"the task at {folder!r}", [key for key in required if key not in given], unexpected, given, known)
    return given


def _shared_parts(model: nn.Module, config: RecastConfig) -> re.Pattern[str]:
    """Parameters of the base that PEFT stores with a task: its biases if asked for, and its embeddings once resized."""
    patterns = [] if config.bias == "none" else [r"(^|[._])bias$"]
    for method in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, method)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        names = [plain_name(name) for name, m in model.named_modules() if m is module and module is not None]
        patterns += [rf"^{re.escape(MODEL_PREFIX + name)}\." for name in names]
    return re.compile("|".join(patterns) or r"(?!)")


def check_state_dict(model: nn.Module, adapter_name: str, entries: dict[str, Tensor], others: Sequence[str] = ()) -> None:
    """Check what is about to be put into a model that has the task's layers already.

    Args:
        model: the model, with or without PEFT's wrapper around it.
        adapter_name: the task.
        entries: tensors by the model's own keys.
        others: keys that the task needs beside its coefficients.

    Raises:
        RecastLoadError: if entries are missing, unexpected, wrongly shaped or not finite.
    """
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wanted = [*(key for key in own if key.endswith(f".{COEFFICIENTS}.{adapter_name}")), *others]
    given = {key if key in own else key.removeprefix(MODEL_PREFIX): value for key, value in entries.items()}
    # a module that is reached by several names (timm's CoaT shares MLPs) is stored by one of them
    identity = {key: id(parameter) for key, parameter in model.named_parameters(remove_duplicate=False)}
    filled = {identity[key] for key in given if key in identity}
    missing = [key for key in wanted if key not in given and identity[key] not in filled]
    unexpected = [key for key in given if key not in own]
    raise_if_damaged(f"task {adapter_name!r}", missing, unexpected, given, own)


def raise_if_damaged(
    what: str,
    missing: list[str],
    unexpected: list[str],
    given: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Raise a RecastLoadError that lists what is wrong with a task's entries; return if nothing is.

    Args:
        what: is being read.
        missing: names that should be there.
        unexpected: names that should not.
        given: the entries by name.
        shapes: that they should have.
    """
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
