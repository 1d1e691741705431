"""readout_bank: templates that read the outputs of several blocks for the classifier, from unlabelled data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_templates import GrownTemplates
from ..errors import RecastConfigError, RecastTargetError
from ..holders import plain_modules
from ..mimicry.features import call_arguments, captured_outputs, device_of, evaluating
from ..names import block_of, lies_in
from ..parts.head_building import find_head
from ..parts.readout import fingerprints_of, mask_of, modules_around, pooled
from ..planning.candidates import find_candidates
from ..planning.heads import head_names
from .practice import Inputs, check_data, rows_of_inputs
from .sources import check_plain, check_sizes

MOST_MODULES = 16
MOST_EXAMPLES = 4096
SMALLEST_SPREAD = 1e-5  # of outputs about their mean, in units of their norm; below lies rounding
SMALLEST = 1e-4  # standard deviation of a direction, in units of the first one's; below lies rounding


def readout_bank(
    model: nn.Module,
    data: Inputs,
    *,
    target_modules: Sequence[str] | None = None,
    head_module: str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> StoredBank:
    """Make a bank that lets the classifier of every task read several blocks: principal directions of their outputs.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        data: unlabelled: a tensor ``(examples, ...)``, or such tensors by the names of the model's arguments; some hundred
            examples or more. Of more than 4,096 as many are drawn.
        target_modules: names of the modules whose outputs are read beside the features that the classifier reads anyway; None
            is at most 16 of the model's numbered blocks, evenly spaced, the last one among them.
        head_module: name of the classifier; None finds it. It may be an ``nn.Identity``.
        batch_size: examples that the model is called with at once.
        progress: show a progress bar.

    Returns:
        the bank, version 1, to be given as ``ReadoutConfig(bank=...)``, saved and pushed. The outputs count equally, whatever
        their size; the new features are as large as the old ones, their mean is zero.

    Raises:
        RecastConfigError: if an argument cannot be used, there are fewer than two examples, or the model is converted already.
        RecastTargetError: if the classifier or a module is not found, or outputs do not fit what the classifier reads.
    """
    check_plain(model, "readout_bank")
    check_sizes(batch_size=batch_size)
    head = find_head(model, head_module)
    members = _members(model, head, target_modules)
    found = _outputs(model, _drawn(data), members, head, batch_size, progress)
    centred, means, sizes = [], [], []
    for values in found:
        mean = values.mean(0)
        centred.append(values - mean)
        means.append(mean)
        size = centred[-1].norm(dim=1).mean()
        is_rounding = size <= SMALLEST_SPREAD * values.norm(dim=1).mean()
        sizes.append(torch.full_like(size, torch.inf) if is_rounding else size)  # it would count as much as any other one
    flat = torch.cat([values / size for values, size in zip(centred, sizes, strict=True)], dim=1)
    if not flat.any():
        raise RecastConfigError("the model gives the same for all examples: give examples that differ, two or more")
    directions, kept = _principal_directions(flat, found[-1].shape[1])
    size = found[-1].norm(dim=1).mean() / (flat @ directions.T).norm(dim=1).mean()
    widths = tuple(values.shape[1] for values in found)
    parts = [size * part / own for part, own in zip(directions.split(widths, dim=1), sizes, strict=True)]
    templates = torch.cat(parts, dim=1)
    group = StoredGroup(
        (*members, head),
        grown=GrownTemplates((templates,), (sum(widths),), False),
        widths=widths,
        offset=-templates @ torch.cat(means),
    )
    fingerprints = fingerprints_of(members, find_candidates(model))
    return StoredBank(
        {"readout": group}, fingerprints, {"method": "readout", "examples": len(flat), "variance": round(kept, 4)}
    )


def _members(model: nn.Module, head: str, wanted: Sequence[str] | None) -> list[str]:
    """The modules that are read, in their order."""
    names = list(plain_modules(model))
    if wanted is not None:
        if isinstance(wanted, str) or not wanted or any(name not in names for name in wanted):
            raise RecastTargetError(
                f"readout_bank(target_modules={wanted!r}): expected a list of names of modules of the model"
            )
        return [name for name in names if name in wanted]
    heads = {*head_names(model), head}
    blocks = [c.name for c in find_candidates(model) if c.weight_name is not None and not lies_in(c.name, heads)]
    blocks = list(dict.fromkeys(block_of(name) for name in blocks if block_of(name) != name))
    blocks = [block for block in blocks if not any(other != block and lies_in(other, {block}) for other in blocks)]
    if not blocks:
        raise RecastTargetError("the model has no numbered blocks: name the modules to read with target_modules")
    count = min(MOST_MODULES, len(blocks))
    return [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]


def _drawn(data: Inputs) -> Inputs:
    check_data(data)
    count = len(next(iter(data.values())) if isinstance(data, Mapping) else data)
    if count < 2:
        raise RecastConfigError(f"readout_bank needs two examples or more; given: {count}")
    if count <= MOST_EXAMPLES:
        return data
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MOST_EXAMPLES]
    return rows_of_inputs(data, rows.sort().values)


@torch.no_grad()
def _outputs(model: nn.Module, data: Inputs, members: list[str], head: str, batch_size: int, progress: bool) -> list[Tensor]:
    """What every member gives, and last what the classifier reads: ``(examples, width)`` each, in float32 on the CPU."""
    read: list[Tensor] = []
    masks: list[Tensor | None] = []

    def note_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        masks.append(mask_of(module, args, kwargs))

    handles = [plain_modules(model)[head].register_forward_pre_hook(lambda module, args: read.extend(args[:1]))]
    # a module inside may be given fewer positions than the model
    handles += [m.register_forward_pre_hook(note_mask, with_kwargs=True) for m in modules_around(model, members)]
    found: list[list[Tensor]] = []
    rows = torch.arange(len(next(iter(data.values()))) if isinstance(data, Mapping) else len(data)).split(batch_size)
    try:
        with evaluating(model), captured_outputs(model, members) as outputs:
            for some in tqdm(rows, desc="readout", disable=not progress):
                args, kwargs = call_arguments(rows_of_inputs(data, some), device_of(model))
                model(*args, **kwargs)
                if not read or not isinstance(read[-1], Tensor) or any(name not in outputs for name in members):
                    silent = next((name for name in members if name not in outputs), head)
                    raise RecastTargetError(f"{silent} is not called when the model is, or gives no tensor: name other modules")
                mask = next((mask for mask in reversed(masks) if mask is not None), None)
                found.append(_vectors([outputs[name] for name in members], read.pop(), mask))
                read.clear()
                masks.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _vectors(outputs: list[Tensor], x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Outputs of a batch as the classifier can read them, position by position where it reads so."""
    is_last = any(o.ndim == 4 and o.shape[-1] == x.shape[-1] != o.shape[1] for o in outputs)
    vectors = [pooled(o, x, o.shape[1] if o.ndim > 3 and not is_last else o.shape[-1], mask) for o in outputs]
    flat = [v.float().cpu().flatten(0, -2) for v in (*vectors, x)]
    if x.ndim == 3 and mask is not None and mask.shape == x.shape[:2]:
        flat = [v[mask.flatten().bool().cpu()] for v in flat]
    return flat


def _principal_directions(flat: Tensor, count: int) -> tuple[Tensor, float]:
    """The first principal directions of centred rows, ``(count, width)`` in float32, and their share of the variance.

    Directions beyond those that the rows have are zero.
    """
    examples, width = flat.shape
    flat = flat.double()
    gram = flat @ flat.T if examples <= width else flat.T @ flat
    every, vectors = (t.flip(-1) for t in torch.linalg.eigh(gram))
    values = every[:count]
    vectors = vectors[:, :count][:, values > every[0].clamp_min(0) * SMALLEST**2]
    if examples <= width:
        vectors = flat.T @ vectors
        vectors = vectors / vectors.norm(dim=0)
    signs = torch.gather(vectors, 0, vectors.abs().argmax(0, keepdim=True)).sign()
    directions = torch.zeros(count, width)
    directions[: vectors.shape[1]] = (vectors * signs).T.float()
    return directions, float(values.sum() / every.sum().clamp_min(torch.finfo(torch.float64).tiny))
