"""What must hold of a task's file before a model is touched, and how its tensors are put in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from ..config import RecastConfig
from ..errors import RecastConfigError, RecastError, RecastLoadError
from ..holders import Entry
from ..layer import RecastLayer
from ..names import COEFFICIENTS, MODEL_PREFIX, PARTNER_CONTAINER, entry_key, modules_of, place_key, plain_name, spellings
from ..parts.base_biases import biased_modules
from ..planning.plan import RecastPlan
from ..storage.tensors import FLOATING, outliers, read_tensors
from ..storage.transfer import fetch_file
from ..validation import shown
from .state import backbone_of, put_in, shared_entries, task_entries
from .verbs import merged_tasks

Shapes = Mapping[str, tuple[int, ...]]
SAVED_PARTNERS = "recast_partners"  # the entry of a file's metadata: of some partners it holds no numbers that could be missed


def check_task_file(model: nn.Module, config: RecastConfig, plan: RecastPlan, own: Shapes) -> dict[str, Tensor] | None:
    """Check the file of a config that ``from_pretrained`` read from a saved task, before the model is touched.

    ``own`` has the shapes of what the task brings beside its coefficients, by the names of the plain model.

    Returns:
        the file's entries; None for any other config, which has no file to check.

    Raises:
        RecastLoadError: if the file cannot be read, or entries are missing, unexpected, wrongly shaped, of another kind of
            number or not finite.
    """
    record = config.record
    if record is None or record.origin is None:
        return None
    folder, hub_kwargs = record.origin
    what = f"the task at {folder!r}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{MODEL_PREFIX}{member}.{COEFFICIENTS}": (group.num_coefficient_sets, group.num_templates)
        for group in plan.groups
        for member in group.members
    }
    shapes.update({f"{MODEL_PREFIX}{key}": shape for key, shape in own.items()})
    optional = _of_the_base(model, config.bias, plan.targets)
    known = {**shapes, **optional}
    entries = read_entries(folder, hub_kwargs, what, config)
    given = _by_key(entries, known, record.renamed)
    check_entries(what, given, shapes, optional)
    for key, value in outliers({key: tensor for key, tensor in given.items() if COEFFICIENTS in key}).items():
        warnings.warn(
            f"{what} holds a coefficient of {value:.4g} in {key}: no task that was trained has one as large as that. The file "
            "may be damaged; fetch it again.",
            stacklevel=2,
        )
    return given


def read_entries(folder: str, hub_kwargs: Mapping[str, Any], what: str, config: RecastConfig) -> dict[str, Tensor]:
    """The entries of a task's file, whose checksum is looked at.

    It lies in a folder, or in a repository on the Hub (``hub_kwargs``); messages call it ``what``.

    Raises:
        RecastLoadError: if it cannot be read, its numbers are not those that were written, or the config names other partners
            than the task was saved with.
    """
    given = {key: value for key, value in hub_kwargs.items() if key != "subfolder"}
    try:
        path = fetch_file(folder, SAFETENSORS_WEIGHTS_NAME, hub_kwargs.get("subfolder"), given)
    except RecastError:
        task = Path(folder, hub_kwargs.get("subfolder") or "")
        if task.is_dir() and not (task / WEIGHTS_NAME).is_file():
            raise RecastLoadError(
                f"{what} cannot be read: its numbers are missing, there is no {SAFETENSORS_WEIGHTS_NAME} in its folder. Copy "
                "the whole folder, or save the task again."
            ) from None
    else:
        content = read_tensors(path, what, floating=False, finite=False)  # masks are bits; check_entries says more
        named = ", ".join(sorted(partner.method for partner in config.partners or ()))  # type: ignore[union-attr]
        saved = content.metadata.get(SAVED_PARTNERS, named)  # earlier versions wrote none
        if saved != named:
            raise RecastLoadError(
                f"{what} has other partners in its config than it was saved with\n  config:     {named or 'none'}\n"
                f"  saved with: {saved or 'none'}\nCopy the whole folder, or save the task again."
            )
        return {entry_key(key): tensor for key, tensor in content.tensors.items()}
    try:
        weights = load_peft_weights(folder, device="cpu", **hub_kwargs)  # an older format
        return {entry_key(key): tensor for key, tensor in weights.items()}
    except Exception as error:
        raise RecastLoadError(f"the coefficients of {what} cannot be read: {error}") from error


def _of_the_base(model: nn.Module, bias: str, targets: Collection[str] = ()) -> Shapes:
    """What a file may hold of the base: its biases if asked for, and embeddings, which PEFT stores once they were resized."""
    shared = {key: tuple(tensor.shape) for key, tensor in shared_entries(model).items()}
    return {**_biases(model, bias, targets), **shared}


def _biases(model: nn.Module, bias: str, targets: Collection[str] = ()) -> Shapes:
    biased = biased_modules(model, bias, targets)
    return {f"{MODEL_PREFIX}{name}.bias": tuple(module._parameters["bias"].shape) for name, module in biased}  # type: ignore


def load_into(model: nn.Module, config: RecastConfig, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put a task's entries into the modules that hold them, all or none.

    Returns:
        a state dict by the model's own keys, for PEFT to go on with.

    Raises:
        RecastLoadError: if entries are missing, unexpected, wrongly shaped, of another kind of number or not finite. A task
            that was made for this file is taken out of the model again.
        RecastConfigError: if the task is merged.
    """
    backbone = backbone_of(model)
    check_not_merged(backbone, adapter_name)
    with filling(adapter_name, getattr(getattr(model, "base_model", None), "forget_unfilled", None)):
        renamed = None if config.record is None else config.record.renamed
        entries = task_entries(model, adapter_name, config)
        optional = _of_the_base(backbone, "all")  # as PEFT takes them
        known = {**entries, **optional}
        _check_values(f"task {adapter_name!r}", state_dict, is_filled=not any(e.tensor.is_meta for e in entries.values()))
        given = _by_key(state_dict, known, renamed)
        biases = _biases(backbone, config.bias)
        # what is missing would stay what it is in the model
        needed = entries.keys() - biases.keys() if biases.keys().isdisjoint(given) else {*entries, *biases}
        optional = {key: shape for key, shape in optional.items() if key not in needed}
        wanted = _wanted(entries, given, optional)
        check_entries(f"task {adapter_name!r}", given, wanted, {**optional, **{key: e.shape for key, e in entries.items()}})
        _check_shared(f"task {adapter_name!r}", entries, given)
        values = {
            key: given[key] if entry.unpack is None else entry.unpack(given[key])
            for key, entry in entries.items()
            if key in given
        }
        written = put_in(model, entries, values)
    resized = {key: value for key, value in given.items() if key not in entries}
    own = {entry_key(plain_name(key)): key for key in model.state_dict()} if resized else {}
    return {**written, **{own[key]: value for key, value in resized.items()}}


def _check_values(what: str, state_dict: Mapping[Any, Any], is_filled: bool) -> None:
    """Refuse what is no dense tensor with numbers; ``is_filled``: the model itself has numbers, which others would replace."""
    for key, value in state_dict.items():
        odd = None
        if not isinstance(key, str):
            odd = "is no name of an entry"
        elif not isinstance(value, Tensor):
            odd = f"is {shown(value)}, no tensor"
        elif value.layout != torch.strided:
            odd = f"is a tensor of layout {value.layout}, give its to_dense()"
        elif value.is_meta and is_filled:
            odd = "is on the meta device and holds no numbers"
        if odd is not None:
            raise RecastLoadError(f"{what}: {key} {odd}. Nothing was loaded.")


@contextmanager
def filling(adapter_name: str, filled: Callable[..., None] | None) -> Iterator[None]:
    """A block that puts a task's file in; ``filled`` is called with the task's name and ``undo``: True if the block fails."""
    filled = filled or (lambda adapter_name, undo: None)
    try:
        yield
    except BaseException:
        filled(adapter_name, undo=True)
        raise
    filled(adapter_name, undo=False)


def check_not_merged(backbone: nn.Module, adapter_name: str) -> None:
    """Refuse to exchange the numbers of a task that is merged: what is merged would stay what it was.

    ``RecastConfigError`` also where an adapter of another method is merged on top of it.
    """
    held = {name for layer in modules_of(backbone, RecastLayer) for name in layer.held or ()}
    if adapter_name in {*merged_tasks(backbone), *held}:
        what = f"task {adapter_name!r} is merged" + (", or others on top of it" if adapter_name in held else "")
        raise RecastConfigError(f"{what}: call unmerge_adapter(), load, and merge again")


def _by_key(
    state_dict: Mapping[str, Tensor], known: Collection[str], renamed: Callable[[str], str | None] | None
) -> dict[str, Tensor]:
    """Entries by the keys of the model. Embeddings that a task owns, PEFT may store again with their container: those go."""
    given = {}
    for key in sorted(state_dict, key=lambda key: ".original_module." not in key):  # the task's own come last, and stay
        meant = [called(spelling, renamed) for spelling in spellings(entry_key(key))]
        given[next((one for one in meant if one in known), meant[-1])] = state_dict[key]
    return {key: value for key, value in given.items() if key in known or ".modules_to_save." not in key}


def called(key: str, renamed: Callable[[str], str | None] | None) -> str:
    """The key of an entry of a task's file as the model has it.

    ``renamed`` says how a module is called there; None: all have the names of the file.
    """
    if renamed is None:
        return key
    name = key.removeprefix(MODEL_PREFIX)
    if name.startswith(f"{PARTNER_CONTAINER}."):
        container, place, rest = name.split(".", 2)
        new = renamed(place.replace("/", "."))
        return key if new is None else f"{MODEL_PREFIX}{container}.{place_key(new)}.{rest}"
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):  # the longest beginning that is a module
        new = renamed(".".join(parts[:end]))
        if new is not None:
            return f"{MODEL_PREFIX}{'.'.join([new, *parts[end:]])}"
    return key


def _wanted(entries: Mapping[str, Entry], given: Collection[str], optional: Collection[str]) -> Shapes:
    """Shapes of the entries that a task needs; what several modules share is stored by one of their names at least."""
    filled = {entry.identity for key, entry in entries.items() if key in given}
    needed = {key: entry for key, entry in entries.items() if key not in optional}
    return {key: entry.shape for key, entry in needed.items() if key in given or entry.identity not in filled}


def _check_shared(what: str, entries: Mapping[str, Entry], given: Mapping[str, Tensor]) -> None:
    """Refuse other numbers for each of the modules that share a tensor: those of the last would be taken for all."""
    first: dict[int, str] = {}
    for key in (key for key in entries if key in given):
        other = first.setdefault(entries[key].identity, key)
        if not given[key].is_meta and not torch.equal(given[other].to(given[key]), given[key]):
            raise RecastLoadError(
                f"{what} does not fit the model: {other} and {key} are one tensor there, and the file has other numbers for "
                "each. Nothing was loaded. Fetch the file again, or load it with the coefficient_sharing that it was made for."
            )


def check_entries(what: str, given: Mapping[str, Tensor], wanted: Shapes, optional: Shapes | None = None) -> None:
    """Raise a ``RecastLoadError`` that lists what is wrong with a task's entries; return if nothing is."""
    known = {**(optional or {}), **wanted}
    misshaped = [
        f"{key}: {tuple(value.shape)} given, {tuple(known[key])} expected"
        for key, value in given.items()
        if key in known and tuple(value.shape) != tuple(known[key])
    ]
    packed = {key for key, value in given.items() if key.endswith(".mask") and value.dtype == torch.uint8}
    # a number without a dimension counts the batches that a norm has seen
    odd = [f"{k}: {v.dtype}" for k, v in given.items() if v.dtype not in FLOATING and k not in packed and v.ndim]
    broken = [k for k, v in given.items() if v.is_floating_point() and not v.is_meta and not torch.isfinite(v.float()).all()]
    lists = {
        "missing": [key for key in wanted if key not in given],
        "unexpected": [key for key in given if key not in known],
        "wrongly shaped": misshaped,
        "of another kind than floating numbers": odd,
        "not finite": broken,
    }
    lines = [
        f"  {kind}: {', '.join(entries[:4])}" + (f", ... ({len(entries)} in all)" if len(entries) > 4 else "")
        for kind, entries in lists.items()
        if entries
    ]
    if lines:
        raise RecastLoadError(
            f"{what} does not fit the model:\n" + "\n".join(lines) + "\nNothing was loaded. Fetch the file again, or load it "
            "on the architecture and with the groups that it was made for."
        )
