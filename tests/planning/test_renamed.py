"""Modules of a stored task are found by their weights where a model calls them by other names."""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_vit
from peft import PeftModel
from sweep.transformers_cases import transformers_cases
from torch import nn

from recast_peft import BiasConfig, RecastConfig, get_recast_model
from recast_peft.planning.renamed import Renaming, find_renamed, mapped


def stored(model: nn.Module, **config: object) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What the file of a task on a model says of its modules."""
    made = get_recast_model(copy.deepcopy(model), RecastConfig(**config)).peft_config["default"]  # type: ignore[arg-type]
    return made.groups, made.base_fingerprint


def with_names(task: tuple[dict[str, list[str]], dict[str, str]], rename: Callable[[str], str]) -> tuple:
    groups, prints = task
    return {b: [rename(m) for m in ms] for b, ms in groups.items()}, {rename(m): f for m, f in prints.items()}


# What transformers 5.0 called the modules of later versions, as the models' code had it then: (now, then).
VIT = [
    (r"^(\w+)\.layers\.", r"\1.encoder.layer."),
    (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]
OLD_NAMES = {
    **dict.fromkeys(("vit", "deit", "beit", "audio-spectrogram-transformer", "vit_mae"), VIT),
    "swin": [(r"attention\.q_proj", "attention.self.query"), *VIT[2:]],
    "segformer": [
        (r"stages\.(\d+)\.patch_embeddings", r"encoder.patch_embeddings.\1"),
        (r"stages\.(\d+)\.blocks", r"encoder.block.\1"),
        (r"stages\.(\d+)\.layer_norm", r"encoder.layer_norm.\1"),
        (r"attention\.sequence_reduction\.layer_norm", "attention.self.layer_norm"),
        (r"mlp\.fc", "mlp.dense"),
        ("layernorm_before", "layer_norm_1"),
        ("layernorm_after", "layer_norm_2"),
    ],
    "clip": [(r"^(text|vision)_model\.", r"\1_model.\1_model.")],
    "siglip": [(r"^vision_model\.", "vision_model.vision_model.")],
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_a_renaming_between_versions_of_transformers_is_found(name: str) -> None:
    model = transformers_cases()[name].build()
    task = stored(model)

    def old_name(module: str) -> str:
        for now, then in OLD_NAMES[name]:
            module = re.sub(now, then, module)
        return module

    wanted = {old_name(m): m for members in task[0].values() for m in members if old_name(m) != m}
    assert wanted
    with pytest.warns(UserWarning, match=rf"(?s){len(wanted)} of {len(task[1])} modules.*found by their pretrained weights"):
        found = find_renamed(model, *with_names(task, old_name))
    assert found == wanted
    rename = Renaming(model, found)
    others = [n for n, m in model.named_modules() if "Norm" in type(m).__name__ or n == "classifier"]
    assert [rename(old_name(n)) for n in others] == others


FOUND = "found by their pretrained weights"


class Outer(nn.Module):
    def __init__(self, name: str = "encoder") -> None:
        super().__init__()
        self.add_module(name, tiny_vit())
        self.norm = nn.LayerNorm(4)


class Inner(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block


def test_a_backbone_inside_of_a_module_and_the_reverse() -> None:
    with pytest.warns(UserWarning, match="blocks.0.mlp.fc1 -> encoder.blocks.0.mlp.fc1"):
        found = find_renamed(Outer(), *stored(tiny_vit()))
    assert found == {f"blocks.{i}.mlp.{fc}": f"encoder.blocks.{i}.mlp.{fc}" for i in range(4) for fc in ("fc1", "fc2")}
    rename = Renaming(Outer(), found)
    assert [rename(n) for n in ("head", "blocks.3.norm", "blocks.0.attn.qkv")] == [
        "encoder.head",
        "encoder.blocks.3.norm",
        "encoder.blocks.0.attn.qkv",
    ]
    with pytest.warns(UserWarning, match=FOUND):
        back = find_renamed(tiny_vit(), *stored(Outer()))
    assert back == {new: old for old, new in found.items()}
    assert Renaming(tiny_vit(), back)("encoder.head") == "head"
    with pytest.warns(UserWarning, match=FOUND):
        other = find_renamed(Outer("trunk"), *stored(Outer()))
    assert Renaming(Outer("trunk"), other)("encoder.blocks.1.norm") == "trunk.blocks.1.norm"
    assert Renaming(Outer("trunk"), other)("norm") == "norm"


@pytest.mark.parametrize(
    "options",
    [
        lambda at: {"num_classes": 2, "head_module": f"{at}head"},
        lambda at: {"modules_to_save": [f"{at}blocks.1.norm"]},
        lambda at: {"partners": [BiasConfig(target_modules=[f"{at}blocks.1.mlp.fc1"])]},
        lambda at: {"lora_config": {"r": 1, "target_modules": [f"{at}blocks.0.attn.qkv"]}},
        lambda at: {"lora_config": {"r": 1, "rank_pattern": {f"{at}blocks.0.mlp.fc1": 2}}},
    ],
)
@pytest.mark.parametrize(("trained", "used"), [("outside", "alone"), ("alone", "outside")])
@pytest.mark.filterwarnings("ignore:.*have other names in this model")
def test_what_the_config_names_has_another_name_too(
    options: Callable[[str], dict], trained: str, used: str, tmp_path: Path
) -> None:
    build = {"alone": lambda: tiny_vit().eval(), "outside": lambda: nn.Sequential(OrderedDict(body=tiny_vit())).eval()}
    at = "body." if trained == "outside" else ""
    x = torch.randn(2, 5, 8)
    model = get_recast_model(build[trained](), RecastConfig(**options(at), init_weights=False), "t").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.requires_grad
        expected = model(x)
        model.save_pretrained(str(tmp_path / "first"))
        other = PeftModel.from_pretrained(build[used](), str(tmp_path / "first" / "t"), "t").eval()
        assert torch.equal(other(x), expected)
        other.save_pretrained(str(tmp_path / "second"))  # under the names that it has there
        for place in build:
            again = PeftModel.from_pretrained(build[place](), str(tmp_path / "second" / "t")).eval()
            assert torch.equal(again(x), expected)


def test_a_users_module_around_the_blocks() -> None:
    model = tiny_vit()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = Inner(block)
    with pytest.warns(UserWarning, match=FOUND):
        found = find_renamed(model, *stored(tiny_vit(), layers_to_transform=[0, 1]))
    rename = Renaming(model, found)
    assert rename("blocks.0.mlp.fc2") == "blocks.0.inner.mlp.fc2"
    assert rename("blocks.3.norm") == "blocks.3.inner.norm"  # a block without a target
    assert rename("head") == "head"
    assert rename("nothing") is None


def test_names_that_are_there_cost_no_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    task = stored(tiny_vit())
    monkeypatch.setattr("recast_peft.planning.candidates.weight_fingerprint", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_renamed(tiny_vit(), *task) == {}
        assert find_renamed(Outer(), *task, {"^": "encoder."}) == {
            f"blocks.{i}.mlp.{fc}": f"encoder.blocks.{i}.mlp.{fc}" for i in range(4) for fc in ("fc1", "fc2")
        }


def test_what_the_weights_do_not_tell_is_not_guessed() -> None:
    twice = nn.ModuleDict({"student": tiny_vit(), "teacher": tiny_vit()})
    another = Outer()
    with torch.no_grad():
        another.encoder.blocks[2].mlp.fc1.weight.mul_(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_renamed(twice, *stored(tiny_vit())) == {}
        assert find_renamed(another, *stored(tiny_vit())) == {}
        assert find_renamed(nn.Sequential(nn.Linear(2, 2)), *stored(tiny_vit())) == {}
        assert find_renamed(twice, *stored(tiny_vit()), {"^blocks": "teacher.blocks"})["blocks.0.mlp.fc1"].startswith("teacher")


def test_a_module_that_is_where_it_was_is_not_taken_for_its_copy() -> None:
    model = tiny_vit()
    model.tail = model.blocks[2:]
    model.blocks = model.blocks[:2]
    model.average = copy.deepcopy(model.blocks)
    with pytest.warns(UserWarning, match=FOUND):
        found = find_renamed(model, *stored(tiny_vit()))
    assert found == {f"blocks.{i}.mlp.{fc}": f"tail.{i - 2}.mlp.{fc}" for i in (2, 3) for fc in ("fc1", "fc2")}


def test_equal_weights_are_told_apart_by_the_others() -> None:
    alone, outer = tiny_vit(), Outer()
    with torch.no_grad():
        for model in (alone, outer.encoder):
            for i in (1, 2):
                model.blocks[i].mlp.fc1.weight.zero_()
    with pytest.warns(UserWarning, match=FOUND):
        found = find_renamed(outer, *stored(alone))
    assert found["blocks.1.mlp.fc1"] == "encoder.blocks.1.mlp.fc1"
    assert found["blocks.2.mlp.fc1"] == "encoder.blocks.2.mlp.fc1"


def test_a_model_with_tasks_is_searched_too() -> None:
    model = get_recast_model(Outer(), RecastConfig(num_templates=1)).get_base_model()
    with pytest.warns(UserWarning, match=FOUND):
        assert len(find_renamed(model, *stored(tiny_vit()))) == 8


def test_the_first_expression_that_matches_is_taken() -> None:
    mapping = {"^a": "x", "^a.b": "y", "c$": "z"}
    assert [mapped(name, mapping) for name in ("a.b.c", "b.c", "d")] == ["x.b.c", "b.z", "d"]


@given(st.lists(st.sampled_from(["a", "b", "c", "layer", "0", "1", "12"]), min_size=1, max_size=4).map(".".join), st.data())
def test_a_name_that_no_rule_touches_stays_and_one_below_a_moved_module_moves(name: str, data: st.DataObject) -> None:
    def model_of(name: str) -> nn.Module:
        module: nn.Module = nn.ModuleDict({"other": nn.Identity()})
        for part in reversed(name.split(".")):
            module = nn.ModuleDict({part: module})
        return module

    assert Renaming(model_of(name), {"x.0.y": "z.0.y"})(name) == name
    prefix = data.draw(st.sampled_from(["enc", "enc.1", "m.n"]))
    rename = Renaming(model_of(f"{prefix}.{name}"), {name: f"{prefix}.{name}"})
    assert rename(name) == f"{prefix}.{name}"
    assert rename(f"{name}.other") == f"{prefix}.{name}.other"
    assert rename(f"{name}.nothing") is None
