"""Models with tasks that have a LoRA part, in a pool and alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from exported import Inverted
from lora_parts import fill
from models import seeded, small_transformer, small_vit
from peft import LoraConfig, PeftModel
from timm.models._efficientnet_blocks import EdgeResidual, SqueezeExcite
from torch import Tensor, nn

from recast_peft import RecastConfig, TaskPool, get_recast_model

NAMES = ("t0", "t1", "t2", "alone")  # the last has coefficients alone
PART = LoraConfig(r=2, lora_alpha=3, use_rslora=True, rank_pattern={"fc1": 3}, target_modules=["qkv", "fc1", "fc2"])
WORDS = torch.arange(30).reshape(5, 6) % 19
IMAGES = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))
PHOTOS = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def convnext() -> nn.Module:
    """timm's, with one block a stage."""
    return seeded(lambda: timm.create_model("test_convnext", num_classes=4, depths=(1, 1, 1, 1)))


class Edged(Inverted):
    """An EfficientNet's two kinds of blocks: one widens by a convolution of several pixels, one by its pixels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = EdgeResidual(8, 8, exp_ratio=2, se_layer=SqueezeExcite)


def part_on(*targets: str) -> dict[str, Any]:
    """A LoRA of rank 2 on some modules; without any on the targets of the coefficients."""
    return {"lora_config": LoraConfig(r=2, target_modules=list(targets) or None)}


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "timm's vit": (small_vit, IMAGES, {"target_modules": ["qkv", "proj"], "lora_config": PART}),
    "its targets": (small_vit, IMAGES, part_on()),
    "convnext": (convnext, PHOTOS, part_on("stem.0", "fc1", "fc2")),
    "efficientnet": (lambda: seeded(Inverted), PHOTOS, part_on("conv_pw", "conv_pwl")),
    "wide convolutions": (lambda: seeded(Edged), PHOTOS, part_on("stem", "conv_exp", "conv_pw")),
    "bert": (lambda: small_transformer("bert"), WORDS, part_on("query", "value")),
    "llama": (lambda: small_transformer("llama"), WORDS, part_on("q_proj", "v_proj")),
    "gpt2": (lambda: small_transformer("gpt2"), WORDS, part_on("c_attn")),
}


def answer(model: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    out = model(x, **kwargs)
    return out if isinstance(out, Tensor) else out.logits


def with_tasks(case: str = "timm's vit", **more: Any) -> tuple[PeftModel, Tensor]:
    """A model with three tasks that have a LoRA part and one without, all trained; and an input."""
    build, x, options = CASES[case]
    model = get_recast_model(build(), RecastConfig(**options, **more), "t0")
    for name in NAMES[1:]:
        own = {**options, "lora_config": None} if name == "alone" else {**options, **more}
        model.add_adapter(name, RecastConfig(**own))
    for seed, name in enumerate(NAMES):
        fill(model, name, seed)
    return model.eval(), x


def each_alone(model: PeftModel, x: Tensor) -> dict[str | None, Tensor]:
    """What every task gives as an ordinary adapter, and under None the pretrained model."""
    given: dict[str | None, Tensor] = {}
    for name in NAMES:
        model.set_adapter(name)
        given[name] = answer(model, x)
    with model.disable_adapter():
        given[None] = answer(model, x)
    assert all(not torch.allclose(given[name], given[other], rtol=1e-3) for name in given for other in given if name != other)
    return given


def assert_mixed(model: PeftModel, pool: TaskPool, x: Tensor, alone: dict[str | None, Tensor]) -> None:
    tasks = [*NAMES[:3], None, "alone"]
    wanted = torch.stack([alone[task][i] for i, task in enumerate(tasks)])
    size = float(wanted.abs().max())
    torch.testing.assert_close(answer(model, x, task_ids=pool.ids(tasks)), wanted, rtol=1e-5, atol=1e-5 * size)


def pool_of(model: PeftModel, **options: Any) -> TaskPool:
    pool = TaskPool(model, **options)
    for name in NAMES:
        pool.add(name, name)
    return pool
