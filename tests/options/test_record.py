"""The record of a task: as fields of a config, and the bank that it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recast_peft import BiasConfig, RecastBankError, RecastConfig, StoredBank
from recast_peft.banks.stored_group import StoredGroup
from recast_peft.options.record import TaskRecord, bank_to_use, from_fields, hub_repository, reference_of, to_fields

NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6)
REFERENCES = st.none() | st.fixed_dictionaries({"name": st.none() | NAMES, "fingerprint": NAMES})
RECORDS = st.builds(
    TaskRecord,
    groups=st.dictionaries(NAMES, st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=3),
    base_fingerprint=st.dictionaries(NAMES, NAMES),
    bank=REFERENCES,
    num_coefficient_sets=st.integers(1, 9),
    coefficient_sharing=st.sampled_from([None, "roles", "blocks", "all"]),
    backbone=st.none() | st.fixed_dictionaries({"library": NAMES, "name": NAMES}),
    fidelity=st.none() | st.dictionaries(NAMES, st.floats(-1, 1)),
    is_stored=st.just(True),
)


def bank(value: float = 1.0, name: str | None = None) -> StoredBank:
    return StoredBank({"g": StoredGroup(("a", "b"), torch.full((1, 2, 2), value), torch.ones(2, 1))}, name=name)


def record(**fields: Any) -> TaskRecord:
    return TaskRecord({"g": ["a", "b"]}, {"a": "x", "b": "y"}, is_stored=True, **fields)


class TestAsFields:
    @given(RECORDS)
    def test_it_comes_back_as_it_was(self, given: TaskRecord) -> None:
        assert from_fields(to_fields(given), {}) == given

    @given(RECORDS)
    def test_it_comes_back_through_a_config(self, given: TaskRecord) -> None:
        groups = {
            f"{number}": [f"{number}.{name}" for name in dict.fromkeys(m)] for number, m in enumerate(given.groups.values())
        }
        given = replace(given, groups=groups)
        config = RecastConfig(**to_fields(given))
        assert config.record == given
        assert RecastConfig(**config.to_dict()).record == given

    @pytest.mark.parametrize("missing", ["groups", "base_fingerprint"])
    def test_what_a_user_gives_is_no_record(self, missing: str) -> None:
        assert from_fields({**to_fields(record()), missing: None}, {}) is None


class TestTheBankOfATask:
    def test_is_what_the_config_names_if_the_task_is_new(self) -> None:
        held = bank()
        assert bank_to_use(held, None) is held
        assert bank_to_use("folder", None) == {"name": "folder", "fingerprint": None}
        assert bank_to_use({"fingerprint": "f"}, None) == {"name": None, "fingerprint": "f"}
        assert bank_to_use(None, None) is None

    def test_of_a_stored_task_is_the_records(self) -> None:
        held = bank(name="here")
        stored = record(bank={"name": "there", "fingerprint": held.fingerprint})
        assert bank_to_use(held, stored) is held
        assert bank_to_use("here", stored) == {"name": "here", "fingerprint": held.fingerprint}
        assert bank_to_use(None, stored) == stored.bank
        assert bank_to_use(None, record()) is None

    @pytest.mark.parametrize(
        ("given", "stored"),
        [
            (bank(2.0), record(bank=bank().reference)),
            (bank(), record()),
            ("here", record()),
            ({"name": "here", "fingerprint": "0" * 16}, record(bank=bank().reference)),
        ],
    )
    def test_is_refused_if_it_is_another_one(self, given: Any, stored: TaskRecord) -> None:
        with pytest.raises(RecastBankError, match="bank of the task"):
            bank_to_use(given, stored)

    def test_of_a_partner_is_its_own(self) -> None:
        held = bank()
        stored = record(partner_banks={"bias": held.reference})
        assert bank_to_use(held, stored, "bias") is held
        with pytest.raises(RecastBankError, match="partner bias"):
            bank_to_use(bank(2.0), stored, "bias")

    def test_is_stored_as_a_reference(self) -> None:
        held = bank(name="here")
        assert reference_of(held) == {"name": "here", "fingerprint": held.fingerprint}
        assert RecastConfig(bank=held).to_dict()["bank"] == reference_of(held)
        assert RecastConfig(bank="here").to_dict()["bank"] == {"name": "here", "fingerprint": None}
        partner = BiasConfig(bank=held)
        assert partner.bank is held
        assert RecastConfig(partners=[partner]).to_dict()["partners"][0]["bank"] == reference_of(held)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (None, None),
        ({"library": "timm", "repository": "timm/vit"}, "timm/vit"),
        ({"library": "transformers", "name": "google/vit"}, "google/vit"),
        ({"library": "transformers", "name": "/somewhere/vit"}, None),
        ({"library": "transformers", "name": "../vit"}, None),
        ({"library": "timm", "name": "vit"}, None),
        ({"name": 3}, None),
    ],
)
def test_the_repository_of_a_backbone(backbone: Any, expected: str | None) -> None:
    assert hub_repository(backbone) == expected
