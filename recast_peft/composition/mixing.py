"""A layer's call in which every sample has its own task.

Either n products serve all samples, whose results each sample mixes by its own coefficients, or a weight is composed for each
task that occurs; whichever costs less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecastBankError
from ..names import BASE_ADAPTER
from .calling import call, call_with, direct_call
from .compose import compose_into, compose_weight, is_cast, mix_by_sample, needs_plain_operations
from .composed import ComposedModule
from .kinds import add_bias, kind_of, positions_of, takes_core
from .mixed_batch import NO_TASK, MixedBatch, mixed_batch

# Positions of a task's samples below which n products are cheaper than composing a weight for each task; measured on a CPU by
# examples/benchmarks/mixed_batch.py.
PRODUCT_LIMIT = 64


def call_mixed(layer: ComposedModule, batch: MixedBatch, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the wrapped module computes with each sample's own weight; ``RecastBankError`` if it cannot be called so."""
    if isinstance(layer.base_layer, nn.MultiheadAttention) or not args or not isinstance(args[0], Tensor):
        raise RecastBankError(
            f"{layer.module_name} ({type(layer.base_layer).__name__}) cannot have another task for each sample: "
            "pass one task at a time instead of adapter_names"
        )
    samples = batch.samples_in(args[0], layer, is_ordered=not isinstance(layer.get_base_layer(), nn.Linear))
    batch.repeats(samples, layer.module_name)  # an error names the module
    if len(batch) == samples == 0:
        return call(layer, [], args, kwargs)
    if batch.pool is not None:
        return _call_from_pool(layer, batch, args, kwargs)
    # tasks without coefficients here share the base's rows
    rows: dict[str, list[int]] = {}
    for key, indices in batch.rows(samples).items():
        name = str(key)
        rows.setdefault(name if layer.has_task(name) else BASE_ADAPTER, []).extend(indices)
    return _call_by_rows(layer, batch, rows, lambda name, _: layer.compose([name]), args, kwargs)


def _call_from_pool(layer: ComposedModule, batch: MixedBatch, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Every sample with its own row of a pool's table."""
    x = args[0]
    offsets = batch.offsets(layer.module_name, len(x))  # (samples, templates)
    if offsets is None:
        return call(layer, [], args, kwargs)
    bank, factor = layer.recast_bank[batch.slot], layer.scaling.get(batch.slot, 1.0)
    offsets = offsets if factor == 1 else factor * offsets
    direct = direct_call(layer, args, kwargs)
    keeps_base = layer.is_compressed and not layer.is_released  # the pretrained weight is no mix of the templates then
    if direct is not None and not keeps_base and (takes_core(layer.base_layer) or not bank.is_factored):
        terms, scale, pairs = bank.product_terms(layer.module_name, offsets, layer.weight_device)
        if products_are_cheaper(layer.base_layer, x, len(terms), batch):  # low-rank pairs cost next to nothing
            mixed = _mixed_products(layer.base_layer, direct, x, terms, scale)
            return mixed if pairs is None else pairs.add_to(mixed, x)
    anchor = None if layer.compressed_bank else layer.pretrained_weight
    templates = [] if bank.is_factored else bank.get_templates(layer.weight_device)
    base = bank.base_row(layer.module_name, offsets) if anchor is None else offsets.new_zeros(())
    # one weight's memory serves all tasks in turn: to get fresh memory for each costs more than to compose
    is_recorded = torch.is_grad_enabled() or needs_plain_operations()
    shared = None if is_recorded else torch.empty_like(templates[0] if anchor is None else anchor)

    def weight_of(key: str | int, sample: int) -> Tensor:
        if key == NO_TASK and not layer.is_released:
            return layer.pretrained_weight
        coefficients = offsets[sample] if anchor is not None else base + offsets[sample]
        if bank.is_factored:
            return bank.added_to(anchor, coefficients)
        if shared is None:
            return compose_weight(anchor, templates, coefficients)
        return compose_into(shared, anchor, templates, coefficients)

    return _call_by_rows(layer, batch, batch.rows(len(x)), weight_of, args, kwargs)


def _mixed_products(
    module: nn.Module, direct: Callable[..., Tensor], x: Tensor, terms: Sequence[Tensor], scale: Tensor | None
) -> Tensor:
    """The output with each sample's own mix of weights; a single weight is scaled by way of the input."""
    if len(terms) > 1:
        assert scale is not None
        return add_bias(mix_by_sample(lambda term: direct(module, term, x, False), terms, scale), module)
    if scale is not None:
        x = x * scale.view(len(x), *[1] * (x.ndim - 1)).to(x.dtype)
    return direct(module, terms[0], x)


def products_are_cheaper(module: nn.Module, x: Tensor, templates: int, batch: MixedBatch) -> bool:
    """Whether n products for the whole batch cost less than composing a weight for each task.

    Composing touches n weights a task; n products do (n - 1) more multiplications with every position of its samples. On an
    accelerator what counts is that a weight for each task means a handful of kernels for each. A compiled region takes the
    products always: which samples share a task is not known when it is compiled.
    """
    if torch.compiler.is_compiling():
        return True
    tasks = max(1, len(batch.rows(len(x))))
    if x.device.type != "cpu":
        return tasks > 1
    return positions_of(module, x) / tasks * (templates - 1) < PRODUCT_LIMIT * templates


def _call_by_rows(
    layer: ComposedModule,
    batch: MixedBatch,
    rows: Mapping[Any, list[int]],
    weight_of: Callable[[Any, int], Tensor],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """The samples of each task with a weight of their own, composed right before it is used: it is in the cache then."""
    x, *rest = args
    if len(rows) == 1:
        ((key, indices),) = rows.items()
        return call_with(layer, weight_of(key, indices[0]), args, kwargs)

    def part_of(key: Any, indices: list[int]) -> Tensor:
        # other layers of tasks may stand inside
        within = mixed_batch(batch.of_rows(indices, len(x))) if len(layer.other_layers) else nullcontext()
        with within:
            return call_with(layer, weight_of(key, indices[0]), (batch.taken(x, indices), *rest), kwargs)

    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        outputs = [part_of(key, indices) for key, indices in rows.items()]
        places = [sample for indices in rows.values() for sample in indices]
        return batch.taken(torch.cat(outputs), sorted(range(len(places)), key=places.__getitem__))
    result = None
    for key, indices in rows.items():
        place = batch.side_by_side(indices)
        if result is not None and place is not None and (call_into := _call_into(layer, result, args, kwargs)) is not None:
            call_into(layer.base_layer, weight_of(key, indices[0]), x[place], result[place])
            continue
        part = part_of(key, indices)
        if result is None:
            result = part.new_empty((len(x), *part.shape[1:]))
        result[batch.index(indices, x.device) if place is None else place] = part
    return result


def _call_into(layer: ComposedModule, result: Tensor, args: tuple, kwargs: dict[str, Any]) -> Callable[..., None] | None:
    """The product that writes its result where it belongs; None where there is none, or dtypes would have to be changed."""
    kind, x = kind_of(layer.base_layer), args[0]
    if kind is None or direct_call(layer, args, kwargs) is None or needs_plain_operations():
        return None
    is_plain = type(result) is Tensor and result.dtype == x.dtype == layer.weight_dtype and not is_cast(result)
    return kind.call_into if is_plain else None
