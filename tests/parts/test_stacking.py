"""RECAST beside every method that the installed PEFT registers: either all is right, or it is refused in clear words."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import KINDS, layers_of, outputs, randomise, seeded, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from recast_peft import STACKABLE, RecastBankError, RecastConfig, RecastTargetError, get_recast_model
from recast_peft.parts.stacking import BLIND

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


def with_seed(seed: int, build: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


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
        assert not torch.equal(layers_of(model)["blocks.0.attn.proj"].weight_parameter, tiny_vit().blocks[0].attn.proj.weight)

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

    def test_a_name_that_a_task_has_is_refused(self):
        task = task_model(tiny_vit())
        with pytest.raises(RecastTargetError, match="a RECAST task of this model has this name"):
            get_peft_model(task.base_model.model, lora(), adapter_name="task")
        assert isinstance(task.peft_config["task"], RecastConfig)
        assert not [key for key in task.state_dict() if "lora_" in key]

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
        assert all(layer.held is None for layer in layers_of(model).values())
        assert all(layer.held is not None for layer in layers_of(twin).values())

    def test_the_file_of_a_lora_around_is_that_of_the_lora_alone(self, tmp_path):
        alone = with_method(tiny_vit().double(), "LORA")
        alone.save_pretrained(tmp_path / "alone")
        stacked("LORA", "around").save_pretrained(tmp_path / "together", selected_adapters=["other"])
        x = vit_input().double()
        loaded = [PeftModel.from_pretrained(tiny_vit().double(), tmp_path / w / "other").eval() for w in ("alone", "together")]
        assert torch.equal(outputs(loaded[0], x), outputs(loaded[1], x))
        assert torch.equal(outputs(loaded[0], x), outputs(alone, x))


CONVOLUTIONS = ["LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3"]  # what PEFT puts on convolutions, of those that stack


@pytest.mark.filterwarnings("ignore")
class TestOtherModules:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_convolutions(self, name, order):
        kind = KINDS["conv2d"]
        fields = {**FIELDS.get(name, {}), "target_modules": kind.targets}
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**fields)

        def task(model: nn.Module) -> nn.Module:
            converted = get_peft_model(model, RecastConfig(target_modules=kind.targets), adapter_name="task").eval()
            randomise(converted, "task")
            return converted.base_model.model

        def other(model: nn.Module) -> PeftModel:
            result = with_seed(5, lambda: get_peft_model(model, copy.deepcopy(config), adapter_name="other").eval())
            generator = torch.Generator().manual_seed(6)
            for key, parameter in sorted((plain_key(k), p) for k, p in result.named_parameters()):
                if "other" in key:
                    parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            return result

        plain, x = seeded(kind.build), kind.inputs()
        with torch.no_grad():
            for key, layer in layers_of(task(seeded(kind.build))).items():
                plain.get_parameter(f"{key}.weight").copy_(layer.compose(["task"]))
        alone = other(plain)
        expected = outputs(alone, x)
        if order == "around" and name == "IA3":
            with pytest.raises(ValueError, match="(?s)RecastLayer.* is not supported"):
                other(task(seeded(kind.build)))
            return
        if order == "around":
            both = other(task(seeded(kind.build)))
        else:
            both = other(seeded(kind.build))
            task(both.base_model.model)
        torch.testing.assert_close(outputs(both, x), expected, rtol=1e-4, atol=1e-5)
        both.merge_adapter()
        alone.merge_adapter()  # PEFT's OFT of a convolution computes something else once it is merged
        torch.testing.assert_close(outputs(both, x), outputs(alone, x), rtol=1e-4, atol=1e-5)
        both.unmerge_adapter()
        pretrained = seeded(kind.build)
        for key, layer in layers_of(both).items():
            assert torch.equal(layer.weight_parameter, pretrained.get_parameter(f"{key}.weight"))

    @pytest.mark.parametrize("order", ORDERS)
    def test_multi_head_attention_is_refused(self, order):
        kind = KINDS["multi-head attention"]
        model, config = seeded(kind.build), lora(target_modules=kind.targets)
        recast = RecastConfig(target_modules=kind.targets)
        first, second = (recast, config) if order == "around" else (config, recast)
        base = get_peft_model(model, first, adapter_name="one").eval().base_model.model
        before = outputs(base, kind.inputs())
        with pytest.raises(RecastTargetError, match="attns.0, a multi-head attention"):
            get_peft_model(base, second, adapter_name="two")
        assert torch.equal(outputs(base, kind.inputs()), before)

    @pytest.mark.parametrize("order", ORDERS)
    def test_compiled_as_one_graph(self, order):
        model = stacked("LORA", order)
        expected = outputs(model, vit_input().double())
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(outputs(compiled, vit_input().double()), expected, rtol=1e-10, atol=1e-12)

    def test_every_sample_its_own_task_under_a_lora(self, both):
        task, model = both
        x = vit_input(3)
        apart = []
        for name, row in zip(("second", "task"), x, strict=False):
            task.set_adapter(name)
            apart.append(outputs(model, row[None])[0])
        with task.disable_adapter():
            assert torch.equal(outputs(model, x), outputs(tiny_vit(), x))
        mixed = outputs(task, x, adapter_names=["second", "task", "__base__"])
        torch.testing.assert_close(mixed[:2], torch.stack(apart), rtol=1e-5, atol=1e-6)
        lora_alone = get_peft_model(tiny_vit(), lora(), adapter_name="other").eval()
        lora_alone.load_state_dict({k: v for k, v in _plain_keys(model).items() if "recast" not in k})
        torch.testing.assert_close(mixed[2], outputs(lora_alone, x[2:])[0], rtol=1e-5, atol=1e-6)

    def test_every_sample_its_own_lora_around_a_task(self, both):
        _, model = both
        x = vit_input(2)
        with_lora = outputs(model, x)[0]
        mixed = outputs(model, x, adapter_names=["other", "__base__"])
        torch.testing.assert_close(mixed[0], with_lora, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mixed[1], outputs(task_model(tiny_vit()), x)[1], rtol=1e-5, atol=1e-6)


def _plain_keys(model: nn.Module) -> dict[str, Tensor]:
    """A model's state with the names that it would have without RECAST's layers."""
    return {key.replace(".base_layer.base_layer.", ".base_layer."): value for key, value in model.state_dict().items()}


class TestReleasedBanks:
    def compressed(self, **fields: Any) -> PeftModel:
        config = RecastConfig(target_modules=TARGETS, num_templates=1, **fields)
        model = get_peft_model(tiny_vit(), config, adapter_name="task").eval()
        randomise(model, "task")
        return model

    def test_a_lora_around_needs_the_pretrained_weights(self):
        model = self.compressed()
        before = outputs(model, vit_input())
        with pytest.raises(RecastTargetError, match=r"released for a compressed bank.*\n?.*keep_base_weights=True"):
            get_peft_model(model.base_model.model, lora(), adapter_name="other")
        assert torch.equal(outputs(model, vit_input()), before)
        assert list(model.peft_config) == ["task"]

    @pytest.mark.parametrize("order", ORDERS)
    def test_merging_where_a_bank_stands_for_the_weight(self, order):
        if order == "around":
            model = get_peft_model(
                self.compressed(keep_base_weights=True).base_model.model, lora(), adapter_name="other"
            ).eval()
        else:
            model = get_peft_model(tiny_vit(), lora(), adapter_name="other").eval()
            converted = get_peft_model(
                model.base_model.model, RecastConfig(target_modules=TARGETS, num_templates=1), adapter_name="task"
            ).eval()
            randomise(converted, "task")
        live = outputs(model, vit_input())
        for _ in range(2):
            model.merge_adapter()
            torch.testing.assert_close(outputs(model, vit_input()), live)
            model.unmerge_adapter()
            assert torch.equal(outputs(model, vit_input()), live)
        assert all(layer.is_released == (order == "inside") for layer in layers_of(model).values())


def test_torch_is_listened_to_only_while_another_adapter_is_added() -> None:
    hooks = torch.nn.modules.module._global_module_registration_hooks
    assert not hooks
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]), "task")
    assert not hooks
    get_peft_model(model, LoraConfig(target_modules=["qkv"]), "other")
    assert not hooks
