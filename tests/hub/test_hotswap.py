"""A stored task in place of one that a model has: ours, and what PEFT and transformers say of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_biases import config as biases
from grown_biases import source
from models import converted, layers_of, move, randomise, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap as peft_hotswap
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from recast_peft import (
    ReadoutConfig,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    get_recast_model,
    grow_bias_bank,
    hotswap_adapter,
    random_bank,
    readout_bank,
)
from recast_peft.composition.fingerprint import weight_fingerprint


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(vit_input(2))


def stored(folder: Path, size: float = 0.2, **config: Any) -> tuple[str, Tensor]:
    model = converted(**{"target_modules": ["qkv", "fc1"], "num_classes": 3, "head_module": "head", **config}).eval()
    randomise(model, "default", size=size)
    model.save_pretrained(folder)
    return str(folder), output(model)


def fresh() -> Any:
    return converted(target_modules=["qkv", "fc1"], num_classes=3, head_module="head").eval()


def test_the_numbers_of_another_task_are_put_in_place(tmp_path: Path) -> None:
    first, expected_first = stored(tmp_path / "a")
    second, expected_second = stored(tmp_path / "b", size=0.5)
    assert not torch.allclose(expected_first, expected_second)
    model = fresh()
    tensors = {name: id(p) for name, p in model.named_parameters()}
    for folder, expected in ((first, expected_first), (second, expected_second), (first, expected_first)):
        hotswap_adapter(model, folder, adapter_name="default")
        assert torch.equal(output(model), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == tensors


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    folder, expected = stored(tmp_path)
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    before = output(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(compiled, folder, "default")
        after = output(compiled)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(after, expected)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = fresh()
    randomise(model, "default", size=0.1)
    before = output(model)
    other_groups, _ = stored(tmp_path / "groups", target_modules=["qkv"])
    with pytest.raises(RecastConfigError, match=r"(?s)groups differs.*given.*expected.*load_adapter"):
        hotswap_adapter(model, other_groups, "default")
    more_classes, _ = stored(tmp_path / "classes", num_classes=5)
    with pytest.raises(RecastConfigError, match=r"(?s)num_classes differs.*given: +5.*expected: 3"):
        hotswap_adapter(model, more_classes, "default")
    good, _ = stored(tmp_path / "good")
    with pytest.raises(RecastConfigError, match="no RECAST task 'other'"):
        hotswap_adapter(model, good, "other")
    model.merge_adapter()
    with pytest.raises(RecastConfigError, match="is merged"):
        hotswap_adapter(model, good, "default")
    model.unmerge_adapter()
    assert torch.equal(output(model), before)
    layer = next(iter(layers_of(model).values()))
    layer._fingerprint = weight_fingerprint(torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(9)))
    with pytest.raises(RecastBaseMismatchError, match="other pretrained weights"):
        hotswap_adapter(model, good, "default")
    assert torch.equal(output(model), before)


def on_a_bank(kind: str, folder: Path, name: str, seed: int) -> tuple[Any, RecastConfig]:
    """The bank in a folder of its name, and the config of a task on it."""
    folder.mkdir(exist_ok=True)
    plain, place = tiny_vit(), str(folder / name)
    if kind == "coefficients":
        bank = random_bank(plain, RecastConfig(target_modules=["qkv"]), seed=seed).save(place)
        return bank, RecastConfig(bank=place, num_classes=3)
    if kind == "bias":
        bank = grow_bias_bank(plain, [source(seed), source(seed + 1)]).save(place)
        return bank, biases(place, num_classes=3)
    data = torch.randn(20 + seed, 5, 8, generator=torch.Generator().manual_seed(seed))
    bank = readout_bank(plain, data, progress=False).save(place)
    return bank, RecastConfig(target_modules=["qkv"], num_classes=3, partners=[ReadoutConfig(bank=place)])


def load_adapter(model: PeftModel, folder: str, adapter_name: str) -> None:
    model.load_adapter(folder, adapter_name)


@pytest.mark.parametrize("kind", ["coefficients", "bias", "readout"])
@pytest.mark.parametrize("put_in", [hotswap_adapter, load_adapter])
def test_only_a_task_on_the_same_bank_is_put_in_place_wherever_the_bank_lies(tmp_path: Path, kind: str, put_in: Any) -> None:
    banks, expected = {}, {}
    for name, seed in (("one", 1), ("copy", 1), ("other", 5)):
        banks[name], config = on_a_bank(kind, tmp_path, name, seed)
        task = get_recast_model(tiny_vit(), config, "task").eval()
        move(task, seed=seed)
        task.save_pretrained(tmp_path / f"on_{name}")
        expected[name] = output(task)
    assert banks["one"].fingerprint == banks["copy"].fingerprint != banks["other"].fingerprint
    model = get_recast_model(tiny_vit(), on_a_bank(kind, tmp_path, "one", 1)[1], "task").eval()
    for name in ("one", "copy"):
        put_in(model, str(tmp_path / f"on_{name}" / "task"), "task")
        torch.testing.assert_close(output(model), expected[name])
    with pytest.raises(RecastConfigError, match=rf"(?s)bank differs.*given.*{banks['other'].fingerprint}.*expected"):
        put_in(model, str(tmp_path / "on_other" / "task"), "task")
    torch.testing.assert_close(output(model), expected["copy"])


@pytest.mark.parametrize("put_in", [hotswap_adapter, load_adapter])
def test_a_classifier_of_modules_to_save_beside_those_of_num_classes(tmp_path: Path, put_in: Any) -> None:
    config = RecastConfig(target_modules=["qkv"], modules_to_save=["head"])
    folder, expected = stored(tmp_path, target_modules=["qkv"], modules_to_save=["head"], num_classes=None, head_module=None)
    model = converted("classes", num_classes=5, head_module="head")
    model.add_adapter("whole", config)
    model.set_adapter("whole")
    put_in(model, folder, "whole")
    assert torch.equal(output(model), expected)
    model.set_adapter("classes")
    assert output(model).shape == (2, 5)


@pytest.mark.parametrize("put_in", [hotswap_adapter, load_adapter])
def test_a_config_that_names_other_classes_than_its_numbers_have_is_refused(tmp_path: Path, put_in: Any) -> None:
    folder, _ = stored(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_classes": 5, "id2label": dict(enumerate("abcde"))}))
    model = fresh()
    before = output(model)
    with pytest.raises(RecastConfigError, match=r"(?s)num_classes differs.*given: +5.*expected: 3"):
        put_in(model, folder, "default")
    assert torch.equal(output(model), before)
    assert model.peft_config["default"].id2label is None


@pytest.mark.parametrize("put_in", [hotswap_adapter, load_adapter])
def test_an_adapter_of_another_method_is_refused(tmp_path: Path, put_in: Any) -> None:
    get_peft_model(tiny_vit(), LoraConfig(target_modules=["qkv"])).save_pretrained(tmp_path)
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "cars")
    with pytest.raises(RecastConfigError, match="method LORA; expected a task of RECAST"):
        put_in(model, str(tmp_path), "cars")


def test_PEFTs_own_refuses_with_a_message(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path)
    model = fresh()
    before = output(model)
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        peft_hotswap.hotswap_adapter(model, folder, adapter_name="default")
    assert torch.equal(output(model), before)


def test_transformers_own_refuses_with_a_message(tmp_path: Path) -> None:
    def llama() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))

    task = get_recast_model(llama(), RecastConfig(), "task")
    randomise(task, "task", size=0.3)
    task.save_pretrained(tmp_path)
    model = llama()
    model.load_adapter(str(tmp_path / "task"), adapter_name="task")
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(str(tmp_path / "task"), adapter_name="task", hotswap=True)
    assert torch.equal(model(input_ids=ids).logits, before)
