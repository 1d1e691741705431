"""Practice tasks are made of unlabelled data alone, and what training on them moves is in the bank."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from models import outputs, small_transformer, tiny_vit, vit_input
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from recast_peft import (
    BiasConfig,
    KnownPictures,
    MissingWords,
    PracticeTask,
    RecastConfig,
    RecastConfigError,
    RecastTargetError,
    get_recast_model,
    growth_report,
    practice_bank,
)
from recast_peft.growth import practice
from recast_peft.growth.practice import mean_features

MASK, PAD = 1, 0


def texts(count: int = 200, length: int = 12, words: int = 30) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 2 + words, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[::3, 8:], mask[::3, 8:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=40, max_position_embeddings=20, **sizes), add_pooling_layer=False).eval()


class Halves:
    """A family of one's own: is the first half of the tokens larger than the second, along a direction that is drawn?"""

    def make(self, data: Any, generator: torch.Generator) -> PracticeTask:
        direction = torch.randn(data.shape[2], generator=generator)
        score = data @ direction  # (examples, tokens)
        return PracticeTask("halves", data, (score[:, :2].mean(1) > score[:, 2:].mean(1)).long())


class TestMissingWords:
    def test_the_word_is_gone_and_the_others_are_not(self) -> None:
        data = texts()
        family = MissingWords(MASK, (PAD,), words=4, examples=10, least=5)
        task = family.make(data, torch.Generator().manual_seed(1))
        assert set(task.labels.tolist()) == {0, 1, 2, 3}
        rows = {tuple(row.tolist()): row for row in data["input_ids"]}
        gone: dict[int, set[int]] = {label: set() for label in range(4)}
        made = (task.inputs["input_ids"], task.inputs["attention_mask"], task.labels.tolist())
        for hidden, mask, label in zip(*made, strict=True):
            assert (hidden == MASK).any()
            (own,) = (row for row in rows.values() if bool(((hidden == row) | (hidden == MASK)).all()))
            gone[label] |= set(own[hidden == MASK].tolist())
            assert torch.equal(mask, (own != PAD).long())
        assert all(len(words) == 1 for words in gone.values())  # one word for each class
        words = set().union(*gone.values())
        assert len(words) == 4
        assert not words & {MASK, PAD}
        assert not torch.isin(task.inputs["input_ids"], torch.tensor(sorted(words))).any()

    def test_another_call_is_another_task_and_the_data_stay(self) -> None:
        data, generator = texts(), torch.Generator().manual_seed(1)
        before = data["input_ids"].clone()
        family = MissingWords(MASK, (PAD,), words=4, least=5)
        first, second = family.make(data, generator), family.make(data, generator)
        assert not torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
        assert torch.equal(data["input_ids"], before)

    def test_too_few_words(self) -> None:
        with pytest.raises(RecastConfigError, match=r"only \d+ words stand in that many of 200 texts"):
            MissingWords(MASK, words=50).make(texts(), torch.Generator())
        with pytest.raises(RecastConfigError, match="needs tokens"):
            MissingWords(MASK).make(torch.randn(3, 4), torch.Generator())


class TestKnownPictures:
    def test_views_of_one_picture_are_alike(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(6, 3, 4, 4, generator=generator)
        images = nn.functional.interpolate(images, size=32, mode="bilinear")  # smooth, as pictures are
        task = KnownPictures(pictures=4, views=5, crop=0.9, colour=0.02, noise=0.01).make(images, generator)
        assert task.inputs.shape == (20, 3, 32, 32)
        assert task.num_classes == 4
        apart = torch.cdist(task.inputs.flatten(1), images.flatten(1)).argmin(1)
        mirrored = torch.cdist(task.inputs.flip(3).flatten(1), images.flatten(1))
        nearest = torch.minimum(torch.cdist(task.inputs.flatten(1), images.flatten(1)), mirrored).argmin(1).view(4, 5)
        assert (nearest == nearest[:, :1]).all()
        assert len(set(nearest[:, 0].tolist())) == 4
        assert (apart.view(4, 5) != nearest).any()  # some are mirrored
        assert not torch.equal(task.inputs[0], task.inputs[1])

    def test_too_few_or_no_pictures(self) -> None:
        with pytest.raises(RecastConfigError, match="at least so many pictures"):
            KnownPictures(pictures=7).make(torch.randn(6, 3, 8, 8), torch.Generator())


class TestTheBank:
    def test_of_biases_spans_what_training_moved(self) -> None:
        model = bert()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        family = MissingWords(MASK, (PAD,), words=4, examples=10, least=5)
        bank = practice_bank(model, texts(), family, tasks=3, epochs=2, progress=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(p.grad is not None for p in model.parameters())
        report = growth_report(bank)
        assert all(group.num_grown == 3 and group.energy[-1] == pytest.approx(1) for group in report.groups)
        assert len(bank.mimicry["sources"]) == 3
        assert all(source.startswith("missing words") for source in bank.mimicry["sources"])
        model = get_recast_model(bert(), RecastConfig(target_modules=["query"], partners=[BiasConfig(bank=bank)]))
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert numbers == 2 * 2 + 2 * 3  # a group of two queries; two blocks with three templates

    def test_of_a_model_in_half_precision(self) -> None:
        family = MissingWords(MASK, (PAD,), words=4, examples=10, least=5)
        model = bert().bfloat16()
        bank = practice_bank(model, texts(), family, tasks=2, epochs=2, lr=1e-4, progress=False)
        assert model.dtype == torch.bfloat16
        for group in bank.groups.values():  # steps of 1e-4, far below the rounding of a bias of 0.1 in bfloat16
            assert group.grown is not None
            assert 0 < float(torch.stack(group.grown.dense()).abs().max()) < 1e-2
        adapted = get_recast_model(model, RecastConfig(target_modules=["query"], partners=[BiasConfig(bank=bank)]))
        assert torch.isfinite(adapted(**texts(3)).last_hidden_state).all()

    def test_follows_from_the_seed(self) -> None:
        def made(seed: int, others: int = 0, of: str = "biases") -> str:
            family = MissingWords(MASK, (PAD,), words=4, examples=5, least=5)
            model = bert()
            torch.manual_seed(others)
            state = torch.get_rng_state()
            bank = practice_bank(model, texts(), family, tasks=2, of=of, epochs=3, seed=seed, progress=False)
            assert torch.equal(torch.get_rng_state(), state)
            return bank.fingerprint

        assert made(0) == made(0, others=1) != made(1)
        assert made(0, of="weights") == made(0, others=1, of="weights")

    def test_of_weights_with_a_family_of_ones_own(self) -> None:
        config = RecastConfig(target_modules=["qkv", "fc1"], group_size=1)
        x = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0))
        bank = practice_bank(tiny_vit(), x, Halves(), tasks=2, of="weights", config=config, epochs=3, progress=False)
        assert not bank.is_of_biases
        model = get_recast_model(tiny_vit(), RecastConfig(bank=bank), "task").eval()
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit().eval(), vit_input()))
        assert {group.num_grown for group in growth_report(bank).groups} == {2}

    def test_training_learns_the_task(self, monkeypatch: pytest.MonkeyPatch) -> None:
        losses, original = [], practice.F.cross_entropy

        def note(logits: Tensor, labels: Tensor) -> Tensor:
            loss = original(logits, labels)
            losses.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(practice.F, "cross_entropy", note)
        x = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(0))
        practice_bank(tiny_vit(), x, Halves(), tasks=1, epochs=15, lr=0.03, seed=5, progress=False)
        assert len(losses) == 15 * 2
        assert losses[0] == pytest.approx(math.log(2))
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])

    @pytest.mark.parametrize("of", ["biases", "weights"])
    def test_training_that_diverges_is_told_as_such(self, of: str) -> None:
        x = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(0))
        with pytest.raises(RecastConfigError, match=r"practice task 'halves' diverged at lr=1e\+30: give a smaller lr"):
            practice_bank(tiny_vit(), x, Halves(), tasks=1, of=of, lr=1e30, progress=False)

    def test_wrong_arguments(self) -> None:
        family = MissingWords(MASK)
        for fields, message in (
            ({"of": "heads"}, "of='heads'"),
            ({"tasks": None}, "tasks=None"),
            ({"scales": "no"}, "scales='no'"),
            ({"epochs": True}, "epochs=True"),
            ({"lr": float("nan")}, "lr=nan: expected a number above 0"),
            ({"seed": "0"}, "seed='0'"),
            ({"batch_size": 1}, "batch_size=1"),
            ({"config": RecastConfig()}, "of='biases'. trains all biases and takes no config"),
            ({"of": "weights", "group_size": 2}, "of='weights'. takes no group_size and no scales"),
            ({"of": "weights", "scales": True}, "of='weights'. takes no group_size and no scales"),
            ({"features": "logits"}, "features='logits': expected a function"),
        ):
            with pytest.raises(RecastConfigError, match=message):
                practice_bank(bert(), texts(), family, progress=False, **fields)
        with pytest.raises(RecastConfigError, match="plain pretrained model"):
            practice_bank(get_recast_model(bert(), RecastConfig(target_modules=["query"])), texts(), family, progress=False)


class TestWhatIsTrained:
    def test_a_grouped_convolution_has_no_lora_and_keeps_its_weight(self) -> None:
        model, family = timm.create_model("test_efficientnet", num_classes=0), KnownPictures(pictures=3, views=2)
        bank = practice_bank(model, torch.rand(3, 3, 32, 32), family, tasks=1, of="weights", epochs=2, progress=False)
        moved = [member for group in bank.groups.values() for member in group.members if len(group.grown)]
        groups = {name: getattr(module, "groups", 1) for name, module in model.named_modules()}
        assert moved
        assert {groups[name] for name in moved} == {1}
        config = RecastConfig(target_modules=r".*conv_dw", group_size=1)
        with pytest.raises(RecastTargetError, match="PEFT has none for the targets"):
            practice_bank(model, torch.rand(3, 3, 32, 32), family, of="weights", config=config, progress=False)

    def test_a_target_whose_name_others_end_in_is_trained_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trained: list[set[str]] = []

        def note(task: PracticeTask, model: nn.Module, **options: Any) -> None:
            free = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            trained.append({name.partition(".lora_")[0] for name in free})
            [*free.values()][1].data.fill_(1.0)

        monkeypatch.setattr(practice, "_train", note)
        model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(8, 8, 8, 8), stem_width=8)
        config = RecastConfig(target_modules=r"conv1", group_size=1)
        family = KnownPictures(pictures=2, views=2)
        practice_bank(model, torch.rand(2, 3, 32, 32), family, tasks=1, of="weights", config=config, progress=False)
        assert trained == [{"base_model.model.conv1"}]

    def test_a_model_without_biases_is_refused_before_training(self) -> None:
        with pytest.raises(RecastTargetError, match="has a bias; take of='weights'"):
            practice_bank(small_transformer("llama"), texts(), MissingWords(MASK, words=2), progress=False)

    @torch.inference_mode()
    def test_inside_inference_mode(self) -> None:
        with torch.inference_mode(False):
            model = tiny_vit()
        bank = practice_bank(model, torch.randn(32, 5, 8), Halves(), tasks=1, epochs=2, progress=False)
        assert not any(tensor.is_inference() for tensor in bank.tensors().values())

    def test_data_in_half_precision(self) -> None:
        x = torch.randn(32, 5, 8).half()
        banks = [practice_bank(tiny_vit().half(), d, Halves(), tasks=1, epochs=2, progress=False) for d in (x, x.float())]
        assert banks[0].fingerprint == banks[1].fingerprint

    @pytest.mark.parametrize("found", [None, torch.zeros(2), torch.zeros(2, 3, 4), torch.zeros(2, 3).long()])
    def test_features_of_another_shape_are_refused(self, found: Any) -> None:
        with pytest.raises(RecastConfigError, match=r"features gave .*: expected floating numbers \(batch, features\)"):
            practice_bank(tiny_vit(), torch.randn(32, 5, 8), Halves(), features=lambda model, x: found, progress=False)

    def test_a_family_that_makes_no_task_is_refused(self) -> None:
        family = SimpleNamespace(make=lambda data, generator: data)
        with pytest.raises(RecastConfigError, match="SimpleNamespace.make gave a Tensor: expected a PracticeTask"):
            practice_bank(tiny_vit(), torch.randn(32, 5, 8), family, progress=False)


def test_features_are_means_over_what_is_attended_to() -> None:
    data = {key: value[:3] for key, value in texts().items()}
    found = mean_features(bert(), data)
    hidden = bert()(**data).last_hidden_state
    torch.testing.assert_close(found[0], hidden[0, :8].mean(0))
    torch.testing.assert_close(found[1], hidden[1].mean(0))
    positions = torch.arange(24.0).view(1, 3, 4, 2)  # of a picture, channels first
    for given, wanted in ((positions, [3.5, 11.5, 19.5]), (positions.flatten(2).mT, [3.5, 11.5, 19.5])):
        assert mean_features(nn.Identity(), given).tolist() == [wanted]


def test_a_row_alone_goes_with_the_batch_before_it() -> None:
    def sizes(count: int) -> list[int]:
        return [len(rows) for rows in practice._batches(count, 4, 1, torch.Generator())]

    assert [sizes(count) for count in (1, 4, 5, 6, 9)] == [[1], [4], [5], [4, 2], [4, 5]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.zeros(5, 8)] * 64, "data is list: expected a tensor"),
        ({}, "data is an empty dictionary"),
        (torch.full((64, 5, 8), float("nan")), "data holds numbers that are not finite"),
    ],
)
def test_data_that_are_no_examples_are_refused(data: Any, message: str) -> None:
    with pytest.raises(RecastConfigError, match=message):
        practice_bank(tiny_vit(), data, Halves(), tasks=1, progress=False)


@pytest.mark.parametrize("family", [None, Halves, [], "Halves"])
def test_what_makes_no_tasks_is_refused(family: Any) -> None:
    with pytest.raises(RecastConfigError, match="family=.*expected an object with a method make"):
        practice_bank(tiny_vit(), torch.randn(64, 5, 8), family, tasks=1, progress=False)


@pytest.mark.parametrize("labels", [torch.zeros(4).long(), torch.arange(3), torch.rand(4), torch.arange(-1, 3)])
def test_labels_that_no_classifier_can_learn_are_refused(labels: Tensor) -> None:
    with pytest.raises(RecastConfigError, match="practice task 'mine': expected a label for each example"):
        PracticeTask("mine", torch.randn(4, 5, 8), labels)


def test_a_single_step_which_moves_nothing_is_refused() -> None:
    with pytest.raises(RecastConfigError, match="32 examples, one step of batch_size=32"):
        practice_bank(tiny_vit(), torch.randn(32, 5, 8), Halves(), tasks=1, epochs=1, progress=False)
    assert practice_bank(tiny_vit(), torch.randn(32, 5, 8), Halves(), tasks=1, epochs=2, progress=False).is_of_biases


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (torch.randn(4, 5), [0, 1, 0, 1], "expected tensors .*\n  inputs: Tensor\n  labels: list"),
        ({"x": torch.randn(4, 5), "text": ["a"] * 4}, torch.arange(4), "expected tensors .*\n  inputs: Tensor, list"),
        ({"x": torch.ones(4, 5), "y": torch.zeros(4)}, torch.arange(4), "its examples are all the same"),
    ],
)
def test_tasks_that_teach_nothing_are_refused(inputs: Any, labels: Any, message: str) -> None:
    with pytest.raises(RecastConfigError, match=f"practice task 'mine': {message}"):
        PracticeTask("mine", inputs, labels)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (KnownPictures, {"views": 0}, "views=0"),
        (KnownPictures, {"crop": 2}, "crop=2.: expected a number from 0 to 1"),
        (KnownPictures, {"colour": -1.0}, "colour=-1.0.: expected a number from 0"),
        (KnownPictures, {"noise": float("nan")}, "noise=nan"),
        (MissingWords, {"mask_token_id": MASK, "words": 1.5}, "words=1.5"),
        (MissingWords, {"mask_token_id": None}, "mask_token_id=None.*expected the number of a token"),
        (MissingWords, {"mask_token_id": MASK, "special_token_ids": 0}, "special_token_ids=0"),
        (MissingWords, {"mask_token_id": MASK, "special_token_ids": (0, None)}, "special_token_ids=.0, None."),
    ],
)
def test_options_that_cannot_be_used_are_refused(family: Any, fields: Any, message: str) -> None:
    with pytest.raises(RecastConfigError, match=message):
        family(**fields)


def test_texts_under_another_name_are_refused() -> None:
    with pytest.raises(RecastConfigError, match="text='tokens'.: the data have 'input_ids', 'attention_mask'"):
        MissingWords(MASK, text="tokens").make(texts(), torch.Generator())
