"""readout_bank: templates that read the layers of several blocks for the classifier, from unlabelled data.

The principal directions of what is read are whitened in part (each is divided by the fourth root of its standard
deviation): the first few would drown the others (whitening of projected features: Jegou and Chum, ECCV 2012). How far, and how
large the features are, was chosen on eight tasks of two pretrained models (docs/results/choices.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_templates import GrownTemplates
from ..composition.compose import made_to_stay
from ..composition.kinds import family_of
from ..errors import RecastConfigError, RecastTargetError
from ..holders import plain_modules
from ..mimicry.closed_form import principal_axes, with_signs
from ..mimicry.features import evaluating, run_on
from ..names import block_of, lies_in
from ..parts.head_building import find_head
from ..parts.readout import fingerprints_at_hand, fitted, given_to, mask_of, modules_around, pooled
from ..planning.candidates import Candidate, find_candidates
from ..planning.heads import head_names
from ..validation import COUNT, check_arguments
from .families import Inputs, check_data, rows_of_inputs
from .sources import check_pretrained

MOST_MODULES = 16
MOST_EXAMPLES = 4096
MOST_TRIED = 8  # examples on which layers are chosen; what all layers of all blocks read is held for them
FIRST_LAYERS = 0.5  # what the first third of the layers count in the directions, beside the others
WHITENING = 0.25  # power of a direction's standard deviation that it is divided by; 0 leaves it as it is, 1 makes all alike
SIZE = 0.5  # of the new features, in units of the old ones' norm: at high rates a classifier learns larger ones by heart
SMALLEST_SPREAD = 1e-5  # of what is read about its mean, in units of their norm; below lies rounding
ROUNDING = 1e-3  # of a layer's templates in half precision, in units of their norm; more is lost where they leave its range
SMALLEST = 1e-4  # standard deviation of a direction, in units of the first one's; below lies rounding


@made_to_stay()
def readout_bank(
    model: nn.Module,
    data: Inputs,
    *,
    target_modules: Sequence[str] | None = None,
    head_module: str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> StoredBank:
    """Make a bank that lets the classifier of every task read several blocks: principal directions of what layers in them read.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        data: unlabelled: a tensor ``(examples, ...)``, or such tensors by the names of the model's arguments; thousands of
            examples serve better than hundreds. Of more than 4,096 as many are drawn.
        target_modules: names of the layers whose inputs are read beside the features that the classifier reads anyway. None is
            one layer in each of at most 16 of the model's numbered blocks, evenly spaced, the last one among them: the layer
            that reads most features, and of equals the last. In a transformer that is the second layer of the MLP, whose
            inputs are the neurons of its first.
        head_module: name of the classifier; None finds it. It may be an ``nn.Identity``.
        batch_size: examples that the model is called with at once.
        progress: show a progress bar.

    Returns:
        the bank, version 1, to be given as ``ReadoutConfig(bank=...)``, saved and pushed. The layers count equally, whatever
        the size of what they read, but for the first third of them, which count half. The new features are whitened in part,
        half as large as the old ones, and their mean is zero. Templates are in half precision, where that holds them.

    Raises:
        RecastConfigError: if an argument cannot be used, there are fewer than two examples, or the model is converted already.
        RecastTargetError: if the classifier or a layer is not found, or inputs do not fit what the classifier reads.
    """
    check_pretrained(model, "readout_bank")
    check_arguments(COUNT, batch_size=batch_size)
    head = find_head(model, head_module)
    drawn = _drawn(data)
    some = rows_of_inputs(drawn, torch.arange(min(_count(drawn), MOST_TRIED)))
    members, pools = _members(model, head, target_modules, some)
    found = _features(model, drawn, members, head, pools, batch_size, progress)
    means = [values.mean(0) for values in found]
    centred = [values - mean for values, mean in zip(found, means, strict=True)]
    sizes = [_size(around, values) for around, values in zip(centred, found, strict=True)]
    third = len(members) // 3
    sizes[:third] = [size / FIRST_LAYERS for size in sizes[:third]]
    flat = torch.cat([values / size for values, size in zip(centred, sizes, strict=True)], dim=1)
    if not flat.any():
        raise RecastConfigError("the model gives the same for all examples: give examples that differ, two or more")
    directions, kept = _principal_directions(flat, found[-1].shape[1])
    size = SIZE * found[-1].norm(dim=1).mean() / (flat @ directions.T).norm(dim=1).mean()
    widths = tuple(values.shape[1] for values in found)
    parts = [size * part / own for part, own in zip(directions.split(widths, dim=1), sizes, strict=True)]
    templates = torch.cat(parts, dim=1)
    if all(torch.dist(part.half().float(), part) <= ROUNDING * part.norm() for part in parts):
        templates = templates.half()
    group = StoredGroup(
        (*members, head),
        grown=GrownTemplates((templates,), (sum(widths),), False),
        widths=widths,
        offset=-templates.float() @ torch.cat(means),
        pools=pools,
    )
    made = {"method": "readout", "examples": len(flat), "variance": round(kept, 4)}
    return StoredBank({"readout": group}, fingerprints_at_hand(members, find_candidates(model)), made)


def _members(model: nn.Module, head: str, wanted: Sequence[str] | None, some: Inputs) -> tuple[list[str], bool]:
    """The layers that are read, in their order, and whether that is pooled; ``some`` are examples to try them on."""
    heads = {*head_names(model), head}
    candidates = [c for c in find_candidates(model) if c.weight_name is not None and not lies_in(c.name, heads)]
    kinds = ((c.name, family_of(c.module)) for c in candidates)
    layers = [name for name, kind in kinds if kind is not None and kind.rows is not None]
    blocks: list[str] = []
    if wanted is not None:
        layers = _named(layers, candidates, wanted)
    else:
        blocks = _blocks(layers)
        chosen = _evenly_spaced(blocks, MOST_MODULES)
        layers = [name for name in layers if lies_in(name, chosen)]
    with _reader(model, layers, head) as reader:
        inputs, x, _ = reader.read(some)
    return (_widest_by_block(layers, blocks, inputs, x) if wanted is None else layers), x.ndim == 2


def _named(layers: Sequence[str], candidates: Sequence[Candidate], wanted: Sequence[str]) -> list[str]:
    """The layers that a user names, by any name that they have in the model."""
    known = {name: candidate.name for candidate in candidates for name in candidate.names}
    if not isinstance(wanted, list | tuple) or not wanted or any(known.get(name) not in layers for name in wanted):
        raise RecastTargetError(
            f"readout_bank(target_modules={wanted!r}): expected a list of names of linear layers or convolutions"
        )
    named = {known[name] for name in wanted}
    return [name for name in layers if name in named]


def _blocks(layers: Sequence[str]) -> list[str]:
    """The innermost numbered blocks that hold layers; in a model without any, the layers themselves."""
    blocks = list(dict.fromkeys(block_of(name) for name in layers if block_of(name) != name))
    return [block for block in blocks if not any(other != block and lies_in(other, {block}) for other in blocks)] or [*layers]


def _evenly_spaced(blocks: Sequence[str], most: int) -> set[str]:
    """At most so many of the blocks, the last one among them."""
    count = min(most, len(blocks))
    return {blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)}


def _widest_by_block(layers: Sequence[str], blocks: Sequence[str], inputs: Mapping[str, Tensor], x: Tensor) -> list[str]:
    """In each block the layer that reads most features and fits the classifier, and of equals the last."""
    widest: dict[str, str] = {}
    for name in layers:
        block = next(b for b in blocks if lies_in(name, {b}))
        if name in inputs and _fits(inputs[name], x) and inputs[name].shape[-1] >= inputs[widest.get(block, name)].shape[-1]:
            widest[block] = name
    if not widest:
        raise RecastTargetError("no layer of the model reads what its classifier could: name layers with target_modules")
    return [name for name in layers if name in widest.values()]


def _fits(given: Tensor, x: Tensor) -> bool:
    try:
        fitted(pooled(given) if x.ndim == 2 else given, x, given.shape[-1])
    except RecastTargetError:
        return False
    return True


def _drawn(data: Inputs) -> Inputs:
    check_data(data)
    count = _count(data)
    if count < 2:
        raise RecastConfigError(f"readout_bank needs two examples or more; given: {count}")
    if count <= MOST_EXAMPLES:
        return data
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MOST_EXAMPLES]
    return rows_of_inputs(data, rows.sort().values)


def _count(data: Inputs) -> int:
    return len(next(iter(data.values())) if isinstance(data, Mapping) else data)


def _features(
    model: nn.Module, data: Inputs, members: list[str], head: str, pools: bool, batch_size: int, progress: bool
) -> list[Tensor]:
    """What every member reads, and last what the classifier does: ``(examples, width)`` each, in float32 on the CPU."""
    found: list[list[Tensor]] = []
    with _reader(model, members, head, pools) as reader:
        for rows in tqdm(torch.arange(_count(data)).split(batch_size), desc="readout", disable=not progress):
            inputs, x, mask = reader.read(rows_of_inputs(data, rows))
            silent = next((name for name in members if name not in inputs), None)
            if silent is not None:
                raise RecastTargetError(f"{silent} is not called when the model is, or with no tensor: name other layers")
            vectors = [fitted(inputs[name], x, inputs[name].shape[-1]) for name in members]
            flat = [v.float().cpu().flatten(0, -2) for v in (*vectors, x)]
            if x.ndim == 3 and mask is not None and mask.shape == x.shape[:2]:
                flat = [v[mask.flatten().bool().cpu()] for v in flat]
            found.append(flat)
    features = [torch.cat(parts) for parts in zip(*found, strict=True)]
    for name, values in zip((*members, head), features, strict=True):
        if not values.isfinite().all():
            raise RecastConfigError(f"{name} reads numbers that are not finite: its weights are damaged, or take float32")
    return features


class _Reader:
    """Calls a model and notes what layers and the classifier read; ``_reader`` puts its hooks into the model.

    What layers read is pooled where that is asked for: as a whole it may not fit in memory.
    """

    def __init__(self, model: nn.Module, head: str, pools: bool) -> None:
        self.model, self.head, self.pools = model, head, pools
        self.inputs: dict[str, Tensor] = {}
        self.mask: Tensor | None = None  # the last one that a module was given

    def note(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = given_to(module, args, kwargs)
        if x is not None:
            self.inputs[name] = pooled(x, self.mask) if self.pools and name != self.head else x

    def note_mask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = mask_of(module, args, kwargs)
        self.mask = self.mask if given is None else given

    @torch.no_grad()
    def read(self, examples: Inputs) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """Call the model; what the layers that were called read, by name, what the classifier reads, and the mask."""
        self.inputs, self.mask = {}, None
        run_on(self.model, examples)
        x = self.inputs.pop(self.head, None)
        if x is None:
            raise RecastTargetError(f"{self.head} is not called when the model is, or with no tensor: name another head_module")
        if x.ndim not in (2, 3):
            raise RecastTargetError(
                f"{self.head} reads {tuple(x.shape)}: expected (samples, features) or (samples, positions, features). Name the "
                "layer in it that reads these with head_module"
            )
        return self.inputs, x, self.mask


@contextmanager
def _reader(model: nn.Module, layers: Sequence[str], head: str, pools: bool = False) -> Iterator[_Reader]:
    """A reader of layers and of the classifier; the model is in evaluation mode until the block ends."""
    reader, modules = _Reader(model, head, pools), plain_modules(model)
    with ExitStack() as hooks, evaluating(model):
        for name in (*layers, head):
            hooks.enter_context(modules[name].register_forward_pre_hook(partial(reader.note, name), with_kwargs=True))
        for module in modules_around(model, layers):  # one inside may be given fewer positions than the model
            hooks.enter_context(module.register_forward_pre_hook(reader.note_mask, with_kwargs=True))
        yield reader


def _size(around: Tensor, values: Tensor) -> Tensor:
    """Mean norm of features about their mean; infinite where they hold rounding alone, which would count as much as others."""
    size = around.norm(dim=1).mean()
    return torch.full_like(size, torch.inf) if size <= SMALLEST_SPREAD * values.norm(dim=1).mean() else size


def _principal_directions(flat: Tensor, count: int) -> tuple[Tensor, float]:
    """The first principal directions of centred rows, whitened in part; their share of the variance.

    Returns:
        at most ``(count, width)`` in float32, the largest first, and the share.
    """
    examples, width = flat.shape
    flat = flat.double()
    gram = flat @ flat.T if examples <= width else flat.T @ flat
    every, vectors = principal_axes(gram)
    values = every[:count]
    is_large = values > every[0].clamp_min(0) * SMALLEST**2
    vectors, deviations = vectors[:, :count][:, is_large], (values[is_large] / every[0]).sqrt()
    if examples <= width:
        vectors = flat.T @ vectors
        vectors = vectors / vectors.norm(dim=0)
    share = float(values.sum() / every.sum().clamp_min(torch.finfo(torch.float64).tiny))
    return (with_signs(vectors) / deviations**WHITENING).T.float(), share
