"""What raises the accuracy of few numbers? Variants of RECAST beside its default, one row each.

    python examples/benchmarks/improvements.py --output improvements_output

Targets and groups, pieces of a layer's own weight as templates (in a grown bank without the plain templates), longer and
faster training, and a second-order solve. Every row has two accuracies: with the classifier that was trained beside the
coefficients, and with one fitted in closed form afterwards. The images are drawn with seeds that other studies do not use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' folder

from accuracy import collect, lora, make_study, parser, show
from glyph_backbone import load_backbone
from glyphs import Task
from study import Method, linear_probe, recast_method
from study_tables import Row
from torch import Tensor, nn
from training import Schedule

from recast_peft import RecastConfig, StoredBank, fit_discriminant_head, get_recast_model
from recast_peft.banks.files import StoredGroup
from recast_peft.banks.grown_templates import GrownTemplates
from recast_peft.composition.fingerprint import weight_fingerprint
from recast_peft.parts.head_building import find_head

PROBE = linear_probe(epochs=Schedule.epochs)  # as long as the others: better on these images than 60 epochs
TASKS = ("cyrillic", "greek", "operators")
SEEDS = (11, 12, 13)
ALL_FOUR = ["qkv", "attn.proj", "fc1", "fc2"]
MLP = ["fc1", "fc2"]
COEFFICIENT_LR = Schedule.coefficient_lr
SHRINKAGE = 0.2
ITERATIONS = 12

Pieces = Callable[[Tensor, int], Tensor]


# ---- pieces of a layer's own weight as templates ----


def rows_of(weight: Tensor, count: int) -> Tensor:
    """``(count, *weight.shape)``: equal blocks of rows, zeros elsewhere; their sum is the weight."""
    blocks = torch.zeros(count, *weight.shape)
    for block, part, rows in zip(blocks, weight.chunk(count), torch.arange(len(weight)).chunk(count), strict=True):
        block[rows] = part
    return blocks


def heads_of_value(weight: Tensor, count: int) -> Tensor:
    """The value rows of a fused projection, in ``count`` heads."""
    return rows_of(weight, 3 * count)[2 * count :]


def singular(weight: Tensor, count: int) -> Tensor:
    """The largest singular components, each of the weight's norm."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    components = left.T[:count, :, None] * right[:count, None]
    return components * weight.norm()


def random_low_rank(weight: Tensor, count: int, rank: int = 8) -> Tensor:
    """Products of normal matrices of the weight's norm; the seed is all that would be stored."""
    generator = torch.Generator().manual_seed(round(1e6 * float(weight.norm())))  # another one for every layer
    left = torch.randn(count, weight.shape[0], rank, generator=generator)
    right = torch.randn(count, rank, weight.shape[1], generator=generator)
    products = left @ right
    return products * (weight.norm() / products.flatten(1).norm(dim=1))[:, None, None]


def pieces_bank(parts: dict[str, tuple[Pieces, int]]) -> StoredBank:
    """A bank in which every layer has templates of its own.

    Args:
        parts: for the layers whose names end so, what makes templates of a weight, and how many.
    """
    groups, fingerprints = {}, {}
    for name, module in load_backbone().named_modules():
        for ending, (make, count) in parts.items():
            if isinstance(module, nn.Linear) and name.endswith(ending):
                weight = module.weight.detach()
                grown = GrownTemplates((make(weight, count),), tuple(weight.shape), plain=False)
                groups[name] = StoredGroup((name,), grown=grown)
                fingerprints[name] = weight_fingerprint(weight)
    return StoredBank(groups, fingerprints, "grown")


def pieces(name: str, **parts: tuple[Pieces, int]) -> Method:
    """RECAST on such a bank; ``parts`` by the last part of the layers' names."""

    @cache
    def bank() -> StoredBank:
        return pieces_bank({ending.replace("_", "."): part for ending, part in parts.items()})

    def build(backbone: nn.Module, task: Task, seed: int) -> nn.Module:
        return get_recast_model(backbone, RecastConfig(bank=bank(), num_classes=task.num_classes, seed=seed))

    settings = {"config": "RecastConfig", "pieces": {ending: [make.__name__, n] for ending, (make, n) in parts.items()}}
    return Method(name, settings, build, {"recast_": COEFFICIENT_LR})


# ---- a second-order solve ----


def leave_one_out_logits(features: Tensor, labels: Tensor, classes: int, shrinkage: float = SHRINKAGE) -> Tensor:
    """Log posteriors, up to a constant, of linear discriminants that were fitted without the example in question.

    Leaving one example out moves the mean of its class and changes the covariance by a matrix of rank one (Sherman and
    Morrison), so that nothing is fitted again. The sphere's size and the shares of the classes stay those of all examples.

    Args:
        features: ``(examples, features)`` in float64; every class needs two.
        labels: ``(examples,)``.
        classes: in all.
        shrinkage: as of ``fit_discriminant_head``.

    Returns:
        ``(examples, classes)``, differentiable in the features.
    """
    count = len(features)
    member = F.one_hot(labels, classes).to(features)
    sizes = member.sum(0)
    means = (member.T @ features) / sizes[:, None]
    away = features - means[labels]
    within = away.T @ away / count
    sphere = torch.eye(features.shape[1], dtype=features.dtype) * within.diagonal().mean()
    precision = torch.linalg.inv((1 - shrinkage) * within + shrinkage * sphere)
    size = sizes[labels]
    grown = size / (size - 1)  # the distance from its class mean, when that is formed without the example
    distance = features[:, None] - means  # (examples, classes, features)
    distance = distance * torch.where(member.bool(), grown[:, None], torch.ones(()))[..., None]
    share = (1 - shrinkage) * grown / count
    towards = away @ precision
    squared = ((distance @ precision) * distance).sum(-1)
    moved = share[:, None] * (distance @ towards[..., None]).squeeze(-1).square()
    return -(squared + moved / (1 - share * (towards * away).sum(1))[:, None]) / 2 + (sizes / count).log()


def train_leave_one_out(model: nn.Module, groups: list[dict[str, object]], task: Task, schedule: Schedule) -> None:
    """Fit the coefficients alone, by L-BFGS on all images, to the leave-one-out loss of the classifier in closed form.

    The loss is differentiated through the classifier. The features are computed twice, so that one part of the images after the
    other is enough in memory.
    """
    coefficients = [p for name, p in model.named_parameters() if p.requires_grad and "recast_" in name]
    caught: list[Tensor] = []
    handle = model.get_submodule(find_head(model)).register_forward_pre_hook(lambda module, args: caught.append(args[0]))

    def features(images: Tensor) -> Tensor:
        model(images)
        return caught.pop()

    solver = torch.optim.LBFGS(coefficients, max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe")
    parts = task.train_images.split(256)

    def loss_of_all() -> Tensor:
        solver.zero_grad()
        with torch.no_grad():
            found = torch.cat([features(part) for part in parts])
        found.requires_grad_()
        logits = leave_one_out_logits(found.double(), task.train_labels, task.num_classes)
        loss = F.cross_entropy(logits, task.train_labels)
        (slope,) = torch.autograd.grad(loss, found)
        for part, its_slope in zip(parts, slope.split(256), strict=True):
            features(part).backward(its_slope)
        return loss.detach()

    model.eval()
    try:
        solver.step(loss_of_all)
    finally:
        handle.remove()
    fit_discriminant_head(model, zip(parts, task.train_labels.split(256), strict=True), shrinkage=SHRINKAGE)


def second_order(method: Method) -> Method:
    """The same numbers by the second-order solve."""
    settings = {**method.settings, "train": f"L-BFGS, {ITERATIONS} iterations, leave one out"}
    return replace(method, name=f"{method.name}, L-BFGS", settings=settings, train=train_leave_one_out)


# ---- the table ----


def recast(name: str, **fields: object) -> Method:
    """RECAST by its configuration."""
    return recast_method(name, fields, COEFFICIENT_LR)


ATTENTION = recast("attention, groups of 2", target_modules="all-attention")
MLP_PAIRS = recast("MLP, groups of 2", target_modules=MLP)
OWN = recast("all four, own weight", target_modules=ALL_FOUR, group_size=1)
BIASES = recast("MLP, own weight, and biases", target_modules=MLP, group_size=1, partners=[{"method": "bias"}])
DECAYED: dict[str, Any] = {"head_lr": 0.003, "head_decay": 10.0}
APART = pieces("q, k, v apart, proj, fc1, fc2", qkv=(rows_of, 3), proj=(rows_of, 1), fc1=(rows_of, 1), fc2=(rows_of, 1))

VARIANTS: dict[str, list[Method]] = {
    "training": [
        ATTENTION,
        replace(ATTENTION, name="attention, learning rate 0.15", lrs={"recast_": 3 * COEFFICIENT_LR}),
        replace(ATTENTION, name="attention, 20 epochs", epochs=20),
    ],
    "targets and groups": [
        recast("fc1, own weight", target_modules=["fc1"], group_size=1),
        recast("fc2, own weight", target_modules=["fc2"], group_size=1),
        recast("MLP, own weight", target_modules=MLP, group_size=1),
        MLP_PAIRS,
        recast("MLP, groups of 3", target_modules=MLP, group_size=3),
        OWN,
        recast("attention, own weight", target_modules=["qkv", "attn.proj"], group_size=1),
        recast("all four, first 4 blocks", target_modules=ALL_FOUR, layers_to_transform=[0, 1, 2, 3]),
        recast("all four, last 4 blocks", target_modules=ALL_FOUR, layers_to_transform=[4, 5, 6, 7]),
        recast("all four, roles shared", target_modules=ALL_FOUR, group_size=4, coefficient_sharing="roles"),
    ],
    "pieces of the own weight": [
        APART,
        pieces("heads of v, proj, fc1, fc2", qkv=(heads_of_value, 3), proj=(rows_of, 1), fc1=(rows_of, 1), fc2=(rows_of, 1)),
        pieces("fc1 in 4 blocks, fc2, qkv", fc1=(rows_of, 4), fc2=(rows_of, 1), qkv=(rows_of, 1)),
        pieces("MLP, 3 singular components", fc1=(singular, 3), fc2=(singular, 3)),
        pieces("MLP, 3 random of rank 8", fc1=(random_low_rank, 3), fc2=(random_low_rank, 3)),
    ],
    "biases": [
        recast("biases alone", target_modules=MLP, group_size=1, partners=[{"method": "bias"}], train_coefficients=False),
        BIASES,
        replace(BIASES, name="the same, learning rate 0.15", lrs={"recast_": 3 * COEFFICIENT_LR}),
    ],
    "decayed classifier": [
        replace(MLP_PAIRS, name="MLP, groups of 2, decayed classifier", **DECAYED),
        replace(BIASES, name="MLP and biases, decayed classifier", **DECAYED),
        replace(lora(8), name="LoRA r=8, decayed classifier", **DECAYED),
    ],
    "second order": [second_order(ATTENTION), second_order(MLP_PAIRS)],
    "LoRA": [lora(8)],
}


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run the variants; returns the rows."""
    made = parser(__doc__, "improvements_output")
    made.set_defaults(tasks=list(TASKS), seeds=list(SEEDS), train_per_class=60)
    made.add_argument("--variants", nargs="+", help="only these rows, by name (default: all)")
    options = made.parse_args(arguments)
    study = make_study(options)
    chosen = {
        family: [m for m in methods if options.variants is None or m.name in options.variants]
        for family, methods in VARIANTS.items()
    }
    families = {PROBE.name: [PROBE], **{family: methods for family, methods in chosen.items() if methods}}
    rows = collect(study, families, options)
    show(rows, options, "What raises the accuracy of few numbers")
    return rows


if __name__ == "__main__":
    main()
