"""Sources of grown banks: whatever moved the pretrained weights, read and compared with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..banks.files import StoredBank
from ..errors import RecastBankError, RecastConfigError, RecastError
from ..layer import RecastLayer
from ..names import modules_of
from ..planning.candidates import Candidate
from ..validation import COUNT, check_arguments, checked_names, listed, optional

Source = str | Path | nn.Module | tuple[PeftModel, str] | Mapping[str, Tensor]
CHECKPOINTS = ("model.safetensors", "pytorch_model.safetensors")


def check_plain(model: nn.Module, verb: str) -> None:
    """Refuse a converted model, and what is no model (``RecastConfigError``)."""
    if not isinstance(model, nn.Module):
        raise RecastConfigError(f"{verb}: model is a {type(model).__name__}; an nn.Module is expected")
    if modules_of(model, RecastLayer):
        raise RecastConfigError(f"{verb} needs the plain pretrained model; this one is converted already (see model.unload())")


def check_bank(bank: StoredBank) -> None:
    """Refuse what is no bank (``RecastConfigError``)."""
    if not isinstance(bank, StoredBank):
        raise RecastConfigError(f"bank is a {type(bank).__name__}: expected a StoredBank, as load_bank(name) reads it")


def check_sources(sources: Sequence[Source], **sizes: int | None) -> None:
    """Refuse what is no list of sources, and sizes that are no whole numbers (``RecastConfigError``)."""
    is_one = isinstance(sources, (str, Path, Mapping, nn.Module, Tensor)) or not isinstance(sources, Collection)
    if is_one or not len(sources):
        given = "an empty list" if isinstance(sources, (list, tuple)) else shown_source(sources)  # type: ignore[arg-type]
        raise RecastConfigError(f"sources is {given}: expected a list with at least one source")
    check_arguments(optional(COUNT), **sizes)


def task_vectors(model: nn.Module, source: Source, targets: Mapping[str, Candidate]) -> dict[str, Tensor]:
    """How far a source moved every target's weight, ``(*weight_shape)`` in float32 by module name.

    Raises:
        RecastBankError: if the source cannot be read or does not fit the model.
    """
    vectors = moves_by_source(model, source, {n: (f"{n}.{t.weight_name}", t.weight) for n, t in targets.items()})
    if not vectors:
        raise RecastBankError(
            f"the source {shown_source(source)} has none of the target modules\n  targets: {listed(targets, 4)}"
        )
    return vectors


def moves_by_source(model: nn.Module, source: Source, parameters: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
    """How far a source moved parameters.

    Args:
        model: plain model with its pretrained weights.
        source: see ``grow_bank``.
        parameters: by module name: the parameter's name in the plain model, and its pretrained value.

    Returns:
        the difference in float32 by module name, of those that the source has.

    Raises:
        RecastBankError: if the source cannot be read or does not fit the model.
    """
    weights = _weights_of(model, source)
    vectors = {}
    for name, (key, pretrained) in parameters.items():
        moved = weights.get(key)
        if moved is None:
            continue
        if moved.shape != pretrained.shape:
            raise RecastBankError(
                f"the source {shown_source(source)} does not fit the model: {name} has another shape\n"
                f"  source: {tuple(moved.shape)}\n  model:  {tuple(pretrained.shape)}"
            )
        vectors[name] = moved.detach().float().cpu() - pretrained.detach().float().cpu()
        if not vectors[name].isfinite().all():
            raise RecastBankError(
                f"the source {shown_source(source)} holds numbers that are not finite at {name}: leave it out"
            )
    return vectors


def _weights_of(model: nn.Module, source: Source) -> Mapping[str, Tensor]:
    """A source's weights by the names of the plain model."""
    if isinstance(source, (str, Path)):
        return _stored_weights(model, str(source))
    if isinstance(source, Mapping):
        wrong = next((key for key, value in source.items() if not isinstance(value, Tensor)), None)
        if wrong is not None:
            raise RecastConfigError(f"a source holds a {type(source[wrong]).__name__} at {wrong!r}: expected tensors by name")
        return source
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], PeftModel):
        return _merged(*source)
    if isinstance(source, PeftModel):
        return _merged(source, source.active_adapters)
    if isinstance(source, nn.Module):
        return source.state_dict()
    raise RecastConfigError(
        f"a source is a {type(source).__name__}: expected an adapter (a folder, a repository, a PeftModel, or "
        "(peft_model, name)), or a fine-tuned form of the model (a module, a state dict, or a file)"
    )


def _stored_weights(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    path = Path(name)
    files = [path] if path.is_file() else [path / file for file in CHECKPOINTS if (path / file).is_file()]
    try:
        if files:
            return load_file(files[0])
        found = loaded(model, name)
    except RecastError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RecastBankError(
            f"the source {name!r} cannot be read: {error}\nExpected a saved adapter (a folder or a repository), a "
            f"safetensors file, or a folder with {CHECKPOINTS[0]}."
        ) from error
    return found.merge_and_unload().state_dict()


def loaded(model: nn.Module, name: str, adapter_name: str = "default", **options: Any) -> PeftModel:
    """A saved adapter on a copy of a plain model, or beside the adapters of a model that is one.

    A head of its own does not matter, and need not have this model's classes.

    Raises:
        RecastBankError: if something else of it has another shape, or a module that the model lacks.
    """
    options["ignore_mismatched_sizes"] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(copy.deepcopy(model), name, adapter_name, **options)
        if adapter_name not in model.peft_config or isinstance(model.peft_config[adapter_name], LoraConfig):
            # of a fresh model once more: what from_pretrained left out it does not say
            left_out = [key for key in model.load_adapter(name, adapter_name, **options).unexpected_keys if ".lora_" in key]
            if left_out:
                raise RecastBankError(f"the source {name!r} does not fit the model, which has no place for {left_out[0]}")
    for warning in caught:
        lines = str(warning.message).splitlines()
        misshaped = [line for line in lines if "found shape" in line]
        # what is left out must be a head: an adapter without its matrices would seem to move nothing
        wrong = [line for line in misshaped if ".modules_to_save." not in line]
        if wrong:
            raise RecastBankError(f"the source {name!r} does not fit the model: {wrong[0]}")
        if not misshaped:
            warnings.warn(warning.message, stacklevel=2)
    return model


def _merged(model: PeftModel, names: str | list[str]) -> dict[str, Tensor]:
    names = checked_names("adapter", names)
    unknown = [name for name in names if name not in model.peft_config]
    if unknown:
        raise RecastBankError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(model.peft_config)}")
    with torch.no_grad():
        return copy.deepcopy(model).merge_and_unload(adapter_names=names).state_dict()


def origin_of(source: Source) -> str:
    """A source in a few words, for the bank's card; of a path on this machine the last part alone."""
    if isinstance(source, (str, Path)):
        return Path(source).name if Path(source).exists() else str(source)
    if isinstance(source, tuple):
        return f"adapter {source[1]!r}"
    if isinstance(source, PeftModel):
        return f"adapter {', '.join(map(repr, source.active_adapters))}"
    return f"weights of {type(source).__name__}" if isinstance(source, nn.Module) else "a state dict"


def shown_source(source: Source) -> str:
    """A source as an error message shows it."""
    return repr(str(source)) if isinstance(source, (str, Path)) else f"of type {type(source).__name__}"
