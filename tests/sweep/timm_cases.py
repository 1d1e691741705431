"""A small model of every timm family.

A family is the timm module that defines a model. ``timm_variants.json`` records the smallest variant of each family that has
one under ``LIMIT`` parameters; ``sweep_architectures.py --recount`` writes it for the installed timm. Families without are
made small by ``SHRUNK`` where their models take arguments for it. timm's own ``test_`` models are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from .checks import Case, names_of

LIMIT = 30_000_000
SMALL_INPUT = 128  # small, yet four patches or more at a stride of 32
VARIANTS = Path(__file__).with_name("timm_variants.json")


SHRUNK: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", {"embed_dim": 64, "depth": 3, "num_heads": 4}),
    "deepseek_vit": ("deepseek_vit_412m", {"embed_dim": 64, "depth": 3, "num_heads": 4}),
    "gemma4_vit": ("gemma4_vit_167m", {"embed_dim": 64, "depth": 3, "num_heads": 4}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"embed_dim": 64, "depth": 3, "num_heads": 4}),
    "qwen3_vit": ("qwen3_vit_88m", {"embed_dim": 64, "depth": 3, "num_heads": 4}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"embed_dim": 64, "depth": 3, "num_heads": 4}),
    "tresnet": ("tresnet_m", {"layers": (1, 1, 2, 1), "width_factor": 0.25}),
}


def timm_cases() -> dict[str, Case]:
    """The smallest model of every family that this timm has, by the name of the family."""
    known = set(timm.list_models())
    recorded = {family: name for family, (name, _) in _recorded()["families"].items() if name in known}
    cases = {family: timm_case(name) for family, name in recorded.items()}
    for family, (name, options) in SHRUNK.items():
        if name in known:
            cases.setdefault(family, timm_case(name, **options))
    return cases


def unrecorded_families() -> list[str]:
    """Families of this timm that were not there when the variants were counted."""
    recorded = _recorded()["families"]
    return [family for family in timm.list_modules() if family not in recorded and timm.list_models(module=family)]


def record_variants() -> None:
    """Count the parameters of all of timm's models, which takes minutes, and write the smallest of each family down."""
    families: dict[str, tuple[str | None, int]] = {}
    names = [(f, name) for f in timm.list_modules() for name in timm.list_models(module=f, exclude_filters="test_*")]
    for family, name in tqdm(names, desc="counting parameters", unit="model"):
        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(name).parameters())
        least = families.get(family, (None, LIMIT))
        families[family] = (name, count) if count < least[1] else least
    rows = ",\n".join(f"    {json.dumps(family)}: {json.dumps(families[family])}" for family in sorted(families))
    VARIANTS.write_text(f'{{\n  "timm": {json.dumps(timm.__version__)},\n  "families": {{\n{rows}\n  }}\n}}\n')


def _recorded() -> dict[str, Any]:
    return json.loads(VARIANTS.read_text())


def timm_case(name: str, **options: Any) -> Case:
    """One timm model at a small input, if it takes one.

    Args:
        name: of the model.
        options: further arguments of the model.
    """
    create = partial(timm.create_model, name, num_classes=5, **options)
    settings = cache(partial(_settings, create))
    return Case(name, lambda: create(**settings()[0]), lambda model: _run(settings()[1], model), _heads)


def _run(size: int, model: nn.Module) -> torch.Tensor:
    return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


def _settings(create: Callable[..., nn.Module]) -> tuple[dict[str, int], int]:
    """Arguments with which a model is made, and the side of its input: the smallest that it takes."""
    with torch.random.fork_rng(devices=[]):  # a case's seed is set before its model is built
        usual = create().default_cfg["input_size"][-1]
        for options in ({"img_size": SMALL_INPUT}, {}):
            try:
                create(**options).eval()(torch.zeros(1, 3, SMALL_INPUT, SMALL_INPUT))
            except (TypeError, RuntimeError, AssertionError, ValueError):
                continue  # it has no such argument, or does not take this size
            return options, SMALL_INPUT
    return {}, usual


def _heads(model: nn.Module) -> set[str]:
    classifier = model.get_classifier()
    found = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    return names_of(model, [module for module in found if isinstance(module, nn.Module)])
