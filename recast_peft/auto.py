"""From a backbone to a model with tasks, in one call."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftMixedModel, PeftModel, get_peft_model
from torch import nn

from .config import RecastConfig
from .errors import RecastConfigError
from .layer import RecastLayer


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
        last bit where the banks are exact.

    Raises:
        RecastError: saying what is wrong, before the model is changed.
    """
    config = RecastConfig() if config is None else config
    if not isinstance(config, RecastConfig):
        raise RecastConfigError(f"config is a {type(config).__name__}; a RecastConfig is expected")
    if isinstance(model, (PeftModel, PeftMixedModel)) or any(isinstance(m, RecastLayer) for m in model.modules()):
        raise RecastConfigError(
            "the model is converted already: add a task with model.add_adapter(name, config) or "
            "model.load_adapter(path, name), or get the plain model back with model.unload()"
        )
    return get_peft_model(model, copy.deepcopy(config), adapter_name=adapter_name, **kwargs)
