"""RECAST beside every method that the installed PEFT registers: either all is right, or it is refused in clear words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import layers_of, outputs, randomise, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from stacked import ORDERS, lora, plain_key, stacked, task_model, with_method, with_seed, with_task
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from recast_peft import STACKABLE, RecastConfig, RecastTargetError, get_recast_model
from recast_peft.parts.stacking import BLIND


def reference(name: str) -> PeftModel:
    """The method alone on a plain model whose weights are the composed ones."""
    plain = tiny_vit().double()
    with torch.no_grad():
        for key, layer in layers_of(with_task(tiny_vit().double())).items():
            plain.get_parameter(f"{key}.weight").copy_(layer.compose(["task"]))
    return with_method(plain, name)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    wanted = {k: p for k, p in model.named_parameters() if ".other" in k and p.is_floating_point()}
    for parameter in wanted.values():
        parameter.requires_grad_()
    found = torch.autograd.grad(model(x).square().sum(), list(wanted.values()), allow_unused=True)
    return {plain_key(k): g for k, g in zip(wanted, found, strict=True) if g is not None}


def coefficient_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd, and by differences of the loss."""
    parameters = [layer.recast_coefficients["task"].requires_grad_() for layer in layers_of(model).values()]
    by_autograd = torch.cat([g.flatten() for g in torch.autograd.grad(model(x).square().sum(), parameters)])
    by_difference = []
    for parameter in parameters:
        for i in range(parameter.numel()):
            losses = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                    losses.append(model(x).square().sum().item())
                    parameter.view(-1)[i] -= step
            by_difference.append((losses[0] - losses[1]) / 2e-3)
    return by_autograd, torch.tensor(by_difference)


def check(name: str, order: str) -> None:
    x = vit_input().double()
    alone, both = reference(name), stacked(name, order)
    expected = outputs(alone, x)
    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(both, x), expected, **close)
    assert not torch.allclose(outputs(tiny_vit().double(), x), expected, rtol=1e-3)
    theirs, mine = gradients(alone, x), gradients(both, x)
    assert set(mine) == set(theirs)
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, **close)
    by_autograd, by_difference = coefficient_gradients(both, x)
    torch.testing.assert_close(by_autograd.double(), by_difference.double(), rtol=1e-2, atol=1e-3)
    assert by_autograd.abs().max() > 1e-3
    # merging: in any order the same, and nothing leaks into what the neighbours see
    if not any(hasattr(m, "merge") for m in both.modules() if isinstance(m, BaseTunerLayer) and "recast" not in repr(m)[:7]):
        return
    pristine = {k: layer.pretrained_weight.clone() for k, layer in layers_of(both).items()}
    for adapters in ([None], *([["task", "other"], ["other", "task"]] if name != "LN_TUNING" else [])):
        for adapter in adapters:
            try:
                both.base_model.merge_adapter(None if adapter is None else [adapter])
            except NotImplementedError:  # PEFT says that the method cannot be merged at all
                return
            torch.testing.assert_close(outputs(both, x), expected, **close)
            for key, layer in layers_of(both).items():
                assert torch.equal(layer.pretrained_weight, pristine[key])
        both.base_model.unmerge_adapter()
        torch.testing.assert_close(outputs(both, x), expected, **close)
        for key, layer in layers_of(both).items():
            assert torch.equal(layer.weight_parameter, pristine[key])
    plain = both.base_model.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in plain.modules())
    torch.testing.assert_close(outputs(plain, x), expected, **close)


def check_files(name: str, order: str, folder: Any) -> None:
    """Both parts are saved by their own wrappers, and loaded again in the same order."""
    x = vit_input().double()
    if order == "around":
        task = task_model(tiny_vit().double())
        other = with_method(task.base_model.model, name)
        other.save_pretrained(folder, selected_adapters=["other"])
    else:  # with RECAST around it PEFT would store other names
        other = with_method(tiny_vit().double(), name)
        other.save_pretrained(folder)
        task = task_model(other.base_model.model)
    expected = outputs(other, x)
    task.save_pretrained(folder, selected_adapters=["task"])
    places = {"task": folder / "task", "other": folder / "other"}
    model: nn.Module = tiny_vit().double()
    for adapter in ("task", "other") if order == "around" else ("other", "task"):
        loaded = PeftModel.from_pretrained(model, places[adapter], adapter_name=adapter).eval()
        model = loaded.base_model.model
    torch.testing.assert_close(outputs(loaded, x), expected, rtol=1e-4, atol=1e-5)


# Methods without layers on the weights of targets: they work on prompts, attention caches, embeddings or whole models, need a
# language model, and never meet a RecastLayer (X-LoRA's own LoRAs apart). They run on a tiny language model.
APART: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 3},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 1},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "SHADOW": {},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "XLORA": {"hidden_size": 16, "xlora_depth": 1},
}
# Methods whose tuner does not find its way around RECAST's layers.
BLIND_AROUND = {"ADALORA", "FROD", "PVERA", "RANDLORA", "SUPERTUNING", "TINYLORA", "VERA"}
METHODS = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != "RECAST"]

TEXT_TARGETS = ["q_proj", "v_proj"]


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return with_seed(0, lambda: LlamaForCausalLM(config).eval())


def with_text_task(model: nn.Module) -> nn.Module:
    converted = get_peft_model(model, RecastConfig(target_modules=TEXT_TARGETS), adapter_name="task").eval()
    randomise(converted, "task")
    return converted.base_model.model


def with_apart(model: nn.Module, name: str, fields: dict[str, Any]) -> PeftModel:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](task_type="CAUSAL_LM", **fields)
    result = with_seed(3, lambda: get_peft_model(model, config, adapter_name="other").eval())
    generator = torch.Generator().manual_seed(4)
    trained = {key: p for key, p in result.named_parameters() if p.requires_grad and "recast" not in key}
    for _, parameter in sorted((plain_key(key), p) for key, p in trained.items()):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return result


def logits(model: nn.Module, name: str) -> Tensor:
    which = {"task_ids": torch.tensor([0, 1])} if name == "MULTITASK_PROMPT_TUNING" else {}
    with torch.no_grad():
        return model(input_ids=torch.arange(10).view(2, 5), **which).logits


@pytest.mark.filterwarnings("ignore")
class TestRegistry:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", [name for name in METHODS if name not in APART])
    def test_a_method_stacks_or_is_refused(self, name, order, tmp_path):
        if order in STACKABLE.get(name.lower(), ()) or name == "LN_TUNING":
            check(name, order)
            check_files(name, order, tmp_path)
            return
        base = with_task(tiny_vit()) if order == "around" else with_method(tiny_vit(), name).base_model.model
        # Poly's layers want to know the task of each sample
        before = None if name == "POLY" else outputs(base, vit_input())
        layers = {key: type(module) for key, module in base.named_modules()}
        with pytest.raises(RecastTargetError, match=f"{name.lower()} cannot stand {order}") as refusal:
            (with_method(base, name) if order == "around" else with_task(base))
        if order == "around" and name in BLIND_AROUND:
            assert "finds no module or config there" in str(refusal.value)
        assert before is None or torch.equal(outputs(base, vit_input()), before)
        assert {key: type(module) for key, module in base.named_modules()} == layers
        assert "other" not in (base.peft_config if order == "around" else {})

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", APART)
    def test_a_method_apart_works_beside_a_task(self, name, order, tmp_path):
        fields = dict(APART[name])
        if name == "XLORA":
            with_seed(1, lambda: get_peft_model(tiny_llama(), lora(target_modules=TEXT_TARGETS))).save_pretrained(tmp_path)
            fields["adapters"] = {"0": str(tmp_path)}
        plain = tiny_llama()
        with torch.no_grad():
            for key, layer in layers_of(with_text_task(tiny_llama())).items():
                plain.get_parameter(f"{key}.weight").copy_(layer.compose(["task"]))
        expected = logits(with_apart(plain, name, fields), name)
        if order == "around":
            both = with_apart(with_text_task(tiny_llama()), name, fields)
        else:
            both = with_apart(tiny_llama(), name, fields)
            inner = both.base_model
            with_text_task(inner if isinstance(inner, LlamaForCausalLM) else inner.model)
        assert torch.equal(logits(both, name), expected)
        alone = logits(with_apart(tiny_llama(), name, fields), name)
        assert not torch.allclose(alone, expected, atol=1e-4)

    def test_the_tables_cover_every_method(self):
        assert set(APART) | set(BLIND_AROUND) | {name.upper() for name in STACKABLE} <= set(METHODS)
        assert {name.lower() for name in BLIND_AROUND} == set(BLIND)
        assert set(METHODS) | {"RECAST"} == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def test_torch_is_listened_to_only_while_another_adapter_is_added() -> None:
    hooks = torch.nn.modules.module._global_module_registration_hooks
    assert not hooks
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "task")
    assert not hooks
    get_peft_model(model, LoraConfig(target_modules=["qkv"]), "other")
    assert not hooks
