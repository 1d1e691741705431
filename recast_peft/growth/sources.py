"""Sources of grown banks: whatever moved the pretrained weights, read and compared with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from ..banks.files import StoredBank
from ..composition.fingerprint import same_weight, weight_fingerprint
from ..config import RecastConfig
from ..errors import RecastBankError, RecastConfigError, RecastError
from ..names import modules_of, plain_name, unwrapped
from ..options.lora import WRITING_INITS
from ..parts.precision import HALF
from ..planning.candidates import Candidate, check_materialised, find_candidates
from ..validation import COUNT, check_arguments, checked_names, listed, optional

Source = str | Path | nn.Module | tuple[PeftModel, str] | Mapping[str, Tensor]
CHECKPOINTS = ("model.safetensors", "pytorch_model.safetensors")


def check_plain(model: nn.Module, verb: str) -> None:
    """Refuse a converted model, one with other adapters, and what is no model (``RecastConfigError``)."""
    if not isinstance(model, nn.Module):
        raise RecastConfigError(f"{verb}: model is a {type(model).__name__}; an nn.Module is expected")
    if isinstance(model, PeftModel) or modules_of(model, BaseTunerLayer):
        raise RecastConfigError(
            f"{verb} needs the plain pretrained model; this one is converted already, or has adapters (see model.unload())"
        )


def check_pretrained(model: nn.Module, verb: str) -> None:
    """Refuse what ``check_plain`` does, and a model without numbers (``RecastTargetError``)."""
    check_plain(model, verb)
    check_materialised(find_candidates(model))


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
    """How far a source moved every target's weight, ``(*weight_shape)`` in float32 by module name; see ``moves_by_source``."""
    vectors = moves_by_source(model, source, {n: (f"{n}.{t.weight_name}", t.weight) for n, t in targets.items()})
    if not vectors:
        raise RecastBankError(
            f"the source {shown_source(source)} has none of the target modules\n  targets: {listed(targets, 4)}"
        )
    return vectors


def moves_by_source(model: nn.Module, source: Source, parameters: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
    """How far a source (see ``grow_bank``) moved parameters, in float32 by module name; those that it lacks are left out.

    ``parameters`` has by module name the parameter's name in the plain model, and its pretrained value.

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
        return _merged(model, copy.deepcopy(source[0]), source[1])
    if isinstance(source, PeftModel):
        return _merged(model, copy.deepcopy(source), source.active_adapters)
    if isinstance(source, nn.Module):
        if modules_of(source, BaseTunerLayer):
            raise RecastBankError(
                f"a source of type {type(source).__name__} has adapters in it: give the PeftModel around it, or what "
                "merge_and_unload() gives"
            )
        return unwrapped(source).state_dict()
    raise RecastConfigError(
        f"a source is a {type(source).__name__}: expected an adapter (a folder, a repository, a PeftModel, or "
        "(peft_model, name)), or a fine-tuned form of the model (a module, a state dict, or a file)"
    )


def _stored_weights(model: nn.Module, name: str) -> Mapping[str, Tensor]:
    path = Path(name)
    files = [path] if path.is_file() else [path / file for file in CHECKPOINTS if (path / file).is_file()]
    if not files:
        return _merged(model, loaded(model, name), "default")
    with told(f"the source {name!r} cannot be read"):
        return load_file(files[0])


@contextmanager
def told(what: str) -> Iterator[None]:
    """Inside, an error that is none of ours is raised as a ``RecastBankError`` that begins with ``what``."""
    try:
        yield
    except RecastError:
        raise
    except Exception as error:  # PEFT, torch and pickle meet what a file holds with errors of many kinds
        raise RecastBankError(
            f"{what}: {type(error).__name__}: {error}\nExpected an adapter that can be merged (a folder, a repository, or a "
            f"PeftModel), a safetensors file, or a folder with {CHECKPOINTS[0]}."
        ) from error


def loaded(model: nn.Module, name: str, adapter_name: str = "default", **options: Any) -> PeftModel:
    """A saved adapter on a copy of a plain model, or beside the adapters of a model that is one; no random number is drawn.

    A head of its own does not matter, and need not have this model's classes.

    Raises:
        RecastBankError: if it cannot be read, or something else of it has another shape, or a module that the model lacks.
    """
    options["ignore_mismatched_sizes"] = True
    devices = range(torch.cuda.device_count())
    lacking: list[str] = []
    with (
        warnings.catch_warnings(record=True) as caught,
        torch.random.fork_rng(devices),
        told(f"the source {name!r} cannot be read"),
    ):
        warnings.simplefilter("always")
        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(copy.deepcopy(unwrapped(model)), name, adapter_name, **options)
        prefix = getattr(model.base_model, "prefix", None)
        if prefix is not None and not isinstance(model.peft_config.get(adapter_name), RecastConfig):
            # of a fresh model once more: what from_pretrained left out it does not say
            result = model.load_adapter(name, adapter_name, **options)
            left_out = [key for key in result.unexpected_keys if f".{prefix}" in key]
            if left_out:
                raise RecastBankError(f"the source {name!r} does not fit the model, which has no place for {left_out[0]}")
            # of a LoRA; other methods make some of their tensors again
            lacking = [key for key in result.missing_keys if prefix == "lora_" and f".{prefix}" in key]
    for warning in caught:
        lines = str(warning.message).splitlines()
        misshaped = [line for line in lines if "found shape" in line]
        # what is left out must be a head: an adapter without its matrices would seem to move nothing
        wrong = [line for line in misshaped if ".modules_to_save." not in line]
        if wrong:
            raise RecastBankError(f"the source {name!r} does not fit the model: {wrong[0]}")
        if not misshaped and not lacking:
            warnings.warn(warning.message, stacklevel=2)
    if lacking:
        raise RecastBankError(f"the source {name!r} lacks {lacking[0]}: it is damaged, or made for another model")
    return model


def _merged(model: nn.Module, adapted: PeftModel, names: str | list[str]) -> dict[str, Tensor]:
    """The weights that adapters make of a model; ``adapted`` is changed."""
    names = checked_names("adapter", names)
    unknown = [name for name in names if name not in adapted.peft_config]
    if unknown:
        raise RecastBankError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(adapted.peft_config)}")
    merged = {name for layer in modules_of(adapted, BaseTunerLayer) for name in layer.merged_adapters} - {*names}
    if merged:
        raise RecastBankError(
            f"the adapter {min(merged)!r} is merged into the weights that {', '.join(map(repr, names))} is a source on: call "
            "unmerge_adapter() first"
        )
    for name in names:
        check_layers(adapted.peft_config[name], name)
    if not any(_writes(config) for config in adapted.peft_config.values()):
        modules = dict(unwrapped(model).named_modules(remove_duplicate=False))
        for name, layer in adapted.get_base_model().named_modules():
            if isinstance(layer, BaseTunerLayer):
                check_same_base(layer, modules.get(plain_name(name)), names[0], plain_name(name))
    adapted._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)  # small moves would be rounded away
    kind = adapted.peft_config[names[0]].peft_type
    with torch.no_grad(), told(f"the adapter {names[0]!r} of type {getattr(kind, 'value', kind)} cannot be merged"):
        return adapted.merge_and_unload(adapter_names=names).state_dict()


def _writes(config: PeftConfig) -> bool:
    """Whether an adapter was started by writing into the weights that it adds to."""
    start = str(getattr(config, "init_lora_weights", None)).lower()
    return start.startswith(WRITING_INITS) or getattr(config, "kasa_config", None) is not None


def check_layers(config: PeftConfig, name: str) -> None:
    """Refuse an adapter for which PEFT puts layers of the model at other places (``RecastBankError``)."""
    replication = getattr(config, "layer_replication", None)
    if replication:
        raise RecastBankError(
            f"the adapter {name!r} has layer_replication={replication}: it is for a model with other layers at these places"
        )


def check_same_base(layer: BaseTunerLayer, module: nn.Module | None, adapter: str, name: str) -> None:
    """Refuse an adapter whose layer stands on another weight than the model's module (``RecastBankError``).

    What is merged, quantised, or has another shape is not looked at.
    """
    own, wanted = getattr(layer.get_base_layer(), "weight", None), getattr(module, "weight", None)
    if own is None or wanted is None or layer.merged or own.shape != wanted.shape:
        return
    if any(tensor.is_meta or not tensor.is_floating_point() or tensor.element_size() < 2 for tensor in (own, wanted)):
        return
    if torch.equal(own.to(wanted.device, wanted.dtype), wanted):
        return
    first, second = weight_fingerprint(own), weight_fingerprint(wanted)
    if not same_weight(first, second):
        raise RecastBankError(
            f"the adapter {adapter!r} stands on other pretrained weights than the model's: {name} differs\n"
            f"  fingerprint under the adapter: {first}\n  fingerprint of the model:      {second}\n"
            "Give the model that the adapter was trained on, or the fine-tuned model that merge_and_unload() gives."
        )


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
