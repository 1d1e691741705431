"""A task's file holds what the task owns, under the plain model's names, whatever the task is called and whatever wraps it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from models import Around, move, outputs, tiny_vit, vit_input
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from recast_peft import (
    BiasConfig,
    RecastConfig,
    RecastConfigError,
    RecastLayer,
    RecastLoadError,
    RecastTargetError,
    TaskPool,
    get_recast_model,
    grow_bias_bank,
)

PARTS = {
    "coefficients": {},
    "head": {"num_classes": 5},
    "LoRA": {"lora_config": {"r": 2, "target_modules": ["qkv"]}},
    "norms": {"train_norms": True},
    "saved module": {"modules_to_save": ["head"]},
    "biases": {"bias": "all"},
    "partners": {"partners": ["adaptformer", "bias", "piggyback"]},
    "shared": {"coefficient_sharing": "all", "target_modules": ["qkv", "fc1"]},
}
NAMES = ["0", "1", "mlp", "head", "weight", "bias", "model", "norm", "training", "v1.2", "recast_coefficients"]


def learned(model: PeftModel, seed: int = 3) -> PeftModel:
    move(model, seed=seed)
    return model.eval()


def biased(plain: nn.Module) -> nn.Module:
    """The model with biases of norms that are not zero."""
    for module in plain.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias.data += 0.5
    return plain


def only_biases_learned(model: PeftModel) -> PeftModel:
    """Where a LoRA's factors say nothing, its bias does."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name and not name.endswith("lora_B.default.weight"):
            parameter.data += 0.1
    return model.eval()


def saved(model: PeftModel, name: str, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder if name == "default" else folder / name


@cache
def keys_by_default(part: str) -> set[str]:
    """Keys of the file of a task that is called as PEFT calls it."""
    with TemporaryDirectory() as folder:
        model = get_recast_model(tiny_vit(depth=2), RecastConfig(**PARTS[part]))
        return set(load_file(saved(model, "default", Path(folder)) / "adapter_model.safetensors"))


@pytest.mark.filterwarnings("error:Found missing adapter keys")  # PEFT's, of keys that a file does not have
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_saved_whole_and_loads(part: str, name: str, tmp_path: Path) -> None:
    model = learned(get_recast_model(tiny_vit(depth=2), RecastConfig(**PARTS[part]), name))
    folder = saved(model, name, tmp_path)
    assert set(load_file(folder / "adapter_model.safetensors")) == keys_by_default(part)
    expected = outputs(model, vit_input())
    alone = PeftModel.from_pretrained(tiny_vit(depth=2), str(folder), name).eval()
    assert torch.equal(outputs(alone, vit_input()), expected)
    other = get_recast_model(tiny_vit(depth=2), RecastConfig(target_modules=["fc2"]), "other")
    other.load_adapter(str(folder), name)
    other.set_adapter(name)
    assert torch.equal(outputs(other.eval(), vit_input()), expected)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpointed": checkpoint_wrapper,
    "compiled": lambda block: torch.compile(block, backend="eager"),
    "a user's own module": Around,
}


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = WRAPPERS[wrapper](block)
    return model


@pytest.mark.filterwarnings("ignore:.*other names in this model")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_file_of_a_wrapped_model_fits_the_plain_one(wrapper: str, when: str, tmp_path: Path) -> None:
    backbone = wrapped(tiny_vit(), wrapper) if when == "before" else tiny_vit()
    model = get_recast_model(backbone, RecastConfig(num_classes=5, target_modules=["qkv", "fc1"]), "task")
    if when == "after":
        wrapped(model.get_base_model(), wrapper)
    learned(model)
    folder = saved(model, "task", tmp_path)
    expected = outputs(model, vit_input())
    for other in (tiny_vit(), wrapped(tiny_vit(), wrapper)):
        assert torch.equal(outputs(PeftModel.from_pretrained(other, str(folder), "task").eval(), vit_input()), expected)
    names = set(load_file(folder / "adapter_model.safetensors"))
    if wrapper != "a user's own module" or when == "after":  # whose names before the conversion nobody knows
        plain = get_recast_model(tiny_vit(), RecastConfig(num_classes=5, target_modules=["qkv", "fc1"]), "task")
        assert names == set(load_file(saved(plain, "task", tmp_path / "plain") / "adapter_model.safetensors"))


@pytest.mark.parametrize("wrapper", ["checkpointed", "compiled"])
@pytest.mark.parametrize("part", ["coefficients", "head", "LoRA", "norms", "saved module", "partners"])
def test_a_wrapper_right_around_what_a_task_changes(part: str, wrapper: str, tmp_path: Path) -> None:
    def wrapped_inside() -> nn.Module:
        model = tiny_vit()
        for name in ("attn.qkv", "mlp.fc1", "norm"):
            for block in model.blocks:
                parent, child = block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                setattr(parent, child, WRAPPERS[wrapper](getattr(parent, child)))
        model.head = nn.Sequential(WRAPPERS[wrapper](model.head)) if part == "head" else WRAPPERS[wrapper](model.head)
        return model

    def plain() -> nn.Module:
        model = tiny_vit()
        model.head = nn.Sequential(model.head) if part == "head" else model.head
        return model

    config = RecastConfig(target_modules=["qkv", "fc1"], **PARTS[part])
    folder = saved(learned(get_recast_model(plain(), config, "task")), "task", tmp_path)
    expected = outputs(PeftModel.from_pretrained(plain(), str(folder), "task").eval(), vit_input())
    assert not torch.equal(expected, outputs(plain(), vit_input()))
    model = PeftModel.from_pretrained(wrapped_inside(), str(folder), "task").eval()
    assert torch.equal(outputs(model, vit_input()), expected)
    again = saved(model, "task", tmp_path / "again")
    assert set(load_file(again / "adapter_model.safetensors")) == set(load_file(folder / "adapter_model.safetensors"))
    assert torch.equal(outputs(model.unload(), vit_input()), outputs(tiny_vit(), vit_input()))


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"train_coefficients": False, "partners": ["bias"]}])
def test_a_model_whose_tasks_were_taken_out_saves_no_empty_file(fields: dict[str, Any], verb: str, tmp_path: Path) -> None:
    """It would take the place of the task's file."""
    model = learned(get_recast_model(tiny_vit(), RecastConfig(**fields), "task"))
    folder = saved(model, "task", tmp_path)
    before = load_file(folder / "adapter_model.safetensors")
    getattr(model, verb)()
    with pytest.raises(RecastTargetError, match=r"task 'task' is no longer in the model.* took it out"):
        model.save_pretrained(tmp_path)
    after = load_file(folder / "adapter_model.safetensors")
    assert before
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_values_that_were_gathered_from_several_processes_are_taken() -> None:
    model = learned(get_recast_model(tiny_vit(), RecastConfig(num_classes=5), "task"))
    gathered = {key: value + 1 if "offsets" in key else value for key, value in model.state_dict().items()}
    own, given = get_peft_model_state_dict(model, adapter_name="task"), get_peft_model_state_dict(model, gathered, "task")
    assert own.keys() == given.keys()
    assert all(torch.equal(given[key], own[key] + (1 if "coefficients" in key else 0)) for key in own)


@pytest.mark.parametrize(
    "replace", [lambda m: setattr(m, "head", nn.Linear(8, 4)), lambda m: setattr(m, "head", nn.Identity())]
)
def test_a_head_that_was_replaced_is_not_left_out_in_silence(replace: Callable[[nn.Module], None], tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(num_classes=5), "task")
    replace(model.get_base_model())
    with pytest.raises(RecastTargetError, match="no longer in the model"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "place", "told"),
    [
        ({}, "head", "is trained, but belongs to no task"),
        ({"modules_to_save": ["head"]}, "head", "no longer in the model|is trained, but belongs to no task"),
        ({"modules_to_save": ["norm"]}, "blocks.1.norm", "no longer in the model"),
        ({"train_norms": True}, "blocks.1.norm", "no longer in the model"),
        ({}, "blocks.1.mlp.fc1", "no longer in the model"),
    ],
)
def test_nothing_that_was_replaced_is_left_out_in_silence(config: dict, place: str, told: str, tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(**config), "task")
    saved(model, "task", tmp_path)
    parent = model.get_base_model().get_submodule(place.rpartition(".")[0])
    setattr(parent, place.rpartition(".")[2], copy.deepcopy(tiny_vit().get_submodule(place)))
    with pytest.raises(RecastTargetError, match=told):
        model.save_pretrained(tmp_path)


def test_the_base_s_own_head_may_be_frozen_or_have_its_bias_trained(tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(bias="all"), "task")
    assert model.get_base_model().head.bias.requires_grad
    saved(model, "task", tmp_path)
    model.get_base_model().head = nn.Linear(8, 4).requires_grad_(False)
    saved(model, "task", tmp_path)


@pytest.mark.parametrize("damage", ["shape", "missing", "integers", "unexpected"])
def test_a_file_that_is_refused_while_it_is_put_in_leaves_nothing(damage: str, tmp_path: Path) -> None:
    folder = saved(learned(get_recast_model(tiny_vit(), RecastConfig(num_classes=5), "task")), "task", tmp_path)
    model = get_recast_model(tiny_vit(), RecastConfig(), "first")
    entries = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.head.weight"
    change = {
        "shape": {key: torch.zeros(6, 8)},
        "integers": {key: torch.zeros(5, 8, dtype=torch.int8)},
        "unexpected": {"base_model.model.head.other": torch.zeros(2)},
        "missing": {},
    }[damage]
    bad = {**entries, **change}
    if damage == "missing":
        del bad[key]
    config = RecastConfig.from_pretrained(str(folder))
    config.record = replace(config.record, origin=None)  # so that the file is not checked before
    model.add_adapter("second", config)
    with pytest.raises(RecastLoadError, match="Nothing was loaded"):
        set_peft_model_state_dict(model, bad, "second")
    assert list(model.peft_config) == ["first"]
    assert not any("second" in m.recast_coefficients for m in model.modules() if isinstance(m, RecastLayer))
    model.load_adapter(str(folder), "second")
    assert list(model.peft_config) == ["first", "second"]


class TestAStateDictThatIsGivenToSave:
    """Its numbers are those that are saved, and no others in silence."""

    @pytest.mark.parametrize("within", ["", "module.", "_orig_mod.", "the backbone"])
    def test_is_what_is_saved_whatever_stood_around_the_model(self, within: str, tmp_path: Path) -> None:
        model = learned(get_recast_model(tiny_vit(), RecastConfig(train_norms=True, num_classes=5), "t"))
        expected = outputs(model, vit_input())
        source = model.get_base_model() if within == "the backbone" else model
        before = "" if within == "the backbone" else within
        numbers = {f"{before}{key}": value.clone() for key, value in source.state_dict().items()}
        learned(model, seed=4)
        model.save_pretrained(tmp_path, state_dict=numbers)
        loaded = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "t"), "t").eval()
        assert torch.equal(outputs(loaded, vit_input()), expected)

    def test_that_holds_nothing_of_the_task_is_refused(self, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(), "t")
        numbers = {f"encoder.{key}": value for key, value in model.state_dict().items()}
        with pytest.raises(RecastConfigError, match="(?s)state_dict holds nothing of task 't'.*given: +encoder.base_model"):
            model.save_pretrained(tmp_path, state_dict=numbers)
        assert not any(tmp_path.iterdir())


def test_what_is_trained_and_not_saved_is_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(bias="all", train_norms=True), "t")
    model.add_adapter("u", RecastConfig(partners=["bias"], lora_config={"r": 1}))
    model.set_adapter("t")
    model.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "not saved" in str(w.message)]
    model.get_base_model().blocks[0].attn.proj.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"belong to no task \(blocks.0.attn.proj.weight\): they are not saved"):
        model.save_pretrained(tmp_path, selected_adapters=["t"])


def test_biases_that_are_trained_by_hand_are_no_tasks_own(tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(), "t")
    model.get_base_model().blocks[0].attn.proj.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"belong to no task \(blocks.0.attn.proj.bias\): they are not saved"):
        model.save_pretrained(tmp_path)


class TestAStateDictOfTheWholeModel:
    """With the merged weights in the place of the pretrained ones, or the other way round."""

    CONFIG = RecastConfig(target_modules=["qkv"], lora_config={"r": 2, "target_modules": ["fc1"]}, partners=["bias"])

    @pytest.fixture
    def model(self) -> PeftModel:
        return learned(get_recast_model(tiny_vit(), self.CONFIG))

    def test_that_holds_merged_weights_is_warned_of_where_nothing_is_merged(self, model: PeftModel) -> None:
        other = learned(get_recast_model(tiny_vit(), self.CONFIG))
        other.merge_adapter()
        with pytest.warns(UserWarning, match=r"at 16 modules with tasks .* merged, which then count twice"):
            model.load_state_dict(other.state_dict())

    BIASES = {"train_coefficients": False, "partners": ["bias"], "target_modules": ["qkv"]}
    BIASES_ALONE = {
        "a bias": (BIASES, 16),
        "a bias of no target": ({**BIASES, "partners": [BiasConfig(target_modules=["norm"])]}, 4),
        "the bias of a LoRA": ({**BIASES, "partners": None, "lora_config": {"r": 2, "lora_bias": True}}, 4),
    }

    @pytest.mark.parametrize(("config", "count"), BIASES_ALONE.values(), ids=BIASES_ALONE)
    def test_that_differs_in_biases_alone_is_no_other(self, config: dict[str, Any], count: int) -> None:
        model, other = (only_biases_learned(get_recast_model(biased(tiny_vit()), RecastConfig(**config))) for _ in range(2))
        live = copy.deepcopy(model.state_dict())
        other.merge_adapter()
        with pytest.warns(UserWarning, match=rf"at {count} modules with tasks .* merged, which then count twice"):
            model.load_state_dict(other.state_dict())
        with pytest.raises(RecastConfigError, match=rf"at {count} modules .* where tasks are merged"):
            other.load_state_dict(live)

    def test_that_differs_in_scales_of_norms_alone_is_no_other(self) -> None:
        plain = tiny_vit()
        moved = {n: 1.5 * p.detach() if n.endswith("norm.weight") else p.detach() for n, p in plain.named_parameters()}
        bank = grow_bias_bank(plain, [moved], scales=True)
        config = RecastConfig(target_modules=["qkv"], train_coefficients=False, partners=[BiasConfig(bank=bank)])
        model, other = (learned(get_recast_model(tiny_vit(), config)) for _ in range(2))
        other.merge_adapter()
        with pytest.warns(UserWarning, match=r"at 4 modules with tasks"):
            model.load_state_dict(other.state_dict())

    def test_with_biases_that_a_task_trains_itself_is_loaded_without_a_word(self) -> None:
        config = RecastConfig(target_modules=["qkv"], bias="all", partners=["bias"])
        model = get_recast_model(tiny_vit(), config)
        other = learned(copy.deepcopy(model))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_state_dict(other.state_dict())
        assert torch.equal(outputs(model.eval(), vit_input()), outputs(other, vit_input()))

    def test_that_holds_pretrained_weights_is_refused_where_tasks_are_merged(self, model: PeftModel) -> None:
        live = copy.deepcopy(model.state_dict())
        expected = outputs(model, vit_input())
        model.merge_adapter()
        merged = outputs(model, vit_input())
        with pytest.raises(RecastConfigError, match=r"where tasks are merged: call unmerge_adapter\(\), load, and merge again"):
            model.load_state_dict(live)
        assert torch.equal(outputs(model, vit_input()), merged)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, vit_input()), expected)

    @pytest.mark.parametrize("is_merged", [False, True])
    def test_of_the_same_kind_is_loaded_without_a_word(self, model: PeftModel, is_merged: bool) -> None:
        other = copy.deepcopy(model)
        if is_merged:
            model.merge_adapter()
            other.merge_adapter()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_state_dict(other.state_dict())
        assert torch.equal(outputs(model, vit_input()), outputs(other, vit_input()))

    @pytest.mark.parametrize("is_around", [True, False], ids=["whole", "backbone"])
    def test_after_to_empty_is_loaded_without_a_word(self, model: PeftModel, is_around: bool) -> None:
        state, expected = copy.deepcopy(model.state_dict()), outputs(model, vit_input())
        emptied = model if is_around else model.get_base_model()
        emptied.to("meta").to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(3.0)  # whatever lay in that memory
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_state_dict(state)
        assert torch.equal(outputs(model, vit_input()), expected)
        model.merge_adapter()
        merged = copy.deepcopy(model.state_dict())
        model.unmerge_adapter()
        with pytest.warns(UserWarning, match="which then count twice"):
            model.load_state_dict(merged)

    def test_what_it_would_not_bring_back_keeps_a_model_off_the_meta_device(self, model: PeftModel) -> None:
        expected = outputs(model, vit_input())
        model.merge_adapter()
        for verb in (lambda: model.to("meta"), lambda: model.to_empty(device="meta")):
            with pytest.raises(RecastConfigError, match=r"tasks are merged \(default\).*unmerge_adapter"):
                verb()
        model.unmerge_adapter()
        pool = TaskPool(model)
        pool.add("task", "default")
        with pytest.raises(RecastConfigError, match=r"tasks of the model's pool .*delete_adapter\('task_pool'\)"):
            model.to("meta")
        assert torch.equal(outputs(model, vit_input()), expected)
        model.delete_adapter(pool.slot)
        state = copy.deepcopy(model.state_dict())
        model.to("meta").load_state_dict(state, assign=True)
        assert torch.equal(outputs(model, vit_input()), expected)

    def test_a_block_of_the_meta_device_keeps_no_merged_model_from_another_dtype(self, model: PeftModel) -> None:
        model.merge_adapter()
        with torch.device("meta"):  # for what is made in it, and nothing is
            model.double()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert not any(parameter.is_meta for parameter in model.parameters())

    def test_in_another_precision_is_loaded_without_a_word(self, model: PeftModel) -> None:
        state = copy.deepcopy(model.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.to(torch.bfloat16).load_state_dict(state)
