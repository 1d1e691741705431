"""random_bank: templates of random numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..banks.files import StoredBank, StoredGroup
from ..banks.grown_templates import GrownTemplates
from ..composition.compose import made_to_stay
from ..config import RecastConfig
from ..planning.groups import PlannedGroup, as_matrix
from ..tasks.plan import plan_recast
from ..validation import COUNT, SEED, check_arguments, flag, optional
from .sources import check_pretrained

RANDOM_SIZE = 0.1  # of a random template, in units of the pretrained weights' root mean square


@made_to_stay()
def random_bank(
    model: nn.Module,
    config: RecastConfig | None = None,
    *,
    num_templates: int = 4,
    rank: int | None = None,
    plain_templates: bool = True,
    seed: int = 0,
) -> StoredBank:
    """Make a bank of random templates, for trials and benchmarks of cost: as large as a grown one, and of no use to a task.

    Args:
        model: plain model with its pretrained weights; it is not changed.
        config: its targets and groups are used; None takes the default targets, each in a group of its own.
        num_templates: random templates of each group.
        rank: stores each template as a low-rank pair; None stores them dense.
        plain_templates: keep the members' pretrained weights as templates beside the random ones.
        seed: random seed for the templates.

    Returns:
        the bank, under no name.

    Raises:
        RecastConfigError: if a number cannot be used, or the model is converted already.
    """
    check_pretrained(model, "random_bank")
    check_arguments(COUNT, num_templates=num_templates)
    check_arguments(optional(COUNT), rank=rank)
    check_arguments(flag, plain_templates=plain_templates)
    check_arguments(SEED, seed=seed)
    plan = plan_recast(model, RecastConfig(group_size=1) if config is None else config)
    targets = {target.name: target for target in plan.candidates}
    generator = torch.Generator().manual_seed(seed)
    groups = {}
    for planned in plan.groups:
        weights = [targets[member].weight.detach().float() for member in planned.members]
        size = RANDOM_SIZE * float(torch.stack([weight.square().mean() for weight in weights]).mean().sqrt())
        tensors = _random_tensors(planned, num_templates, rank, size, generator)
        groups[planned.name] = StoredGroup(
            planned.members, grown=GrownTemplates(tensors, tuple(planned.shape), plain_templates)
        )
    fingerprints = {name: target.fingerprint for name, target in targets.items()}
    return StoredBank(groups, fingerprints, {"method": "random", "num_templates": num_templates, "rank": rank, "seed": seed})


def _random_tensors(
    planned: PlannedGroup, count: int, rank: int | None, size: float, generator: torch.Generator
) -> tuple[Tensor, ...]:
    rows, columns = as_matrix(planned.shape)
    if rank is None:
        shapes: tuple[tuple[int, ...], ...] = ((count, *planned.shape),)
        scale = size
    else:
        rank = min(rank, rows, columns)
        shapes = ((count, rows, rank), (count, rank, columns))
        scale = (size / math.sqrt(rank)) ** 0.5  # an entry of the product is a sum of ``rank`` products
    return tuple((torch.randn(shape, generator=generator, dtype=torch.float32) * scale).to(planned.dtype) for shape in shapes)
