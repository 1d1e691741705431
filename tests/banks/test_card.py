"""The card of a bank file, and how it is pushed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from hub_tasks import files_of, learn, make_backbone, metadata, output
from transformers import ViTForImageClassification

from recast_peft import (
    AutoRecastModel,
    RecastConfig,
    RecastHubError,
    RecastLoadError,
    StoredBank,
    fit_bank,
    get_recast_model,
    load_bank,
    push_bank_to_hub,
    push_task_to_hub,
)
from recast_peft.banks.card import made_by, write_bank_card


class TestABank:
    """Templates that do not follow from the pretrained weights are stored once, and tasks name them."""

    @pytest.fixture(scope="class")
    def bank(self) -> StoredBank:
        config = RecastConfig(num_templates=1, mimicry={"method": "gradient", "steps": 5})
        return fit_bank(make_backbone(), config)

    def test_is_pushed_with_a_card(self, hub: HubServer, bank: StoredBank) -> None:
        push_bank_to_hub(bank, "ada/bank", base_model="google/vit")
        files = files_of(hub, "ada/bank")
        assert set(files) == {"README.md", "recast_bank.json", "recast_bank.safetensors"}
        assert len(hub.repositories["ada/bank"].commits) == 2
        card = files["README.md"].decode()
        assert "| Targets | 8 modules: `vit.layers.*.mlp.fc1`" in card
        assert "| Banks | 4, with 4 templates |" in card
        assert metadata(card)["base_model"] == "google/vit"
        assert load_bank("ada/bank").fingerprint == bank.fingerprint

    def test_is_found_by_the_tasks_name(self, hub: HubServer, bank: StoredBank, monkeypatch: Any, tmp_path: Path) -> None:
        push_bank_to_hub(bank, "ada/bank", private=True)
        make_backbone().save_pretrained(tmp_path / "base")
        hub.add("ada/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
        base = ViTForImageClassification.from_pretrained("ada/base")
        model = get_recast_model(base, RecastConfig(bank=load_bank("ada/bank")))
        learn(model, "default", 3)
        push_task_to_hub(model.eval(), "ada/task")
        assert "| Fidelity of the base | stored bank `ada/bank`; cosine" in files_of(hub, "ada/task")["README.md"].decode()
        fresh = {"cache_dir": tmp_path / "fresh"}
        assert torch.equal(output(AutoRecastModel.from_pretrained("ada/task", **fresh)), output(model))
        monkeypatch.delenv("HF_TOKEN")
        elsewhere = {"cache_dir": tmp_path / "elsewhere"}
        with pytest.raises(RecastHubError, match="ada/bank"):
            AutoRecastModel.from_pretrained("ada/task", **elsewhere)
        loaded = AutoRecastModel.from_pretrained("ada/task", token="hf_writer", **elsewhere)
        assert torch.equal(output(loaded), output(model))

    def test_without_its_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RecastLoadError, match=r"recast_bank\.json"):
            write_bank_card(tmp_path)


@pytest.mark.parametrize(
    ("mimicry", "words"),
    [
        ("closed_form", "closed_form"),
        ("random", "of random templates"),
        ({"method": "grown", "sources": ["birds"]}, "grown from 1 source: birds"),
        ({"method": "grown", "sources": ["birds\n# cars", "dogs"]}, "grown from 2 sources: birds # cars, dogs"),
        ({"method": "grown", "sources": ["birds"], "of": "biases"}, "of biases, grown from 1 source: birds"),
        (
            {"method": "learned", "tasks": ["a", "b"], "steps": 9, "start": {"method": "random"}},
            "learned together with the tasks a, b in 9 steps; started from a bank of random templates",
        ),
        (3, "3"),
    ],
)
def test_how_a_bank_was_made_is_said_in_one_line(mimicry: Any, words: str) -> None:
    assert made_by(mimicry) == words
