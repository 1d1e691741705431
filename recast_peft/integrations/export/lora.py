"""The LoRA part of a task that is given to the call: its factors are the last numbers of the task's row.

The second factors are written times their strength, and a lower rank is filled up with zeros. So one graph takes tasks of any
strength, and in a table also tasks of a lower rank or without a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...composition.kinds import CONVOLUTIONS, kind_of
from ...errors import RecastBankError
from ...holders import container_key
from ...parts.lora_pool import is_of_places, product_by_sample
from ...parts.lora_strength import part_layers
from ...pool.layout import PoolLayout
from ...pool.lora import FACTORS, poolable_part
from .layers import AroundBase, Given


def refusals_of_part(model: nn.Module, task: str) -> list[str]:
    """What the LoRA part of a task has that no graph can express."""
    layers = part_layers(model, task)
    found = [text for layer in layers if (text := layer.refusal_to_merge(task)) is not None]
    if layers and poolable_part(model, task) is None:
        found.append("a LoRA part that is more than two factors (DoRA or another variant, lora_bias), or is of embeddings")
    by_weight = (layer.module_name for layer in layers if layer._by_weight)
    return found + [f"a LoRA part at {name}, which is computed by its weight" for name in by_weight]


def part_columns(layout: PoolLayout, task: str, adapter: str, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the columns of a row hold of the LoRA part of a task, by their names.

    Args:
        layout: of the row.
        task: the task's name.
        adapter: the adapter of the model whose strengths hold for it.
        factors: its factors by the names of their columns; empty for a task without a part.

    Raises:
        RecastBankError: if the row has no room for them.
    """
    columns = {name: torch.zeros(entry.shape) for name, entry in layout.lora.entries.items()}
    key, layers = container_key(adapter), part_layers(layout.backbone, adapter)
    strengths = {layer.module_name: layer.scaling[key] for layer in layers}
    for name, values in factors.items():
        room = columns.get(name)
        if room is None or any(own > size for own, size in zip(values.shape, room.shape, strict=True)):
            raise RecastBankError(
                f"task {task!r} has a LoRA part that the graph has no room for\n  {name} of the task:  {tuple(values.shape)}\n"
                f"  {name} of the graph: {'none' if room is None else tuple(room.shape)}\n"
                "A graph, a table and a file of several tasks have the LoRA part of the task that is active, or that is named "
                "first: let that be the one with the largest, or export this task alone."
            )
        strength = strengths[name.removesuffix(FACTORS[1])] if name.endswith(FACTORS[1]) else 1
        room[tuple(slice(size) for size in values.shape)] = values.detach().cpu().float() * strength
    return columns


class TaskedPart(AroundBase):
    """A module with the LoRA part of the given task beside it.

    Args:
        base: the module, or what stands for it.
        layer: the layer of LoRA parts whose place it takes.
        task: one that has a part here, as the given ones have.
        slices: columns of a row, by the names of factors.
        given: holds the row.
    """

    def __init__(self, base: nn.Module, layer: Any, task: str, slices: Mapping[str, slice], given: Given) -> None:
        super().__init__()
        self.base, self.place, self.takes, self.weight_name = base, layer.module_name, layer._takes, "weight"
        key, names = container_key(task), ("lora_A", "lora_B")
        pairs = [(getattr(layer, name)[key], slices[f"{self.place}.{name}.weight"]) for name in names]
        self._held = (given, layer.get_base_layer(), pairs)  # in a tuple: no children

    def _factors(self) -> list[tuple[nn.Module, Tensor]]:
        given, _, pairs = self._held
        return [(module, given.row[:, columns].reshape(-1, *module.weight.shape)) for module, columns in pairs]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._held[0]
        y = self.base(*args, **kwargs)
        x = args[0] if args else kwargs[self.takes]
        given.check_samples(self.place, x)
        added = x.float()
        for module, factors in self._factors():
            if given.rows is None:
                added = torch.func.functional_call(module, {"weight": factors[0]}, added)
            elif is_of_places(module):
                added = product_by_sample(module, added, factors)
            else:
                patches = _patches(module, added)
                added = (factors.flatten(2) @ patches.flatten(2)).view(x.shape[0], -1, *patches.shape[2:])
        return (y + added).to(y.dtype)

    def effective_weight(self) -> Tensor:
        given, plain, _ = self._held
        given.check_one_task(self.place)
        first, second = (factors[0].flatten(1) for _, factors in self._factors())
        kind, added = kind_of(plain), second @ first
        weight: Any = self.base.weight
        return weight + (added.T if kind is not None and kind.is_transposed else added).view_as(weight).to(weight.dtype)


def _patches(module: Any, x: Tensor) -> Tensor:
    """What each place of a convolution reads, ``(samples, in * kernel, ...)``, by a convolution that every runtime knows."""
    channels, size = x.shape[1], module.weight[0, 0].numel()
    one_of_each = torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *module.kernel_size)
    filters = one_of_each.repeat(channels, *[1] * (x.ndim - 1))
    return CONVOLUTIONS[x.ndim](x, filters, None, module.stride, module.padding, module.dilation, channels)
