"""Wholly or not at all: what a model is made of, put back after a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import converted, layers_of, outputs, randomise, state, tiny_vit, vit_input
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from recast_peft import RecastConfig, RecastLayer, RecastModel, get_recast_model
from recast_peft.layer import recast_layers
from recast_peft.parts.wrapper import TaskModule
from recast_peft.tasks.undo import Snapshot, undone_on_failure


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
        assert list(model.peft_config) == ["default"]
        model.add_adapter("second", RecastConfig(target_modules=["qkv"], num_templates=templates))
        assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("step", ["peft.peft_model.load_peft_weights", "recast_peft.tasks.files.put_in"])
def test_a_load_that_is_interrupted_after_the_modules_were_made_leaves_the_model_as_it_was(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    stored = converted("stored", num_classes=3)
    randomise(stored, "stored")
    stored.save_pretrained(tmp_path)
    model = converted()
    before = state(model)
    monkeypatch.setattr(step, stop)
    with pytest.raises(KeyboardInterrupt):
        model.load_adapter(tmp_path / "stored", "second")
    assert (state(model), list(model.peft_config)) == (before, ["default"])
    monkeypatch.undo()
    model.load_adapter(tmp_path / "stored", "second")
    model.set_adapter("second")
    assert torch.equal(outputs(model.eval(), vit_input()), outputs(stored, vit_input()))


def _facts(model: PeftModel) -> tuple[Any, ...]:
    """What a switch or a deletion changes: tasks, the active ones, labels, and what is trained; and what is computed."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [layer._active_adapter for layer in recast_layers(model.get_base_model()).values()]
    where = (model.active_adapter, model.active_adapters, layers)
    return list(model.peft_config), where, trained, sorted(model.state_dict()), outputs(model, vit_input()).tolist()


@pytest.mark.parametrize("verb", ["set_adapter", "delete_adapter"])
def test_a_switch_or_deletion_that_is_interrupted_is_not_begun_or_finished(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared() -> PeftModel:
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["fc1"], init_lora_weights=False)
        own = {"target_modules": ["qkv"], "num_classes": 3, "partners": ["bias"], "lora_config": lora}
        model = converted("first", depth=2, **own)
        model.add_adapter("second", RecastConfig(**own))
        for name in ("first", "second"):
            randomise(model, name, seed=len(name))
        return model.eval()

    name = "second" if verb == "set_adapter" else "first"
    before, finished = prepared(), prepared()
    getattr(finished, verb)(name)
    states = _facts(before), _facts(finished)
    assert states[0] != states[1]
    for kind in (RecastLayer, TaskModule, LoraLayer):
        for at in (1, 2):
            model = prepared()
            monkeypatch.setattr(kind, verb, _stopped(getattr(kind, verb), at))
            with pytest.raises(KeyboardInterrupt):
                getattr(model, verb)(name)
            monkeypatch.undo()
            assert _facts(model) in states
    model = prepared()
    monkeypatch.setattr(RecastModel, verb, lambda *args, **kwargs: _stop())  # while it waits for another thread's call
    with pytest.raises(KeyboardInterrupt):
        getattr(model, verb)(name)
    monkeypatch.undo()
    assert _facts(model) == states[0]


def _stopped(verb: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A verb that is interrupted the ``at``-th time that it is called."""
    calls: list[int] = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return _stop() if len(calls) == at else verb(*args, **kwargs)

    return stopped


def _stop() -> None:
    raise KeyboardInterrupt


def _resolve(path: str) -> Any:
    import pkgutil

    return pkgutil.resolve_name(path)


class TestASnapshot:
    def change(self, model: nn.Sequential) -> None:
        """Whatever a conversion may do: a child exchanged, parameters frozen, new, gone, hooks, lists and other attributes."""
        model[0].weight.requires_grad_(False)
        model[0].bias = None
        model[0].kept.append(2)
        model[0].named["b"] = 2
        model[0].word = "other"
        model[0].new = 1
        model[0].register_forward_hook(lambda *args: None)
        model[0].register_buffer("fresh", torch.zeros(1))
        model[1] = nn.ReLU()

    def noted(self, model: nn.Sequential) -> dict[str, Any]:
        first, hooks = model[0], [hook for module in model.modules() for hook in module._forward_hooks.values()]
        objects = [id(module) for module in model.modules()] + [id(p) for p in model.parameters()]
        return {
            "objects": objects, "trained": [p.requires_grad for p in model.parameters()], "hooks": hooks,
            "kept": [*first.kept], "named": {**first.named}, "word": first.word, "attributes": sorted(vars(first)),
            "tensors": sorted(model.state_dict()),
        }  # fmt: skip

    @pytest.fixture
    def model(self) -> nn.Sequential:
        made = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        made[0].kept, made[0].named, made[0].word = [1], {"a": 1}, "own"
        return made

    def test_brings_back_what_was_exchanged_added_and_taken_away(self, model: nn.Sequential) -> None:
        before, lists = self.noted(model), (model[0].kept, model[0].named)
        with pytest.raises(RuntimeError, match="stop"), undone_on_failure(model):
            self.change(model)
            assert all(self.noted(model)[key] != value for key, value in before.items())
            raise RuntimeError("stop")
        assert self.noted(model) == before
        assert (model[0].kept, model[0].named) == ([1], {"a": 1})
        assert model[0].kept is lists[0]  # the very objects, which others may hold too
        assert model[0].named is lists[1]

    def test_is_not_used_where_nothing_failed(self, model: nn.Sequential) -> None:
        before = self.noted(model)
        with undone_on_failure(model):
            self.change(model)
        assert all(self.noted(model)[key] != value for key, value in before.items())

    def test_can_be_put_back_by_hand_and_copies_no_tensor(self, model: nn.Sequential) -> None:
        before = self.noted(model)
        snapshot = Snapshot(model)
        self.change(model)
        with torch.no_grad():
            model[0].weight.fill_(7.0)
        snapshot.restore()
        assert self.noted(model) == before
        assert (model[0].weight == 7.0).all()


class Unwritable(dict[str, Any]):
    """A dictionary that refuses to be written to, as the configs of diffusers do."""

    def clear(self) -> None:
        raise AssertionError("it was written to")

    update = clear  # type: ignore[assignment]


def test_a_dictionary_that_was_not_changed_is_not_written_to() -> None:
    model = tiny_vit()
    model.own = Unwritable(depth=4)  # type: ignore[assignment]
    model.other = {"depth": 4}  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="inside"), undone_on_failure(model):
        model.other["depth"] = 5  # type: ignore[operator]
        raise RuntimeError("inside")
    assert model.own == {"depth": 4} == model.other  # type: ignore[comparison-overlap]
