"""How transformers' own loading of an adapter goes by the task's names; tests/integrations/test_transformers.py runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyVit, layers_of, randomise, seeded, tiny_vit
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastLoadError, get_recast_model
from recast_peft.tasks.transformers_loading import LOADING, hand_back_loading, take_over_loading


@dataclass(frozen=True)
class LoadConfig:
    """What of transformers' options of a load counts here."""

    weight_mapping: list[str] = field(default_factory=lambda: ["a renaming"])


class LoadingVit(TinyVit):
    """A model with transformers' way of loading, which notes what it is given."""

    given: dict[str, Any] = {}

    @staticmethod
    def _load_pretrained_model(**options: Any) -> str:
        LoadingVit.given = options
        return "what transformers says"


@pytest.fixture
def backbone() -> nn.Module:
    """A model with a task named anew, whose coefficients are zero."""
    model = get_recast_model(seeded(LoadingVit), RecastConfig(target_modules=["qkv"]), "anew")
    return model.get_base_model()


@pytest.fixture
def stored() -> dict[str, Tensor]:
    """Entries of a task with numbers, by the names that its file has."""
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "task")
    randomise(model, "task")
    return get_peft_model_state_dict(model, adapter_name="task")


class TestALoad:
    @pytest.mark.parametrize("way", ["state dict", "file"])
    def test_puts_a_tasks_entries_in_under_another_name(
        self, backbone: nn.Module, stored: dict[str, Tensor], way: str, tmp_path: Path
    ) -> None:
        told: list[tuple[str, bool]] = []
        take_over_loading(backbone, RecastConfig(), "anew", lambda name, undo: told.append((name, undo)))
        save_file(stored, tmp_path / "task.safetensors")
        files = [str(tmp_path / "task.safetensors")]
        source = {"state_dict": stored, "checkpoint_files": None} if way == "state dict" else {}
        options = {"state_dict": None, "checkpoint_files": files, **source}
        assert getattr(backbone, LOADING)(**options, load_config=LoadConfig(), more=1) == "what transformers says"
        for name, layer in layers_of(backbone).items():
            expected = stored[f"base_model.model.{name}.recast_coefficients"]
            assert torch.equal(layer.recast_coefficients["anew"], expected)
            assert expected.any()
        assert told == [("anew", False)]
        # transformers goes on with what is in the model already, and renames nothing of it
        assert (LoadingVit.given["checkpoint_files"], LoadingVit.given["more"]) == (None, 1)
        assert LoadingVit.given["load_config"].weight_mapping == []
        assert LOADING not in vars(backbone)

    def test_that_fails_is_undone_and_the_next_one_is_transformers_own(
        self, backbone: nn.Module, stored: dict[str, Tensor]
    ) -> None:
        told: list[tuple[str, bool]] = []
        take_over_loading(backbone, RecastConfig(), "anew", lambda name, undo: told.append((name, undo)))
        stored.pop(next(iter(stored)))
        with pytest.raises(RecastLoadError, match="missing"):
            getattr(backbone, LOADING)(state_dict=stored, checkpoint_files=None, load_config=LoadConfig())
        assert told == [("anew", True)]
        assert not any(layer.recast_coefficients["anew"].any() for layer in layers_of(backbone).values())
        assert getattr(backbone, LOADING) is LoadingVit._load_pretrained_model


def test_what_is_taken_over_can_be_handed_back(backbone: nn.Module) -> None:
    take_over_loading(backbone, RecastConfig(), "anew", lambda name, undo: None)
    assert LOADING in vars(backbone)
    hand_back_loading(backbone)
    hand_back_loading(backbone)
    assert getattr(backbone, LOADING) is LoadingVit._load_pretrained_model


def test_other_models_are_left_alone() -> None:
    plain = tiny_vit()
    before = dict(vars(plain))
    take_over_loading(plain, RecastConfig(), "anew", lambda name, undo: None)
    assert vars(plain) == before
