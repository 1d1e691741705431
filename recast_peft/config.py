"""RecastConfig: what a RECAST task is, as PEFT stores it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from .errors import RecastConfigError
from .registration import peft_type

DEFAULT_GROUP_SIZE = 2
BIAS_CHOICES = ("none", "all", "recast_only")
TARGET_SHORTHANDS = ("all-linear", "all-attention", "all-mlp", "all-conv")


@dataclass
class RecastConfig(PeftConfig):
    """Configuration of one RECAST task.

    Args:
        target_modules: which modules are composed from templates: a list of names, a regular expression that matches whole
            names, or one of ``"all-linear"``, ``"all-attention"``, ``"all-mlp"``, ``"all-conv"``. None takes the attention
            projections where the model has any, else its convolutions, else its linear layers. Neither None nor a
            shorthand picks a classifier head.
        exclude_modules: names, or a regular expression, of modules to leave out.
        layers_to_transform: restrict the targets to these layer indices.
        layers_pattern: the name of the module list that ``layers_to_transform`` counts in.
        modules_to_save: further modules that are trained and stored whole with the task, such as a classifier.
        bias: ``"none"``, ``"all"`` or ``"recast_only"``: which biases are trained and stored with the task.
        init_weights: True starts at the pretrained weights (all offsets zero); False at random
            offsets of size 0.1 to 0.2, drawn by a generator that ``seed`` and the task's name seed (meant for tests).
        group_size: how many consecutive layers of one role and shape share a bank (2 unless ``num_groups`` is given). A
            remainder makes a smaller group; a lone layer has a bank of its own with one template.
        num_groups: instead of ``group_size``: into how many groups the layers of each role and shape are divided.
        num_templates: templates in a bank. None takes as many as the group has layers: the pretrained weights themselves
            are the templates and nothing is approximated. Fewer compress the model.
        num_coefficient_sets: how many coefficient sets are trained and averaged (K of the paper, section 3.1).
        mimicry: the name of the method that finds templates and base coefficients (paper, section 3.2).
        keep_base_weights: keep the pretrained weights beside a compressed bank, so that disabling or unloading the task
            gives the pretrained model instead of its compressed form.
        seed: seeds whatever is random about the task's start.
        groups: written when a task is created: the members of every bank by name. Given, they are used as they are.
        recipes: written when a task is created: for every compressed bank ``{"mix": (templates, layers), "base": (layers,
            templates)}``, from which the bank is rebuilt out of the pretrained weights.
        base_fingerprint: written when a task is created: a fingerprint of the pretrained weight of each target module.

    Raises:
        RecastConfigError: naming the field and its value, if a value cannot be used.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names, a regular expression, or 'all-linear', 'all-attention', 'all-mlp', 'all-conv'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Restrict the targets to these layer indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the module list that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and stored whole with the task."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases are trained: 'none', 'all' or 'recast_only'."})
    init_weights: bool = field(
        default=True, metadata={"help": "True starts at the pretrained weights; False at random offsets (for tests)."}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "Consecutive layers that share a bank (2 unless num_groups is given)."}
    )
    num_groups: int | None = field(
        default=None, metadata={"help": "Instead of group_size: groups for the layers of each role and shape."}
    )
    num_templates: int | None = field(
        default=None, metadata={"help": "Templates in a bank; None is as many as the group has layers, which is exact."}
    )
    num_coefficient_sets: int = field(default=1, metadata={"help": "Coefficient sets that are trained and averaged."})
    mimicry: str = field(default="closed_form", metadata={"help": "How templates and base coefficients are found."})
    keep_base_weights: bool = field(default=False, metadata={"help": "Keep the pretrained weights beside a compressed bank."})
    seed: int = field(default=0, metadata={"help": "Seeds whatever is random about the task's start."})
    groups: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "Members of every bank by name; written when a task is created."}
    )
    recipes: dict[str, dict[str, list[list[float]]]] | None = field(
        default=None, metadata={"help": "How compressed banks are rebuilt; written when a task is created."}
    )
    base_fingerprint: dict[str, str] | None = field(
        default=None, metadata={"help": "Fingerprint of each target's pretrained weight; written on creation."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self._check_targets()
        self._check_sizes()
        self._check_choices()
        self._check_written_fields()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> RecastConfig:
        """Read the config of a saved task from a folder or a repository on the Hub.

        The returned config remembers where it came from, so that the file of coefficients beside it is checked before a
        model is touched.
        """
        config: RecastConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, RecastConfig):
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            if subfolder is not None:
                hub_kwargs["subfolder"] = subfolder
            config.__dict__["_origin"] = (str(pretrained_model_name_or_path), hub_kwargs)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read ``adapter_config.json``; a file that is not a JSON object raises a RecastConfigError."""
        try:
            content = super().from_json_file(path_json_file, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RecastConfigError(f"{path_json_file} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise RecastConfigError(f"{path_json_file} holds a {type(content).__name__}; a JSON object is expected")
        return content

    @property
    def effective_group_size(self) -> int | None:
        """The group size in force: None if ``num_groups`` decides instead."""
        return None if self.num_groups is not None else (self.group_size or DEFAULT_GROUP_SIZE)

    def write_fields(
        self,
        groups: dict[str, list[str]],
        recipes: dict[str, dict[str, list[list[float]]]],
        fingerprint: dict[str, str],
    ) -> None:
        """Record what a conversion decided, so that it is stored with the task."""
        self.groups, self.recipes, self.base_fingerprint = groups, recipes or None, fingerprint
        self._written = True

    def forget_written_fields(self) -> None:
        """Drop what an earlier conversion recorded: a config object that is used again describes a new task.

        What was given to the constructor, or read from a file, stays.
        """
        if self.__dict__.pop("_written", False):
            self.groups = self.recipes = self.base_fingerprint = None

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            self._check_names(name)
        if self.target_modules is not None and not self.target_modules:
            raise self._bad("target_modules", "at least one name; None chooses by itself")
        indices = self.layers_to_transform
        if indices is not None:
            listed: Any = [indices] if _is_int(indices) else indices
            if not isinstance(listed, (list, tuple, range)) or not all(_is_int(i) and i >= 0 for i in listed):
                raise self._bad("layers_to_transform", "a layer index, or a list of them, counted from 0")
            self.layers_to_transform = indices if isinstance(indices, int) else list(listed)
        elif self.layers_pattern is not None:
            raise self._bad("layers_pattern", "None, since layers_to_transform is None")

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str) and value and name != "modules_to_save":
            return
        if value is None:
            return
        if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(v, str) for v in value):
            what = "a list of names or None" if name == "modules_to_save" else "a string, a list of strings or None"
            raise self._bad(name, what)
        # an order that comes from a set would differ from run to run
        setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))

    def _check_sizes(self) -> None:
        for name in ("group_size", "num_groups", "num_templates"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise self._bad(name, "a whole number of at least 1, or None")
        if not _is_int(self.num_coefficient_sets) or self.num_coefficient_sets < 1:
            raise self._bad("num_coefficient_sets", "a whole number of at least 1")
        if not _is_int(self.seed):
            raise self._bad("seed", "a whole number")
        if self.group_size is not None and self.num_groups is not None:
            raise RecastConfigError(
                f"group_size={self.group_size} and num_groups={self.num_groups} were both given; give one of them"
            )
        size = self.effective_group_size
        if self.num_templates is not None and size is not None and self.num_templates > size and self.groups is None:
            raise RecastConfigError(
                f"num_templates={self.num_templates} is above the group's size\n  group_size: {size}\n"
                "More templates than layers describe nothing that the layers' own weights do not: "
                "give a larger group_size or fewer num_templates."
            )

    def _check_choices(self) -> None:
        if self.bias not in BIAS_CHOICES:
            raise self._bad("bias", f"one of {', '.join(BIAS_CHOICES)}")
        for name in ("init_weights", "keep_base_weights", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise self._bad(name, "True or False")
        if not isinstance(self.mimicry, str):
            raise self._bad("mimicry", "the name of a method")

    def _check_written_fields(self) -> None:
        if self.groups is not None:
            if not isinstance(self.groups, dict) or not self.groups:
                raise self._bad("groups", "a dictionary from bank names to lists of module names")
            seen: set[str] = set()
            for bank, members in self.groups.items():
                if not isinstance(members, (list, tuple)) or not members or not all(isinstance(m, str) for m in members):
                    raise RecastConfigError(f"groups[{bank!r}]={members!r}: a list of module names is expected")
                double = seen.intersection(members)
                if double or len(set(members)) < len(members):
                    raise RecastConfigError(f"groups[{bank!r}] names a module twice: {sorted(double) or members}")
                seen.update(members)
            self.groups = {str(bank): list(members) for bank, members in self.groups.items()}
        if self.recipes is not None:
            if not isinstance(self.recipes, dict):
                raise self._bad("recipes", "a dictionary from bank names to recipes")
            for bank, recipe in self.recipes.items():
                self._check_recipe(bank, recipe)
        if self.base_fingerprint is not None and (
            not isinstance(self.base_fingerprint, dict) or not all(isinstance(v, str) for v in self.base_fingerprint.values())
        ):
            raise self._bad("base_fingerprint", "a dictionary from module names to fingerprints")

    def _check_recipe(self, bank: str, recipe: Any) -> None:
        members = (self.groups or {}).get(bank)
        if members is None:
            raise RecastConfigError(f"recipes[{bank!r}]: there is no such bank in groups")
        if not isinstance(recipe, dict) or set(recipe) != {"mix", "base"}:
            raise RecastConfigError(f"recipes[{bank!r}]={recipe!r}: a dictionary with 'mix' and 'base' is expected")
        layers, templates = len(members), len(recipe["mix"]) if isinstance(recipe["mix"], list) else 0
        for key, rows, columns in (("mix", templates, layers), ("base", layers, templates)):
            matrix = recipe[key]
            if not (
                isinstance(matrix, list)
                and len(matrix) == rows >= 1
                and all(isinstance(row, list) and len(row) == columns and all(map(_is_number, row)) for row in matrix)
            ):
                raise RecastConfigError(
                    f"recipes[{bank!r}][{key!r}]: {rows} rows of {columns} finite numbers are expected, got {matrix!r}"
                )

    def _bad(self, name: str, expected: str) -> RecastConfigError:
        return RecastConfigError(f"RecastConfig({name}={getattr(self, name)!r}): expected {expected}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
