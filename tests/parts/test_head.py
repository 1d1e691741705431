"""A task's own classifier: its size, its labels, what is stored of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import outputs, randomise, small_vit, tiny_vit, vit_input
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
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

from recast_peft import RecastConfig, RecastConfigError, RecastTargetError, TaskPool, get_recast_model
from recast_peft.parts.head import TaskHead, split_logits
from recast_peft.parts.head_building import PrototypeHead, find_head
from recast_peft.parts.prototypes import fit_prototypes
from recast_peft.parts.wrapper import joined


def small_bert(num_labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=num_labels
    )
    return BertForSequenceClassification(config).eval()


def learn_something(model: nn.Module, adapter: str) -> None:
    """Numbers that differ from task to task, in place of training."""
    generator = torch.Generator().manual_seed(sum(map(ord, adapter)))
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))


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


class TestFinding:
    def test_timm_and_transformers_conventions(self):
        assert find_head(small_vit()) == "head"
        assert find_head(timm.create_model("resnet10t")) == "fc"
        assert find_head(small_bert()) == "classifier"

    def test_a_name_that_does_not_exist(self):
        with pytest.raises(RecastTargetError, match="no such module; top level: .*head"):
            get_recast_model(small_vit(), RecastConfig(num_classes=3, head_module="foo"))

    def test_a_model_without_a_head_says_how_to_name_one(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with pytest.raises(RecastTargetError, match="head_module="):
            get_recast_model(model, RecastConfig(target_modules=["0"], num_classes=3))
        named = get_recast_model(model, RecastConfig(target_modules=["0"], num_classes=3, head_module="1"))
        assert named(torch.ones(2, 4)).shape == (2, 3)

    @pytest.mark.parametrize(
        ("head", "fields", "message"),
        [
            (nn.Identity(), {}, "does not say its num_features"),
            (nn.ReLU(), {}, "without a linear layer or convolution"),
            (nn.Sequential(nn.Linear(4, 4)), {"head_type": "prototypes"}, "need a single linear layer"),
        ],
    )
    def test_what_no_head_can_be_built_for(self, head, fields, message):
        model = nn.Sequential(nn.Linear(4, 4), head)
        with pytest.raises(RecastTargetError, match=message):
            get_recast_model(model, RecastConfig(target_modules=["0"], num_classes=3, head_module="1", **fields))
        assert type(model[0]) is nn.Linear

    def test_of_two_classifiers_one_has_to_be_named(self):
        class Distilled(nn.Sequential):
            def get_classifier(self) -> tuple[nn.Module, ...]:
                return self[1], self[2]

        model = Distilled(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2))
        with pytest.raises(RecastTargetError, match="the model has 2 classifiers"):
            get_recast_model(model, RecastConfig(target_modules=["0"], num_classes=3))

    def test_copying_needs_the_same_classes(self, images):
        with pytest.raises(RecastTargetError, match=r"head head: 7\n +num_classes: 3"):
            get_recast_model(small_vit(), RecastConfig(num_classes=3, head_init="copy"))
        model = get_recast_model(small_vit(), RecastConfig(num_classes=7, head_init="copy"))
        assert torch.equal(model(images), small_vit()(images))

    @pytest.mark.parametrize(
        "fields",
        [
            {"num_classes": 0}, {"num_classes": True}, {"num_classes": "3"}, {"id2label": {0: "a", 2: "b"}},
            {"id2label": ["a"]}, {"num_classes": 3, "id2label": {0: "a"}}, {"head_init": "zero"},
            {"head_type": "tree"}, {"head_dtype": "int8"}, {"head_module": 3}, {"train_norms": "yes"},
        ],
    )  # fmt: skip
    def test_bad_fields_are_named(self, fields):
        with pytest.raises(RecastConfigError) as error:
            RecastConfig(**fields)
        assert any(name in str(error.value) for name in fields)


class TestPrototypes:
    def test_they_are_the_class_means_and_the_nearest_one_wins(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes"))
        labels = torch.tensor([0, 1, 0, 1, 0, 1])
        features = small_vit(num_classes=0)
        features.load_state_dict(small_vit().state_dict(), strict=False)
        means = torch.stack([features(images)[labels == k].mean(0) for k in (0, 1)])
        fitted = fit_prototypes(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])
        assert torch.allclose(fitted, means, atol=1e-5)
        distances = (features(images)[:, None] - means).square().sum(-1)
        assert torch.allclose(model(images), -distances, atol=1e-4)

    def test_a_class_without_an_example_is_named(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=3, head_type="prototypes"))
        with pytest.raises(RecastTargetError, match=r"class \[2\]"):
            fit_prototypes(model, [(images[:2], torch.tensor([0, 1]))])

    def test_labels_that_are_no_classes_and_a_task_that_is_not_in_force(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=3, head_type="prototypes"), "first")
        for labels in ([3, 0], [-1, 0]):
            with pytest.raises(RecastTargetError, match="numbers of the task's classes"):
                fit_prototypes(model, [(images[:2], torch.tensor(labels))])
        model.add_adapter("second", RecastConfig(num_classes=3))
        model.set_adapter("second")
        with pytest.raises(RecastTargetError, match="set_adapter"):
            fit_prototypes(model, [(images[:3], torch.arange(3))], "first")

    def test_a_task_without_prototypes_is_refused(self, images):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=3))
        with pytest.raises(RecastTargetError, match="head_type='prototypes'"):
            fit_prototypes(model, [(images, torch.zeros(6, dtype=torch.long))])

    def test_they_are_stored_and_never_trained(self, images, tmp_path):
        model = get_recast_model(small_vit(), RecastConfig(num_classes=2, head_type="prototypes"))
        fit_prototypes(model, [(images, torch.tensor([0, 1] * 3))])
        assert not any("prototypes" in n for n, p in model.named_parameters() if p.requires_grad)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(small_vit(), tmp_path)
        assert isinstance(again.get_base_model().head.modules_to_save["default"], PrototypeHead)
        assert torch.equal(again(images), model(images))


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

    def test_joining_and_splitting_by_hand(self):
        together = joined([([1], torch.tensor([[1.0, 2.0]])), ([0, 2], torch.tensor([[3.0], [4.0]]))], 3)
        inf = float("inf")
        assert torch.equal(together, torch.tensor([[3.0, -inf], [1.0, 2.0], [4.0, -inf]]))
        assert [row.tolist() for row in split_logits(together)] == [[3.0], [1.0, 2.0], [4.0]]


class TestNorms:
    def test_running_statistics_stay_the_pretrained_models(self):
        model = get_recast_model(timm.create_model("resnet10t", num_classes=3), RecastConfig(num_classes=2))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.train()
        model(torch.randn(4, 3, 32, 32))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_a_task_can_own_its_norms(self, tmp_path):
        def backbone() -> nn.Module:
            torch.manual_seed(0)
            return timm.create_model("resnet10t", num_classes=3)

        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model = get_recast_model(backbone(), RecastConfig(num_classes=2, train_norms=True))
        base = backbone().eval()(x)
        model.train()
        model(x * 3).sum().backward()
        owned = [n for n, p in model.named_parameters() if p.requires_grad and "bn1" in n]
        assert owned
        model.eval()
        live = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert any(key.endswith("running_mean") for key in stored)
        again = PeftModel.from_pretrained(backbone(), tmp_path).eval()
        assert torch.equal(again(x), live)


class TestTheKindOfLoss:
    """What transformers calls ``problem_type`` decides the loss; it belongs to the task whose head is called."""

    IDS = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(5))
    TARGETS = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))

    def bert(self, **fields: Any) -> BertForSequenceClassification:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForSequenceClassification(BertConfig(vocab_size=40, **sizes, **{"num_labels": 3, **fields})).eval()

    def loss_of(self, model: nn.Module) -> str:
        out = model(input_ids=self.IDS, labels=self.TARGETS)
        losses = {"regression": mse_loss, "multi_label_classification": binary_cross_entropy_with_logits}
        (kind,) = (kind for kind, loss in losses.items() if torch.allclose(out.loss, loss(out.logits, self.TARGETS)))
        return kind

    @pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
    def test_is_the_models_own_for_as_many_outputs(self, kind: str) -> None:
        model = get_recast_model(self.bert(problem_type=kind), RecastConfig(num_classes=3)).eval()
        assert (model.config.problem_type, self.loss_of(model)) == (kind, kind)
        model.add_adapter("two", RecastConfig(num_classes=2))
        model.set_adapter("two")
        assert model.config.problem_type is None  # other outputs mean another problem
        with model.disable_adapter():
            assert model.config.problem_type == kind

    def test_is_the_tasks_if_it_is_given(self) -> None:
        config = RecastConfig(num_classes=3, problem_type="regression")
        model = get_recast_model(self.bert(problem_type="multi_label_classification"), config).eval()
        assert self.loss_of(model) == "regression"
        with model.disable_adapter():
            assert self.loss_of(model) == "multi_label_classification"
        assert self.loss_of(model) == "regression"

    def test_set_on_the_model_stays_with_the_active_task(self, tmp_path: Path) -> None:
        model = get_recast_model(self.bert(), RecastConfig(num_classes=3), "one").eval()
        model.config.problem_type = "regression"
        model.add_adapter("two", RecastConfig(num_classes=3))
        assert self.loss_of(model) == "regression"
        with model.disable_adapter():
            assert model.config.problem_type is None
        model.set_adapter("two")
        assert self.loss_of(model) == "multi_label_classification"  # transformers' guess, which is now that of task two
        model.set_adapter("one")
        assert self.loss_of(model) == "regression"
        model.save_pretrained(tmp_path)
        assert model.peft_config["one"].problem_type == "regression"
        for name, kind in (("one", "regression"), ("two", "multi_label_classification")):
            assert RecastConfig.from_pretrained(tmp_path / name).problem_type == kind
            loaded = PeftModel.from_pretrained(self.bert(), tmp_path / name, name).eval()
            assert (loaded.config.problem_type, self.loss_of(loaded)) == (kind, kind)
        model.set_adapter("two")
        model.delete_adapter("one")
        assert model.config.problem_type == "multi_label_classification"
        assert model.unload().config.problem_type is None

    def test_goes_with_a_merged_model(self) -> None:
        model = get_recast_model(self.bert(), RecastConfig(num_classes=3, problem_type="regression"))
        assert self.loss_of(model.merge_and_unload().eval()) == "regression"

    def test_is_kept_by_a_pool_and_its_file(self, tmp_path: Path) -> None:
        model = get_recast_model(self.bert(), RecastConfig(num_classes=3, problem_type="regression"), "one").eval()
        pool = TaskPool(model)
        pool.add("stored", "one")
        pool.add("other", RecastConfig(num_classes=3))
        pool.save(tmp_path / "pool.safetensors")
        again = TaskPool(get_recast_model(self.bert(), RecastConfig(num_classes=3), "one").eval())
        again.load(tmp_path / "pool.safetensors")
        for each in (pool, again):
            for name, kind in (("stored", "regression"), ("other", "multi_label_classification"), ("stored", "regression")):
                each.activate(name)
                assert self.loss_of(each.model) == kind

    def test_of_a_timm_model_is_kept_with_the_task(self, tmp_path: Path) -> None:
        model = get_recast_model(small_vit(), RecastConfig(num_classes=3, problem_type="regression"))
        model.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(tmp_path).problem_type == "regression"

    def test_without_a_head_of_the_task_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="expected num_classes too"):
            RecastConfig(problem_type="regression")
        with pytest.raises(RecastConfigError, match="problem_type='ranking'"):
            RecastConfig(num_classes=3, problem_type="ranking")


class TestAModelInHalfPrecision:
    """GradScaler refuses gradients of float16, so a new head is trained in float32."""

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

    def test_mixes_it_with_the_model_s_own_and_in_pools(self, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit().half(), RecastConfig(num_classes=3), "task").eval()
        randomise(model, "task")
        x = vit_input().half()
        alone = outputs(model, x)
        mixed = outputs(model, x, adapter_names=["task", "__base__"])
        assert mixed.dtype == torch.float16
        torch.testing.assert_close(mixed[:1, :3], alone[:1], rtol=1e-2, atol=1e-2)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_vit().half(), tmp_path / "task", "task").eval()
        assert torch.equal(outputs(again, x), alone)
        pool = TaskPool(again)
        pool.load_folder(tmp_path)
        torch.testing.assert_close(outputs(again, x, task_ids=pool.ids(["task", "task"])), alone, rtol=1e-2, atol=1e-2)
        pool.activate("task")
        torch.testing.assert_close(outputs(again, x), alone, rtol=1e-2, atol=1e-2)
