"""A config refuses what cannot be meant, and comes back from a file as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import converted, tiny_vit
from peft import PeftConfig, PeftType, get_peft_model

from recast_peft import RecastConfig, RecastConfigError, RecastError, get_recast_model

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
            ("backbone", {"library": None}),
            ("backbone", {"name": "vit"}),
            ("results", [0.9]),
        ],
    )
    def test_is_refused_by_name(self, field: str, value: Any) -> None:
        with pytest.raises(RecastConfigError, match=rf"{field}={'.*' if isinstance(value, dict) else ''}"):
            RecastConfig(**{field: value})

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
            ({"bank": {"mix": [[1, "0"]], "base": [[1], [0]]}}, "finite numbers"),
            ({"bank": {"mix": [[1, math.nan]], "base": [[1], [0]]}}, "finite numbers"),
            ({"bank": {"mix": [[1, math.inf]], "base": [[1], [0]]}}, "finite numbers"),
            ({"bank": {"mix": "12", "base": [[1], [0]]}}, "mix"),
        ],
    )
    def test_is_refused_in_recipes(self, recipes: Any, message: str) -> None:
        with pytest.raises(RecastConfigError, match=message):
            RecastConfig(groups=GROUPS, recipes=recipes)

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


class TestAConfig:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [({}, 2), ({"group_size": 5}, 5), ({"num_groups": 3}, None)],
    )
    def test_says_the_group_size_that_is_used(self, fields: dict[str, int], expected: int | None) -> None:
        assert RecastConfig(**fields).effective_group_size == expected

    def test_is_of_a_type_that_PEFT_knows(self) -> None:
        assert RecastConfig().peft_type == PeftType.RECAST == "RECAST"

    def test_sorts_what_was_given_as_a_set(self) -> None:
        assert RecastConfig(target_modules={"c", "a", "b"}).target_modules == ["a", "b", "c"]

    def test_does_not_share_lists_with_the_caller(self) -> None:
        names = ["qkv"]
        config = RecastConfig(target_modules=names)
        names.append("proj")
        assert config.target_modules == ["qkv"]

    def test_comes_back_from_a_folder_as_it_was(self, tmp_path: Path) -> None:
        config = RecastConfig(
            target_modules="all-mlp",
            exclude_modules=["fc2"],
            layers_to_transform=[0, 1],
            layers_pattern="blocks",
            modules_to_save=["head"],
            bias="recast_only",
            group_size=3,
            num_templates=2,
            num_coefficient_sets=4,
            keep_base_weights=True,
            seed=7,
            groups={"bank": ["a", "b"]},
            recipes={"bank": {"mix": [[0.5, 0.25]], "base": [[1.0], [0.1]]}},
            base_fingerprint={"a": "x"},
        )
        config.save_pretrained(tmp_path)
        for reader in (RecastConfig, PeftConfig):
            read = reader.from_pretrained(tmp_path)
            assert isinstance(read, RecastConfig)
            # PEFT reads a saved config for inference unless asked otherwise
            assert {**read.to_dict(), "inference_mode": False} == config.to_dict()

    def test_keeps_every_digit_of_a_recipe(self, tmp_path: Path) -> None:
        mix = [[1 / 3, 2**0.5], [1e-17, -math.pi]]
        config = RecastConfig(groups=GROUPS, recipes={"bank": {"mix": mix, "base": mix}})
        config.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(tmp_path).recipes["bank"]["mix"] == mix

    def test_can_be_used_on_two_models(self) -> None:
        config = RecastConfig(target_modules=["qkv"])
        first = get_recast_model(tiny_vit(0, depth=2), config)
        second = get_recast_model(tiny_vit(1, depth=4), config)
        assert config.record is None
        assert len(first.peft_config["default"].groups) == 1
        assert len(second.peft_config["default"].groups) == 2

    def test_can_be_used_on_two_models_through_PEFT(self) -> None:
        # PEFT does not copy a config, so the second use meets what the first one wrote into it
        config = RecastConfig(target_modules=["qkv"])
        get_peft_model(tiny_vit(0, depth=2), config)
        second = get_peft_model(tiny_vit(1, depth=4), config)
        assert sum(map(len, second.peft_config["default"].groups.values())) == 4

    def test_keeps_groups_that_were_given(self) -> None:
        groups = {"mine": ["blocks.0.attn.qkv", "blocks.3.attn.qkv"]}
        config = RecastConfig(groups=groups)
        for seed in (0, 1):
            assert get_recast_model(tiny_vit(seed), config).peft_config["default"].groups == groups

    def test_can_be_copied_deeply(self) -> None:
        config = converted().peft_config["default"]
        assert copy.deepcopy(config).to_dict() == config.to_dict()


class TestAConfigFile:
    @pytest.mark.parametrize(
        "content", ["", "{", "[1, 2]", "null", '"RECAST"', "17", b"\xff\xfe\x00"], ids=lambda c: repr(c)[:12]
    )
    @pytest.mark.parametrize("reader", [RecastConfig, PeftConfig])
    def test_that_is_not_an_object_is_refused(self, tmp_path: Path, content: str | bytes, reader: type) -> None:
        (tmp_path / "adapter_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        # PeftConfig reads the file before it knows whose it is, so there the error is Python's own for broken JSON
        expected = RecastConfigError if reader is RecastConfig else (ValueError, TypeError, AttributeError, KeyError)
        with pytest.raises(expected):
            reader.from_pretrained(tmp_path)

    def test_that_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="adapter_config"):
            RecastConfig.from_pretrained(tmp_path)

    def test_with_a_field_of_a_later_version_is_read_with_a_warning(self, tmp_path: Path) -> None:
        RecastConfig(target_modules=["qkv"]).save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
        with pytest.warns(UserWarning, match="from_the_future"):
            assert RecastConfig.from_pretrained(tmp_path).target_modules == ["qkv"]
