"""A group of a stored bank: what its header says, and what of a header is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_weights import grown

from recast_peft import RecastLoadError, load_bank
from recast_peft.banks.files import BANK_CONFIG
from recast_peft.banks.grown_templates import GrownTemplates
from recast_peft.banks.stored_group import StoredGroup, read_group
from recast_peft.storage.json_reader import Fields, parse_json


def grown_templates(*shape: int, plain: bool) -> GrownTemplates:
    count = torch.Size(shape).numel()
    return GrownTemplates((torch.arange(2.0 * count).reshape(2, *shape),), shape, plain, (0.5, 0.75))


def fields(description: dict[str, Any]) -> Fields:
    return parse_json(json.dumps(description), "a header")


GROUPS = {
    "exact": StoredGroup(("a", "b")),
    "dense": StoredGroup(("a", "b", "c"), torch.ones(1, 2, 3), torch.ones(3, 1)),
    "grown": StoredGroup(("a", "b"), grown=grown_templates(2, 3, plain=True)),
    "bias": StoredGroup(("a", "b"), grown=grown_templates(5, plain=False), widths=(2, 3)),
    "readout": StoredGroup(("a", "b"), grown=grown_templates(5, plain=False), widths=(2, 3), offset=torch.ones(2), pools=True),
}
COUNTS = {
    "exact": (2, 4),
    "dense": (1, 3),
    "grown": (4, 8),
    "bias": (2, 2),
    "readout": (2, 0),
}  # of templates, and of a task's coefficients


class TestReading:
    def test_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        grown().save(tmp_path)
        file = tmp_path / BANK_CONFIG
        content = {key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"}
        file.write_text(json.dumps(content).replace('"plain": true', '"plain": false'))
        with pytest.raises(RecastLoadError, match="lacks .*only_grown"):
            load_bank(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"templates": 3}, r"in its description: 3\n  in its tensors:     4"),
            ({"members": ["a", "a"]}, "each is expected once"),
            ({"kind": "tied"}, "kind 'tied'; known: exact, dense, grown, bias, readout"),
            ({"shape": [3, 2]}, "another shape"),
            ({"shape": []}, r"its shape \(\) cannot be used"),
            ({"factored": True}, "lacks g.left"),
            ({"kind": "bias", "templates": 2, "plain": False, "widths": [1, 2]}, "lacks g.only_grown"),
        ],
    )
    def test_a_description_that_its_tensors_do_not_bear_out_is_refused(self, change: dict[str, Any], message: str) -> None:
        group = GROUPS["grown"]
        with pytest.raises(RecastLoadError, match=message):
            read_group("g", fields({**group.describe(), **change}), group.named("g"), "the file")


class TestDescribing:
    @pytest.mark.parametrize("kind", GROUPS)
    def test_what_is_described_is_read_again(self, kind: str) -> None:
        group = GROUPS[kind]
        assert group.kind == kind
        assert (group.num_templates, group.num_coefficients) == COUNTS[kind]
        again = read_group("g", fields(group.describe()), group.named("g"), "the file")
        assert again.describe() == group.describe()
        assert {key: value.tolist() for key, value in again.named("g").items()} == {
            key: value.tolist() for key, value in group.named("g").items()
        }

    def test_templates_of_biases_are_cut_by_the_widths_of_the_members(self) -> None:
        found = {name: values.tolist() for name, values in GROUPS["bias"].by_member().items()}
        assert found == {"a": [[0.0, 1.0], [5.0, 6.0]], "b": [[2.0, 3.0, 4.0], [7.0, 8.0, 9.0]]}

    def test_widths_that_do_not_fit_the_templates_are_refused(self) -> None:
        group = GROUPS["bias"]
        with pytest.raises(RecastLoadError, match=r"templates of \(5,\) numbers for widths of \[2, 4\]"):
            read_group("g", fields({**group.describe(), "widths": [2, 4]}), group.named("g"), "the file")
