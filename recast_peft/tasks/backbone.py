"""What is written down of a backbone with a task, so that it can be built again (hub/backbone.py).

Written down is where the pretrained weights come from and what they were built with, never the weights. A task's
fingerprint then says whether what was built is what the task was learned on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from torch import nn
from transformers import PreTrainedModel

from ..names import unwrapped
from ..parts.head import task_heads
from ..storage.paths import is_hub_name
from ..storage.transfer import commit_of

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# keywords of timm.create_model that say where weights come from and where they are written: a caller's alone
SOURCE_KEYWORDS = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def describe_backbone(model: nn.Module, revision: str | None = None) -> dict[str, Any] | None:
    """Say how a backbone can be built again, in values that JSON can hold.

    Args:
        model: a timm or transformers model, converted or not.
        revision: that its weights were loaded at, if it is known: neither library keeps it. None is the commit in the cache
            that the main branch points to, or the only one in the cache.

    Returns:
        ``library``, ``name`` (what the library builds it from), ``class``, ``revision`` (the commit of the repository, where
        it is known) and what else the library needs; None for a model of another kind.
    """
    model = unwrapped(model)
    if isinstance(model, PreTrainedModel):
        return _describe_transformers(model, revision)
    pretrained = getattr(model, "pretrained_cfg", None)
    if isinstance(pretrained, dict) and pretrained.get("architecture"):
        return _describe_timm(model, pretrained, revision)
    return None


def _describe_transformers(model: PreTrainedModel, revision: str | None) -> dict[str, Any]:
    config = model.config
    name = str(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "") or "") or None
    description = {
        "library": "transformers",
        "name": name,
        "revision": getattr(config, "_commit_hash", None) or _cached_commit(name, revision) or revision,
        "class": type(model).__name__,
        "num_classes": _own_classes(model, config.num_labels),
    }
    size = getattr(config, "image_size", None)
    if size is not None:
        size = [size, size] if isinstance(size, int) else list(size)
        description["input_size"] = [int(getattr(config, "num_channels", 3)), *size]
    return description


def _describe_timm(model: nn.Module, pretrained: dict[str, Any], revision: str | None) -> dict[str, Any]:
    arguments = dict(getattr(model, "_model_args", {}))
    num_classes = _own_classes(model, getattr(model, "num_classes", None))
    if isinstance(num_classes, int):  # reset_classifier changes it after the model was made
        arguments["num_classes"] = num_classes
    arguments = {key: value for key, value in arguments.items() if key not in SOURCE_KEYWORDS}
    left_out = sorted(key for key, value in arguments.items() if not _fits_json(value))
    arguments = {key: value for key, value in arguments.items() if key not in left_out}
    name, repository, recorded = _timm_origin(pretrained)
    revision = recorded or revision
    description = {
        "library": "timm",
        "name": name,
        "architecture": pretrained["architecture"],
        "tag": pretrained.get("tag") or None,
        "repository": repository or None,
        "revision": _cached_commit(repository, revision) or revision,
        "class": type(model).__name__,
        "input_size": _timm_input_size(pretrained, arguments),
        "mean": list(pretrained.get("mean") or ()),
        "std": list(pretrained.get("std") or ()),
        "num_classes": num_classes,
        "arguments": arguments,
    }
    if pretrained.get("file") and pretrained.get("source") != "local-dir":
        description["file"] = str(pretrained["file"])
    if pretrained.get("license"):
        description["license"] = pretrained["license"]
    if isinstance(getattr(model, "global_pool", None), str):
        description["global_pool"] = model.global_pool
    if left_out:
        description["arguments_left_out"] = left_out
    return description


def _timm_origin(pretrained: dict[str, Any]) -> tuple[str, str, str]:
    """The name that timm builds a model by, and the repository and revision of its weights; empty where there is none."""
    repository, _, revision = str(pretrained.get("hf_hub_id") or "").partition("@")
    source, tag = pretrained.get("source"), pretrained.get("tag")
    if source == "hf-hub":
        return f"hf-hub:{repository}", repository, revision
    if source == "local-dir":
        return f"local-dir:{pretrained.get('file')}", "", revision
    return f"{pretrained['architecture']}.{tag}" if tag else pretrained["architecture"], repository, revision


def _timm_input_size(pretrained: dict[str, Any], arguments: dict[str, Any]) -> list[int]:
    channels, *size = pretrained.get("input_size") or (3,)
    given = arguments.get("img_size")
    if given is not None:
        size = [given, given] if isinstance(given, int) else list(given)
    return [arguments.get("in_chans") or channels, *size]


def _own_classes(model: nn.Module, shown: int | None) -> int | None:
    """Classes of the model's own classifier; what it says of itself may be those of the active task's."""
    head = next(iter(task_heads(model)), None)
    return shown if head is None else head._labels[None].num_classes


def _cached_commit(repository: Any, revision: str | None) -> str | None:
    """The commit in the cache that weights were probably loaded from; the fingerprint says later whether they were."""
    if not is_hub_name(repository):
        return None
    for name in (*WEIGHT_FILES, "config.json"):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return commit_of(path)
    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots")
    commits = [path.name for path in folder.iterdir()] if folder.is_dir() and revision is None else []
    return commits[0] if len(commits) == 1 else None


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
