"""RECAST beside every method that the installed PEFT registers: either all is right, or it is refused in clear words."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import layers_of, outputs, randomise, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from recast_peft import STACKABLE, RecastBankError, RecastConfig, RecastTargetError, get_recast_model

TARGETS = ["proj"]  # square, as some methods want it
ORDERS = ("around", "inside")  # the other method's layer around RECAST's, or inside it

# Fields that a method's config needs here beside its targets.
FIELDS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "init_lora_weights": False},
    "ADALORA": {"total_step": 10},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "IA3": {"feedforward_modules": []},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 8},
    "WAVEFT": {"n_frequency": 8},
    "MISS": {"r": 4},
    "SHIRA": {"r": 2},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SUPERTUNING": {"sparsity": 0.5},
    "LN_TUNING": {"target_modules": ["norm"]},
    "VBLORA": {"vector_length": 4, "num_vectors": 16, "topk": 2},
}


def method_config(name: str) -> Any:
    fields = dict(FIELDS.get(name, {}))
    if "target_modules" in PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)].__dataclass_fields__:
        fields.setdefault("target_modules", list(TARGETS))
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**fields)


def with_task(model: nn.Module) -> nn.Module:
    """A model with a RECAST task of known numbers; only the backbone is given back."""
    return task_model(model).base_model.model


def task_model(model: nn.Module) -> PeftModel:
    converted = get_peft_model(model, RecastConfig(target_modules=TARGETS), adapter_name="task").eval()
    randomise(converted, "task")
    return converted


def with_method(model: nn.Module, name: str) -> PeftModel:
    torch.manual_seed(5)
    result = get_peft_model(model, method_config(name), adapter_name="other").eval()
    generator = torch.Generator().manual_seed(6)
    for key, parameter in sorted((plain_key(k), p) for k, p in result.named_parameters()):
        if "other" in key and parameter.is_floating_point():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    return result


def plain_key(key: str) -> str:
    return key.replace(".base_layer", "")


def reference(name: str) -> PeftModel:
    """The method alone on a plain model whose weights are the composed ones."""
    plain = tiny_vit().double()
    with torch.no_grad():
        for key, layer in layers_of(with_task(tiny_vit().double())).items():
            plain.get_parameter(f"{key}.weight").copy_(layer.compose(["task"]))
    return with_method(plain, name)


def stacked(name: str, order: str) -> PeftModel:
    """Both on one model; what is returned is the wrapper of the other method."""
    if order == "around":
        return with_method(with_task(tiny_vit().double()), name)
    other = with_method(tiny_vit().double(), name)
    with_task(other.base_model.model)
    return other


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
            assert torch.equal(layer._weight_parameter, pristine[key])
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


# Methods without layers on weights (they work on prompts, attention caches or whole models of one kind), which therefore need
# a language model or embeddings, and never meet a RecastLayer.
APART = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "SHADOW",
    "TRAINABLE_TOKENS", "XLORA",
}  # fmt: skip
# Methods that PEFT itself does not put on a layer of another method, by what it says.
REFUSED_BY_PEFT = {
    "ADALORA": "only 1 trainable adapter", "FROD": "No layer types compatible",
    "PVERA": "No layers types compatible", "RANDLORA": "No layers types compatible",
    "SUPERTUNING": "RecastConfig", "TINYLORA": "RecastConfig", "VERA": "No layers types compatible",
}  # fmt: skip
METHODS = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != "RECAST"]


@pytest.mark.filterwarnings("ignore")
class TestRegistry:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", [name for name in METHODS if name not in APART])
    def test_a_method_stacks_or_is_refused(self, name, order, tmp_path):
        if order in STACKABLE.get(name.lower(), ()) or name == "LN_TUNING":
            check(name, order)
            check_files(name, order, tmp_path)
            return
        if order == "around" and name in REFUSED_BY_PEFT:
            with pytest.raises((ValueError, AttributeError, TypeError), match=REFUSED_BY_PEFT[name]):
                stacked(name, order)
            return
        base = with_task(tiny_vit()) if order == "around" else with_method(tiny_vit(), name).base_model.model
        # Poly's layers want to know the task of each sample
        before = None if name == "POLY" else outputs(base, vit_input())
        with pytest.raises(RecastTargetError, match=f"{name.lower()} cannot stand {order}"):
            (with_method(base, name) if order == "around" else with_task(base))
        assert before is None or torch.equal(outputs(base, vit_input()), before)

    def test_the_tables_name_methods_that_exist(self):
        assert APART | set(REFUSED_BY_PEFT) | {name.upper() for name in STACKABLE} <= set(METHODS)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **fields})


@pytest.fixture
def both() -> tuple[PeftModel, PeftModel]:
    """RECAST with two tasks, and a LoRA around it."""
    task = task_model(tiny_vit())
    task.add_adapter("second", RecastConfig(target_modules=TARGETS))
    randomise(task, "second", 9)
    torch.manual_seed(5)
    return task, get_peft_model(task.base_model.model, lora(), adapter_name="other").eval()


class TestProtection:
    def test_a_lora_merged_into_one_layer_leaves_its_neighbours_alone(self, both):
        _, model = both
        layers = [m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]
        neighbour = layers_of(model)["blocks.1.attn.proj"]
        before = neighbour.compose(["task"]).detach().clone()
        layers[0].merge()
        assert torch.equal(neighbour.compose(["task"]), before)
        assert not torch.equal(layers_of(model)["blocks.0.attn.proj"]._weight_parameter, tiny_vit().blocks[0].attn.proj.weight)

    def test_the_base_comes_back_to_the_last_bit(self, both):
        task, model = both
        for order in ((task, model), (model, task)):
            for one in order:
                one.merge_adapter()
            for one in order:
                one.unmerge_adapter()
        task.disable_adapter_layers()
        with torch.no_grad():
            assert torch.equal(model(vit_input()), tiny_vit()(vit_input()))

    def test_tasks_are_not_changed_under_a_merged_lora(self, both):
        task, model = both
        model.merge_adapter(["other"])
        task.set_adapter("second")
        with pytest.raises(RecastBankError, match="Unmerge them first"):
            model(vit_input())
        for layer in layers_of(model).values():
            with pytest.raises(RecastBankError, match="tasks wanted now:    second"):
                layer.merge_in_place(["second"])
        task.set_adapter("task")
        merged = outputs(model, vit_input())
        model.unmerge_adapter()
        torch.testing.assert_close(outputs(model, vit_input()), merged)

    def test_switching_the_whole_model_off_under_a_merged_lora(self, both):
        task, model = both
        model.merge_adapter()
        with task.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))

    def test_a_reader_of_the_weight_gets_the_composed_one(self, both):
        _, model = both
        layer = layers_of(model)["blocks.0.attn.proj"]
        assert torch.equal(model.base_model.model.blocks[0].attn.proj.weight, layer.compose(["task"]))

    def test_a_lora_that_is_merged_already_is_refused(self):
        model = get_peft_model(tiny_vit(), lora(), adapter_name="other")
        model.merge_adapter()
        with pytest.raises(RecastTargetError, match="not the pretrained one"):
            get_recast_model(model.base_model.model, RecastConfig(target_modules=TARGETS))

    def test_variants_that_read_the_weight_are_refused(self):
        with pytest.raises(RecastTargetError, match="Dora reads the pretrained weight"):
            get_peft_model(with_task(tiny_vit()), lora(use_dora=True))
        with pytest.raises(RecastTargetError, match="Dora reads the pretrained weight"):
            with_task(get_peft_model(tiny_vit(), lora(use_dora=True)).base_model.model)

    def test_rank_stabilised_lora_stacks(self):
        model = get_peft_model(with_task(tiny_vit()), lora(use_rslora=True)).eval()
        live = outputs(model, vit_input())
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, vit_input()), live)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_merge_on_their_own(self, both, copied):
        _, model = both
        live = outputs(model, vit_input())
        twin = copied(model.base_model.model)
        for module in twin.modules():
            if hasattr(module, "lora_A"):
                module.merge()
        torch.testing.assert_close(outputs(twin, vit_input()), live)
        assert all(layer._held is None for layer in layers_of(model).values())
        assert all(layer._held is not None for layer in layers_of(twin).values())

    def test_the_file_of_a_lora_around_is_that_of_the_lora_alone(self, tmp_path):
        alone = with_method(tiny_vit().double(), "LORA")
        alone.save_pretrained(tmp_path / "alone")
        stacked("LORA", "around").save_pretrained(tmp_path / "together", selected_adapters=["other"])
        x = vit_input().double()
        loaded = [PeftModel.from_pretrained(tiny_vit().double(), tmp_path / w / "other").eval() for w in ("alone", "together")]
        assert torch.equal(outputs(loaded[0], x), outputs(loaded[1], x))
        assert torch.equal(outputs(loaded[0], x), outputs(alone, x))
