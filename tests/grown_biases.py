"""Banks grown from what moved the biases of a tiny vision transformer, and tasks on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from models import randomise, tiny_vit, vit_input
from peft import PeftModel
from torch import Tensor, nn

from recast_peft import BiasConfig, RecastConfig, StoredBank, TaskPool, get_recast_model, grow_bias_bank

X = vit_input(4)
MEMBERS = ("norm", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
WIDTHS = (8, 24, 8, 16, 8)  # of the biases of a block of tiny_vit


def source(seed: int, build: Callable[[], nn.Module] = tiny_vit, size: float = 0.3) -> dict[str, Tensor]:
    """The model with every bias moved at random."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, parameter in build().named_parameters():
        move = size * torch.randn(parameter.shape, generator=generator) if name.endswith("bias") else 0.0
        moved[name] = parameter.detach() + move
    return moved


def grown(seeds: tuple[int, ...] = (0, 1, 2), depth: int = 4, **fields: Any) -> StoredBank:
    build = partial(tiny_vit, depth=depth)
    return grow_bias_bank(build(), [source(seed, build) for seed in seeds], **fields)


def config(bank: Any, **fields: Any) -> RecastConfig:
    given = {"target_modules": ["fc1"], "group_size": 1, "partners": [BiasConfig(bank=bank)], **fields}
    return RecastConfig(**given)


def offsets(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """A task's coefficients of biases by the module that owns them."""
    key = f".modules_to_save.{name}.offset"
    return {
        n.split("recast_partners.")[1].split(".bias")[0].replace("%2E", "."): p
        for n, p in model.named_parameters()
        if n.endswith(key)
    }


def on(bank: Any, name: str = "default", seed: int = 1, depth: int = 4, **fields: Any) -> PeftModel:
    """A task with random numbers on a bank."""
    model = get_recast_model(tiny_vit(depth=depth), config(bank, **fields), name).eval()
    learn_offsets(model, name, seed)
    return model


def learn_offsets(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    randomise(model, name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in offsets(model, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def by_hand(bank: StoredBank, model: PeftModel, name: str = "default") -> nn.Module:
    """A plain model whose biases and weights of fc1 are put together by plain arithmetic."""
    plain = tiny_vit()
    own = offsets(model, name)
    with torch.no_grad():
        for block in range(4):
            group = bank.groups[f"blocks.{block}"]
            mixed = sum(c * t for c, t in zip(own[group.members[0]], group.grown.tensors[0], strict=True))
            for member, part in zip(group.members, mixed.split(list(WIDTHS)), strict=True):
                plain.get_submodule(member).bias += part
            layer = model.get_base_model().blocks[block].mlp.fc1
            plain.blocks[block].mlp.fc1.weight *= 1 + layer.recast_coefficients[name].mean()
    return plain


class BatchNorms(nn.Module):
    """Two layers of a convolution and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3, bias=False), "norm": nn.BatchNorm2d(3)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["norm"](layer["conv"](x)))
        return x


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def filled(bank: Any, *names: str, depth: int = 4) -> TaskPool:
    """A pool of tasks with random numbers."""
    pool = TaskPool(get_recast_model(tiny_vit(depth=depth), config(bank)).eval())
    for seed, name in enumerate(names):
        row = pool.add(name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            pool.table[row].copy_(0.3 * torch.randn(pool.numbers_per_task, generator=generator))
    return pool
