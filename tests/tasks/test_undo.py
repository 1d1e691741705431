"""Wholly or not at all: what a model is made of, put back after a failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import converted, layers_of, outputs, randomise, state, tiny_vit, vit_input

from recast_peft import RecastConfig, RecastLayer, get_recast_model


class TestAConversion:
    @pytest.mark.parametrize("templates", [None, 1])
    @pytest.mark.parametrize(
        ("step", "when"),
        [
            ("peft.tuners.tuners_utils.BaseTuner.set_adapter", 0),
            ("peft.tuners.tuners_utils.BaseTuner._mark_only_adapters_as_trainable", 0),
            ("recast_peft.layer.RecastLayer.update_layer", 0),
            ("recast_peft.layer.RecastLayer.update_layer", 2),
        ],
    )
    def test_in_which_PEFT_fails_leaves_the_model_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch, templates: int | None, step: str, when: int
    ) -> None:
        model, calls = tiny_vit(), []
        owner, name = step.rpartition(".")[0], step.rpartition(".")[2]
        original = getattr(_resolve(owner), name)

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > when:
                raise RuntimeError("disk on fire")
            return original(*args, **kwargs)

        before, start = state(model), outputs(model, vit_input())
        monkeypatch.setattr(step, fail)
        with pytest.raises(RuntimeError, match="disk on fire"):
            get_recast_model(model, RecastConfig(target_modules=["qkv"], num_templates=templates))
        assert state(model) == before
        assert torch.equal(outputs(model, vit_input()), start)
        monkeypatch.undo()
        get_recast_model(model, RecastConfig(target_modules=["qkv"], num_templates=templates))
        assert len(layers_of(model)) == 4

    @pytest.mark.parametrize("templates", [None, 1])
    def test_of_a_later_task_in_which_PEFT_fails_leaves_the_earlier_one_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch, templates: int | None
    ) -> None:
        model = converted(num_templates=templates)
        randomise(model)
        before, live = state(model), outputs(model, vit_input())
        calls: list[int] = []
        original = RecastLayer.update_layer

        def fail(*args: Any, **kwargs: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            original(*args, **kwargs)

        monkeypatch.setattr(RecastLayer, "update_layer", fail)
        with pytest.raises(KeyboardInterrupt):
            model.add_adapter("second", RecastConfig(target_modules=["qkv"], num_templates=templates))
        assert state(model) == before
        assert torch.equal(outputs(model, vit_input()), live)
        monkeypatch.undo()
        model.peft_config.pop("second", None)
        model.add_adapter("second", RecastConfig(target_modules=["qkv"], num_templates=templates))
        assert list(model.peft_config) == ["default", "second"]


def _resolve(path: str) -> Any:
    import pkgutil

    return pkgutil.resolve_name(path)
