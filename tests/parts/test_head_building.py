"""Finding a classifier, building one of a task's own size, and what a model says of its classes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from models import small_transformer, small_vit
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.optim.swa_utils import AveragedModel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwiftFormerConfig,
    SwiftFormerForImageClassification,
)

from recast_peft import RecastConfig, RecastConfigError, RecastTargetError, TaskPool, get_recast_model
from recast_peft.parts.head_building import classes_of, find_head, prepare_head


def small_swiftformer() -> nn.Module:
    config = SwiftFormerConfig(image_size=64, depths=[1, 1, 2, 1], embed_dims=[8, 16, 16, 24], num_labels=3)
    return SwiftFormerForImageClassification(config)


BERT_SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}


class TestFinding:
    def test_timm_and_transformers_conventions(self):
        assert find_head(small_vit()) == "head"
        assert find_head(timm.create_model("resnet10t")) == "fc"
        assert find_head(small_transformer("bert")) == "classifier"
        layers = {"body": nn.Linear(4, 4), "class_head": nn.Linear(4, 2), "box_head": nn.Identity()}
        assert find_head(nn.ModuleDict(layers)) == "class_head"  # the one linear layer that is called a head

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

    @pytest.mark.parametrize(
        ("build", "heads"),
        [
            (small_swiftformer, ["head", "dist_head"]),
            (lambda: timm.create_model("levit_128s", num_classes=3), ["head", "head_dist"]),
            (lambda: timm.create_model("repvit_m0_9", num_classes=3), ["head.head.l", "head.head_dist.l"]),
            (lambda: timm.create_model("crossvit_9_240", num_classes=3), ["head.0", "head.1"]),
        ],
        ids=["swiftformer", "levit", "repvit", "crossvit"],
    )
    def test_a_model_that_averages_several_says_how_a_task_can_own_them_all(self, build, heads, tmp_path) -> None:
        for num_classes in (3, 5):  # as many as the model's own, too: the average would hold a head that no task trains
            with pytest.raises(RecastTargetError, match=re.escape(f"give modules_to_save={heads}")):
                get_recast_model(build(), RecastConfig(num_classes=num_classes))
        torch.manual_seed(0)
        plain = build().eval()
        model = get_recast_model(copy.deepcopy(plain), RecastConfig(modules_to_save=heads))
        size = getattr(plain, "img_size", (224, 224))
        x = torch.randn(2, 3, *size)

        def logits(model: nn.Module) -> Tensor:
            found = model(x)
            return getattr(found, "logits", found)

        logits(model)[:, 0].sum().backward()
        own = {name: p for name, p in model.named_parameters() if ".modules_to_save." in name and p.ndim == 2}
        assert len(own) == 2
        assert all(p.grad is not None and p.grad[0].abs().sum() > 0 for p in own.values())
        with torch.no_grad():
            for parameter in own.values():
                parameter.add_(1)
        model.save_pretrained(tmp_path)
        fresh = PeftModel.from_pretrained(plain, tmp_path).eval()
        assert torch.equal(logits(fresh), logits(model.eval()))

    def test_layers_of_one_size_in_a_head_are_no_classifiers_of_their_own(self) -> None:
        config = RobertaConfig(**{**BERT_SIZES, "num_labels": 8})  # as many labels as the head is wide
        model = get_recast_model(RobertaForSequenceClassification(config), RecastConfig(num_classes=3))
        assert model(input_ids=torch.arange(5)[None]).logits.shape == (1, 3)

    def test_words_of_a_model_that_adds_a_bias_to_them_are_no_classes(self) -> None:
        small = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 8)
        few = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
        model = BartForConditionalGeneration(BartConfig(vocab_size=20, **small, **few))
        with pytest.raises(RecastTargetError, match="adds final_logits_bias to lm_head, which has 20 outputs"):
            get_recast_model(model, RecastConfig(num_classes=3))

    def test_copying_needs_the_same_classes(self, images):
        with pytest.raises(RecastTargetError, match=r"head head: 7\n +num_classes: 3"):
            get_recast_model(small_vit(), RecastConfig(num_classes=3, head_init="copy"))
        model = get_recast_model(small_vit(), RecastConfig(num_classes=7, head_init="copy"))
        assert torch.equal(model(images), small_vit()(images))


class TestFreshHeads:
    @pytest.mark.parametrize("layer", [nn.Linear(4, 7), nn.Conv2d(4, 7, 1)], ids=["linear", "convolution"])
    def test_follow_from_the_seed_and_hardly_move_the_features(self, layer: nn.Module) -> None:
        def weights(seed: int) -> Tensor:
            torch.manual_seed(seed + 1)  # says nothing
            head = prepare_head(nn.Sequential(layer), RecastConfig(num_classes=500, head_module="0", seed=seed // 2)).module
            assert not head.bias.any()
            return head.weight.detach()

        assert torch.equal(weights(0), weights(1))
        assert not torch.equal(weights(0), weights(2))
        assert weights(0).std() == pytest.approx(0.001, rel=0.1)

    @pytest.mark.parametrize("bias", [True, False])
    def test_are_the_models_own_but_for_the_classes(self, bias: bool) -> None:
        steps = {"stride": 2, "padding": 3, "dilation": 2, "padding_mode": "circular"}
        convolution, linear = nn.Conv2d(4, 7, 3, bias=bias, **steps), nn.Linear(4, 7, bias=bias)
        for layer, x, shape in ((convolution, torch.ones(2, 4, 8, 8), (2, 3, 5, 5)), (linear, torch.ones(2, 4), (2, 3))):
            head = prepare_head(nn.Sequential(layer), RecastConfig(num_classes=3, head_module="0")).module
            assert head(x).shape == shape
            assert (head.bias is not None) == bias
            assert getattr(head, "padding_mode", None) == getattr(layer, "padding_mode", None)

    def test_have_as_many_classes_as_their_last_layer_gives(self) -> None:
        assert classes_of(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))) == 3
        assert classes_of(nn.ReLU()) is None


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

    def test_names_of_classes_set_on_the_model_stay_with_the_active_task_too(self, tmp_path: Path) -> None:
        model = get_recast_model(self.bert(), RecastConfig(num_classes=2), "one").eval()
        model.config.id2label = {0: "no", 1: "yes"}
        model.config.label2id = {"no": 0, "yes": 1}
        model.add_adapter("two", RecastConfig(num_classes=2))
        model.set_adapter("two")
        assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
        model.set_adapter("one")
        assert model.config.id2label == {0: "no", 1: "yes"}
        with model.disable_adapter():
            model.config.id2label = {0: "a", 1: "b", 2: "c"}
        model.save_pretrained(tmp_path)
        for name, names in (("one", {0: "no", 1: "yes"}), ("two", {0: "LABEL_0", 1: "LABEL_1"})):
            loaded = PeftModel.from_pretrained(self.bert(), tmp_path / name, name)
            assert loaded.config.id2label == names
        assert model.unload().config.id2label == {0: "a", 1: "b", 2: "c"}

    @pytest.mark.parametrize("names", [{0: "no", 2: "yes"}, {0: 1, 1: 2}, {"0": "no", "1": "yes"}])
    def test_names_that_no_task_may_have_are_not_taken(self, names: Any, tmp_path: Path) -> None:
        model = get_recast_model(self.bert(), RecastConfig(num_classes=2, id2label={0: "a", 1: "b"}))
        model.config.id2label = names
        model.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(tmp_path).id2label == {0: "a", 1: "b"}

    @pytest.mark.parametrize("by_number", [False, True])
    def test_of_other_tasks_than_the_active_one_is_refused_in_a_batch(self, by_number: bool) -> None:
        model = get_recast_model(self.bert(), RecastConfig(num_classes=3, problem_type="multi_label_classification"), "one")
        for name, classes in (("two", 3), ("few", 2)):
            model.add_adapter(name, RecastConfig(num_classes=classes, problem_type="regression"))
        model.eval()
        if by_number:
            pool = TaskPool(model, slot="pool")
            for name in ("one", "two", "few"):
                pool.add(f"{name}_", name)
            pool.activate("one_")
        key, suffix = ("task_ids", "_") if by_number else ("adapter_names", "")
        alike = {"input_ids": self.IDS, "labels": self.TARGETS, key: [f"one{suffix}"] * 4}
        wanted = binary_cross_entropy_with_logits(model(**alike).logits, self.TARGETS)
        torch.testing.assert_close(model(**alike).loss, wanted)
        for names in (["two"] * 4, ["one", "two", "one", "one"], ["few"] * 4):
            tasks = [name + suffix for name in names]
            with pytest.raises(RecastConfigError, match="labels were given to a batch of several tasks"):
                model(input_ids=self.IDS, labels=self.TARGETS, **{key: tasks})
            assert model(input_ids=self.IDS, **{key: tasks}).logits.shape[0] == 4

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


class Around(nn.Module):
    """A user's module around a model, which says nothing of classes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class TestAModelInsideAnother:
    @pytest.mark.parametrize(("wrap", "head"), [(nn.DataParallel, "{}"), (Around, "inner.{}"), (AveragedModel, "{}")])
    def test_the_model_that_has_the_head_counts_the_classes_of_its_loss(self, wrap, head):
        model = wrap(BertForSequenceClassification(BertConfig(**BERT_SIZES, num_labels=3)).eval())
        config = RecastConfig(num_classes=5, head_module=head.format("classifier"))
        task = get_recast_model(model, config).eval()
        ids, labels = torch.arange(8).reshape(4, 2), torch.tensor([4, 0, 3, 1])
        output = task(input_ids=ids, labels=labels)
        torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels))
        with task.disable_adapter():
            output = task(input_ids=ids, labels=labels % 3)
            torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels % 3))
        output = task.merge_and_unload()(input_ids=ids, labels=labels)
        torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels))

    @pytest.mark.parametrize(("wrap", "head"), [(nn.DataParallel, "head"), (Around, "inner.head"), (AveragedModel, "head")])
    def test_a_backbone_without_a_classifier_says_its_features(self, wrap, head):
        task = get_recast_model(wrap(small_vit(num_classes=0)), RecastConfig(num_classes=5, head_module=head))
        assert task(torch.randn(1, 1, 16, 16)).shape == (1, 5)


class TestOutputsThatAreNoClasses:
    """The model's class says how many outputs there are: as many classes would be a shape error, or wrong scores in silence."""

    @pytest.mark.parametrize(
        ("kind", "name", "outputs", "message"),
        [
            ("MultipleChoice", "classifier", 1, "every choice is scored by itself"),
            ("QuestionAnswering", "qa_outputs", 2, "where an answer begins and ends"),
            ("NextSentencePrediction", "cls.seq_relationship", 2, "whether a sentence follows"),
        ],
    )
    def test_are_not_resized(self, kind: str, name: str, outputs: int, message: str) -> None:
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 30}
        model = getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**sizes)).eval()
        with pytest.raises(RecastTargetError, match=rf"num_classes=4: .*{message}(?s:.)*modules_to_save=\['{name}'\]"):
            get_recast_model(model, RecastConfig(num_classes=4, target_modules=["query"]))
        model = get_recast_model(model, RecastConfig(num_classes=outputs, target_modules=["query"])).eval()
        given = torch.zeros(2, 3, 5, dtype=torch.long) if outputs == 1 else torch.zeros(2, 5, dtype=torch.long)
        scores = next(iter(model(input_ids=given).values()))
        assert scores.shape == {"MultipleChoice": (2, 3), "QuestionAnswering": (2, 5), "NextSentencePrediction": (2, 2)}[kind]
