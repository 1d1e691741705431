"""A stored task put in place of one that a model has, number by number: nothing is added, exchanged or compiled again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..composition.quantised import quantised_by
from ..config import RecastConfig, tasks_among
from ..errors import RecastConfigError
from ..holders import unwrapped
from ..layer import fingerprints_of, recast_layers
from ..parts.head import task_heads
from ..tasks.conversion import check_fingerprints
from ..tasks.files import check_not_merged, load_into, read_entries
from ..tasks.preparation import under_names_of
from ..tasks.state import backbone_of
from ..validation import check_is_peft_model, check_is_task

# what two tasks have to have in common
_SIZES = ("num_directions", "num_coefficient_sets", "coefficient_sharing")
_ALIKE = ("groups", "recipes", *_SIZES, "bias", "partners", "lora_config")
# of a LoRA part and of partners: what decides how their numbers act
_OF_LORA = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_NOT_OF_PARTNERS = ("target_modules", "dropout", "bank")


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
        ValueError: (PEFT's) if nothing is stored there.
        RecastBaseMismatchError: if the stored task was learned on other pretrained weights.
        RecastLoadError: if its file is damaged, or has other entries.
    """
    del torch_device
    inner: Any = unwrapped(model)
    check_is_peft_model(inner)
    tasks = tasks_among(inner.peft_config)
    check_is_task(adapter_name, tasks)
    own = tasks[adapter_name]
    backbone = backbone_of(inner)
    config, entries = check_replacement(backbone, str(model_name_or_path), adapter_name, own, **kwargs)
    with inner.base_model.calls.change():
        load_into(inner, config, adapter_name, entries)
        take_over(backbone, config, adapter_name, own)


def check_replacement(
    backbone: nn.Module, path: str, adapter_name: str, own: RecastConfig, **kwargs: Any
) -> tuple[RecastConfig, dict[str, Tensor]]:
    """Refuse a stored task whose numbers mean something else than those of a model's task; the model is not touched.

    Args:
        backbone: the backbone, with its tasks.
        path: folder or repository of the stored task.
        adapter_name: the task that it replaces.
        own: the config of that task.
        kwargs: for reading from the Hub.

    Returns:
        the stored task's config, with modules called as they are in the model, and its entries.

    Raises:
        RecastError: as ``hotswap_adapter`` says.
    """
    check_not_merged(backbone, adapter_name)
    config = RecastConfig.from_pretrained(path, **kwargs)
    if not isinstance(config, RecastConfig):
        raise RecastConfigError(f"{path!r} holds an adapter of the method {config.peft_type.value}; expected a task of RECAST")
    config = under_names_of(backbone, config)
    _check_alike(path, config, adapter_name, own)
    entries = read_entries(path, kwargs, f"the task at {path!r}", config)
    layers = {name: layer for name, layer in recast_layers(backbone).items() if layer.has_task(adapter_name)}
    quantised = {name for name, layer in layers.items() if quantised_by(layer.get_base_layer()) is not None}
    check_fingerprints(config, fingerprints_of(layers), entries, quantised)
    return config, entries


def take_over(backbone: nn.Module, config: RecastConfig, adapter_name: str, own: RecastConfig) -> None:
    """Let a model's task say of itself what the stored one says whose numbers it has now: results, names of classes, loss."""
    own.results, own.id2label = config.results, config.id2label
    for head in task_heads(backbone, adapter_name):
        head.relabel(adapter_name, config.id2label, config.problem_type)


def _check_alike(path: str, config: RecastConfig, adapter_name: str, own: RecastConfig) -> None:
    alike = {field: (_plain(getattr(config, field)), _plain(getattr(own, field))) for field in _ALIKE}
    if None not in (config.num_classes, own.num_classes):  # modules_to_save has classifiers of no number
        alike["num_classes"] = (config.num_classes, own.num_classes)
    for what, (given, expected) in {"bank": (_banks(config), _banks(own)), **alike}.items():
        if given != expected:
            raise RecastConfigError(
                f"the task at {path!r} cannot take the place of {adapter_name!r}: {what} differs\n  given:    {given}\n"
                f"  expected: {expected}\nLoad it under a name of its own with load_adapter."
            )


def _banks(config: RecastConfig) -> dict[str, str | None]:
    """Fingerprints of the banks that a task's coefficients, biases and readout are on, wherever these banks lie."""
    named = {"coefficients": config.bank_reference, **config.partner_banks}
    return {what: reference["fingerprint"] for what, reference in named.items() if reference is not None}


def _plain(value: Any) -> Any:
    """Values that compare; configs of parts say more than what a swap depends on."""
    if hasattr(value, "to_dict"):
        return {key: each for key, each in value.to_dict().items() if key in _OF_LORA}
    if isinstance(value, list):
        return {p.method: {k: v for k, v in p.to_dict().items() if k not in _NOT_OF_PARTNERS} for p in value}
    return value or None
