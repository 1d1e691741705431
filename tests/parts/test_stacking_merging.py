"""Merges, names and copies where a method is stacked on tasks, on other kinds of modules and on released banks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import KINDS, layers_of, outputs, randomise, seeded, tiny_vit, vit_input
from peft import PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from stacked import FIELDS, ORDERS, TARGETS, lora, plain_key, stacked, task_model, with_method, with_seed, with_task
from torch import Tensor, nn

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, RecastTargetError, get_recast_model


@pytest.fixture
def both() -> tuple[PeftModel, PeftModel]:
    """RECAST with two tasks, and a LoRA around it."""
    task = task_model(tiny_vit())
    task.add_adapter("second", RecastConfig(target_modules=TARGETS))
    randomise(task, "second", 9)
    torch.manual_seed(5)
    return task, get_peft_model(task.base_model.model, lora(), adapter_name="other").eval()


class TestProtection:
    def test_a_lora_merged_into_one_layer_leaves_its_neighbours_alone(self, both):
        _, model = both
        layers = [m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]
        neighbour = layers_of(model)["blocks.1.attn.proj"]
        before = neighbour.compose(["task"]).detach().clone()
        layers[0].merge()
        assert torch.equal(neighbour.compose(["task"]), before)
        assert not torch.equal(layers_of(model)["blocks.0.attn.proj"].weight_parameter, tiny_vit().blocks[0].attn.proj.weight)

    def test_the_base_comes_back_to_the_last_bit(self, both):
        task, model = both
        for order in ((task, model), (model, task)):
            for one in order:
                one.merge_adapter()
            for one in order:
                one.unmerge_adapter()
        task.disable_adapter_layers()
        with torch.no_grad():
            assert torch.equal(model(vit_input()), tiny_vit()(vit_input()))

    def test_taken_out_unmerged_they_leave_the_pretrained_model(self, both):
        _, model = both
        model.merge_adapter()
        assert torch.equal(outputs(model.unload(), vit_input()), outputs(tiny_vit(), vit_input()))

    def test_numbers_are_not_loaded_under_a_merged_lora(self, both):
        task, model = both
        numbers = {key: value + 1 for key, value in get_peft_model_state_dict(task, adapter_name="task").items()}
        model.merge_adapter(["other"])
        before = outputs(model, vit_input())
        with pytest.raises(RecastConfigError, match="'task' is merged, or others on top of it: call unmerge_adapter"):
            set_peft_model_state_dict(task, numbers, "task")
        assert torch.equal(outputs(model, vit_input()), before)
        model.unmerge_adapter()
        set_peft_model_state_dict(task, numbers, "task")
        assert not torch.allclose(outputs(model, vit_input()), before)

    def test_tasks_are_not_changed_under_a_merged_lora(self, both):
        task, model = both
        model.merge_adapter(["other"])
        task.set_adapter("second")
        with pytest.raises(RecastBankError, match="Unmerge them first"):
            model(vit_input())
        for layer in layers_of(model).values():
            with pytest.raises(RecastBankError, match="tasks wanted now:    second"):
                layer.merge_in_place(["second"])
        task.set_adapter("task")
        merged = outputs(model, vit_input())
        model.unmerge_adapter()
        torch.testing.assert_close(outputs(model, vit_input()), merged)

    def test_switching_the_whole_model_off_under_a_merged_lora(self, both):
        task, model = both
        model.merge_adapter()
        with task.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))

    def test_a_name_that_a_task_has_is_refused(self):
        task = task_model(tiny_vit())
        with pytest.raises(RecastTargetError, match="a RECAST task of this model has this name"):
            get_peft_model(task.base_model.model, lora(), adapter_name="task")
        assert isinstance(task.peft_config["task"], RecastConfig)
        assert not [key for key in task.state_dict() if "lora_" in key]

    def test_a_reader_of_the_weight_gets_the_composed_one(self, both):
        _, model = both
        layer = layers_of(model)["blocks.0.attn.proj"]
        assert torch.equal(model.base_model.model.blocks[0].attn.proj.weight, layer.compose(["task"]))

    def test_a_lora_that_is_merged_already_is_refused(self):
        model = get_peft_model(tiny_vit(), lora(), adapter_name="other")
        model.merge_adapter()
        with pytest.raises(RecastTargetError, match="not the pretrained one"):
            get_recast_model(model.base_model.model, RecastConfig(target_modules=TARGETS))

    def test_variants_that_read_the_weight_are_refused(self):
        with pytest.raises(RecastTargetError, match="Dora reads the pretrained weight"):
            get_peft_model(with_task(tiny_vit()), lora(use_dora=True))
        with pytest.raises(RecastTargetError, match="Dora reads the pretrained weight"):
            with_task(get_peft_model(tiny_vit(), lora(use_dora=True)).base_model.model)

    def test_rank_stabilised_lora_stacks(self):
        model = get_peft_model(with_task(tiny_vit()), lora(use_rslora=True)).eval()
        live = outputs(model, vit_input())
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, vit_input()), live)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_merge_on_their_own(self, both, copied):
        _, model = both
        live = outputs(model, vit_input())
        twin = copied(model.base_model.model)
        for module in twin.modules():
            if hasattr(module, "lora_A"):
                module.merge()
        torch.testing.assert_close(outputs(twin, vit_input()), live)
        assert all(layer.held is None for layer in layers_of(model).values())
        assert all(layer.held is not None for layer in layers_of(twin).values())

    def test_the_file_of_a_lora_around_is_that_of_the_lora_alone(self, tmp_path):
        alone = with_method(tiny_vit().double(), "LORA")
        alone.save_pretrained(tmp_path / "alone")
        stacked("LORA", "around").save_pretrained(tmp_path / "together", selected_adapters=["other"])
        x = vit_input().double()
        loaded = [PeftModel.from_pretrained(tiny_vit().double(), tmp_path / w / "other").eval() for w in ("alone", "together")]
        assert torch.equal(outputs(loaded[0], x), outputs(loaded[1], x))
        assert torch.equal(outputs(loaded[0], x), outputs(alone, x))


CONVOLUTIONS = ["LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3"]  # what PEFT puts on convolutions, of those that stack


@pytest.mark.filterwarnings("ignore")
class TestOtherModules:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_convolutions(self, name, order):
        kind = KINDS["conv2d"]
        fields = {**FIELDS.get(name, {}), "target_modules": kind.targets}
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**fields)

        def task(model: nn.Module) -> nn.Module:
            converted = get_peft_model(model, RecastConfig(target_modules=kind.targets), adapter_name="task").eval()
            randomise(converted, "task")
            return converted.base_model.model

        def other(model: nn.Module) -> PeftModel:
            result = with_seed(5, lambda: get_peft_model(model, copy.deepcopy(config), adapter_name="other").eval())
            generator = torch.Generator().manual_seed(6)
            for key, parameter in sorted((plain_key(k), p) for k, p in result.named_parameters()):
                if "other" in key:
                    parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            return result

        plain, x = seeded(kind.build), kind.inputs()
        with torch.no_grad():
            for key, layer in layers_of(task(seeded(kind.build))).items():
                plain.get_parameter(f"{key}.weight").copy_(layer.compose(["task"]))
        alone = other(plain)
        expected = outputs(alone, x)
        if order == "around" and name == "IA3":
            with pytest.raises(ValueError, match="(?s)RecastLayer.* is not supported"):
                other(task(seeded(kind.build)))
            return
        if order == "around":
            both = other(task(seeded(kind.build)))
        else:
            both = other(seeded(kind.build))
            task(both.base_model.model)
        torch.testing.assert_close(outputs(both, x), expected, rtol=1e-4, atol=1e-5)
        both.merge_adapter()
        alone.merge_adapter()  # PEFT's OFT of a convolution computes something else once it is merged
        torch.testing.assert_close(outputs(both, x), outputs(alone, x), rtol=1e-4, atol=1e-5)
        both.unmerge_adapter()
        pretrained = seeded(kind.build)
        for key, layer in layers_of(both).items():
            assert torch.equal(layer.weight_parameter, pretrained.get_parameter(f"{key}.weight"))

    @pytest.mark.parametrize("order", ORDERS)
    def test_multi_head_attention_is_refused(self, order):
        kind = KINDS["multi-head attention"]
        model, config = seeded(kind.build), lora(target_modules=kind.targets)
        recast = RecastConfig(target_modules=kind.targets)
        first, second = (recast, config) if order == "around" else (config, recast)
        base = get_peft_model(model, first, adapter_name="one").eval().base_model.model
        before = outputs(base, kind.inputs())
        with pytest.raises(RecastTargetError, match="attns.0, a multi-head attention"):
            get_peft_model(base, second, adapter_name="two")
        assert torch.equal(outputs(base, kind.inputs()), before)

    @pytest.mark.parametrize("order", ORDERS)
    def test_compiled_as_one_graph(self, order):
        model = stacked("LORA", order)
        expected = outputs(model, vit_input().double())
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(outputs(compiled, vit_input().double()), expected, rtol=1e-10, atol=1e-12)

    def test_every_sample_its_own_task_under_a_lora(self, both):
        task, model = both
        x = vit_input(3)
        apart = []
        for name, row in zip(("second", "task"), x, strict=False):
            task.set_adapter(name)
            apart.append(outputs(model, row[None])[0])
        with task.disable_adapter():
            assert torch.equal(outputs(model, x), outputs(tiny_vit(), x))
        mixed = outputs(task, x, adapter_names=["second", "task", "__base__"])
        torch.testing.assert_close(mixed[:2], torch.stack(apart), rtol=1e-5, atol=1e-6)
        lora_alone = get_peft_model(tiny_vit(), lora(), adapter_name="other").eval()
        lora_alone.load_state_dict({k: v for k, v in _plain_keys(model).items() if "recast" not in k})
        torch.testing.assert_close(mixed[2], outputs(lora_alone, x[2:])[0], rtol=1e-5, atol=1e-6)

    def test_every_sample_its_own_lora_around_a_task(self, both):
        _, model = both
        x = vit_input(2)
        with_lora = outputs(model, x)[0]
        mixed = outputs(model, x, adapter_names=["other", "__base__"])
        torch.testing.assert_close(mixed[0], with_lora, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mixed[1], outputs(task_model(tiny_vit()), x)[1], rtol=1e-5, atol=1e-6)


def _plain_keys(model: nn.Module) -> dict[str, Tensor]:
    """A model's state with the names that it would have without RECAST's layers."""
    return {key.replace(".base_layer.base_layer.", ".base_layer."): value for key, value in model.state_dict().items()}


class TestReleasedBanks:
    def compressed(self, **fields: Any) -> PeftModel:
        config = RecastConfig(target_modules=TARGETS, num_templates=1, **fields)
        model = get_peft_model(tiny_vit(), config, adapter_name="task").eval()
        randomise(model, "task")
        return model

    def test_a_lora_around_needs_the_pretrained_weights(self):
        model = self.compressed()
        before = outputs(model, vit_input())
        with pytest.raises(RecastTargetError, match=r"released for a compressed bank.*\n?.*keep_base_weights=True"):
            get_peft_model(model.base_model.model, lora(), adapter_name="other")
        assert torch.equal(outputs(model, vit_input()), before)
        assert list(model.peft_config) == ["task"]

    @pytest.mark.parametrize("order", ORDERS)
    def test_merging_where_a_bank_stands_for_the_weight(self, order):
        if order == "around":
            model = get_peft_model(
                self.compressed(keep_base_weights=True).base_model.model, lora(), adapter_name="other"
            ).eval()
        else:
            model = get_peft_model(tiny_vit(), lora(), adapter_name="other").eval()
            converted = get_peft_model(
                model.base_model.model, RecastConfig(target_modules=TARGETS, num_templates=1), adapter_name="task"
            ).eval()
            randomise(converted, "task")
        live = outputs(model, vit_input())
        for _ in range(2):
            model.merge_adapter()
            torch.testing.assert_close(outputs(model, vit_input()), live)
            model.unmerge_adapter()
            assert torch.equal(outputs(model, vit_input()), live)
        assert all(layer.is_released == (order == "inside") for layer in layers_of(model).values())
