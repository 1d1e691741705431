"""What each field of a config may be, and what must hold of several together."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_vit
from peft import PeftConfig

from recast_peft import AdaptFormerConfig, RecastConfig, RecastConfigError, RecastError, get_recast_model

GROUPS = {"bank": ["a", "b"]}


class TestAValueThatCannotBeMeant:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *((field, value) for field in ("group_size", "num_groups", "num_templates") for value in (0, -1, 1.5, "2", True)),
            *(("num_coefficient_sets", value) for value in (0, -3, None, 2.0, False)),
            ("seed", "0"),
            ("seed", None),
            ("bias", "lora_only"),
            ("bias", None),
            ("init_weights", "gaussian"),
            ("init_weights", 1),
            ("keep_base_weights", "yes"),
            ("inference_mode", None),
            ("mimicry", 3),
            ("target_modules", []),
            ("target_modules", ""),
            ("target_modules", 7),
            ("target_modules", ["qkv", 7]),
            ("target_modules", "((("),
            ("exclude_modules", "[a"),
            ("exclude_modules", {"a": 1}),
            ("modules_to_save", "head"),
            ("modules_to_save", [None]),
            ("layers_to_transform", -1),
            ("layers_to_transform", [0, -2]),
            ("layers_to_transform", "0"),
            ("layers_to_transform", [True]),
            ("layers_pattern", "blocks"),
            ("groups", []),
            ("groups", {}),
            ("groups", "bank"),
            ("recipes", [1]),
            ("base_fingerprint", "abc"),
            ("base_fingerprint", {"a": 1}),
            ("id2label", {0.5: "a"}),
            ("id2label", {True: "a"}),
            ("id2label", {"-1": "a"}),
            ("fidelity", 3),
            ("fidelity", {"mean_cosine": "high"}),
            ("backbone", "vit"),
            ("backbone", {"library": None}),
            ("backbone", {"name": "vit"}),
            ("results", [0.9]),
            ("results", {"accuracy": object()}),
            ("results", {1: 2}),
            ("results", {"accuracy": float("nan")}),
            ("results", {"losses": [1.0, float("inf")]}),
            ("results", {"accuracies": torch.tensor([0.5, 0.25])}),
            ("fidelity", {"mean_cosine": math.nan}),
            ("backbone", {"library": "timm", "name": {1, 2}}),
            ("task_type", "SEQ"),
            ("task_type", ["SEQ_CLS"]),
            ("base_model_name_or_path", 3),
            ("revision", ["main"]),
            ("auto_mapping", "a"),
            ("bank", {}),
            ("bank", {"name": None, "fingerprint": None}),
            ("bank", {"name": 3}),
            ("bank", {"names": "a"}),
            ("bank", ""),
            ("bank", 3),
            ("num_classes", 10**9),
            ("num_classes", 0),
            ("num_coefficient_sets", 10**6),
            ("seed", 2**70),
            ("head_init", "old"),
            ("head_type", None),
            ("head_dtype", "int8"),
            ("head_module", ""),
            ("id2label", {"9" * 5000: "a"}),
            ("id2label", {0: [[]]}),
            ("target_modules", "a" * 5000),
            ("target_modules", "(" * 900),
            ("exclude_modules", ["a" * 5000]),
            ("layers_to_transform", [10**6] * 200_001),
            ("coefficient_gradient", 2.0),
            ("max_coefficients", 0),
            ("max_coefficients", 2.5),
            ("max_coefficients", "48"),
        ],
    )
    def test_is_refused_by_name(self, field: str, value: Any) -> None:
        with pytest.raises(RecastConfigError, match=rf"{field}={'.*' if isinstance(value, dict) else ''}"):
            RecastConfig(**{field: value})

    @pytest.mark.parametrize(
        ("classes", "labels"), [(3, {0: "a", 1: "b"}), (2, {0: "a", 2: "b"}), (None, {1: "a"}), (None, {})]
    )
    def test_is_refused_for_labels_that_leave_classes_out(self, classes: int | None, labels: dict[int, str]) -> None:
        with pytest.raises(RecastConfigError, match="name every class once"):
            RecastConfig(num_classes=classes, id2label=labels)

    @pytest.mark.parametrize("members", [None, [], "ab", [1], {"a": 1}])
    def test_is_refused_in_groups(self, members: Any) -> None:
        with pytest.raises(RecastConfigError, match=r"groups\['bank'\].*list of module names"):
            RecastConfig(groups={"bank": members})

    @pytest.mark.parametrize("groups", [{"x": ["a", "a"]}, {"x": ["a"], "y": ["b", "a"]}])
    def test_is_refused_for_a_module_in_two_groups(self, groups: dict[str, list[str]]) -> None:
        with pytest.raises(RecastConfigError, match=r"names a module twice.*a"):
            RecastConfig(groups=groups)

    @pytest.mark.parametrize(
        ("recipes", "message"),
        [
            ({"other": {"mix": [[1, 0]], "base": [[1], [0]]}}, "no such bank"),
            ({"bank": [[1, 0]]}, "'mix' and 'base'"),
            ({"bank": {"mix": [[1, 0]]}}, "'mix' and 'base'"),
            ({"bank": {"mix": [], "base": [[], []]}}, "mix"),
            ({"bank": {"mix": [[1, 0, 0]], "base": [[1], [0]]}}, "1 rows of 2"),
            ({"bank": {"mix": [[1, 0]], "base": [[1]]}}, "2 rows of 1"),
            # templates that would take any amount of memory
            ({"bank": {"mix": [[1, 0]] * 3, "base": [[1] * 3] * 2}}, "'mix'.: 2 rows of 2"),
            ({"bank": {"mix": [[1, "0"]], "base": [[1], [0]]}}, "finite numbers"),
            ({"bank": {"mix": [[1, math.nan]], "base": [[1], [0]]}}, "finite numbers"),
            ({"bank": {"mix": [[1, math.inf]], "base": [[1], [0]]}}, "finite numbers"),
            ({"bank": {"mix": "12", "base": [[1], [0]]}}, "mix"),
        ],
    )
    def test_is_refused_in_recipes(self, recipes: Any, message: str) -> None:
        with pytest.raises(RecastConfigError, match=message):
            RecastConfig(groups=GROUPS, recipes=recipes)

    def test_sizes_of_recipes_are_looked_at_before_their_numbers(self) -> None:
        class Untouched(list):
            def __iter__(self) -> Iterator[Any]:
                raise AssertionError("a row of a forged file, which may have millions, is read")

        for recipe in ({"mix": [Untouched()] * 3, "base": [[1], [0]]}, {"mix": [Untouched([1, 0, 0])], "base": [[1], [0]]}):
            with pytest.raises(RecastConfigError, match="rows of 2 finite numbers are expected"):
                RecastConfig(groups=GROUPS, recipes={"bank": recipe})

    def test_keeps_a_copy_of_recipes(self) -> None:
        given = {"bank": {"mix": [[1, 0]], "base": [[1], [0]]}}
        config = RecastConfig(groups=GROUPS, recipes=given)
        given["bank"]["mix"][0][0] = 5
        assert config.recipes == {"bank": {"mix": [[1, 0]], "base": [[1], [0]]}}

    @pytest.mark.parametrize("pattern", ["(", ["blocks", "["]])
    def test_is_refused_for_a_list_of_layers_that_is_no_regular_expression(self, pattern: Any) -> None:
        given = {"layers_to_transform": [0], "layers_pattern": pattern}
        with pytest.raises(RecastConfigError, match="layers_pattern=.*regular expression, which this is not"):
            RecastConfig(**given)
        with pytest.raises(RecastConfigError, match="lora_config.*regular expression, which this is not"):
            RecastConfig(lora_config={"target_modules": ["qkv"], **given})

    def test_is_refused_for_two_ways_to_group(self) -> None:
        with pytest.raises(RecastConfigError, match="group_size=2 and num_groups=3"):
            RecastConfig(group_size=2, num_groups=3)

    @pytest.mark.parametrize(("size", "templates"), [(None, 3), (2, 3), (1, 2), (12, 13)])
    def test_is_refused_for_more_templates_than_a_group_has_layers(self, size: int | None, templates: int) -> None:
        with pytest.raises(RecastConfigError, match=f"num_templates={templates} is above the group's size"):
            RecastConfig(group_size=size, num_templates=templates)

    def test_is_refused_for_a_field_that_does_not_exist(self) -> None:
        with pytest.raises(TypeError, match="num_template"):
            RecastConfig(num_template=2)

    def test_of_mimicry_is_refused_with_the_names_there_are(self) -> None:
        with pytest.raises(RecastConfigError, match=r"mimicry='telepathy'.*closed_form"):
            get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1, mimicry="telepathy"))

    @given(
        st.dictionaries(
            st.sampled_from(sorted(f.name for f in dataclasses.fields(RecastConfig) if f.init)),
            st.recursive(
                st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                max_leaves=5,
            ),
            max_size=3,
        )
    )
    def test_never_ends_in_a_bare_error(self, values: dict[str, Any]) -> None:
        own = {name: value for name, value in values.items() if name not in PeftConfig.__dataclass_fields__}
        try:
            config = RecastConfig(**own)
        except RecastError:
            return
        assert RecastConfig(**{k: v for k, v in config.__dict__.items() if k in own}).to_dict() == config.to_dict()

    @pytest.mark.parametrize(
        "fields",
        [
            {"num_classes": 0}, {"num_classes": True}, {"num_classes": "3"}, {"id2label": {0: "a", 2: "b"}},
            {"id2label": ["a"]}, {"num_classes": 3, "id2label": {0: "a"}}, {"head_init": "zero"},
            {"head_type": "tree"}, {"head_dtype": "int8"}, {"head_module": 3}, {"train_norms": "yes"},
        ],
    )  # fmt: skip
    def test_bad_fields_are_named(self, fields):
        with pytest.raises(RecastConfigError) as error:
            RecastConfig(**fields)
        assert any(name in str(error.value) for name in fields)


@pytest.mark.parametrize("value", [1, 0, -2, 2.0, True, "2", "layers"])
def test_sharing_of_no_kind_is_refused(value: Any) -> None:
    with pytest.raises(RecastConfigError, match="coefficient_sharing"):
        RecastConfig(coefficient_sharing=value)


def test_numbers_of_numpy_and_torch_are_kept_as_plain_ones(tmp_path: Path) -> None:
    labels = np.array([0, 4, 2])
    partner = AdaptFormerConfig(bottleneck=np.int64(8), scale=np.float32(0.5))
    config = RecastConfig(
        num_classes=labels.max() + 1,
        max_coefficients=torch.tensor(2_000),
        train_coefficients=np.bool_(True),
        partners=[partner],
    )
    kept = config.num_classes, config.max_coefficients, config.train_coefficients, partner.bottleneck, partner.scale
    assert [(type(value), value) for value in kept] == [(int, 5), (int, 2_000), (bool, True), (int, 8), (float, 0.5)]
    config.save_pretrained(tmp_path)
    assert RecastConfig.from_pretrained(tmp_path).num_classes == 5


@pytest.mark.parametrize("wrong", [np.bool_(True), np.float64(3.5), np.array([3]), torch.tensor(0)])
def test_numbers_of_numpy_and_torch_are_held_to_the_same_bounds(wrong: Any) -> None:
    with pytest.raises(RecastConfigError, match="num_classes"):
        RecastConfig(num_classes=wrong)


@pytest.mark.parametrize("field", [{"head_type": "prototypes"}, {"head_init": "copy"}, {"head_dtype": "float16"}])
def test_a_classifier_that_is_described_without_classes_is_none_and_that_is_said(field: dict[str, str]) -> None:
    name, value = next(iter(field.items()))
    with pytest.warns(UserWarning, match=f"{name}={value!r}: without num_classes or id2label"):
        RecastConfig(**field)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RecastConfig(num_classes=2, **field)
