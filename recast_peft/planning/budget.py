"""A budget of coefficients: sizes of groups and sharing are chosen so that a task keeps it (the paper's parametric scaling)."""

from __future__ import annotations

from ..config import RecastConfig
from ..errors import RecastConfigError
from .candidates import Candidate
from .groups import SHARING, count_coefficients, plan_groups


def choose_sizes(runs: list[list[Candidate]], config: RecastConfig) -> tuple[RecastConfig, str]:
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
    sharings = [config.coefficient_sharing] if config.coefficient_sharing else [None, *SHARING]
    all_sets = sorted({config.num_coefficient_sets, 1}, reverse=True)
    smallest = None
    for sharing in sharings:
        for sets in all_sets:
            options = []
            for size in sizes:
                choice = config.as_chosen(num_coefficient_sets=sets, coefficient_sharing=sharing)
                if size is not None:
                    choice.group_size = size
                options.append((count_coefficients(plan_groups(runs, choice), sharing), choice))
            least = min(count for count, _ in options)
            smallest = least if smallest is None else min(smallest, least)
            fitting = [option for option in options if option[0] <= budget]
            if fitting:
                count, choice = max(fitting, key=lambda option: option[0])
                return choice, _explain(count, choice, config, least if sharing is None else None)
    raise RecastConfigError(
        f"max_coefficients={budget} cannot be kept with what the config gives\n  numbers of the smallest choice: {smallest}\n"
        "Give fewer target_modules, or leave group_size, num_templates and coefficient_sharing open."
    )


def _explain(count: int, choice: RecastConfig, config: RecastConfig, least: int | None) -> str:
    parts = [
        f"num_groups={choice.num_groups}" if choice.num_groups is not None else f"group_size={choice.effective_group_size}"
    ]
    parts.append(f"num_templates={choice.num_templates or 'as many as layers (exact)'}")
    parts.append(f"num_coefficient_sets={choice.num_coefficient_sets}")
    if choice.num_coefficient_sets < config.num_coefficient_sets:
        parts[-1] += f" (down from {config.num_coefficient_sets}, which describes the same weights)"
    if choice.coefficient_sharing is not None:
        parts.append(f"coefficient_sharing={choice.coefficient_sharing!r}")
    why = "the largest choice within the budget"
    if least is None and config.coefficient_sharing is None:
        why += "; without sharing no choice keeps it"
    return f"max_coefficients={config.max_coefficients}: {', '.join(parts)} needs {count} numbers, {why}"
