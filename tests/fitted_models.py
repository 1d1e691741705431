"""A tiny vision transformer with a task on a bank that was fitted to its weights."""

from __future__ import annotations

from models import randomise, tiny_vit, vit_input
from peft import PeftModel

from recast_peft import RecastConfig, get_recast_model
from recast_peft.mimicry import Gradient

X = vit_input()
FIELDS = {"target_modules": ["qkv", "fc1"], "num_templates": 1}


def fitted(seed: int = 0, **fields: object) -> PeftModel:
    method = Gradient(steps=5, seed=seed, progress=False)
    model = get_recast_model(tiny_vit(), RecastConfig(**{**FIELDS, "mimicry": method, **fields})).eval()
    randomise(model)
    return model
