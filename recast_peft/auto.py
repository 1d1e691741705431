"""From a backbone to a model with tasks, or from a task's name to both, in one call."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from .banks.files import BANK_CONFIG, BANK_WEIGHTS, StoredBank, load_bank
from .config import RecastConfig, checked_config
from .errors import RecastBaseMismatchError, RecastConfigError
from .hub.backbone import build_backbone
from .hub.peft_models import any_name, with_task_verbs
from .hub.task_files import numbers_by_key
from .hub.transfer import fetch_task
from .layer import RecastLayer
from .model import check_not_wrapped
from .names import MODEL_PREFIX, check_adapter_name, modules_of, plain_name
from .options.partner import partners_of
from .options.record import modules_called
from .storage.paths import is_hub_name
from .storage.transfer import fetch_together
from .validation import check_is_module, listed

# keywords of PeftModel.from_pretrained that make sense when the backbone is built here
PEFT_KEYWORDS = ("autocast_adapter_dtype", "low_cpu_mem_usage", "key_mapping", "torch_device", "ignore_mismatched_sizes")


NEEDED_BY_TASK_TYPE = {  # attributes of the model that PEFT's classes for a task type use
    **dict.fromkeys(("CAUSAL_LM", "SEQ_2_SEQ_LM"), "prepare_inputs_for_generation"),
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"), "config"),
}


def get_recast_model(
    model: nn.Module, config: RecastConfig | None = None, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Express a pretrained model by templates and coefficients, and give it its first task.

    Args:
        model: any transformers, timm or other ``nn.Module``; it is modified in place.
        config: None means ``RecastConfig()``. The object is not changed, and can be used again.
        adapter_name: the task's name.
        kwargs: passed on to ``peft.get_peft_model``.

    Returns:
        a ``PeftModel`` (for a ``task_type``, the ``PeftModelFor...`` of it) that computes what the model did before, to the
        last bit where the banks are exact. Its ``save_pretrained`` and ``push_to_hub`` write RECAST's model cards.

    Raises:
        RecastError: saying what is wrong, before the model is changed.
    """
    config = checked_config(config)
    check_is_module(model)
    check_adapter_name(adapter_name)
    check_not_wrapped(model, bool(modules_of(model, RecastLayer)))
    _check_task_type(model, config)
    with any_name():
        made = get_peft_model(model, copy.deepcopy(config), adapter_name=adapter_name, **kwargs)
    return with_task_verbs(made)


def _check_task_type(model: nn.Module, config: RecastConfig) -> None:
    needed = NEEDED_BY_TASK_TYPE.get(str(config.task_type))
    if needed is not None and not hasattr(model, needed):
        raise RecastConfigError(
            f"task_type={str(config.task_type)!r} is for models of transformers with {needed!r}, which {type(model).__name__} "
            "has not: leave task_type out"
        )


def with_task(model: nn.Module, config: RecastConfig, adapter_name: str) -> PeftModel:
    """A model with one more task, which is active: a plain model is converted, one with tasks is used as it is."""
    if not isinstance(model, PeftModel) or not modules_of(model, RecastLayer):
        return get_recast_model(model, config, adapter_name)
    model.add_adapter(adapter_name, config)
    model.set_adapter(adapter_name)
    return model


class AutoRecastModel:
    """Builds a backbone and its task from the task's name alone; see :meth:`from_pretrained`."""

    def __init__(self) -> None:
        raise RecastConfigError("AutoRecastModel is not made by its constructor: use AutoRecastModel.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *,
        backbone: nn.Module | Mapping[str, Any] | str | os.PathLike | None = None,
        adapter_name: str = "default",
        subfolder: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Find the backbone that a task names, build it, and load the task.

        All files of the task are fetched and checked before the backbone is built, and the backbone's weights are held
        against the task's fingerprint: a download that breaks, or other weights, leave nothing half-loaded.

        Args:
            name: a folder, or a repository on the Hub.
            backbone: None finds the recorded one. Else a model (converted in place); keyword arguments for building it
                (those of ``timm.create_model``, or of ``from_pretrained`` of its transformers class, such as ``dtype``); or the
                path of a local checkpoint of it.
            adapter_name: the name that the task is given in the model.
            subfolder: where the task lies in the folder or repository. None is the root, or the one subfolder with a task.
            revision: branch, tag or commit of the task's repository. The backbone's own is recorded with the task.
            token: access token of the Hub; None takes the one that you are logged in with.
            cache_dir: folder of the cache, for task and backbone; None is the Hub's usual one.
            local_files_only: take what the cache holds and ask no server.
            force_download: fetch again what the cache holds already.
            is_trainable: whether the task can be trained on.
            kwargs: ``autocast_adapter_dtype``, ``low_cpu_mem_usage``, ``key_mapping``, ``torch_device`` and
                ``ignore_mismatched_sizes`` of PEFT.

        Returns:
            a ``PeftModel`` (for a ``task_type``, the ``PeftModelFor...`` of it) in evaluation mode, unless it is trainable.

        Raises:
            RecastConfigError: if an argument, or the task's config, cannot be used.
            RecastHubError: if a repository cannot be reached or read.
            RecastLoadError: if there is no task, a file is damaged, or the backbone cannot be found or built.
            RecastBaseMismatchError: if the backbone's weights are not those that the task was learned on.
            RecastTargetError: if the backbone has not the modules of the task, or has several of the same weights.
        """
        check_adapter_name(adapter_name)
        unknown = sorted(set(kwargs) - set(PEFT_KEYWORDS))
        if unknown:
            own = [p.name for p in inspect.signature(cls.from_pretrained).parameters.values() if p.kind is p.KEYWORD_ONLY]
            raise RecastConfigError(
                f"unknown keyword arguments {', '.join(unknown)}: expected some of {', '.join((*own, *PEFT_KEYWORDS))}. "
                "What the backbone is built with goes into backbone={...}."
            )
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download}
        folder = str(fetch_task(name, subfolder, revision=revision, **hub))
        with modules_called(kwargs.pop("key_mapping", None)):
            config = RecastConfig.from_pretrained(folder)
        _fetch_banks(config, folder, hub)
        model, missing = build_backbone(config.backbone, backbone, **hub)
        _check_task_type(model, config)
        uncovered = _uncovered(missing, folder)
        try:
            with _left_where_it_is(model):
                result = PeftModel.from_pretrained(
                    model, folder, adapter_name=adapter_name, config=config, is_trainable=is_trainable, key_mapping={}, **kwargs
                )
        except RecastBaseMismatchError as error:
            raise RecastBaseMismatchError(f"{error}\n{_why_other_weights(config, backbone)}") from error
        if uncovered:
            warnings.warn(
                f"{len(uncovered)} parameters of the backbone ({listed(uncovered)}) are neither in its checkpoint nor in the "
                "task: they are random. Store a classifier with the task (num_classes=, or modules_to_save=), or pass "
                "backbone=.",
                stacklevel=2,
            )
        return result


@contextmanager
def _left_where_it_is(model: nn.Module) -> Iterator[None]:
    """A block in which PEFT does not spread an offloaded model anew: it loses what lies on disk, and a task needs no move."""
    spread = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if spread is not None:
            model.hf_device_map = spread


def _fetch_banks(config: RecastConfig, folder: str, hub: dict[str, Any]) -> None:
    """Fetch the stored banks that a task names from the Hub, with the token and the cache that the task was fetched with."""
    fetched = _fetched_bank(config.bank, folder, hub)
    if fetched is not None:
        config.bank = fetched  # type: ignore[assignment]
    partners = partners_of(config)
    for place, partner in enumerate(partners):
        fetched = _fetched_bank(partner.bank_reference, folder, hub)
        if fetched is not None:
            partners[place] = replace(partner, bank=fetched)  # type: ignore[call-arg]


def _fetched_bank(reference: Any, folder: str, hub: dict[str, Any]) -> StoredBank | None:
    """The bank of a reference, from the Hub; None if it names none, or one that lies on this machine."""
    name: Any = reference.get("name") if isinstance(reference, dict) else None
    if not is_hub_name(name) or any(Path(folder, place).exists() for place in (name, BANK_CONFIG)):
        return None  # the conversion finds it
    return load_bank(fetch_together(name, BANK_CONFIG, BANK_WEIGHTS, hub_kwargs=hub)).under(name)


def _uncovered(missing: list[str], folder: str) -> list[str]:
    """Parameters that no checkpoint gave and that the task does not bring either."""
    if not missing:
        return []
    brought = {plain_name(key.removeprefix(MODEL_PREFIX)) for key in numbers_by_key(folder)}
    owners = {key.rpartition(".")[0] for key in brought}
    return [key for key in missing if key not in brought and key.rpartition(".")[0] not in owners]


def _why_other_weights(config: RecastConfig, given: Any) -> str:
    if given is not None:
        return "The backbone was given with backbone=."
    name = (config.backbone or {}).get("name")
    return (
        f"The backbone was built from {name!r}, as the task says. If the task was made on a model without pretrained weights "
        "(timm's pretrained=False), or whose weights were changed before the task was made, nobody can find those weights: "
        "pass them as backbone=."
    )
