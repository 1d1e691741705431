"""Three tasks on one model, and what each computes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from models import converted, outputs, randomise, vit_input
from peft import PeftModel

from recast_peft import RecastConfig

NAMES = ["cars", "birds", "flowers"]


def with_tasks(templates: int | None = None, **config: Any) -> PeftModel:
    """Three tasks that differ, each with groups of another size where the banks are exact."""
    model = converted("cars", num_templates=templates, **config)
    for i, name in enumerate(NAMES):
        if i:
            size = {} if templates else {"group_size": i + 2}
            model.add_adapter(name, RecastConfig(**{"target_modules": ["qkv"], "num_templates": templates, **config, **size}))
        randomise(model, name, seed=i)
    return model.eval()


def alone(model: PeftModel, names: Sequence[str] = NAMES) -> dict[str, torch.Tensor]:
    """The output of every task by itself, and of none; the first is active then."""
    result = {}
    for name in names:
        model.set_adapter(name)
        result[name] = outputs(model, vit_input())
    with model.disable_adapter():
        result["__base__"] = outputs(model, vit_input())
    model.set_adapter(names[0])
    assert len({tuple(r.flatten().tolist()) for r in result.values()}) == len(names) + 1
    return result
