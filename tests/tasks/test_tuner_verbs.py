"""What the tuner's verbs do to tasks: which is active afterwards, what is refused by name, and which bank is stored."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import converted, outputs, randomise, tiny_vit, vit_input
from peft import PeftModel, inject_adapter_in_model

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, get_recast_model


@pytest.fixture
def model() -> PeftModel:
    """Tasks a, b and c, each with numbers of its own; a is active."""
    made = converted("a")
    for name in ("b", "c"):
        made.add_adapter(name, RecastConfig(target_modules=["qkv"]))
    for seed, name in enumerate("abc"):
        randomise(made, name, seed=seed + 1)
    return made


def trained(model: PeftModel) -> set[str]:
    own = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {task for task in "abc" if any(f"recast_coefficients.{task}." in f"{name}." for name in own)}


class TestDeleting:
    def test_the_only_active_task_makes_the_first_one_active_and_says_so(self, model: PeftModel) -> None:
        model.set_adapter("c")
        with pytest.warns(UserWarning, match="Adapter c was active .* Setting active adapter to a"):
            model.base_model.delete_adapter("c")
        assert (model.active_adapters, trained(model), [*model.peft_config]) == (["a"], {"a"}, ["a", "b"])

    def test_one_of_several_active_tasks_leaves_the_others_active(self, model: PeftModel) -> None:
        model.base_model.set_adapter(["b", "c"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.base_model.delete_adapter("b")
        assert (model.active_adapters, trained(model)) == (["c"], {"c"})

    def test_leaves_frozen_what_was_frozen(self, model: PeftModel) -> None:
        model.base_model.set_adapter(["b", "c"], inference_mode=True)
        model.base_model.delete_adapter("b")
        assert (model.active_adapters, trained(model)) == (["c"], set())

    def test_a_task_that_is_not_active_leaves_the_merged_one_merged(self, model: PeftModel) -> None:
        model.merge_adapter()
        merged = outputs(model, vit_input())
        model.delete_adapter("b")
        assert model.base_model.model.blocks[0].attn.qkv.merged_adapters == ["a"]
        assert torch.equal(outputs(model, vit_input()), merged)

    def test_a_task_that_is_not_there_is_an_error(self, model: PeftModel) -> None:
        with pytest.raises(ValueError, match="Adapter d does not exist"):
            model.base_model.delete_adapter("d")
        assert [*model.peft_config] == ["a", "b", "c"]


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_merging_an_unknown_task_names_those_there_are(model: PeftModel, verb: str) -> None:
    before = outputs(model, vit_input())
    with pytest.raises(RecastConfigError, match="the model has no RECAST task 'd'; its tasks: a, b, c$"):
        getattr(model, verb)(adapter_names=["a", "d"])
    assert torch.equal(outputs(model, vit_input()), before)
    assert not model.base_model.model.blocks[0].attn.qkv.merged


class TestStoringABank:
    @pytest.mark.parametrize(
        ("of", "error", "message"),
        [
            ("heads", RecastConfigError, "of='heads': expected one of 'weights', 'biases', 'readout'"),
            ("biases", RecastBankError, "task 'a' is on no bank of biases"),
            ("weights", RecastBankError, "nothing to store"),
        ],
    )
    def test_that_is_not_there_writes_nothing(
        self, model: PeftModel, of: str, error: type[Exception], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=message):
            model.save_bank(tmp_path / "bank", of=of)
        assert not (tmp_path / "bank").exists()


class TestNamesThatNoTaskHas:
    def test_are_not_activated(self, model: PeftModel) -> None:
        before = outputs(model, vit_input())
        for names in ("typo", ["typo"], ["b", "typo"]):
            with pytest.raises(RecastConfigError, match="no RECAST task 'typo'; its tasks: a, b, c"):
                model.base_model.set_adapter(names)
        assert model.active_adapters == ["a"]
        assert torch.equal(outputs(model, vit_input()), before)

    def test_a_text_is_no_list_of_names(self, model: PeftModel, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="adapter_names should be a list of strings, got 'ab'"):
            model.merge_adapter("ab")
        with pytest.raises(TypeError, match="selected_adapters should be a list of names, got 'ab'"):
            model.save_pretrained(tmp_path, selected_adapters="ab")
        assert not any(tmp_path.iterdir())

    def test_are_not_trained(self, model: PeftModel) -> None:
        with pytest.raises(RecastConfigError, match="no RECAST task 'typo'; its tasks: a, b, c"):
            model.set_requires_grad(["b", "typo"])
        assert trained(model) == {"a"}
        model.set_requires_grad("b")
        assert trained(model) == {"a", "b"}

    @pytest.mark.parametrize("name", ["typo", ""])
    def test_have_no_bank(self, model: PeftModel, name: str, tmp_path: Path) -> None:
        with pytest.raises(RecastConfigError, match=f"no RECAST task '{name}'; its tasks: a, b, c"):
            model.save_bank(tmp_path, name)

    @pytest.mark.parametrize("given", [None, 1, ["a", 1], [None], b"a"])
    @pytest.mark.parametrize("verb", ["set_adapter", "set_requires_grad", "merge_adapter", "merge_and_unload"])
    def test_are_refused_if_they_are_no_texts(self, model: PeftModel, verb: str, given: Any) -> None:
        if given is None and verb.startswith("merge"):
            pytest.skip("the active tasks")
        before = outputs(model, vit_input())
        with pytest.raises(RecastConfigError, match="expected the name of a task, or a list of names, got"):
            getattr(model.base_model, verb)(**{"adapter_name" if verb == "set_adapter" else "adapter_names": given})
        assert torch.equal(outputs(model, vit_input()), before)
        assert trained(model) == {"a"}


class TestSeveralNames:
    @pytest.mark.parametrize("verb", ["set_adapter", "merge_adapter", "merge_and_unload"])
    def test_of_one_task_do_not_let_it_act_twice(self, model: PeftModel, verb: str) -> None:
        before = outputs(model, vit_input())
        with pytest.raises(RecastConfigError, match=r"\['a', 'b', 'a'\]: a task is named twice"):
            getattr(model.base_model, verb)(**{"adapter_name" if verb == "set_adapter" else "adapter_names": ["a", "b", "a"]})
        assert torch.equal(outputs(model, vit_input()), before)
        assert model.active_adapters == ["a"]

    @pytest.mark.parametrize("verb", ["set_adapter", "merge_adapter", "merge_and_unload"])
    def test_may_come_one_by_one(self, model: PeftModel, verb: str) -> None:
        model.base_model.set_adapter(["a", "b"])
        expected = outputs(model, vit_input())
        model.base_model.set_adapter("c")
        one_by_one = (name for name in ("a", "b"))
        result = getattr(model.base_model, verb)(**{"adapter_name" if verb == "set_adapter" else "adapter_names": one_by_one})
        torch.testing.assert_close(outputs(model if result is None else result, vit_input()), expected)

    def test_may_be_frozen_one_by_one(self, model: PeftModel) -> None:
        model.set_requires_grad(name for name in ("b", "c"))
        assert trained(model) == {"a", "b", "c"}

    def test_may_be_none_to_merge(self, model: PeftModel) -> None:
        before = outputs(model, vit_input())
        model.merge_adapter(adapter_names=[])
        assert torch.equal(outputs(model, vit_input()), before)
        assert not model.base_model.model.blocks[0].attn.qkv.merged


@pytest.mark.parametrize("partner", [None, "bias", "adaptformer", "piggyback"])
def test_all_of_a_task_of_any_name_is_frozen_and_trained(partner: str | None) -> None:
    more = {"lora_config": {"r": 2, "target_modules": ["fc1"]}, "modules_to_save": ["fc2"], "train_norms": True}
    config = RecastConfig(target_modules=["qkv"], **({"partners": [partner]} if partner else more))
    model = get_recast_model(tiny_vit(), config, "v1.2")
    before = model.get_nb_trainable_parameters()[0]
    assert before > 8  # the coefficients are not all
    model.set_requires_grad("v1.2", False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad("v1.2")
    assert model.get_nb_trainable_parameters()[0] == before


def test_a_task_beside_those_of_a_tuner_that_is_gone_is_active_in_every_module() -> None:
    together = tiny_vit()
    for name, targets, classes in (("a", ["qkv"], 3), ("b", ["qkv", "fc1"], 4)):
        inject_adapter_in_model(RecastConfig(target_modules=targets, num_classes=classes), together, name)
        randomise(together, name)
    alone = converted("b", target_modules=["qkv", "fc1"], num_classes=4)
    randomise(alone, "b")
    assert torch.equal(outputs(together.eval(), vit_input()), outputs(alone, vit_input()))
    assert trained(together) == {"b"}
