"""A stored task put in place of one that a model has, number by number: nothing is added, exchanged or compiled again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..composition.quantised import quantised_by
from ..config import RecastConfig
from ..errors import RecastConfigError
from ..holders import unwrapped
from ..layer import recast_layers
from ..tasks.conversion import check_fingerprints
from ..tasks.files import load_into, read_entries
from ..tasks.preparation import under_names_of
from ..tasks.state import backbone_of
from ..tasks.verbs import merged_tasks

# what two tasks have to have in common
_ALIKE = ("groups", "recipes", "bank", "num_coefficient_sets", "coefficient_sharing", "lora_config")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put the numbers of a stored task in place of a model's task, which keeps its name and its tensors.

    ``peft.utils.hotswap.hotswap_adapter`` for RECAST tasks, with its arguments. A compiled model is not compiled again. Every
    check comes before the first change.

    Args:
        model: the ``PeftModel``, in any wrapper.
        model_name_or_path: folder or repository of the task that is put in.
        adapter_name: the task whose numbers are replaced.
        torch_device: not needed, since the tensors stay where they are; taken for PEFT's sake.
        kwargs: for reading from the Hub: ``subfolder``, ``revision``, ``token``, ``cache_dir``.

    Raises:
        RecastConfigError: if the model has no such task, it is merged, or the two are not alike.
        RecastBaseMismatchError: if the stored task was learned on other pretrained weights.
        RecastLoadError: if its file is damaged, or has other entries.
    """
    del torch_device
    inner: Any = unwrapped(model)
    own = inner.peft_config.get(adapter_name)
    if not isinstance(own, RecastConfig):
        raise RecastConfigError(f"the model has no RECAST task {adapter_name!r}; its adapters: {', '.join(inner.peft_config)}")
    backbone = backbone_of(inner)
    if adapter_name in merged_tasks(backbone):
        raise RecastConfigError(f"task {adapter_name!r} is merged: call unmerge_adapter(), swap, and merge again")
    path = str(model_name_or_path)
    config = under_names_of(backbone, RecastConfig.from_pretrained(path, **kwargs))
    _check_alike(path, config, adapter_name, own)
    entries = read_entries(path, kwargs, f"the task at {path!r}")
    layers = {name: layer for name, layer in recast_layers(backbone).items() if layer.has_task(adapter_name)}
    quantised = {name for name, layer in layers.items() if quantised_by(layer.get_base_layer()) is not None}
    check_fingerprints(config, {name: layer.fingerprint for name, layer in layers.items()}, entries, quantised)
    with inner.base_model.calls.change():
        load_into(inner, config, adapter_name, entries)
        own.results, own.id2label = config.results, config.id2label


def _check_alike(path: str, config: RecastConfig, adapter_name: str, own: RecastConfig) -> None:
    for field in _ALIKE:
        given, expected = _plain(getattr(config, field)), _plain(getattr(own, field))
        if given != expected:
            raise RecastConfigError(
                f"the task at {path!r} cannot take the place of {adapter_name!r}: {field} differs\n  given:    {given}\n"
                f"  expected: {expected}\nLoad it under a name of its own with load_adapter."
            )


def _plain(value: Any) -> Any:
    """Values that compare; a LoRA's config says more than what a swap depends on."""
    if hasattr(value, "to_dict"):
        return {key: each for key, each in value.to_dict().items() if key in ("r", "lora_alpha", "use_rslora", "rank_pattern")}
    return value
