"""Several tasks of one model that have LoRA parts."""

from __future__ import annotations

import pytest
import torch
from lora_parts import close, expected, fill, lora, two_parts
from models import KINDS, layers_of, outputs, seeded, tiny_vit, vit_input
from peft import PeftModel
from torch import Tensor

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, TaskPool, convert_to_lora, get_recast_model
from recast_peft.parts.lora_strength import part_layers


@pytest.fixture
def three() -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with a task of two parts, one of coefficients alone, and one of two parts elsewhere; and what each computes."""
    model = two_parts(target_modules=["qkv", "fc1"])
    model.add_adapter("alone", RecastConfig(target_modules=["qkv"]))
    model.add_adapter("other", RecastConfig(target_modules=["fc2"], lora_config=lora(target_modules=["fc1", "proj"])))
    fill(model, "alone", 5)
    fill(model, "other", 6)
    results = {}
    for name in ("task", "alone", "other"):
        model.set_adapter(name)
        results[name] = outputs(model, vit_input())
        close(results[name], expected(model, vit_input(), name))
    return model, results


@pytest.mark.filterwarnings("ignore")
class TestSeveralTasks:
    def test_every_sample_its_own_task(self, three):
        model, results = three
        x = torch.cat([vit_input()[:1]] * 4)
        mixed = outputs(model, x, adapter_names=["task", "other", "__base__", "alone"])
        wanted = [results["task"], results["other"], outputs(tiny_vit(), vit_input()), results["alone"]]
        close(mixed, torch.stack([result[0] for result in wanted]))

    def test_saved_together_and_loaded_in_another_order(self, three, tmp_path):
        model, results = three
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "alone", adapter_name="alone").eval()
        for name in ("other", "task"):
            loaded.load_adapter(tmp_path / name, name)
        for name, result in results.items():
            loaded.set_adapter(name)
            assert torch.equal(outputs(loaded, vit_input()), result)

    @pytest.mark.parametrize("name", ["task", "alone", "other"])
    def test_merging_a_task_that_is_not_active_into_a_plain_model(self, three, name):
        model, results = three
        model.set_adapter("alone")
        close(outputs(model.merge_and_unload(adapter_names=[name]), vit_input()), results[name])

    def test_two_tasks_at_once(self, three):
        model, _ = three
        model.base_model.set_adapter(["task", "other"])
        live = outputs(model, vit_input())
        model.merge_adapter(["task"])
        model.merge_adapter(["other"])
        close(outputs(model, vit_input()), live)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, vit_input()), live)

    def test_changing_the_task_while_one_is_merged(self, three):
        model, results = three
        for name in ("task", "other", "alone", "task"):
            model.set_adapter(name)
            model.merge_adapter()
            close(outputs(model, vit_input()), results[name])

    def test_a_task_acts_again_after_tasks_were_switched_off_beside_a_merged_one(self, three):
        model, results = three
        model.set_adapter("task")
        model.merge_adapter(["alone"])
        close(outputs(model, vit_input()), results["alone"])
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        close(outputs(model, vit_input()), results["task"])
        mixed = outputs(model, vit_input(), adapter_names=["task", "other"])
        close(mixed, torch.stack([results["task"][0], results["other"][1]]))

    def test_both_parts_come_out_when_tasks_are_switched_off(self, three):
        model, results = three
        model.set_adapter("task")
        model.merge_adapter()
        with model.disable_adapter():
            assert not any(module.merged for module in (*part_layers(model), *layers_of(model).values()))
        close(outputs(model, vit_input()), results["task"])

    def test_deleting_a_task_takes_both_parts(self, three):
        model, results = three
        model.delete_adapter("task")
        assert not [key for key in model.state_dict() if "task" in key]
        assert all("task" not in layer.active_adapters for layer in part_layers(model))
        for name in ("alone", "other"):
            model.set_adapter(name)
            assert torch.equal(outputs(model, vit_input()), results[name])
        model.add_adapter("task", RecastConfig(target_modules=["qkv"], lora_config=lora()))
        model.set_adapter("task")
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))

    def test_a_pool_beside_tasks_of_two_parts(self, three):
        model, results = three
        model.add_adapter("unlike", RecastConfig(target_modules=["qkv", "proj"]))
        pool = TaskPool(model, like="unlike")
        pool.add("row")
        with torch.no_grad():
            pool.table[0].normal_(std=0.2)
        with pytest.raises(RecastBankError, match="pool: no LoRA part"):
            pool.add("second", "task")
        pool.activate("row")
        row = outputs(model, vit_input())
        reference = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv", "proj"]), "row").eval()
        for key, values in pool.coefficients("row").items():
            layers_of(reference)[key].recast_coefficients["row"].data = values[None]
        close(row, outputs(reference, vit_input()))
        close(outputs(model, vit_input(), task_ids=torch.tensor([0, -1]))[0], row[0])
        model.set_adapter("task")
        assert torch.equal(outputs(model, vit_input()), results["task"])

    def test_what_a_combination_or_a_lora_cannot_hold_is_refused(self, three, tmp_path):
        model, _ = three
        with pytest.raises(RecastConfigError, match="a LoRA part"):
            model.add_weighted_adapter(["task"], [-1.0], "forget", "magnitude_prune", density=0.5)
        with pytest.raises(RecastConfigError, match="a LoRA part"):
            convert_to_lora(model, 4, "task")
        assert not model.base_model.supports_lora_conversion("task")
        model.save_pretrained(tmp_path)
        with pytest.raises(RecastBankError, match="other target modules"):
            TaskPool(model, like="alone").add("task", tmp_path / "task")


def test_coefficients_of_a_task_that_comes_later_stand_beside_a_part_that_reads_the_weight():
    config = RecastConfig(target_modules=["fc2"], lora_config=lora(target_modules=["fc1"], use_dora=True))
    model = get_recast_model(tiny_vit(), config, "task").eval()
    fill(model, "task")
    before = outputs(model, vit_input())
    model.add_adapter("other", RecastConfig(target_modules=["fc1"]))
    fill(model, "other", 5)
    assert torch.equal(outputs(model, vit_input()), before)
    model.set_adapter("other")
    alone = get_recast_model(tiny_vit(), RecastConfig(target_modules=["fc1"]), "other").eval()
    fill(alone, "other", 5)
    close(outputs(model, vit_input()), outputs(alone, vit_input()))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_weight_that_is_read_has_the_part_that_was_there_before_its_layer(use_dora: bool) -> None:
    kind = KINDS["bilinear weight reader"]
    x, place = kind.inputs(), r".*1\.proj"
    config = RecastConfig(target_modules=r".*0\.proj", lora_config=lora(target_modules=place, use_dora=use_dora))
    model = get_recast_model(seeded(kind.build), config, "below").eval()
    fill(model, "below")
    before = outputs(model, x)
    model.add_adapter("around", RecastConfig(target_modules=place))
    assert torch.equal(outputs(model, x), before)
    model.base_model.set_adapter(["below", "around"])
    assert torch.equal(outputs(model, x), before)
    fill(model, "around", 5)
    both = outputs(model, x)
    assert not torch.equal(both, before)
    model.merge_adapter()
    close(outputs(model, x), both)
