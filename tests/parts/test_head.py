"""A task's own classifier: its size, its labels, what is stored of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import move, outputs, randomise, small_vit, tiny_vit, vit_input
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from recast_peft import RecastConfig, RecastConfigError, TaskPool, get_recast_model
from recast_peft.parts.head import TaskHead, split_logits


def small_bert(num_labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=num_labels
    )
    return BertForSequenceClassification(config).eval()


def learn_something(model: nn.Module, adapter: str) -> None:
    """Numbers that differ from task to task, in place of training."""
    move(model, f".{adapter}", seed=sum(map(ord, adapter)), size=0.3)


@pytest.fixture
def two_tasks() -> PeftModel:
    model = get_recast_model(small_vit(), RecastConfig(num_classes=5), "flowers")
    model.add_adapter("cars", RecastConfig(id2label={0: "van", 1: "bus"}))
    learn_something(model, "flowers")
    learn_something(model, "cars")
    return model.eval()


class TestSwitching:
    def test_each_task_has_logits_of_its_own_number(self, two_tasks, images):
        assert two_tasks(images).shape == (6, 5)
        two_tasks.set_adapter("cars")
        assert two_tasks(images).shape == (6, 2)
        assert two_tasks.get_base_model().num_classes == 2

    def test_the_models_own_head_comes_back(self, two_tasks, images):
        expected = small_vit()(images)
        with two_tasks.disable_adapter():
            assert torch.equal(two_tasks(images), expected)
            assert two_tasks.get_base_model().num_classes == 7
        plain = two_tasks.unload()
        assert torch.equal(plain(images), expected)
        assert not any(isinstance(m, TaskHead) for m in plain.modules())
        assert plain.num_classes == 7

    def test_merge_and_unload_keeps_the_tasks_head(self, two_tasks, images):
        two_tasks.set_adapter("cars")
        live = two_tasks(images)
        plain = two_tasks.merge_and_unload()
        assert torch.allclose(plain(images), live, atol=1e-5)
        assert plain.num_classes == 2

    @pytest.mark.parametrize("own_classes", [0, 2, 1000])
    def test_timm_saves_a_merged_model_with_the_tasks_labels(self, own_classes, tmp_path):
        images = torch.randn(2, 3, 160, 160)
        backbone = timm.create_model("test_vit", num_classes=own_classes)
        backbone.pretrained_cfg["label_names"] = ["cat", "dog"]  # of its own classes
        model = get_recast_model(backbone, RecastConfig(id2label={0: "van", 1: "bus"}, init_weights=False), "cars").eval()
        model.add_adapter("nameless", RecastConfig(num_classes=2))
        assert backbone.pretrained_cfg["label_names"] == ["cat", "dog"]
        expected = model(images)
        nameless = copy.deepcopy(model).merge_and_unload(adapter_names=["nameless"])
        assert "label_names" not in nameless.pretrained_cfg
        assert model.get_base_model().pretrained_cfg["label_names"] == ["cat", "dog"]
        save_for_hf(model.merge_and_unload(), tmp_path, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(again(images), expected)
        assert again.pretrained_cfg["label_names"] == ["van", "bus"]

    def test_two_heads_cannot_be_in_force_at_once_and_nothing_changes(self, two_tasks, images):
        two_tasks.add_adapter("plain", RecastConfig())
        learn_something(two_tasks, "plain")
        before = two_tasks(images)
        trained = [name for name, p in two_tasks.named_parameters() if p.requires_grad]
        with pytest.raises(RecastConfigError, match="ModulesToSaveWrapper 'head', got flowers, cars.*add_weighted_adapter"):
            two_tasks.base_model.set_adapter(["plain", "flowers", "cars"])
        assert two_tasks.active_adapters == ["flowers"]
        assert torch.equal(two_tasks(images), before)
        assert [name for name, p in two_tasks.named_parameters() if p.requires_grad] == trained
        two_tasks.base_model.set_adapter(["plain", "flowers"])
        assert two_tasks(images).shape == (6, 5)
        assert not torch.allclose(two_tasks(images), before)

    def test_only_the_active_tasks_head_is_trained(self, two_tasks):
        two_tasks.set_adapter("cars")
        trained = [name for name, p in two_tasks.named_parameters() if p.requires_grad and "head" in name]
        assert trained
        assert all(".cars." in name for name in trained)

    def test_deleting_a_task_takes_its_head_along(self, two_tasks, images):
        two_tasks.delete_adapter("cars")
        assert not [name for name, _ in two_tasks.named_parameters() if "cars" in name]
        assert two_tasks(images).shape == (6, 5)

    def test_a_copied_model_names_its_own_classes(self, two_tasks):
        twin = copy.deepcopy(two_tasks)
        twin.set_adapter("cars")
        assert twin.get_base_model().num_classes == 2
        assert two_tasks.get_base_model().num_classes == 5

    def test_a_copy_of_a_compiled_model_names_its_own_classes(self):
        plain = small_vit(num_classes=3)
        model = get_recast_model(torch.compile(plain), RecastConfig(num_classes=4), "cars")
        twin = copy.deepcopy(model)
        assert plain.num_classes == 4  # the model inside the compiled one names them
        twin.delete_adapter("cars")
        assert twin.get_base_model()._orig_mod.num_classes == 3
        assert plain.num_classes == 4

    def test_a_backbone_without_classifier_gets_one(self, images):
        model = get_recast_model(small_vit(num_classes=0), RecastConfig(num_classes=4))
        assert model(images).shape == (6, 4)
        with model.disable_adapter():
            assert model(images).shape == (6, 16)

    def test_a_fresh_one_starts_near_zero(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=5)).eval()
        shares = model(images).softmax(-1)
        assert (
            0 < (shares - 1 / 5).abs().max() < 0.01
        )  # it drives the coefficients nowhere, and is not the same for all classes

    def test_of_another_size_stays_where_its_place_is_saved_whole_too(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=3, modules_to_save=["head"]))
        assert model(images).shape == (6, 3)

    def test_a_plain_module_that_was_saved_whole_is_taken_over(self, images):
        model = get_recast_model(small_vit(), RecastConfig(modules_to_save=["head"]), "whole")
        learn_something(model, "whole")
        before = model(images)
        model.add_adapter("cars", RecastConfig(num_classes=3))
        assert torch.equal(model(images), before)
        model.set_adapter("cars")
        assert model(images).shape == (6, 3)


class TestTransformersLabels:
    def test_the_config_names_the_active_tasks_classes(self):
        model = get_recast_model(small_bert(), RecastConfig(id2label={0: "no", 1: "yes"}), "binary")
        config = model.get_base_model().config
        assert (config.num_labels, config.id2label, config.label2id) == (2, {0: "no", 1: "yes"}, {"no": 0, "yes": 1})
        model.add_adapter("topics", RecastConfig(num_classes=4))
        model.set_adapter("topics")
        assert config.num_labels == 4
        assert config.id2label[3] == "LABEL_3"
        with model.disable_adapter():
            assert config.num_labels == 3
        assert config.num_labels == 4

    def test_the_loss_is_that_of_the_active_task(self):
        ids = torch.arange(12).reshape(2, 6)
        model = get_recast_model(small_bert(), RecastConfig(num_classes=5), "five")
        loss_of_classes = model(input_ids=ids, labels=torch.tensor([4, 0])).loss
        assert torch.isfinite(loss_of_classes)
        model.add_adapter("regression", RecastConfig(num_classes=1))
        model.set_adapter("regression")
        out = model(input_ids=ids, labels=torch.tensor([0.5, -0.5]))
        expected = (out.logits.squeeze() - torch.tensor([0.5, -0.5])).square().mean()
        assert torch.allclose(out.loss, expected)
        model.set_adapter("five")
        assert torch.allclose(model(input_ids=ids, labels=torch.tensor([4, 0])).loss, loss_of_classes)

    def test_the_trainer_reports_a_loss_and_loads_the_best_model(self, tmp_path: Path):
        model = get_recast_model(small_bert(), RecastConfig(num_classes=2), "binary")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 50, (16, 6), generator=generator)
        rows = [{"input_ids": row, "labels": int(row[0] > 25)} for row in ids]
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, num_train_epochs=3, learning_rate=0.05, eval_strategy="epoch",
            save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss", report_to=[],
            disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(losses) == 3
        assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)

    def test_image_pipelines_say_the_active_tasks_labels(self):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
        )
        model = get_recast_model(ViTForImageClassification(config).eval(), RecastConfig(id2label={0: "cat", 1: "dog"}), "pets")
        model.add_adapter("colours", RecastConfig(id2label={0: "red", 1: "green", 2: "blue"}))
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
        image = Image.new("RGB", (20, 20), (200, 10, 10))
        classify = [
            pipeline("image-classification", model=given, image_processor=processor, device="cpu")
            for given in (model, model.get_base_model())
        ]
        labels = {"pets": {"cat", "dog"}, "colours": {"red", "green", "blue"}}
        for task in ("pets", "colours", "pets"):
            model.set_adapter(task)
            assert all({answer["label"] for answer in run(image)} == labels[task] for run in classify)
        pool = TaskPool(model)
        pool.add("digits", RecastConfig(id2label={0: "zero", 1: "one"}))
        for task, of_task in ((None, {"LABEL_0", "LABEL_1"}), ("digits", {"zero", "one"})):
            pool.deactivate() if task is None else pool.activate(task)
            assert all({answer["label"] for answer in run(image)} == of_task for run in classify)

    def test_text_pipelines_say_the_active_tasks_labels(self):
        words = ["[PAD]", "[UNK]", "good", "bad"]
        plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]")
        model = get_recast_model(small_bert(), RecastConfig(id2label={0: "no", 1: "yes"}, task_type="SEQ_CLS"), "mood")
        model.add_adapter("topic", RecastConfig(id2label={0: "art", 1: "war", 2: "sea"}, task_type="SEQ_CLS"))
        for name in ("mood", "topic"):
            learn_something(model, name)
        classify = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer, device="cpu", top_k=None)
        for task, labels in (("mood", {"no", "yes"}), ("topic", {"art", "war", "sea"}), ("mood", {"no", "yes"})):
            model.set_adapter(task)
            answers = {answer["label"]: answer["score"] for answer in classify(["good"])[0]}
            assert set(answers) == labels
            scores = model(torch.tensor([[2]])).logits[0].softmax(-1)
            names = model.get_base_model().config.id2label
            assert answers == pytest.approx({names[i]: score.item() for i, score in enumerate(scores)}, rel=1e-4)


class TestFiles:
    def test_heads_of_different_sizes_come_back_to_the_last_bit(self, two_tasks, images, tmp_path):
        two_tasks.save_pretrained(tmp_path)
        fresh = PeftModel.from_pretrained(small_vit(), tmp_path / "flowers", "flowers")
        fresh.load_adapter(tmp_path / "cars", "cars")
        for name in ("flowers", "cars"):
            two_tasks.set_adapter(name)
            fresh.set_adapter(name)
            assert torch.equal(fresh(images), two_tasks(images))
        assert fresh.peft_config["cars"].id2label == {0: "van", 1: "bus"}

    def test_a_head_in_half_precision_takes_half_the_bytes(self, images, tmp_path):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=5, head_dtype="float16"))
        learn_something(model, "default")
        live = model(images)
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert stored["base_model.model.head.weight"].dtype == torch.float16
        assert stored["base_model.model.blocks.0.mlp.fc1.recast_coefficients"].dtype == torch.float32
        again = PeftModel.from_pretrained(small_vit(), tmp_path)
        head = again.get_base_model().head.modules_to_save["default"]
        assert head.weight.dtype == torch.float32
        assert torch.allclose(again(images), live, atol=1e-2)
        assert not torch.equal(again(images), live)

    def test_loading_without_the_heads_entry_is_refused_before_anything_is_touched(self, two_tasks, images, tmp_path):
        from safetensors.torch import save_file

        two_tasks.save_pretrained(tmp_path)
        file = tmp_path / "cars" / "adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "head" not in k}, file)
        plain = small_vit()
        expected = plain(images)
        with pytest.raises(ValueError, match=r"missing: base_model\.model\.head"):
            PeftModel.from_pretrained(plain, tmp_path / "cars", "cars")
        assert torch.equal(plain(images), expected)
        assert type(plain.head) is nn.Linear


class TestMixedBatches:
    def test_every_sample_gets_its_own_head(self, two_tasks, images):
        alone = {}
        for name in ("flowers", "cars"):
            two_tasks.set_adapter(name)
            alone[name] = two_tasks(images)
        with two_tasks.disable_adapter():
            alone["__base__"] = two_tasks(images)
        names = ["cars", "flowers", "__base__", "cars", "flowers", "__base__"]
        mixed = two_tasks(images, adapter_names=names)
        assert mixed.shape == (6, 7)
        for i, (name, row) in enumerate(zip(names, split_logits(mixed), strict=True)):
            assert row.shape == alone[name][i].shape
            assert torch.allclose(row, alone[name][i], atol=1e-5)


class TestAModelInHalfPrecision:
    """GradScaler refuses gradients of float16, and small steps are lost in bfloat16: a new head is trained in float32."""

    def test_in_bfloat16_a_small_step_of_the_head_is_not_lost(self) -> None:
        model = get_recast_model(tiny_vit().bfloat16(), RecastConfig(num_classes=3, head_init="copy"), "task").train()
        weight = model.get_base_model().head.modules_to_save["task"].weight
        before = weight.detach().clone()
        logits = model(vit_input().bfloat16())
        assert (logits.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
        logits.float().square().sum().backward()
        with torch.no_grad():
            weight.add_(before, alpha=1e-4)  # a bfloat16 has steps of 1/256 of its size
        assert not torch.equal(weight, before)
        assert weight.grad is not None

    @pytest.mark.parametrize("autocast", [False, True])
    def test_trains_its_head_with_a_scaler(self, autocast: bool) -> None:
        model = get_recast_model(tiny_vit().half(), RecastConfig(num_classes=3), "task").train()
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in own]
        optimizer, scaler = torch.optim.SGD(own, lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            logits = model(vit_input().half())
        assert logits.dtype == torch.float16
        scaler.scale(nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1]))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        head = model.get_base_model().head.modules_to_save["task"]
        assert all(not torch.equal(a, b) for a, b in zip(before, own, strict=True))
        assert head.weight.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_mixes_it_with_the_model_s_own_and_in_pools(self, dtype: torch.dtype, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit().to(dtype), RecastConfig(num_classes=3), "task").eval()
        randomise(model, "task")
        x = vit_input().to(dtype)
        alone = outputs(model, x)
        mixed = outputs(model, x, adapter_names=["task", "__base__"])
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed[:1, :3], alone[:1], rtol=1e-2, atol=1e-2)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_vit().to(dtype), tmp_path / "task", "task").eval()
        assert torch.equal(outputs(again, x), alone)
        pool = TaskPool(again)
        pool.load_folder(tmp_path)
        torch.testing.assert_close(outputs(again, x, task_ids=pool.ids(["task", "task"])), alone, rtol=1e-2, atol=1e-2)
        pool.activate("task")
        torch.testing.assert_close(outputs(again, x), alone, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("backbone", [tiny_vit, partial(timm.create_model, "test_vit", num_classes=0)])
    def test_a_model_that_tasks_are_merged_into_has_one_dtype(self, backbone: Callable[..., nn.Module], dtype: Any) -> None:
        """A linear layer in float32 takes no features in half precision."""
        model = get_recast_model(backbone().to(dtype), RecastConfig(num_classes=3, head_init="fresh"), "task").eval()
        randomise(model, "task")
        x = (vit_input() if backbone is tiny_vit else torch.rand(2, 3, 160, 160)).to(dtype)
        live = outputs(model, x)
        merged = model.merge_and_unload()
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
        torch.testing.assert_close(outputs(merged, x), live, rtol=2e-2, atol=2e-2)
