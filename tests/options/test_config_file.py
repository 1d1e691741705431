"""``adapter_config.json``: read with care, refused where it is damaged."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import converted, tiny_vit
from peft import LoraConfig, PeftConfig, PeftModel

from recast_peft import RecastConfig, RecastConfigError, RecastError

FIXTURES = Path(__file__).parents[1] / "fixtures"


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

    def test_with_a_result_that_is_not_finite_is_read_and_never_written(self, tmp_path: Path) -> None:
        config = RecastConfig(target_modules=["qkv"], results={"accuracy": 0.5})
        config.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        before = path.read_text()
        for value in (math.nan, math.inf, object()):
            config.results = {"losses": [1.0, value]}  # set later, past the checks of a new config
            with pytest.raises(RecastConfigError, match=r"RecastConfig\(results=.*\) cannot be written: "):
                config.save_pretrained(tmp_path)
        config.results, config.revision = None, object()
        with pytest.raises(RecastConfigError, match=r"RecastConfig\(revision=.*\) cannot be written: "):
            config.save_pretrained(tmp_path)
        assert path.read_text() == before
        path.write_text(before.replace("0.5", "NaN"))  # as earlier versions wrote it
        assert RecastConfig.from_pretrained(tmp_path).results == {"accuracy": None}

    def test_holds_numbers_of_other_libraries_as_plain_ones(self, tmp_path: Path) -> None:
        config = RecastConfig(target_modules=["qkv"], results={"accuracy": torch.tensor(0.5), "n": [np.int64(3)]})
        assert config.results == {"accuracy": 0.5, "n": [3]}
        config.results = {"accuracy": np.float32(0.25)}
        config.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(tmp_path).results == {"accuracy": 0.25}

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


def places_in(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside of lists and dictionaries."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places_in(inner, *path, key)


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


@pytest.mark.parametrize("keyword", ["is_trainble", "low_cpu_mem_usag"])
def test_a_misspelt_keyword_of_a_model_is_told(keyword: str) -> None:
    with pytest.raises(RecastConfigError, match=rf"{keyword}=True\): there is no such argument; did you mean"):
        PeftModel.from_pretrained(tiny_vit(), FIXTURES / "plain", **{keyword: True})
    RecastConfig.from_pretrained(FIXTURES / "plain", torch_dtype=torch.float32)  # PEFT passes on whatever it was given


@pytest.mark.parametrize("device", ["gpux", "meta", "cuda:99", 99, 1.5])
def test_a_device_that_is_not_here_is_told_before_a_model_is_converted(device: Any, tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    model = tiny_vit()
    names = [*model.state_dict()]
    with pytest.raises(RecastConfigError, match=f"torch_device='?{device}'?: expected a device that is here"):
        PeftModel.from_pretrained(model, tmp_path, torch_device=device)
    assert [*model.state_dict()] == names
    loaded = PeftModel.from_pretrained(model, tmp_path, torch_device="cpu")
    with pytest.raises(RecastConfigError, match="torch_device="):
        loaded.load_adapter(tmp_path, "second", torch_device=device)
    assert [*loaded.peft_config] == ["default"]
