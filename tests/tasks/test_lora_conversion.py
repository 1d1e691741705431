"""A task as a LoRA of a given rank, and as a plain checkpoint that loads without this library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import converted, layers_of, move, outputs, randomise, small_vit, tiny_vit, vit_input
from peft import LoraConfig, PeftModel
from peft.tuners.lora.conversion import convert_to_lora as peft_convert_to_lora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from recast_peft import RecastConfig, RecastConfigError, convert_to_lora, get_recast_model, rescale_adapter_scale, save_as_lora


def small_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def task(**config) -> PeftModel:
    model = converted(**config)
    randomise(model)
    return model


class TestLora:
    @pytest.mark.parametrize("targets", [["qkv"], ["qkv", "proj", "fc1", "fc2"], None, "all-mlp", r".*\.qkv"])
    def test_at_full_rank_it_is_the_task(self, tmp_path, targets):
        model = task(target_modules=targets)
        expected = outputs(model, vit_input())
        report = save_as_lora(tmp_path, model, 8)
        assert torch.equal(outputs(model, vit_input()), expected)  # the conversion changes nothing
        assert report.worst_relative_error < 1e-5
        lora = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        torch.testing.assert_close(outputs(lora, vit_input()), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs(tiny_vit(), vit_input()), expected, rtol=1e-2)

    @pytest.mark.parametrize("place", ["qkv", "fc1"])
    def test_another_task_may_have_a_lora_part(self, tmp_path, place):
        model = task()
        expected = outputs(model, vit_input())
        beside = LoraConfig(r=2, target_modules=[place], init_lora_weights=False)
        model.add_adapter("other", RecastConfig(target_modules=["qkv"], lora_config=beside))
        assert save_as_lora(tmp_path, model, 8).worst_relative_error < 1e-5
        lora = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        torch.testing.assert_close(outputs(lora, vit_input()), expected, rtol=1e-4, atol=1e-5)

    def test_the_errors_are_those_of_the_best_approximation(self):
        model = task()
        _, state, report = convert_to_lora(model, 3)
        for row, (name, layer) in zip(report.layers, layers_of(model).items(), strict=True):
            singular = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())
            missing = singular[3:].square().sum().sqrt()
            assert row.module == name
            assert (row.rank, row.full_rank) == (3, 8)
            assert row.relative_error == pytest.approx(float(missing / singular.norm()), rel=1e-4)
            assert row.energy_kept == pytest.approx(1 - row.relative_error**2)
            assert row.weight_error == pytest.approx(float(missing / layer.compose(["default"]).detach().norm()), rel=1e-4)
            assert row.relative_error > 0.1
        assert report.lora_numbers == sum(v.numel() for v in state.values()) == 4 * 3 * (8 + 24)
        assert report.recast_numbers == 8

    def test_errors_fall_with_the_rank(self):
        model = task()
        errors = [convert_to_lora(model, rank)[2].mean_relative_error for rank in (1, 2, 4, 8)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-5 < errors[-2]

    def test_a_share_of_the_energy_chooses_the_ranks(self, tmp_path):
        model = task(target_modules=["qkv", "fc1"])
        with torch.no_grad():  # templates of which one direction carries most
            for layer in list(layers_of(model).values())[:4]:
                layer.pretrained_weight[0] *= 10
        report = save_as_lora(tmp_path, model, 0.9)
        assert all(row.energy_kept >= 0.9 - 1e-6 for row in report.layers)
        assert len({row.rank for row in report.layers}) > 1
        lora = PeftModel.from_pretrained(tiny_vit(), tmp_path)
        ranks = {n.removeprefix("base_model.model."): m.r["default"] for n, m in lora.named_modules() if hasattr(m, "lora_A")}
        assert ranks == {row.module: row.rank for row in report.layers}

    def test_excluded_layers_stay_without_a_lora(self, tmp_path):
        model = task(target_modules=["qkv"], exclude_modules=["blocks.3.attn.qkv"], layers_to_transform=[0, 1, 3])
        save_as_lora(tmp_path, model, 8)
        lora = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        with_lora = [n for n, m in lora.named_modules() if hasattr(m, "lora_A")]
        assert with_lora == [f"base_model.model.blocks.{i}.attn.qkv" for i in (0, 1)]
        torch.testing.assert_close(outputs(lora, vit_input()), outputs(model, vit_input()), rtol=1e-4, atol=1e-5)

    def test_what_fails_in_saving_leaves_the_former_lora(self, tmp_path, monkeypatch):
        save_as_lora(tmp_path, task(), 2)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

        def full(*_):
            raise OSError("no space left")

        monkeypatch.setattr(LoraConfig, "save_pretrained", full)
        with pytest.raises(OSError, match="no space left"):
            save_as_lora(tmp_path, task(), 3)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_modules_whose_names_end_alike_stay_without_a_lora(self, tmp_path):
        def net():
            torch.manual_seed(0)
            return nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "fc": nn.Linear(4, 4)})

        model = get_recast_model(net(), RecastConfig(target_modules=r"fc"))
        save_as_lora(tmp_path, model, 2)
        lora = PeftModel.from_pretrained(net(), tmp_path)
        assert [n for n, m in lora.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.fc"]

    def test_transposed_linear_layers(self, tmp_path):
        model = get_recast_model(small_gpt2(), RecastConfig(target_modules=["c_attn", "c_fc"])).eval()
        randomise(model)
        ids = torch.arange(8)[None]
        report = save_as_lora(tmp_path, model, 16)
        assert report.worst_relative_error < 1e-5
        lora = PeftModel.from_pretrained(small_gpt2(), tmp_path).eval()
        expected = outputs(model, ids).logits
        torch.testing.assert_close(outputs(lora, ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(small_gpt2()(ids).logits, expected, rtol=1e-2, atol=1e-2)

    def test_head_and_norms_come_along(self, tmp_path):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=7, train_norms=True), "task").eval()
        randomise(model, "task")
        model.add_adapter("other", RecastConfig(num_classes=3))
        move(model, ".modules_to_save.task.")
        x = torch.randn(2, 1, 16, 16)
        expected = outputs(model, x)
        with rescale_adapter_scale(model, 0.5):  # a strength belongs to the model and not to the task
            assert not torch.allclose(outputs(model, x), expected, atol=1e-4)
            save_as_lora(tmp_path, model, 16, "task")
        lora = PeftModel.from_pretrained(small_vit(), tmp_path).eval()
        torch.testing.assert_close(outputs(lora, x), expected, rtol=1e-4, atol=1e-5)

    def test_a_classifier_that_the_backbone_lacks_fits_one_with_as_many_classes(self, tmp_path):
        model = get_recast_model(small_vit(num_classes=0), RecastConfig(num_classes=5), "task").eval()
        randomise(model, "task")
        save_as_lora(tmp_path, model, 16, "task")
        x = torch.randn(2, 1, 16, 16)
        plain = small_vit(num_classes=0)
        plain.reset_classifier(5)
        lora = PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(outputs(lora, x), outputs(model, x), rtol=1e-4, atol=1e-5)

    def test_a_classifier_that_no_lora_holds_is_refused(self):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=7, head_type="prototypes"), "task")
        with pytest.raises(RecastConfigError, match="it has a PrototypeHead at head, and a LoRA brings modules like"):
            convert_to_lora(model, 4, "task")

    def test_a_partner_is_refused_without_a_promise_that_it_can_be_merged(self):
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], partners=["adaptformer"]), "task")
        with pytest.raises(
            RecastConfigError, match=r"the partners adaptformer\. Keep it as .*, if all that it has can be merged"
        ):
            convert_to_lora(model, 4, "task")

    def test_partners_of_another_task_do_not_stand_in_the_way(self, tmp_path):
        model = task()
        model.add_adapter("other", RecastConfig(target_modules=["qkv"], partners=["bias"]))
        save_as_lora(tmp_path, model, 8)
        lora = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        torch.testing.assert_close(outputs(lora, vit_input()), outputs(model, vit_input()), rtol=1e-4, atol=1e-5)

    def test_low_precision_differences_do_not_drown_in_the_weights(self):
        model = converted().to(torch.bfloat16)
        randomise(model, size=1e-4)
        layer = next(iter(layers_of(model).values()))
        offsets = layer.recast_coefficients["default"].detach()[0]
        templates = [other.pretrained_weight.float() for other in list(layers_of(model).values())[:2]]
        exact = offsets[0] * templates[0] + offsets[1] * templates[1]
        torch.testing.assert_close(layer.get_delta_weight("default").float(), exact, rtol=1e-2, atol=1e-7)

    def test_pefts_own_function_converts_it_too(self):
        model = task()
        assert model.supports_lora_conversion()
        _, theirs = peft_convert_to_lora(model, 4)
        _, mine, _ = convert_to_lora(model, 4)
        assert {k.removeprefix("base_model.model.") for k in theirs} == {k.removeprefix("base_model.model.") for k in mine}
        for key, value in theirs.items():
            assert torch.equal(value, mine[key])

    def test_the_report_says_that_the_rank_is_full(self, tmp_path):
        report = save_as_lora(tmp_path, task(), 2)
        text = str(report)
        assert "full rank in general" in text
        assert "2 of 8" in text
        assert (tmp_path / "conversion.txt").read_text() == f"{text}\n"
        assert json.loads(json.dumps(report.to_dict()))["recast_numbers"] == 8

    def test_a_task_that_learned_nothing_has_no_error(self):
        assert convert_to_lora(converted(), 2)[2].worst_relative_error == 0

    @pytest.mark.parametrize(
        ("config", "rank", "says"),
        [
            ({}, 0, "expected 1 to 8"),
            ({}, 9, "expected 1 to 8"),
            ({}, 1.5, r"\(0, 1\]"),
            ({}, True, "whole number"),
            ({"num_templates": 1}, 2, "exact banks"),
            ({"bias": "all"}, 2, "biases of its own"),
        ],
    )
    def test_what_cannot_be_converted_is_refused(self, config, rank, says):
        with pytest.raises(RecastConfigError, match=says):
            convert_to_lora(converted(**config), rank)

    def test_convolutions_and_unknown_tasks_are_refused(self):
        torch.manual_seed(0)
        model = get_recast_model(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), RecastConfig(target_modules=["0", "1"]))
        assert not model.supports_lora_conversion()
        with pytest.raises(RecastConfigError, match="merge_and_unload"):
            convert_to_lora(model, 2)
        with pytest.raises(RecastConfigError, match="no RECAST task 'other'"):
            convert_to_lora(model, 2, "other")


def test_merged_models_are_plain_checkpoints_that_load_without_this_library(tmp_path: Path) -> None:
    vit = get_recast_model(small_vit(), RecastConfig(num_classes=5)).eval()
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    torch.manual_seed(0)
    bert = get_recast_model(
        BertForSequenceClassification(config), RecastConfig(target_modules="all-linear", id2label={0: "no", 1: "yes"})
    ).eval()
    given = {"images": torch.randn(2, 1, 16, 16), "ids": torch.randint(0, 50, (2, 6))}
    for model in (vit, bert):
        randomise(model)
    live = {"vit": outputs(vit, given["images"]), "bert": outputs(bert, given["ids"]).logits}
    vit, bert = vit.merge_and_unload(), bert.merge_and_unload()
    torch.testing.assert_close(outputs(vit, given["images"]), live["vit"])
    torch.testing.assert_close(outputs(bert, given["ids"]).logits, live["bert"])
    assert not any("peft" in type(module).__module__ for model in (vit, bert) for module in model.modules())
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    bert.save_pretrained(tmp_path / "bert")
    plain = small_vit(num_classes=5).eval()
    plain.load_state_dict(load_file(tmp_path / "vit.safetensors"), strict=True)
    assert torch.equal(outputs(plain, given["images"]), outputs(vit, given["images"]))
    loaded, info = BertForSequenceClassification.from_pretrained(tmp_path / "bert", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(loaded.eval(), given["ids"]).logits, outputs(bert, given["ids"]).logits)
    assert loaded.config.id2label == {0: "no", 1: "yes"}
