"""A task for each sample by PEFT's adapter_names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import converted, layers_of, outputs, randomise, vit_input
from three_tasks import NAMES, alone, with_tasks

from recast_peft import RecastConfig


class TestATaskForEachSample:
    @pytest.mark.parametrize("templates", [None, 1])
    @given(names=st.lists(st.sampled_from([*NAMES, "__base__"]), min_size=1, max_size=6))
    def test_gives_what_each_gives_alone(self, templates: int | None, names: list[str]) -> None:
        model = with_tasks(templates, keep_base_weights=True)
        expected = alone(model)
        inputs = vit_input()[[i % 2 for i in range(len(names))]]
        result = outputs(model, inputs, adapter_names=names)
        for i, name in enumerate(names):
            torch.testing.assert_close(result[i], expected[name][i % 2], rtol=1e-4, atol=1e-5)

    def test_uses_the_head_of_each(self) -> None:
        model = converted("cars", modules_to_save=["head"])
        model.add_adapter("birds", RecastConfig(target_modules=["qkv"], modules_to_save=["head"]))
        for i, name in enumerate(("cars", "birds")):
            randomise(model, name, seed=i)
            model.base_model.model.head.modules_to_save[name].bias.data += i + 1
        expected = alone(model, ["cars", "birds"])
        result = outputs(model, vit_input(), adapter_names=["birds", "cars"])
        torch.testing.assert_close(result[0], expected["birds"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result[1], expected["cars"][1], rtol=1e-4, atol=1e-5)

    def test_uses_the_plain_module_where_a_task_has_none_of_its_own(self) -> None:
        model = converted("cars", modules_to_save=["head"])
        model.add_adapter("birds", RecastConfig(target_modules=["qkv"]))
        model.get_submodule("base_model.model.head").modules_to_save["cars"].weight.data += 0.5
        for seed, name in enumerate(("cars", "birds")):
            randomise(model, name, seed)
        expected = alone(model, ["cars", "birds"])
        mixed = outputs(model, vit_input(), adapter_names=["cars", "birds"])
        torch.testing.assert_close(mixed[0], expected["cars"][0])
        torch.testing.assert_close(mixed[1], expected["birds"][1])
        assert not torch.allclose(expected["cars"], expected["birds"], atol=1e-2)

    def test_of_an_unknown_name_is_refused(self) -> None:
        model = with_tasks()
        live = outputs(model, vit_input())
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): planes"):
            outputs(model, vit_input(), adapter_names=["cars", "planes"])
        assert torch.equal(outputs(model, vit_input()), live)

    @pytest.mark.parametrize("names", ["cars", ["cars", 1], 1])
    def test_is_given_as_a_list_of_names(self, names: Any) -> None:
        with pytest.raises(TypeError, match="adapter_names"):
            outputs(with_tasks(), vit_input(), adapter_names=names)

    def test_may_come_one_by_one(self) -> None:
        model, names = with_tasks(), ["cars", "birds"]
        expected = outputs(model, vit_input(), adapter_names=names)
        assert torch.equal(outputs(model, vit_input(), adapter_names=iter(names)), expected)

    def test_of_another_number_than_samples_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`adapter_names` .* got 3 and 2"):
            outputs(with_tasks(), vit_input(), adapter_names=["cars"] * 3)

    def test_is_refused_while_training(self) -> None:
        with pytest.raises(ValueError, match="training mode"):
            with_tasks().train()(vit_input(), adapter_names=["cars", "birds"])

    def test_is_refused_while_merged(self) -> None:
        model = with_tasks()
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            outputs(model, vit_input(), adapter_names=["cars", "birds"])

    def test_leaves_nothing_behind_after_an_error(self) -> None:
        model = with_tasks()
        live = outputs(model, vit_input())
        with pytest.raises(RuntimeError):
            outputs(model, torch.randn(2, 5, 3), adapter_names=["cars", "birds"])
        assert torch.equal(outputs(model, vit_input()), live)
        assert isinstance(layers_of(model)["blocks.0.attn.qkv"].weight, torch.Tensor)
