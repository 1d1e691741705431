"""The record of a task: decided by a conversion, dropped by the next one, followed where a file holds it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model

from recast_peft import BiasConfig, RecastBankError, RecastConfig, RecastConfigError, StoredBank, get_recast_model
from recast_peft.banks.stored_group import StoredGroup
from recast_peft.options.record import DECIDED, TaskRecord, bank_to_use, from_fields, hub_repository, reference_of, to_fields

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


class TestOfAConversion:
    def test_is_all_that_is_written_to_a_config(self) -> None:
        config = RecastConfig(target_modules="all-linear", max_coefficients=40, lora_config=LoraConfig(r=1))
        before = {name: copy.deepcopy(value) for name, value in vars(config).items()}
        model = get_peft_model(tiny_vit(), config)
        assert model.peft_config["default"] is config
        after = dict(vars(config))
        assert (before.pop("record"), type(after.pop("record"))) == (None, TaskRecord)
        assert before == after

    def test_is_what_the_decided_fields_read_as(self) -> None:
        config = RecastConfig(target_modules=["qkv"], num_coefficient_sets=2, max_coefficients=7, lora_config=LoraConfig(r=1))
        model = get_peft_model(tiny_vit(), config)
        assert config.record is not None
        for name in DECIDED:
            assert getattr(model.peft_config["default"], name) == getattr(config.record, name)
        assert config.num_coefficient_sets == 1  # the budget allows no more
        assert sum(map(len, config.groups.values())) == 4
        assert config.lora_config.target_modules is not None

    def test_is_dropped_when_the_config_is_used_again(self) -> None:
        config = RecastConfig(target_modules=["qkv"], num_coefficient_sets=2, max_coefficients=7)
        get_peft_model(tiny_vit(depth=4), config)
        get_peft_model(tiny_vit(depth=2), config)
        assert config.num_coefficient_sets == 2  # two layers leave room for both
        assert sum(map(len, config.groups.values())) == 2

    def test_stays_when_a_second_conversion_fails(self) -> None:
        config = RecastConfig(target_modules=["qkv"])
        get_peft_model(tiny_vit(), config)
        kept = config.record
        with pytest.raises(Exception, match="qkv"):
            get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
        assert config.record is kept

    def test_of_a_stored_task_is_followed_on_every_model(self, tmp_path: Path) -> None:
        given = {"mine": ["blocks.0.attn.qkv", "blocks.3.attn.qkv"]}
        get_recast_model(tiny_vit(), RecastConfig(groups=given)).save_pretrained(tmp_path)
        config = RecastConfig.from_pretrained(str(tmp_path))
        assert config.is_stored_task
        assert config.record.folder == str(tmp_path)
        for _ in range(2):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path), config=config)
            assert config.groups == given
        with pytest.raises(RecastConfigError, match="groups of a stored task"):
            config.groups = {"other": ["blocks.0.attn.qkv"]}
        with pytest.raises(ValueError, match="other pretrained weights"):
            PeftModel.from_pretrained(tiny_vit(seed=1), str(tmp_path), config=config)

    def test_results_stay_the_users(self, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(results={"accuracy": 0.5}))
        model.peft_config["default"].results = {"accuracy": 0.9}
        model.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(str(tmp_path)).results == {"accuracy": 0.9}


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
