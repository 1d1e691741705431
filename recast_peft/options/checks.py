"""What each field of a RecastConfig may be: one row a field, then what must hold of several together.

A config may come from a file that a stranger wrote, so types are checked all the way down, and names, lists and numbers are
bounded: whatever is wrong ends in one error that names the field.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from peft import TaskType

from ..banks.files import StoredBank
from ..composition.coefficient_gradients import AUTO, GRADIENT_CHOICES
from ..errors import RecastConfigError
from ..mimicry import resolve_method
from ..validation import (
    LONGEST_NAME,
    SEED,
    Check,
    Unexpected,
    checked,
    flag,
    indices,
    is_int,
    is_matrix,
    is_number,
    names,
    names_or_pattern,
    one_of,
    optional,
    patterns,
    plain,
    plain_number,
    shown,
    targets,
    text,
    whole_number,
)
from .lora import checked_lora_config
from .partner import resolve_partners

BIAS_CHOICES = ("none", "all", "recast_only")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
SHARING = {  # of coefficients: between which layers
    "roles": "the roles of a block",
    "blocks": "the members of a bank",
    "all": "the roles of a block and the members of a bank",
}

MOST_CLASSES = 10_000_000
MOST_SETS = 10_000
MOST_DIRECTIONS = 1_000


def task_type(value: Any) -> Any:
    """One of PEFT's kinds of task."""
    if not isinstance(value, str) or value not in list(TaskType):
        raise Unexpected(f"one of {', '.join(TaskType)}, or None")
    return value


def sharing(value: Any) -> str | int:
    """Which layers share their offsets."""
    if not (isinstance(value, str) and value in SHARING) and not (is_int(value) and 1 < value < 2**31):
        raise Unexpected(f"one of {', '.join(map(repr, SHARING))}, or a number of consecutive banks, at least 2")
    return value


def labels(value: Any) -> dict[int, str]:
    """Names by class number; JSON turns the numbers into strings."""
    if not isinstance(value, Mapping) or len(value) > MOST_CLASSES:
        raise Unexpected("a dictionary from class numbers to names")
    for key, name in value.items():
        is_number_ = is_int(key) or (isinstance(key, str) and key.isdecimal() and len(key) < 10)
        if not is_number_ or not isinstance(name, (str, int, float)):
            raise Unexpected("a dictionary from class numbers to names")
    return {int(key): str(name) for key, name in value.items()}


def mapping(expected: str, holds: Callable[[Any], bool] = lambda value: True) -> Check:
    """A dictionary by name, as a copy, for whose values something holds."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) and holds(one) for key, one in value.items()):
            raise Unexpected(expected)
        return plain(value)

    return check


def backbone(value: Any) -> dict[str, Any]:
    """How a backbone is found again."""
    if not isinstance(value, Mapping) or not isinstance(value.get("library"), str):
        raise Unexpected("a dictionary with the name of the 'library' and what it builds the model from")
    return plain(value)


def groups(value: Any) -> dict[str, list[str]]:
    """Module names by bank name; no module twice."""
    if not isinstance(value, Mapping) or not value:
        raise Unexpected("a dictionary from bank names to lists of module names")
    seen: set[str] = set()
    for bank, members in value.items():
        is_named = isinstance(bank, str) and isinstance(members, (list, tuple)) and bool(members)
        if not is_named or not all(isinstance(member, str) for member in members):
            raise RecastConfigError(f"groups[{shown(bank)}]={shown(members)}: a list of module names is expected")
        double = seen.intersection(members)
        if double or len(set(members)) < len(members):
            raise RecastConfigError(f"groups[{bank!r}] names a module twice: {shown(sorted(double) or members)}")
        seen.update(members)
    return {bank: list(members) for bank, members in value.items()}


def recipes(value: Any) -> dict[str, Any]:
    """How compressed banks were mixed, by bank name; what is in them is looked at once the groups say how large they are."""
    if not isinstance(value, Mapping) or not all(isinstance(bank, str) for bank in value):
        raise Unexpected("a dictionary from bank names to recipes")
    return dict(value)


def bank(value: Any) -> Any:
    """A bank in memory, the name of one, or a reference to one, as it was given."""
    named = isinstance(value, Mapping) and bool(value) and set(value) <= {"name", "fingerprint"} and any(value.values())
    if not named and not isinstance(value, StoredBank) and not (isinstance(value, str) and value):
        raise Unexpected("the name of a bank file, a StoredBank, or {'name': ..., 'fingerprint': ...}")
    if named and not all(part is None or (isinstance(part, str) and len(part) <= LONGEST_NAME) for part in value.values()):
        raise Unexpected("texts as 'name' and 'fingerprint'")
    return value


def mimicry(value: Any) -> str | dict[str, Any]:
    """A mimicry method by its name, or with its options as a dictionary."""
    method = resolve_method(value)
    return value if isinstance(value, str) else method.to_dict()


def coefficient_gradient(value: Any) -> str:
    """How gradients of coefficients are formed."""
    if isinstance(value, float) and 0 < value < 1:  # in tasks that earlier versions stored; it is about their training alone
        warnings.warn("gradients of coefficients are no longer estimated from a share of the tokens: 'auto'", stacklevel=2)
        return AUTO
    return one_of(*GRADIENT_CHOICES)(value)


CHECKS: dict[str, Check] = {
    "task_type": optional(task_type),
    "peft_version": optional(text),
    "auto_mapping": optional(mapping("a dictionary from names to values")),
    "base_model_name_or_path": lambda value: optional(text)(None if value == "" else value),  # transformers' unnamed models
    "revision": optional(text),
    "inference_mode": flag,
    "target_modules": optional(targets),
    "target_parameters": optional(names),
    "exclude_modules": optional(names_or_pattern),
    "layers_to_transform": optional(indices),
    "layers_pattern": optional(patterns),
    "modules_to_save": optional(names),
    "bias": one_of(*BIAS_CHOICES),
    "init_weights": flag,
    "group_size": optional(whole_number(1)),
    "num_groups": optional(whole_number(1)),
    "num_templates": optional(whole_number(1)),
    "num_directions": optional(whole_number(1, MOST_DIRECTIONS)),
    "num_coefficient_sets": whole_number(1, MOST_SETS),
    "max_coefficients": optional(whole_number(1)),
    "coefficient_sharing": optional(sharing),
    "coefficient_gradient": coefficient_gradient,
    "mimicry": mimicry,
    "bank": optional(bank),
    "keep_base_weights": flag,
    "num_classes": optional(whole_number(1, MOST_CLASSES)),
    "id2label": optional(labels),
    "problem_type": optional(one_of(*PROBLEM_TYPES)),
    "head_module": optional(text),
    "head_init": one_of("fresh", "copy"),
    "head_type": one_of("linear", "prototypes"),
    "head_dtype": one_of(None, "float16", "bfloat16"),
    "train_norms": flag,
    "train_coefficients": flag,
    "partners": optional(lambda value: resolve_partners(value) or None),
    "seed": SEED,
    "groups": optional(groups),
    "recipes": optional(recipes),
    "base_fingerprint": optional(
        mapping("a dictionary from module names to fingerprints", lambda value: isinstance(value, str))
    ),
    "surroundings_fingerprint": optional(text),
    "backbone": optional(backbone),
    "fidelity": optional(mapping("a dictionary from names to finite numbers", is_number)),
    "results": optional(mapping("a dictionary from names to values")),
}
"""Row for row a field, and what gives the value that it keeps or raises :class:`Unexpected`."""


def check_config(config: Any) -> None:
    """Check every field of a config, and put the values in that it keeps.

    Raises:
        RecastConfigError: naming the field and its value, or the fields that do not go together.
    """
    for name, check in CHECKS.items():
        setattr(config, name, checked(check, name, plain_number(getattr(config, name)), "RecastConfig"))
    is_stored = config.base_fingerprint is not None
    try:
        if config.lora_config is not None:
            config.lora_config = checked_lora_config(config.lora_config, config.task_type, is_stored)
    except ValueError as error:
        raise RecastConfigError(f"RecastConfig(lora_config=...): expected {error}") from error
    _check_sizes(config)
    _check_classes(config)
    _check_recipes(config.recipes or {}, config.groups or {})
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise RecastConfigError(
            f"RecastConfig(layers_pattern={shown(config.layers_pattern)}): expected None, since layers_to_transform is None"
        )


def _check_sizes(config: Any) -> None:
    if config.group_size is not None and config.num_groups is not None:
        raise RecastConfigError(
            f"group_size={config.group_size} and num_groups={config.num_groups} were both given; give one of them"
        )
    sized = [n for n in ("group_size", "num_groups", "num_templates", "bank") if getattr(config, n) is not None]
    if config.num_directions is not None and sized:
        raise RecastConfigError(
            f"num_directions={config.num_directions} and {sized[0]}={shown(getattr(config, sized[0]))} were both given; "
            "templates between the directions of a weight belong to that weight alone: give one of them"
        )
    size = config.effective_group_size
    if config.num_templates is not None and size is not None and config.num_templates > size and config.groups is None:
        raise RecastConfigError(
            f"num_templates={config.num_templates} is above the group's size\n  group_size: {size}\n"
            "More templates than layers describe nothing that the layers' own weights do not: "
            "give a larger group_size or fewer num_templates."
        )


def _check_classes(config: Any) -> None:
    if config.problem_type is not None and config.num_classes is None and config.id2label is None:
        raise RecastConfigError(
            f"RecastConfig(problem_type={config.problem_type!r}): expected num_classes too, since it is the kind of loss of "
            "the task's own classifier. Without one the loss is that of the model: set model.config.problem_type."
        )
    usual = {"head_init": "fresh", "head_type": "linear", "head_dtype": None}
    idle = [f"{name}={getattr(config, name)!r}" for name, value in usual.items() if getattr(config, name) != value]
    if idle and config.num_classes is None and config.id2label is None:
        warnings.warn(f"{', '.join(idle)}: without num_classes or id2label the task has no classifier of its own", stacklevel=2)
    if config.id2label is None:
        return
    if config.num_classes is None:
        config.num_classes = len(config.id2label) or None
    if config.num_classes is None or len(config.id2label) != config.num_classes or max(config.id2label) >= config.num_classes:
        raise RecastConfigError(
            f"id2label must name every class once\n  num_classes: {config.num_classes}\n"
            f"  numbers in id2label: {sorted(config.id2label)[:10]}"
        )


def _check_recipes(recipes: dict[str, Any], groups: Mapping[str, list[str]]) -> None:
    """Check recipes, and put copies in their places."""
    for bank, recipe in recipes.items():
        if bank not in groups:
            raise RecastConfigError(f"recipes[{shown(bank)}]: there is no such bank in groups")
        if not isinstance(recipe, Mapping) or set(recipe) != {"mix", "base"}:
            raise RecastConfigError(f"recipes[{bank!r}]={shown(recipe)}: a dictionary with 'mix' and 'base' is expected")
        layers = len(groups[bank])
        # no more templates than layers: what is longer is refused before its numbers are looked at
        templates = min(layers, len(recipe["mix"])) if isinstance(recipe["mix"], list) else 0
        for key, rows, columns in (("mix", templates, layers), ("base", layers, templates)):
            if rows == 0 or not is_matrix(recipe[key], rows, columns):
                raise RecastConfigError(
                    f"recipes[{bank!r}][{key!r}]: {rows} rows of {columns} finite numbers are expected, got "
                    f"{shown(recipe[key])}"
                )
        recipes[bank] = {key: [list(row) for row in rows] for key, rows in recipe.items()}
