"""Modules that a task owns whole, around and inside of what it and other tasks have: each task is what it is alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models import move, small_transformer, small_vit
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from pools import TOKENS, text_model
from safetensors.torch import load_file
from torch import Tensor, nn

from recast_peft import RecastBankError, RecastConfig, RecastConfigError, get_recast_model, plan_recast
from recast_peft.tasks.state import task_entries

TASKS: dict[str, dict[str, Any]] = {
    "coefficients": {},
    "all linear layers": {"target_modules": "all-linear", "group_size": 1},
    "classifier": {"num_classes": 5},
    "block": {"modules_to_save": ["blocks.1"]},
    "blocks and classifier": {"modules_to_save": ["blocks.0", "blocks.1"], "num_classes": 5, "target_modules": ["qkv"]},
    "layer": {"modules_to_save": ["mlp.fc1"]},
    "norms": {"train_norms": True},
    "LoRA": {"lora_config": LoraConfig(r=2, target_modules=["qkv", "fc1"])},
    "AdaptFormer": {"partners": ["adaptformer"]},
    "masks": {"partners": ["piggyback"]},
}
OWNING = ("block", "blocks and classifier", "layer", "norms")
PAIRS = [pair for pair in product([*TASKS][1:], repeat=2) if pair[0] != pair[1] and any(task in OWNING for task in pair)]
PAIRS += [("LoRA", "all linear layers"), ("all linear layers", "LoRA"), ("LoRA", "masks")]  # one's layers inside the other's
X = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def backbone() -> nn.Module:
    return copy.deepcopy(plain())


@cache
def plain() -> nn.Module:
    return small_vit(num_classes=3, depth=3).eval()


def config(task: str) -> RecastConfig:
    fields = dict(TASKS[task])
    if task == "blocks and classifier":  # the third block is what is left
        fields["group_size"] = 1
    return RecastConfig(**fields)


def learn(model: PeftModel, name: str) -> Tensor:
    """Move everything that a task trains; its output."""
    model.set_adapter(name)
    move(model, seed=len(name), size=0.05)
    return output(model, name)


@torch.no_grad()
def output(model: PeftModel, name: str) -> Tensor:
    model.set_adapter(name)
    return model.eval()(X)


def numbers(model: PeftModel, name: str) -> dict[str, Tensor]:
    entries = task_entries(model, name, model.peft_config[name])
    return {key: entry.stored(entry.tensor).clone() for key, entry in entries.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the files of a task hold."""
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def learned(task: str, name: str) -> tuple[PeftModel, Tensor, dict[str, Tensor]]:
    """A model with one task that was trained, its output, and its numbers."""
    model = get_recast_model(backbone(), config(task), name)
    return model, learn(model, name), numbers(model, name)


@pytest.fixture(scope="module")
def saved_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor, dict[str, Tensor]]]:
    """A task ``two`` on a model of its own: where it is saved, its output, and its numbers."""

    @cache
    def save(task: str) -> tuple[Path, Tensor, dict[str, Tensor]]:
        model, expected, held = learned(task, "two")
        folder = tmp_path_factory.mktemp("alone")
        model.save_pretrained(folder)
        return folder / "two", expected, held

    return save


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_two_tasks_on_one_model_are_what_each_is_alone(first: str, second: str, saved_alone: Any, tmp_path: Path) -> None:
    expected, held = {}, {}
    folder, expected["two"], held["two"] = saved_alone(second)
    model, expected["one"], held["one"] = learned(first, "one")
    model.add_adapter("two", config(second))  # a fresh one has the same numbers to learn
    assert numbers(model, "two").keys() == held["two"].keys()
    model.delete_adapter("two")
    assert torch.equal(output(model, "one"), expected["one"])

    model.load_adapter(folder, "two")
    for name in ("two", "one"):
        torch.testing.assert_close(output(model, name), expected[name], rtol=1e-5, atol=1e-5)
        assert same(numbers(model, name), held[name])
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(X), plain()(X), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        mixed = model(X, adapter_names=["one", "two"])
    for row, name in enumerate(("one", "two")):
        classes = expected[name].shape[1]
        torch.testing.assert_close(mixed[row, :classes], expected[name][row], rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    config_of_two, tensors_of_two = saved(tmp_path / "two")
    config_alone, tensors_alone = saved(folder)  # which was loaded above
    assert config_of_two == config_alone
    assert same(tensors_of_two, tensors_alone)
    fresh = PeftModel.from_pretrained(backbone(), tmp_path / "one", "one")
    assert same(numbers(fresh, "one"), held["one"])

    if second != "AdaptFormer":
        model.set_adapter("two")
        merged = model.merge_and_unload().eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(X), expected["two"], rtol=1e-4, atol=1e-5)
        assert dict(merged.named_modules()).keys() == dict(plain().named_modules()).keys()


def test_a_merged_task_is_not_copied() -> None:
    model = get_recast_model(backbone(), config("coefficients"), "one")
    before = learn(model, "one")
    model.merge_adapter()
    for task in ("block", "layer", "norms"):
        with pytest.raises(RecastConfigError, match=r"a task is merged, and would stay in the copy of"):
            model.add_adapter("two", config(task))
    model.unmerge_adapter()
    model.add_adapter("two", config("block"))
    torch.testing.assert_close(output(model, "two"), backbone()(X).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(output(model, "one"), before)


@pytest.mark.parametrize("saved", ["blocks.1", "mlp.fc1"])
def test_a_weight_that_a_compressed_bank_stands_for_is_in_the_copy(saved: str) -> None:
    model = get_recast_model(backbone(), RecastConfig(num_templates=1, group_size=3), "one")
    before = learn(model, "one")
    with model.disable_adapter(), torch.no_grad():
        without = model(X)
    model.add_adapter("two", RecastConfig(target_modules=["qkv"], modules_to_save=[saved]))
    torch.testing.assert_close(output(model, "two"), without, rtol=1e-5, atol=1e-5)
    assert torch.equal(output(model, "one"), before)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ({"modules_to_save": ["blocks.1"], "train_norms": True}, "blocks.1 and the other blocks' norms"),
        ({"modules_to_save": ["head"], "num_classes": 5}, "the classifier of five classes"),
        ({"modules_to_save": ["patch_embed", "norm"], "train_norms": True}, "norms twice"),
        ({"modules_to_save": ["blocks.1", "blocks.1.mlp"]}, "a block and a part of it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_task_names_twice_it_owns_once(task: dict[str, Any], names: str, tmp_path: Path) -> None:
    model = get_recast_model(backbone(), RecastConfig(**task), "task")
    expected, held = learn(model, "task"), numbers(model, "task")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(backbone(), tmp_path / "task", "task")
    assert same(numbers(loaded, "task"), held)
    assert torch.equal(output(loaded, "task"), expected)
    planned = sum(sum(part.values()) for part in plan_recast(backbone(), RecastConfig(**task)).parts.values())
    trained = sum(p.numel() for name, p in model.named_parameters() if "modules_to_save" in name and "recast_" not in name)
    assert planned == trained


class Head(nn.Module):
    """A norm and a classifier in one module, as ConvNeXt has them; with a tensor of its own, as few have."""

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.fc(x if self.scale is None else x * self.scale)


class Net(nn.Module):
    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = Head(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_module_around_the_classifier_is_owned_but_for_the_classifier(tmp_path: Path) -> None:
    task = RecastConfig(target_modules=["0", "2"], num_classes=5, head_module="head.fc", modules_to_save=["head"])
    model = get_recast_model(Net(), task, "task")
    model.save_pretrained(tmp_path)
    names = {name.split("model.", 2)[-1] for name in numbers(model, "task") if "recast" not in name}
    assert names == {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "task", "task").eval()
    x = torch.randn(4, 8)
    assert loaded(x).shape == (4, 5)
    assert torch.equal(loaded(x), model.eval()(x))
    with pytest.raises(RecastConfigError, match=r"modules_to_save names head, which holds tensors of its own beside head\.fc"):
        get_recast_model(Net(scale=True), task, "task")


@pytest.mark.parametrize("fields", [{}, {"head_module": "classifier"}])
def test_a_task_type_and_other_classes(fields: dict[str, Any], tmp_path: Path) -> None:
    # PEFT's models for a task_type add the classifier to modules_to_save by themselves
    task = RecastConfig(task_type="SEQ_CLS", num_classes=5, **fields)
    model = get_recast_model(small_transformer("bert"), task, "task")
    learned = numbers(model, "task")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_transformer("bert"), tmp_path / "task", "task")
    assert same(numbers(loaded, "task"), learned)
    assert loaded(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 5)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_classifier_that_a_task_type_adds_is_the_tasks_own(task_type: str, tmp_path: Path) -> None:
    config = RecastConfig(task_type=task_type)
    planned = plan_recast(text_model(task_type), config).parts["modules_to_save"]
    model = get_recast_model(text_model(task_type), config, "task")
    place = "qa_outputs" if task_type == "QUESTION_ANS" else "classifier"
    own = model.get_base_model().get_submodule(place)
    trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
    assert planned == {place: sum(parameter.numel() for parameter in trained)}
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
        learned = model.eval()(input_ids=TOKENS)[0]
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(text_model(task_type), tmp_path / "task", "task").eval()
        assert torch.equal(loaded(input_ids=TOKENS)[0], learned)
        with loaded.disable_adapter():
            assert torch.equal(loaded(input_ids=TOKENS)[0], text_model(task_type)(input_ids=TOKENS)[0])
    loaded.save_pretrained(tmp_path / "again")
    stored = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("task", "again/task")]
    assert stored[0]["modules_to_save"] == stored[1]["modules_to_save"]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_state_dict_says_whether_a_task_type_brings_a_classifier(task_type: str) -> None:
    model = get_recast_model(text_model(task_type), RecastConfig(task_type=task_type)).eval()
    plain = get_recast_model(text_model(task_type), RecastConfig()).eval()
    for trained in (model, plain):
        for parameter in [p for p in trained.parameters() if p.requires_grad]:
            parameter.data.add_(0.1)
        state = get_peft_model_state_dict(trained)
        other = inject_adapter_in_model(RecastConfig(task_type=task_type), text_model(task_type), state_dict=state).eval()
        assert not set_peft_model_state_dict(other, state).unexpected_keys
        assert torch.equal(other(input_ids=TOKENS)[0], trained(input_ids=TOKENS)[0])


def test_a_task_without_a_classifier_beside_one_whose_type_brings_one(tmp_path: Path) -> None:
    plain = get_recast_model(small_transformer("bert"), RecastConfig(), "plain")
    ids = torch.tensor([[1, 2, 3]])
    learn_from = [p for p in plain.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in learn_from:
            parameter.fill_(0.1)
        expected = plain.eval()(input_ids=ids).logits
    plain.save_pretrained(tmp_path)
    model = get_recast_model(small_transformer("bert"), RecastConfig(task_type="SEQ_CLS"), "typed")
    model.load_adapter(tmp_path / "plain", "plain")
    model.set_adapter("plain")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)
    assert model.peft_config["plain"].modules_to_save is None


def test_the_classifier_is_found_inside_of_a_module_that_another_task_owns() -> None:
    class Named(Net):
        def get_classifier(self) -> nn.Module:
            return self.head.fc

    model = get_recast_model(Named(), RecastConfig(target_modules=["0", "2"], modules_to_save=["head"]), "one")
    model.add_adapter("two", RecastConfig(target_modules=["0", "2"], num_classes=5))
    model.set_adapter("two")
    assert model(torch.randn(4, 8)).shape == (4, 5)
    names = {name.split("model.", 2)[-1] for name in numbers(model, "two") if "recast" not in name}
    assert names == {"head.fc.weight", "head.fc.bias"}


class Gated(nn.Module):
    """Takes more than its input, and gives two tensors and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, gate: Tensor | None = None, table: Tensor | None = None, past: Any = None) -> Any:
        y = self.fc(x) if gate is None else self.fc(x) * gate[:, None]
        return (y if table is None else y + table.sum(), x - y), 7


class Past:
    """Marked as the caches of transformers are."""

    def get_seq_length(self) -> int:
        return 0


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gated = nn.Linear(8, 8), Gated()

    def forward(self, x: Tensor, how: str, past: Any = None) -> Tensor:
        x, gate, table = self.first(x), x[:, 0], torch.ones(4, 3)  # as long as the batch, and the same for every sample
        given: dict[str, Any] = {"gate": gate, "table": table[:3]} if how != "alone" else {}
        (y, rest), number = self.gated(x=x, **given) if how == "by keyword" else self.gated(x, **given, past=past)
        return y * number + rest


@pytest.mark.parametrize("how", ["alone", "beside others", "by keyword"])
def test_a_task_for_each_sample_where_a_module_takes_and_gives_more(how: str) -> None:
    model = get_recast_model(Gates(), RecastConfig(target_modules=["first", "fc"]), "one")
    model.add_adapter("two", RecastConfig(target_modules=["first"], modules_to_save=["gated"]))
    model.add_adapter("three", RecastConfig(target_modules=["first", "fc"]))
    model.eval()
    x, alone = torch.randn(4, 8), {}
    names = ["one", "two", "three", "one"]
    with torch.no_grad():
        for seed, name in enumerate(("one", "two", "three")):
            model.set_adapter(name)
            move(model, seed=seed)
        for name in ("one", "two", "three"):
            model.set_adapter(name)
            alone[name] = model(x, how)
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(model(x, how, adapter_names=names), expected)
        if how == "alone":
            with pytest.raises(RecastBankError, match="own gated whole, which writes into a cache"):
                model(x, how, Past(), adapter_names=names)
            torch.testing.assert_close(model(x, how, Past(), adapter_names=["two"] * 4), alone["two"])
