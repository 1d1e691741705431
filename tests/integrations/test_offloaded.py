"""Models whose weights accelerate keeps elsewhere between their calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_weights import grown, on
from llamas import IDS, converted, llama, logits, train
from models import converted as vit
from models import layers_of, move, randomise, tiny_vit, vit_input
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from recast_peft import (
    AdaptFormerConfig,
    AutoRecastModel,
    RecastBankError,
    RecastConfig,
    RecastTargetError,
    TaskPool,
    convert_to_lora,
    get_recast_model,
    random_bank,
)
from recast_peft.parts.copies import plain_copy
from recast_peft.tasks import state


@pytest.fixture(params=["cpu", "disk"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[nn.Module], None]:
    accelerate = pytest.importorskip("accelerate")
    warnings.simplefilter("ignore")
    if request.param == "cpu":
        return lambda model: accelerate.cpu_offload(model, execution_device="cpu")
    return lambda model: accelerate.disk_offload(model, str(tmp_path / "offloaded"), execution_device="cpu")


@pytest.mark.parametrize("sizes", [{"group_size": 1}, {"group_size": 2}, {"group_size": None, "num_directions": 2}])
def test_offloaded_weights_compute_as_those_in_memory(offload: Callable[[nn.Module], None], sizes: dict[str, Any]) -> None:
    expected, model = converted(**sizes), converted(**sizes)
    offload(model.get_base_model())
    layer = next(iter(layers_of(model).values()))
    assert layer.base_layer.weight.is_meta
    torch.testing.assert_close(logits(model), logits(expected))
    with model.disable_adapter(), expected.disable_adapter():
        torch.testing.assert_close(logits(model), logits(expected))
    with pytest.raises(RecastBankError, match=r"nothing can be merged into .*offloaded"):
        model.merge_adapter()


def test_what_needs_the_weight_in_a_call_is_refused(offload: Callable[[nn.Module], None]) -> None:
    bank = random_bank(llama(), RecastConfig(target_modules="all-mlp", group_size=1), num_templates=2)
    plain = llama()
    offload(plain)
    model = get_recast_model(plain, RecastConfig(bank=bank, init_weights=False), "task")
    with pytest.raises(RecastBankError, match=r"gate_proj .* is offloaded, and what its task has there needs the weight"):
        logits(model)


def test_a_weight_that_a_compressed_bank_stands_for_is_back_once_nothing_is_offloaded(
    offload: Callable[[nn.Module], None],
) -> None:
    model = vit(group_size=2, num_templates=1).eval()
    randomise(model)
    with model.disable_adapter():
        expected = model(vit_input())
    offload(model)
    with model.disable_adapter(), pytest.raises(RecastBankError, match=r"is offloaded, and what its task has there needs"):
        model(vit_input())
    with pytest.raises(RecastBankError, match=r"a compressed bank stands for the weight of .*, which is offloaded"):
        model.unload()
    pytest.importorskip("accelerate").hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model.unload()(vit_input()), expected)


def test_masks_on_a_model_that_is_offloaded_are_refused(offload: Callable[[nn.Module], None]) -> None:
    plain = tiny_vit()
    offload(plain)
    model = get_recast_model(plain, RecastConfig(target_modules=["qkv"], partners=["piggyback"]))
    with pytest.raises(RecastBankError, match=r"qkv .* is offloaded, and what its task has there needs the weight"):
        model(vit_input())


@pytest.mark.parametrize("when", ["before the conversion", "after it"])
def test_tasks_are_trained_saved_and_loaded_while_weights_are_offloaded(
    offload: Callable[[nn.Module], None], when: str, tmp_path: Path
) -> None:
    expected = converted()
    start = logits(expected)
    if when == "after it":
        model = converted()
        offload(model)
    else:
        plain = llama()
        offload(plain)
        model = get_recast_model(plain, RecastConfig(target_modules="all-mlp", group_size=2), "task")
        randomise(model, "task", size=0.1)
    assert train(model, IDS) == pytest.approx(train(expected, IDS), rel=1e-5)
    trained = logits(expected)
    assert not torch.allclose(trained, start, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "task", "task")), trained)
    randomise(model, "task", size=0.1)
    assert not torch.allclose(logits(model), trained, atol=1e-4)
    for name in ("task", "again"):  # into the task that is there, and beside it
        model.load_adapter(tmp_path / "task", name)
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), trained)


PARTS: dict[str, dict[str, Any]] = {
    "a classifier": {"num_classes": 5},
    "norms": {"train_norms": True},
    "a whole module": {"modules_to_save": ["head"]},
    "biases of the base": {"bias": "all"},
    "coefficients of biases": {"partners": ["bias"]},
    "bottlenecks": {"partners": [AdaptFormerConfig(dropout=0.0)]},
    "a LoRA": {"lora_config": {"r": 2, "target_modules": ["fc1"]}},
    "main directions": {"num_directions": 2},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_new_task_of_an_offloaded_model_computes_and_is_trained(
    part: dict[str, Any], offload: Callable[[nn.Module], None]
) -> None:
    torch.manual_seed(0)
    expected = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], **part), "task")
    plain = tiny_vit()
    offload(plain)
    torch.manual_seed(0)
    model = get_recast_model(plain, RecastConfig(target_modules=["qkv"], **part), "task")
    for each in (expected, model):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        each.train()
        for _ in range(2):
            optimizer.zero_grad()
            each(vit_input()).square().sum().backward()
            optimizer.step()
        each.eval()
    torch.testing.assert_close(model(vit_input()), expected(vit_input()))
    with model.disable_adapter():
        assert not torch.allclose(model(vit_input())[..., :3], expected(vit_input())[..., :3], atol=1e-4)


def test_calls_ask_for_what_tasks_have_once(offload: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_classes=3), "task").eval()
    offload(model.get_base_model())
    expected = model(vit_input())  # from now on what is trained stays where it computes
    monkeypatch.delattr(state, "task_entries")
    assert torch.equal(model(vit_input()), expected)


def test_a_copy_of_an_offloaded_part_does_not_copy_the_weights_of_the_whole_model(offload: Callable[[nn.Module], None]) -> None:
    plain = tiny_vit()
    offload(plain)
    assert plain_copy(plain.head)._hf_hook.weights_map is plain.head._hf_hook.weights_map


def test_a_pool_does_not_copy_the_weights_of_the_whole_model_with_a_classifier(offload: Callable[[nn.Module], None]) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_classes=3), "task")
    offload(model.get_base_model())
    expected = model.eval()(vit_input())
    pool = TaskPool(model)
    pool.add("task", "task")
    head = pool.head(0)
    assert head is not None
    assert head._hf_hook.weights_map is None
    pool.activate("task")
    torch.testing.assert_close(model(vit_input()), expected)


@pytest.mark.parametrize("head_type", ["linear", "prototypes"])
def test_a_frozen_classifier_is_taken_with_its_numbers(head_type: str, offload: Callable[[nn.Module], None]) -> None:
    config = RecastConfig(target_modules=["qkv"], num_classes=3, head_type=head_type, inference_mode=True)
    model = get_recast_model(tiny_vit(), config, "task").eval()
    own = model.get_base_model().head.modules_to_save["task"]
    for tensor in own.state_dict().values():
        tensor.copy_(torch.randn_like(tensor))
    expected, numbers = model(vit_input()), {key: value.clone() for key, value in own.state_dict().items()}
    offload(model.get_base_model())
    pool = TaskPool(model)
    pool.add("task", "task")
    head = pool.head(0)
    assert head is not None
    assert head._hf_hook.weights_map is None  # not that of the whole model
    torch.testing.assert_close(dict(head.state_dict()), numbers)
    model.add_weighted_adapter(["task"], [1.0], "sum", heads="first")
    if head_type == "linear":
        _, state_of_lora, _ = convert_to_lora(model, 2, "task")
        torch.testing.assert_close({key: state_of_lora[f"base_model.model.head.{key}"] for key in numbers}, numbers)
    for name in ("sum", "task"):
        model.set_adapter(name, inference_mode=True)
        torch.testing.assert_close(model(vit_input()), expected)
    pool.activate("task")
    torch.testing.assert_close(model(vit_input()), expected)


@pytest.mark.parametrize("evaluated", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("around", [False, True], ids=["backbone", "whole"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_an_optimizer_from_before_the_training_mode_trains_every_part(
    part: dict[str, Any], around: bool, evaluated: Callable[[], Any], offload: Callable[[nn.Module], None]
) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], **part), "task").eval()
    offload(model if around else model.get_base_model())
    given = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(given.values(), lr=1.0)
    with evaluated():
        start = None if evaluated is nullcontext else model(vit_input())
    model.train()
    if start is not None:
        torch.testing.assert_close(model(vit_input()), start)
    model(vit_input()).square().sum().backward()
    optimizer.step()
    now = dict(model.named_parameters())
    assert all(now[name] is parameter and parameter.grad is not None for name, parameter in given.items())


def test_norms_of_a_model_in_half_precision_are_computed_with_while_they_are_kept_elsewhere(
    offload: Callable[[nn.Module], None],
) -> None:
    """They are trained in float32, and the model's own is what they are rounded to."""
    model = get_recast_model(tiny_vit().bfloat16(), RecastConfig(train_norms=True, train_coefficients=False), "task").eval()
    move(model, ".modules_to_save.task.")
    expected = model(vit_input().bfloat16())
    offload(model)
    assert model.get_base_model().blocks[0].norm.modules_to_save["task"].weight.is_meta
    assert torch.equal(model(vit_input().bfloat16()), expected)
    model.train()
    model(vit_input().bfloat16()).square().mean().backward()
    own = model.get_base_model().blocks[0].norm.modules_to_save["task"].weight
    assert (own.dtype, own.grad is None) == (torch.float32, False)


@pytest.mark.parametrize("fields", PARTS.values(), ids=PARTS)
def test_every_part_of_a_task_is_saved_trained_and_loaded_once_it_is_offloaded(
    offload: Callable[[nn.Module], None], fields: dict[str, Any], tmp_path: Path
) -> None:
    model, expected = (vit(**{"group_size": None if "num_directions" in fields else 1, **fields}) for _ in range(2))
    for each in (model, expected):
        randomise(each)
    expected.load_state_dict(model.state_dict())
    x = vit_input(4)
    start = expected(x)
    offload(model)
    torch.testing.assert_close(model(x), start)
    model.save_pretrained(tmp_path)
    for each in (model, expected):
        each.train()
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
        each.eval()
    torch.testing.assert_close(model(x), expected(x))
    assert not torch.allclose(expected(x), start, atol=1e-4)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(x), start)


def test_a_task_is_loaded_into_parts_that_are_kept_elsewhere(offload: Callable[[nn.Module], None], tmp_path: Path) -> None:
    """Also where the classifier has never been trained since; norms are read anew from a disk each time they are looked at."""
    stored = vit(train_norms=True, modules_to_save=["head"])
    randomise(stored)
    for name, parameter in stored.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.rand(parameter.shape)
    stored.save_pretrained(tmp_path)
    model = vit(train_norms=True, modules_to_save=["head"])
    offload(model)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(vit_input()), stored(vit_input()))


def test_biases_are_not_merged_into_what_is_offloaded(offload: Callable[[nn.Module], None]) -> None:
    model = vit(partners=["bias"], train_coefficients=False)
    randomise(model)
    before = model(vit_input())
    offload(model)
    with pytest.raises(RecastBankError, match=r"a bias at .* is offloaded: nothing can be merged into it"):
        model.merge_adapter()
    torch.testing.assert_close(model(vit_input()), before)


@pytest.mark.parametrize("fields", [{}, {"rank": 2}])
def test_a_grown_bank_stays_in_memory(offload: Callable[[nn.Module], None], fields: dict[str, Any], tmp_path: Path) -> None:
    bank = grown(**fields)
    model = on(bank)
    expected = model(vit_input())
    before = {key: tensor.clone() for key, tensor in stored_templates(model)}
    offload(model)
    assert dict(stored_templates(model)).keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in stored_templates(model))
    with pytest.raises(RecastBankError, match=r"is offloaded, and what its task has there needs the weight"):
        model(vit_input())
    model.save_pretrained(tmp_path)
    config = RecastConfig.from_pretrained(tmp_path)
    config.bank = model.base_model.save_bank(tmp_path / "bank")
    torch.testing.assert_close(PeftModel.from_pretrained(tiny_vit(), tmp_path, config=config)(vit_input()), expected)


def stored_templates(model: PeftModel) -> list[tuple[str, torch.Tensor]]:
    return [entry for entry in model.named_parameters() if "recast_banks" in entry[0]]


def test_trained_norms_are_taken_out(offload: Callable[[nn.Module], None]) -> None:
    model = vit(train_norms=True, num_classes=3)
    offload(model.get_base_model())
    assert torch.equal(model.unload()(vit_input()), tiny_vit()(vit_input()))


def test_a_task_is_loaded_on_a_sharded_model_that_device_map_has_put_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, folder = converted(), tmp_path / "task"
    expected = logits(model)
    model.save_pretrained(folder)
    llama().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len([*(tmp_path / "base").glob("*.safetensors")]) > 1
    places = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(4)))
    spread = {place: "disk" if place in ("model.layers.1", "model.layers.2") else "cpu" for place in places}
    backbone = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=spread, offload_folder=str(tmp_path / "disk"))
    assert backbone.model.layers[1].mlp.up_proj.weight.is_meta
    loaded = AutoRecastModel.from_pretrained(folder / "task", backbone=backbone, is_trainable=True)
    torch.testing.assert_close(logits(loaded), expected)
    assert backbone.model.layers[1].mlp.up_proj.base_layer.weight.is_meta
    assert backbone.hf_device_map == spread
    losses = train(loaded, IDS)
    assert losses[-1] < losses[0]


def test_what_pefts_own_verb_takes_away_from_a_model_on_disk_is_said(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    converted().save_pretrained(tmp_path / "task")
    llama().save_pretrained(tmp_path / "base")
    spread = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "disk")}
    backbone = LlamaForCausalLM.from_pretrained(tmp_path / "base", **spread)
    with pytest.raises(RecastTargetError, match=r"device_map .*load that model again, .*AutoRecastModel\.from_pretrained"):
        PeftModel.from_pretrained(backbone, tmp_path / "task" / "task")
