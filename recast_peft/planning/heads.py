"""Which modules turn features into predictions: they are no targets unless they are named."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..errors import RecastTargetError
from ..holders import other_names, plain_modules, plain_place, unwrapped_module
from ..names import plain_name, unwrapped
from ..validation import check_arguments, optional, text

_HEAD_FIRST = re.compile(
    r"^(head|heads|head_dist|classifier|cls_classifier|distillation_classifier|fc|score|lm_head|qa_outputs|logits|logits_proj"
    r"|pre_classifier|classification_head|cls|seq_relationship|sequence_summary|summary|embed_out|proj_out|aux_head|prediction_head"
    r"|generator_lm_head|decode_head|auxiliary_head|vocab_projector|vocab_transform|vocab_layer_norm|last_linear)$"
)
_HEAD_LAST = re.compile(r"^(lm_head|embed_out|qa_outputs|last_linear|vocab_projector|distillation_classifier)$")
# Detectors, segmenters and the like, which put their heads anywhere but into a repeated block.
_HEAD_ANYWHERE = re.compile(
    r"^(?!conv_)(\w+_)?heads?\d*$|^rpn$|^\w+_classifier$|^(class|cls|bbox|box|mask)_(predictor|embed|score|pred)$"
)
_HEAD_CLASS = re.compile(r"(?<!Attention)(?<!Attn)Heads?$")


def head_names(model: nn.Module, head_module: str | None = None) -> set[str]:
    """Names of the modules that turn features into predictions, by timm's and transformers' conventions and by name."""
    model = unwrapped(model)
    modules = [(plain_name(name), module) for name, module in model.named_modules()]
    found = (*modules_by(model, "get_classifier"), *modules_by(model, "get_output_embeddings"))
    names = {name for module in found if (name := plain_place(model, module)) is not None}
    base = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if isinstance(base, nn.Module):  # transformers: a model for a task is the base model with the task's modules beside it
        names.update(name for name, child in model.named_children() if child is not base)
    names.update(timm_classifiers(model))
    kinds = ((name, type(unwrapped_module(module)).__name__) for name, module in modules)  # ours is called one too
    names.update(name for name, kind in kinds if _is_called_a_head(name.split("."), kind))
    return {name for name in (*names, head_module or "") if name}


def timm_classifiers(model: nn.Module) -> list[str]:
    """Names of a model's classifiers by timm's config of it; none of another library's model."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    return [named] if isinstance(named, str) else list(named or ())


def modules_by(model: Any, method: str) -> list[nn.Module]:
    """The modules that a method of a model gives, such as ``get_classifier``; none where it has no such method."""
    try:
        given = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return []
    return [m for m in (given if isinstance(given, (tuple, list)) else [given]) if isinstance(m, nn.Module)]


def _is_called_a_head(parts: list[str], kind: str) -> bool:
    in_a_block = any(part.isdigit() for part in parts)
    anywhere = _HEAD_ANYWHERE.match(parts[-1]) or _HEAD_CLASS.search(kind)
    return bool(_HEAD_FIRST.match(parts[0]) or _HEAD_LAST.match(parts[-1]) or (anywhere and not in_a_block))


def top_level(model: nn.Module) -> str:
    """The names of a model's outermost modules, for a message."""
    return ", ".join(name for name in plain_modules(model) if "." not in name)


def named_head(model: nn.Module, name: str | None) -> str | None:
    """The first name of the classifier that is named; None if none is, ``RecastTargetError`` if the model does not have it."""
    check_arguments(optional(text), head_module=name)
    if name is None or name in plain_modules(model):
        return name
    first = other_names(model).get(name)
    if first is None:
        raise RecastTargetError(f"head_module={name!r}: the model has no such module; top level: {top_level(model)}")
    return first
