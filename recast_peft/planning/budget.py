"""A budget of coefficients: sizes are chosen so that a task keeps it (the paper's parametric scaling).

A config that names no size keeps to ``DEFAULT_BUDGET``: the first row of ``DEFAULT_SIZES`` within it is taken. Which rows there
are, and in what order, is measured on pretrained models (docs/results/index.md). A size that is given, however small or
large, is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import RecastConfig
from ..errors import RecastConfigError
from .candidates import Candidate, is_compressed
from .groups import SHARING, count_coefficients, layer_runs, most_directions, plan_groups
from .roles import is_minor_convolution

DEFAULT_BUDGET = 48


@dataclass(frozen=True)
class Sizes:
    """A way to fit a budget."""

    group_size: int  # layers that share a bank
    leaves_out_minor: bool = False  # without the convolutions that make patches or join stages, unless the config names them
    shares: bool = False  # consecutive layers of a role share their offsets, as few of them as will do


DEFAULT_SIZES = (Sizes(2), Sizes(1), Sizes(1, leaves_out_minor=True), Sizes(1, shares=True))


def fit_budget(targets: list[Candidate], config: RecastConfig) -> tuple[list[Candidate], RecastConfig, str]:
    """Choose what a config leaves open so that a task keeps its budget, or the default one.

    Returns:
        the targets that stay, the config with its choices, and a sentence that says what was chosen; empty where nothing was.

    Raises:
        RecastConfigError: if nothing fits.
    """
    if not _names_a_size(config):
        return default_sizes(targets, config)
    directions = _choose_directions(targets, config)
    if directions is not None:
        return directions
    if config.max_coefficients is not None and config.num_directions is None:
        return targets, *_choose_sizes(layer_runs(targets), config)
    return targets, config, ""


def _names_a_size(config: RecastConfig) -> bool:
    """Whether a config says how many numbers a task trains, by a size, by sharing or by a budget."""
    sizes = (*_sizes_of(config), config.coefficient_sharing, config.max_coefficients)
    return config.num_coefficient_sets > 1 or any(size is not None for size in sizes) or not config.train_coefficients


def _sizes_of(config: RecastConfig) -> tuple[int | None, ...]:
    return config.group_size, config.num_groups, config.num_templates, config.num_directions


def _choose_directions(targets: list[Candidate], config: RecastConfig) -> tuple[list[Candidate], RecastConfig, str] | None:
    """Give a budget from ``DEFAULT_BUDGET`` on to the main directions of each weight, as many as it keeps.

    Returns:
        the targets that stay, the config with its choice, and a sentence that says so; None without a budget, for a smaller
        one or less than one direction a layer, for a config that gives other sizes or a method that fits templates, and where
        the weights are no matrices (``target_parameters``) or compressed banks stand for them.
    """
    budget = config.max_coefficients or 0
    others = (*_sizes_of(config), config.coefficient_sharing, config.target_parameters)
    is_other = any(choice is not None for choice in others) or config.num_coefficient_sets > 1 or config.method.fits_full_banks
    if budget < DEFAULT_BUDGET or is_other or any(is_compressed(target) for target in targets):
        return None
    kept = next((kept for kept in (targets, _without_minor(targets, config)) if most_directions(kept, budget)), None)
    if kept is None:
        return None
    choice = config.as_chosen(num_directions=most_directions(kept, budget))
    count = choice.num_directions
    needed = count_coefficients(plan_groups(layer_runs(kept), choice), None)
    return kept, choice, f"max_coefficients={budget}: num_directions={count} needs {needed} numbers, the most that keep it"


def _without_minor(targets: list[Candidate], config: RecastConfig) -> list[Candidate]:
    return [target for target in targets if config.target_modules is not None or not is_minor_convolution(target)]


def default_sizes(targets: list[Candidate], config: RecastConfig) -> tuple[list[Candidate], RecastConfig, str]:
    """Choose sizes for a config that names none, so that a task trains at most ``DEFAULT_BUDGET`` numbers.

    Returns:
        the targets that stay, the config with its choices, and a sentence that says what was chosen; it is empty where the
        first row fits.
    """
    for row in DEFAULT_SIZES:
        kept = _without_minor(targets, config) if row.leaves_out_minor else targets
        choice = config.as_chosen(group_size=row.group_size)
        groups = plan_groups(layer_runs(kept), choice)
        sharings = range(-(-len(groups) // DEFAULT_BUDGET), len(groups) + 1) if row.shares else [None]
        for sharing in sharings:
            count = count_coefficients(groups, sharing)
            if 0 < count <= DEFAULT_BUDGET:
                choice.coefficient_sharing = sharing  # type: ignore[assignment]
                reason = _explain(DEFAULT_BUDGET, count, choice, config) if row is not DEFAULT_SIZES[0] else ""
                return kept, choice, reason
    raise AssertionError("one number for all layers fits every budget")


def _choose_sizes(runs: list[list[Candidate]], config: RecastConfig) -> tuple[RecastConfig, str]:
    """Choose what a config leaves open so that a task needs at most ``max_coefficients`` numbers.

    What was given is kept: ``group_size`` or ``num_groups``, ``num_templates``, ``coefficient_sharing``. Of the rest, the
    most numbers that fit are taken, first without sharing, then with as little sharing as will do; coefficient sets are
    given up before layers share, as they add nothing that can be expressed. Fewer templates than layers are never chosen:
    they change the model, and a smaller group saves as many numbers.

    Returns:
        the config with its choices, and a sentence that says what they are and why.

    Raises:
        RecastConfigError: if nothing fits; the message says how many numbers the smallest choice needs.
    """
    assert config.max_coefficients is not None
    budget, longest = config.max_coefficients, max(map(len, runs))
    fixed_size = config.group_size is not None or config.num_groups is not None
    sizes: list[int | None] = [None] if fixed_size else list(range(longest, (config.num_templates or 1) - 1, -1)) or [longest]
    how_many = range(2, sum(map(len, runs)) + 1)  # consecutive banks may share their offsets
    sharings: list[Any] = [None, *SHARING, *how_many] if config.coefficient_sharing is None else [config.coefficient_sharing]
    counts: list[int] = []
    for sharing in sharings:
        for sets in sorted({config.num_coefficient_sets, 1}, reverse=True):
            options = {"num_coefficient_sets": sets, "coefficient_sharing": sharing}
            choices = [config.as_chosen(group_size=size or config.group_size, **options) for size in sizes]
            counted = [(count_coefficients(plan_groups(runs, choice), sharing), choice) for choice in choices]
            if fitting := [(count, choice) for count, choice in counted if count <= budget]:
                count, choice = max(fitting, key=lambda option: option[0])
                return choice, _explain(budget, count, choice, config)
            counts += [count for count, _ in counted]
    raise RecastConfigError(
        f"max_coefficients={budget} cannot be kept with what the config gives\n"
        f"  numbers of the smallest choice: {min(counts)}\n"
        "Give fewer target_modules, or leave group_size, num_templates and coefficient_sharing open."
    )


def _explain(budget: int, count: int, choice: RecastConfig, config: RecastConfig) -> str:
    size = f"group_size={choice.effective_group_size}" if choice.num_groups is None else f"num_groups={choice.num_groups}"
    templates = f"num_templates={choice.num_templates or 'as many as layers (exact)'}"
    parts = [size, templates, f"num_coefficient_sets={choice.num_coefficient_sets}"]
    if choice.num_coefficient_sets < config.num_coefficient_sets:
        parts[-1] += f" (down from {config.num_coefficient_sets}, which describes the same weights)"
    if choice.coefficient_sharing is not None:
        parts.append(f"coefficient_sharing={choice.coefficient_sharing!r}")
    why = "the largest choice within the budget"
    if choice.coefficient_sharing is not None and config.coefficient_sharing is None:
        why += "; without sharing no choice keeps it"
    asked = "" if config.max_coefficients is not None else " (by default; a size or a budget that is given goes before it)"
    return f"max_coefficients={budget}{asked}: {', '.join(parts)} needs {count} numbers, {why}"
