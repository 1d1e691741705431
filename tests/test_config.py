"""A config refuses what cannot be meant, and comes back from a file as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import converted, tiny_vit
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model

from recast_peft import RecastConfig, RecastConfigError, RecastError, get_recast_model

FIXTURES = Path(__file__).parent / "fixtures"
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
            ("results", {"accuracy": object()}),
            ("results", {1: 2}),
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
            ("coefficient_sharing", "rows"),
            ("coefficient_sharing", 1),
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
        ],
    )
    def test_is_refused_by_name(self, field: str, value: Any) -> None:
        with pytest.raises(RecastConfigError, match=rf"{field}={'.*' if isinstance(value, dict) else ''}"):
            RecastConfig(**{field: value})

    @pytest.mark.parametrize(
        "lora",
        [
            {"r": 0},
            {"r": 10**9},
            {"r": "8"},
            {"lora_alpha": None},
            {"lora_dropout": 1.5},
            {"target_modules": {"a": 1}},
            {"target_modules": "("},
            {"rank_pattern": {"(": 3}},
            {"rank_pattern": {"a": 10**9}},
            {"alpha_pattern": {"a": "b"}},
            {"use_dora": "yes"},
            {"r": {"r": {}}},
            {3: 4},
            {"peft_type": ["LORA"]},
            17,
        ],
    )
    def test_is_refused_in_a_lora_part(self, lora: Any) -> None:
        with pytest.raises(RecastConfigError, match="lora_config"):
            RecastConfig(lora_config=lora)

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

    @pytest.mark.parametrize("name", ["gbank", {"name": "gbank"}])
    def test_keeps_a_bank_as_it_was_given(self, name: Any) -> None:
        assert RecastConfig(bank=name).bank == name

    def test_its_results_can_be_set(self) -> None:
        config = RecastConfig(results={"accuracy": 0.5})
        config.results = {"accuracy": 0.75}
        assert config.to_dict()["results"] == {"accuracy": 0.75}


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

    @pytest.mark.parametrize(
        "content", [{}, {"peft_type": 3}, {"peft_type": ["A"]}, {"peft_type": "NONE"}, {"cls": 1}, {"self": 1}]
    )
    def test_of_no_method_that_is_known_is_refused(self, tmp_path: Path, content: dict[str, Any]) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(RecastConfigError, match="no config of a method"):
            RecastConfig.from_pretrained(tmp_path)

    def test_of_a_lora_is_read_as_one(self, tmp_path: Path) -> None:
        LoraConfig(r=3).save_pretrained(tmp_path)
        assert type(RecastConfig.from_pretrained(tmp_path)) is LoraConfig

    def test_is_not_written_in_the_place_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(AssertionError, match="should be a directory"):
            RecastConfig().save_pretrained(str(tmp_path / "file"))

    def test_damaged_anywhere_gives_one_clear_error_or_a_config(self, tmp_path: Path) -> None:
        fields = json.loads((FIXTURES / "lorap" / "adapter_config.json").read_text())
        fields.update(json.loads((FIXTURES / "partners" / "adapter_config.json").read_text()))
        fields["results"] = {"accuracy": 0.5}
        places = list(places_in(fields))
        draw = random.Random(0)
        refused: list[int] = []
        for _ in range(300):
            damaged = copy.deepcopy(fields)
            *path, last = draw.choice(places)
            inside = damaged
            for key in path:
                inside = inside[key]
            inside[last] = copy.deepcopy(draw.choice(ODD))
            (tmp_path / "adapter_config.json").write_text(json.dumps(damaged))
            try:
                config = RecastConfig.from_pretrained(tmp_path)
            except RecastError as error:
                refused.append(len(str(error)))
                continue
            if isinstance(config, RecastConfig):  # else its method is another one
                config.save_pretrained(tmp_path)
                assert RecastConfig.from_pretrained(tmp_path).groups == config.groups
        assert len(refused) > 100
        assert max(refused) < 3000


ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**30, math.nan, "", "x", "\0", "(" * 500, "a" * 5000, "LORA", "bias"),
    *(
        [],
        {},
        [[]],
        [None],
        {"a": None},
        [1, "a"],
        {"method": 3},
        [[[[[[[[[[[[[[1]]]]]]]]]]]]]],
        {"name": 3},
        {"x": {"y": [1]}},
    ),
]


def places_in(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside of lists and dictionaries."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places_in(inner, *path, key)
