"""Partners: AdaptFormer, Piggyback and CLR beside RECAST, and alone, on transformers and convolutional networks."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from models import TinyVit, composed_weights, layers_of, outputs, randomise, reference_model, seeded, tiny_vit, vit_input
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora as peft_convert_to_lora
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from recast_peft import (
    PARTNERS,
    AdaptFormerConfig,
    BiasConfig,
    CLRConfig,
    PartnerConfig,
    PiggybackConfig,
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    RecastLoadError,
    RecastTargetError,
    TaskPool,
    convert_to_lora,
    create_recast_optimizer,
    get_recast_model,
    plan_recast,
)
from recast_peft.cli import main
from recast_peft.parts.partner import PartnerHook, partner_holders

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class TinyCnn(nn.Module):
    """Convolutions of all sizes and strides, two of one shape, and a head. Input: ``(batch, 3, height, width)``."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.point = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.norm(self.conv2(torch.tanh(self.conv1(x))))
        return self.head(torch.tanh(self.point(x)).mean(dim=(2, 3)))


def tiny_cnn() -> TinyCnn:
    return seeded(TinyCnn)  # type: ignore[return-value]


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 9, 8, generator=torch.Generator().manual_seed(5))


def with_biases(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same model with biases that are not small: those of fresh norms are zero."""

    def built() -> nn.Module:
        model = build()
        generator = torch.Generator().manual_seed(6)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        return model

    return built


@dataclass(frozen=True)
class Case:
    """A partner with options on a model: the options, the numbers that it trains, worked out by hand."""

    partner: PartnerConfig
    numbers: int
    build: Callable[[], nn.Module] = tiny_vit
    inputs: Callable[..., Tensor] = vit_input
    targets: list[str] = field(default_factory=lambda: ["qkv"])

    @property
    def config(self) -> RecastConfig:
        return RecastConfig(target_modules=list(self.targets), partners=[self.partner])


CNN: dict[str, Any] = {"build": tiny_cnn, "inputs": image, "targets": ["conv1", "conv2"]}
CASES: dict[str, Case] = {
    # 4 blocks of (8 + 1) * 5 down and (5 + 1) * 8 up
    "adaptformer": Case(AdaptFormerConfig(bottleneck=5, dropout=0.0), 4 * (45 + 48)),
    "adaptformer with a norm": Case(AdaptFormerConfig(bottleneck=2, dropout=0.0, layer_norm=True), 4 * (18 + 24 + 16)),
    # qkv, proj, fc1 and fc2 of 4 blocks
    "bias": Case(BiasConfig(), 4 * 4, build=with_biases(tiny_vit)),
    "bias of named layers": Case(BiasConfig(target_modules=["fc1", "qkv"]), 4 * 2, build=with_biases(tiny_vit)),
    "bias of convolutions": Case(
        BiasConfig(target_modules=["stem", "point", "norm"]),
        3,
        build=with_biases(tiny_cnn),
        inputs=image,
        targets=["conv1", "conv2"],
    ),
    # 4, 4, 4 and 6 channels of 3x3
    "clr": Case(CLRConfig(), 18 * 9, **CNN),
    "clr with factors after 1x1": Case(CLRConfig(pointwise_kernel_size=1), 12 * 9 + 6, **CNN),
    # 4 blocks of 8 x 24; every bit has a score
    "piggyback": Case(PiggybackConfig(), 4 * 8 * 24),
    "piggyback beside the targets": Case(PiggybackConfig(target_modules=["qkv", "fc1"]), 4 * (8 * 24 + 8 * 16)),
    "piggyback on convolutions": Case(PiggybackConfig(target_modules="all-conv"), 108 + 144 + 144 + 24, **CNN),
}
ON_BIASES = [name for name in CASES if name.startswith("bias")]
ON_OUTPUTS = [name for name in CASES if not name.startswith(("piggyback", "bias"))]
ON_WEIGHTS = [name for name in CASES if name.startswith("piggyback")]


def learn(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Give coefficients and partners of a task numbers that a test would see."""
    randomise(model, adapter, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_partners(name) and f".{adapter}." in name:
                size = 0.02 if name.endswith("scores") else 0.5
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)


def is_partners(name: str) -> bool:
    return "recast_partners" in name or "recast_masks" in name


def partner_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The numbers of a task's partners by the place and the last part of their names."""
    found = {}
    for name, parameter in model.named_parameters():
        if is_partners(name) and f".{adapter}." in name:
            place = name.split("recast_partners.")[1].split(".")[0].replace("/", ".") if "recast_partners" in name else ""
            place = place or name.removeprefix("base_model.model.").partition(".recast_masks")[0]
            found[f"{place}:{name.partition(f'.{adapter}.')[2]}"] = parameter.detach()
    return found


def learned(name: str, adapter: str = "default") -> PeftModel:
    case = CASES[name]
    model = get_recast_model(case.build(), case.config, adapter).eval()
    learn(model, adapter)
    return model


def expected_model(name: str, model: PeftModel) -> nn.Module:
    """A plain model that computes by plain arithmetic what the task's coefficients and partner should."""
    case = CASES[name]
    plain = reference_model(case.build(), model)
    tensors = partner_tensors(model)
    places = list(dict.fromkeys(key.partition(":")[0] for key in tensors))
    for place in places:
        own = {key.partition(":")[2]: value for key, value in tensors.items() if key.startswith(f"{place}:")}
        module = plain.get_submodule(place)
        parent = plain.get_submodule(place.rpartition(".")[0])
        if isinstance(case.partner, AdaptFormerConfig):
            setattr(parent, place.rpartition(".")[2], Beside(module, own))
        elif isinstance(case.partner, CLRConfig):
            channels, size = own["offset"].shape[0], own["offset"].shape[-1]
            follower = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
            identity = torch.zeros(channels, 1, size, size)
            identity[:, 0, size // 2, size // 2] = 1
            follower.weight.data = identity + own["offset"]
            setattr(parent, place.rpartition(".")[2], nn.Sequential(module, follower))
        elif isinstance(case.partner, BiasConfig):
            module.bias.data = module.bias.data * (1 + own["offset"])
        else:
            module.weight.data = module.weight.data * (own["scores"] > 0.005)
    return plain.eval()


class Beside(nn.Module):
    """AdaptFormer's equation, written down once more."""

    def __init__(self, mlp: nn.Module, own: dict[str, Tensor]) -> None:
        super().__init__()
        self.mlp, self.own = mlp, own

    def forward(self, x: Tensor) -> Tensor:
        h = x
        if "normalization.weight" in self.own:
            h = F.layer_norm(x, x.shape[-1:], self.own["normalization.weight"], self.own["normalization.bias"])
        h = (h @ self.own["down_projection.weight"].T + self.own["down_projection.bias"]).clamp_min(0)
        return self.mlp(x) + 0.1 * (h @ self.own["up_projection.weight"].T + self.own["up_projection.bias"])


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_every_partner_has_a_case():
    own = {method for method, config in PARTNERS.items() if config.__module__.startswith("recast_peft.")}
    assert {case.partner.method for case in CASES.values()} == own


@pytest.mark.parametrize("name", CASES)
class TestEveryPartner:
    def test_changes_nothing_while_it_is_fresh(self, name):
        case = CASES[name]
        for dtype in (torch.float32, torch.bfloat16):
            plain = case.build().to(dtype)
            inputs = case.inputs().to(dtype)
            expected = outputs(plain, inputs)
            model = get_recast_model(plain, case.config).eval()
            assert torch.equal(outputs(model, inputs), expected)

    def test_computes_what_its_paper_says_with_the_composed_weights(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        result = outputs(model, inputs)
        torch.testing.assert_close(result, outputs(expected_model(name, model), inputs), rtol=1e-4, atol=1e-5)
        without = reference_model(CASES[name].build(), model)
        assert (result - outputs(without, inputs)).abs().max() > 1e-2

    def test_is_trained_with_the_coefficients_and_counted(self, name):
        model = get_recast_model(CASES[name].build(), CASES[name].config)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for n, p in trained.items() if is_partners(n)) == CASES[name].numbers
        assert any("recast_coefficients" in n for n in trained)
        assert all(is_partners(n) or "recast_coefficients" in n for n in trained)
        learn(model)
        model(CASES[name].inputs()).square().sum().backward()
        silent = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
        assert not silent
        status = model.get_model_status()
        assert status.trainable_params == sum(p.numel() for p in trained.values())
        assert (status.enabled, status.active_adapters, status.requires_grad) == (True, ["default"], {"default": True})

    def test_comes_back_from_its_file_to_the_last_bit(self, name, tmp_path):
        model = learned(name)
        live = outputs(model, CASES[name].inputs())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(CASES[name].build(), tmp_path).eval()
        assert loaded.peft_config["default"].partners == [CASES[name].partner]
        assert torch.equal(outputs(loaded, CASES[name].inputs()), live)
        again = PeftModel.from_pretrained(CASES[name].build(), tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(outputs(again, CASES[name].inputs()), live)

    def test_goes_with_its_task(self, name):
        model = learned(name, "first")
        case = CASES[name]
        model.add_adapter("second", case.config)
        learn(model, "second", seed=2)
        model.add_adapter("bare", RecastConfig(target_modules=list(case.targets)))
        inputs = case.inputs()
        live = {}
        for task in ("first", "second", "bare"):
            model.set_adapter(task)
            trained = [n for n, p in model.named_parameters() if p.requires_grad]
            assert trained
            assert all(f".{task}" in n for n in trained)
            live[task] = outputs(model, inputs)
        plain = outputs(case.build(), inputs)
        assert torch.equal(live["bare"], plain)
        assert not torch.allclose(live["first"], live["second"], atol=1e-2)
        model.set_adapter("second")
        with model.disable_adapter():
            assert torch.equal(outputs(model, inputs), plain)
        assert torch.equal(outputs(model, inputs), live["second"])
        model.delete_adapter("first")
        assert not [n for n in model.state_dict() if ".first" in n]
        assert torch.equal(outputs(model, inputs), live["second"])
        model.delete_adapter("second")
        assert torch.equal(outputs(model, inputs), plain)

    def test_differs_from_sample_to_sample(self, name):
        model = learned(name, "first")
        case = CASES[name]
        model.add_adapter("second", case.config)
        learn(model, "second", seed=2)
        inputs = case.inputs(4)
        names = ["second", "first", "__base__", "second"]
        mixed = outputs(model, inputs, adapter_names=names)
        for row, task in enumerate(names):
            if task == "__base__":
                with model.disable_adapter():
                    expected = outputs(model, inputs[row : row + 1])
            else:
                model.set_adapter(task)
                expected = outputs(model, inputs[row : row + 1])
            torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-4, atol=1e-5)

    def test_leaves_no_trace_when_it_is_unloaded(self, name):
        model = learned(name)
        plain = model.unload()
        assert list(plain.state_dict()) == list(CASES[name].build().state_dict())
        assert torch.equal(outputs(plain, CASES[name].inputs()), outputs(CASES[name].build(), CASES[name].inputs()))
        assert not any(isinstance(hook, PartnerHook) for m in plain.modules() for hook in m._forward_hooks.values())
        assert not any(m._forward_hooks_with_kwargs for m in plain.modules())

    def test_follows_a_copy_of_its_model(self, name):
        model = learned(name)
        live = outputs(model, CASES[name].inputs())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(outputs(twin, CASES[name].inputs()), live)
            learn(twin, seed=7)
            assert not torch.allclose(outputs(twin, CASES[name].inputs()), live, atol=1e-2)
            assert torch.equal(outputs(model, CASES[name].inputs()), live)

    def test_alone_trains_no_coefficient(self, name, tmp_path):
        case = CASES[name]
        config = case.config
        config.train_coefficients = False
        model = get_recast_model(case.build(), config)
        assert model.get_nb_trainable_parameters()[0] == case.numbers
        with model.disable_adapter():
            pass
        model.set_adapter("default")
        model.set_requires_grad("default")
        assert model.get_nb_trainable_parameters()[0] == case.numbers
        optimizer = create_recast_optimizer(model, lr=0.1)
        assert len(optimizer.param_groups) == 1
        for _ in range(3):
            optimizer.zero_grad()
            model(case.inputs()).square().sum().backward()
            optimizer.step()
        assert not any(
            layer.recast_coefficients["default"].any() for layer in layers_of(model).values() if layer.recast_coefficients
        )
        assert not torch.allclose(outputs(model, case.inputs()), outputs(case.build(), case.inputs()), atol=1e-3)
        model.save_pretrained(tmp_path)
        assert "(0 coefficients)" in (tmp_path / "README.md").read_text()
        loaded = PeftModel.from_pretrained(case.build(), tmp_path, is_trainable=True)
        assert loaded.get_nb_trainable_parameters()[0] == case.numbers
        assert torch.equal(outputs(loaded.eval(), case.inputs()), outputs(model.eval(), case.inputs()))

    def test_of_another_base_is_refused_though_no_coefficient_was_trained(self, name, tmp_path):
        case = CASES[name]
        config = case.config
        config.train_coefficients = False
        model = get_recast_model(case.build(), config)
        learn(model)
        for layer in layers_of(model).values():
            for values in layer.recast_coefficients.values():
                values.data.zero_()
        model.save_pretrained(tmp_path)
        other = seeded(TinyVit if case.inputs is vit_input else TinyCnn, seed=3)
        with pytest.raises(RecastBaseMismatchError):
            PeftModel.from_pretrained(other, tmp_path)

    def test_cannot_be_combined_converted_or_pooled(self, name, tmp_path):
        model = learned(name)
        model.add_adapter("bare", RecastConfig(target_modules=list(CASES[name].targets)))
        method = CASES[name].partner.method
        # coefficients of biases can be combined and pooled with their like: tests/test_bias_bank.py
        refused = (RecastBankError, "biases") if method == "bias" else (RecastConfigError, f"partner {method}")
        with pytest.raises(refused[0], match=refused[1]):
            model.add_weighted_adapter(["bare", "default"], [1.0, 1.0], "sum")
        with pytest.raises(RecastConfigError, match=f"partners {method}"):
            convert_to_lora(model, rank=2)
        with pytest.raises(TypeError, match="do not support LoRA"):
            peft_convert_to_lora(model, rank=2)
        before = outputs(model, CASES[name].inputs())
        pool = TaskPool(model, like="bare")
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        for source in ("default", tmp_path, CASES[name].config):
            with pytest.raises(refused[0], match=refused[1]):
                pool.add("taken", source)
        assert len(pool) == 0
        pool.add("bare", "bare")
        with pool.use("bare"):
            assert torch.equal(outputs(model, CASES[name].inputs()), outputs(CASES[name].build(), CASES[name].inputs()))
        assert torch.equal(outputs(model, CASES[name].inputs()), before)


@pytest.mark.parametrize("name", ON_WEIGHTS)
class TestMergingMasks:
    def test_gives_the_live_output_and_goes_back_to_the_same_tensors(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        layers = layers_of(model).values()
        before = [layer.pretrained_weight for layer in layers]
        kept = [weight.clone() for weight in before]
        live = outputs(model, inputs)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
        assert all((layer.get_base_layer().weight == 0).any() for layer in layers if layer.recast_masks)
        model.unmerge_adapter()
        assert all(
            layer.get_base_layer().weight.data_ptr() == weight.data_ptr() for layer, weight in zip(layers, before, strict=True)
        )
        assert all(torch.equal(layer.get_base_layer().weight, weight) for layer, weight in zip(layers, kept, strict=True))
        assert torch.equal(outputs(model, inputs), live)


@pytest.mark.parametrize("name", ON_WEIGHTS + ON_BIASES)
def test_merging_into_a_plain_model_keeps_the_output(name):
    model = learned(name)
    live = outputs(model, CASES[name].inputs())
    plain = model.merge_and_unload()
    assert list(plain.state_dict()) == list(CASES[name].build().state_dict())
    torch.testing.assert_close(outputs(plain, CASES[name].inputs()), live, rtol=1e-5, atol=1e-6)


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if n.endswith("bias") and not is_partners(n)}


@pytest.mark.parametrize("name", ON_BIASES)
class TestMergingBiases:
    def test_gives_the_live_output_and_goes_back_to_the_same_tensors(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        before = {n: (p.data_ptr(), p.detach().clone()) for n, p in biases(model).items()}
        live = outputs(model, inputs)
        for _ in range(3):
            model.merge_adapter(safe_merge=True)
            torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
            moved = [n for n, p in biases(model).items() if not torch.equal(p, before[n][1])]
            assert len(moved) == CASES[name].numbers
            model.merge_adapter()  # what is merged is not merged twice
            torch.testing.assert_close(outputs(model, inputs), live, rtol=1e-5, atol=1e-6)
            model.unmerge_adapter()
            assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in biases(model).items())
            assert torch.equal(outputs(model, inputs), live)

    def test_unloading_a_merged_model_gives_the_pretrained_one(self, name):
        model = learned(name)
        model.merge_adapter()
        plain = model.unload()
        assert torch.equal(outputs(plain, CASES[name].inputs()), outputs(CASES[name].build(), CASES[name].inputs()))

    def test_of_two_tasks_adds_what_both_change(self, name):
        model = learned(name, "first")
        model.add_adapter("second", CASES[name].config)
        learn(model, "second", seed=2)
        parts = [partner_tensors(model, task) for task in ("first", "second")]
        pretrained = {n: p.detach().clone() for n, p in biases(model).items()}
        model.merge_adapter(["first"])
        model.merge_adapter(["second"])
        for key in parts[0]:
            place = key.partition(":")[0]
            (own,) = [n for n in pretrained if f"{place}.b" in n]
            expected = pretrained[own] * (1 + parts[0][key] + parts[1][key])
            torch.testing.assert_close(biases(model)[own].detach(), expected)

    def test_ends_where_another_task_is_put_in_force_or_added(self, name):
        model = learned(name, "first")
        model.add_adapter("second", CASES[name].config)
        learn(model, "second", seed=2)
        model.add_adapter("bare", RecastConfig(target_modules=list(CASES[name].targets)))
        randomise(model, "bare", seed=4)
        inputs, before, live = CASES[name].inputs(), {n: p.detach().clone() for n, p in biases(model).items()}, {}
        for task in ("first", "second", "bare"):
            model.set_adapter(task)
            live[task] = outputs(model, inputs)
        for task in ("second", "bare"):
            model.set_adapter("first")
            model.merge_adapter()
            with pytest.warns(UserWarning, match="Unmerging the model first"):
                model.set_adapter(task)
            assert torch.equal(outputs(model, inputs), live[task])
        model.set_adapter("first")
        model.merge_adapter()
        merged = outputs(model, inputs)
        model.add_adapter("third", CASES[name].config)
        assert torch.equal(outputs(model, inputs), merged)  # a task is put in beside it, and changes nothing
        model.unmerge_adapter()
        assert torch.equal(outputs(model, inputs), live["first"])
        assert all(torch.equal(p, before[n]) for n, p in biases(model).items())

    def test_is_undone_where_tasks_are_switched_off(self, name):
        model = learned(name)
        inputs = CASES[name].inputs()
        live = outputs(model, inputs)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, inputs), outputs(CASES[name].build(), inputs))
        assert torch.equal(outputs(model, inputs), live)

    def test_that_fails_leaves_no_bias_merged(self, name):
        model = learned(name)
        before = {n: p.detach().clone() for n, p in biases(model).items()}
        for layer in layers_of(model).values():
            layer.recast_coefficients["default"].data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)
        assert all(torch.equal(p, before[n]) for n, p in biases(model).items())

    def test_moves_with_the_model(self, name):
        model = learned(name)
        model.merge_adapter()
        model.to(torch.float64)
        inputs = CASES[name].inputs().double()
        model.unmerge_adapter()
        expected = learned(name).to(torch.float64)
        torch.testing.assert_close(outputs(model, inputs), outputs(expected, inputs))


class TestBiases:
    def test_of_norms_over_channels_are_told_from_those_over_features(self):
        plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
        for parameter in plain.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        config = RecastConfig(target_modules=["3"], partners=[BiasConfig(target_modules=["0", "1", "2"])])
        model = get_recast_model(copy.deepcopy(plain), config).eval()
        learn(model)
        for place, own in partner_tensors(model).items():
            plain[int(place[0])].bias.data *= 1 + own
        plain[3].weight.data = layers_of(model)["3"].weight.detach()
        x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(outputs(model, x), outputs(plain.eval(), x))

    def test_of_layer_norms_lie_along_the_last_dimension(self):
        plain = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)))
        nn.init.uniform_(plain[1].bias, 0.5, 1.5)
        config = RecastConfig(target_modules=["0"], partners=[BiasConfig(target_modules=["1"])])
        model = get_recast_model(copy.deepcopy(plain), config).eval()
        with torch.no_grad():
            dict(model.named_parameters())["base_model.model.recast_partners.1.bias.modules_to_save.default.offset"].fill_(0.5)
        plain[1].bias.data *= 1.5
        x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3))  # as many tokens as features
        torch.testing.assert_close(outputs(model, x), outputs(plain.eval(), x))

    def test_stand_by_themselves_neither_at_the_head_nor_at_the_patches(self):
        backbone = timm.create_model("test_vit", num_classes=5)
        places = plan_recast(backbone, RecastConfig(num_classes=3, partners=["bias"])).parts["bias"]
        names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert places == {f"blocks.{block}.{name}": 1 for block in range(len(backbone.blocks)) for name in names}

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: nn.Linear(4, 4, bias=False), "Linear has no bias"),
            (lambda: nn.MultiheadAttention(4, 2).out_proj, "a multi-head attention reads it"),
            (lambda: nn.Bilinear(4, 4, 4), "not known where the bias of Bilinear lies"),
        ],
    )
    def test_that_are_none_are_refused(self, build, message):
        plain = nn.ModuleDict({"target": nn.Linear(4, 4), "other": build()})
        config = RecastConfig(target_modules=["target"], partners=[BiasConfig(target_modules=["other"])])
        with pytest.raises(RecastTargetError, match=message):
            get_recast_model(plain, config)


@pytest.mark.parametrize("name", ON_OUTPUTS)
class TestPartnersOnOutputs:
    def test_cannot_be_merged_and_nothing_is_changed(self, name):
        model = learned(name)
        model.add_adapter("bare", RecastConfig(target_modules=list(CASES[name].targets)))
        randomise(model, "bare", seed=4)
        before, live = frozen_state(model), outputs(model, CASES[name].inputs())
        for call in (
            model.merge_adapter,
            lambda: model.merge_adapter(["default"]),
            model.merge_and_unload,
        ):
            with pytest.raises(RecastBankError, match=CASES[name].partner.method):
                call()
        assert same_state(model, before)
        assert torch.equal(outputs(model, CASES[name].inputs()), live)
        model.merge_adapter(["bare"])  # while it is merged, the active task's partner does not act
        merged = outputs(model, CASES[name].inputs())
        model.unmerge_adapter()
        assert torch.equal(outputs(model, CASES[name].inputs()), live)
        model.set_adapter("bare")
        bare = outputs(model, CASES[name].inputs())
        torch.testing.assert_close(merged, bare, rtol=1e-5, atol=1e-6)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, CASES[name].inputs()), bare, rtol=1e-5, atol=1e-6)

    def test_are_there_again_after_a_merge_that_failed(self, name):
        model = learned(name, "first")
        live = outputs(model, CASES[name].inputs())
        model.add_adapter("broken", RecastConfig(target_modules=list(CASES[name].targets)))
        model.set_adapter("broken")
        for layer in layers_of(model).values():
            layer.recast_coefficients["broken"].data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            model.merge_and_unload(safe_merge=True)
        model.set_adapter("first")
        assert torch.equal(outputs(model, CASES[name].inputs()), live)

    def test_of_two_tasks_are_not_in_force_together(self, name):
        model = learned(name, "first")
        model.add_adapter("second", CASES[name].config)
        learn(model, "second", seed=2)
        live = outputs(model, CASES[name].inputs())
        with pytest.raises(RecastConfigError, match="first, second"):
            model.base_model.set_adapter(["first", "second"])
        assert model.active_adapters == ["first"]
        assert torch.equal(outputs(model, CASES[name].inputs()), live)

    def test_of_one_task_stand_beside_the_coefficients_of_another(self, name):
        case = CASES[name]
        model = learned(name, "first")
        model.add_adapter("bare", RecastConfig(target_modules=list(case.targets)))
        randomise(model, "bare", seed=4)
        model.base_model.set_adapter(["first", "bare"])
        together = outputs(model, case.inputs())
        model.base_model.set_adapter("first")
        with torch.no_grad():  # the coefficients of both in one task
            for layer in layers_of(model).values():
                layer.recast_coefficients["first"] += layer.recast_coefficients["bare"]
        torch.testing.assert_close(outputs(model, case.inputs()), together, rtol=1e-4, atol=1e-5)


class TestMasks:
    def test_of_two_tasks_keep_what_both_keep(self):
        model = learned("piggyback", "first")
        model.add_adapter("second", CASES["piggyback"].config)
        learn(model, "second", seed=2)
        model.base_model.set_adapter(["first", "second"])
        plain = tiny_vit()
        weights = composed_weights(plain, model, ("first", "second"))
        with torch.no_grad():
            for name, layer in layers_of(model).items():
                kept = (layer.recast_masks["first"].scores > 0.005) & (layer.recast_masks["second"].scores > 0.005)
                plain.get_submodule(name).weight.copy_(weights[f"{name}.weight"] * kept)
        torch.testing.assert_close(outputs(model, vit_input()), outputs(plain, vit_input()), rtol=1e-4, atol=1e-5)

    def test_are_trained_through_the_threshold(self):
        model = learned("piggyback").train()
        model(vit_input()).square().sum().backward()
        plain = reference_model(tiny_vit(), model).requires_grad_(False)
        masks = {}
        for name, layer in layers_of(model).items():
            masks[name] = (layer.recast_masks["default"].scores > 0.005).float().requires_grad_()
        weights = {f"{name}.weight": plain.get_submodule(name).weight * mask for name, mask in masks.items()}
        torch.func.functional_call(plain, weights, vit_input()).square().sum().backward()
        for name, layer in layers_of(model).items():
            torch.testing.assert_close(layer.recast_masks["default"].scores.grad, masks[name].grad, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", ON_WEIGHTS)
    def test_take_one_bit_for_each_entry_in_the_file(self, name, tmp_path):
        model = learned(name)
        model.save_pretrained(tmp_path)
        bits = {key: value for key, value in load_file(tmp_path / WEIGHTS).items() if "recast_masks" in key}
        masks = {
            layer.module_name: layer.recast_masks["default"].scores for layer in layers_of(model).values() if layer.recast_masks
        }
        assert set(bits) == {f"base_model.model.{name}.recast_masks.mask" for name in masks}
        for name, scores in masks.items():
            stored = bits[f"base_model.model.{name}.recast_masks.mask"]
            assert stored.dtype == torch.uint8
            assert len(stored) == math.ceil(scores.numel() / 8)
            by_hand = [(int(stored[i // 8]) >> (i % 8)) & 1 for i in range(scores.numel())]
            assert by_hand == (scores > 0.005).flatten().int().tolist()
            assert 0 < sum(by_hand) < len(by_hand)

    def test_of_a_state_dict_come_back_and_a_missing_one_is_said(self):
        model = learned("piggyback")
        state, live = get_peft_model_state_dict(model), outputs(model, vit_input())
        fresh = get_recast_model(tiny_vit(), CASES["piggyback"].config).eval()
        set_peft_model_state_dict(fresh, state)
        assert torch.equal(outputs(fresh, vit_input()), live)
        key = next(key for key in state if key.endswith(".mask"))
        before = frozen_state(fresh)
        with pytest.raises(RecastLoadError, match="missing"):
            set_peft_model_state_dict(fresh, {k: v for k, v in state.items() if k != key})
        with pytest.raises(RecastLoadError, match="wrongly shaped"):
            set_peft_model_state_dict(fresh, {**state, key: state[key][1:]})
        assert same_state(fresh, before)

    def test_stand_on_the_weight_that_a_lora_is_put_on(self):
        model = learned("piggyback")
        live = outputs(model, vit_input())
        both = get_peft_model(model.base_model.model, LoraConfig(target_modules=["qkv"]), "lora").eval()
        torch.testing.assert_close(outputs(both, vit_input()), live)
        both.merge_adapter()
        torch.testing.assert_close(outputs(both, vit_input()), live, rtol=1e-5, atol=1e-6)
        both.unmerge_adapter()
        torch.testing.assert_close(outputs(both, vit_input()), live)

    def test_act_on_compressed_banks_too(self, tmp_path):
        config = RecastConfig(target_modules=["qkv"], num_templates=1, partners=["piggyback"])
        model = get_recast_model(tiny_vit(), config).eval()
        learn(model)
        live = outputs(model, vit_input())
        model.save_pretrained(tmp_path)
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_vit(), tmp_path).eval(), vit_input()), live)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, vit_input()), live, rtol=1e-5, atol=1e-6)


class TestPlaces:
    @pytest.mark.parametrize("architecture", ["test_vit", "swin_tiny_patch4_window7_224"])
    def test_adaptformer_finds_the_mlps_of_timm(self, architecture):
        size = {"test_vit": 160, "swin_tiny_patch4_window7_224": 56}[architecture]
        small = {} if size == 160 else {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "img_size": size}
        backbone = seeded(lambda: timm.create_model(architecture, **small))
        places = [n for n, m in backbone.named_modules() if n.endswith(".mlp")]
        x = torch.randn(1, 3, size, size)
        before = outputs(backbone, x)
        model = get_recast_model(backbone, RecastConfig(partners=["adaptformer"])).eval()
        assert [holder.place for holder in partner_holders(model)] == places
        assert torch.equal(outputs(model, x), before)
        learn(model)
        assert not torch.allclose(outputs(model, x), before, atol=1e-2)

    def test_adaptformer_does_not_stand_beside_an_mlp_of_convolutions(self):
        backbone = seeded(lambda: nn.ModuleDict({"fc": nn.Linear(4, 4), "mlp": timm.layers.ConvMlp(4, 8, 4)}))
        partner = AdaptFormerConfig(target_modules=["mlp"])
        with pytest.raises(RecastTargetError, match="mlp: it begins or ends with a convolution"):
            get_recast_model(backbone, RecastConfig(target_modules=["fc"], partners=[partner]))

    def test_adaptformer_finds_the_mlps_of_transformers(self):
        small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        backbone = seeded(lambda: ViTModel(ViTConfig(image_size=16, patch_size=8, **small)))
        pixels = torch.randn(2, 3, 16, 16)
        expected = backbone(pixels).last_hidden_state
        model = get_recast_model(backbone, RecastConfig(partners=[AdaptFormerConfig(bottleneck=4)])).eval()
        assert len(partner_holders(model)) == 2
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, expected)
        learn(model)
        assert not torch.allclose(model(pixel_values=pixels).last_hidden_state, expected, atol=1e-2)

    def test_an_mlp_in_parts_is_refused_with_a_hint(self):
        small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        backbone = seeded(lambda: BertModel(BertConfig(vocab_size=20, **small)))
        before = frozen_state(backbone)
        with pytest.raises(RecastTargetError, match="split over several modules|name them with its target_modules"):
            get_recast_model(backbone, RecastConfig(partners=["adaptformer"]))
        with pytest.raises(RecastTargetError, match=r"intermediate: it holds no two layers"):
            get_recast_model(backbone, RecastConfig(partners=[AdaptFormerConfig(target_modules=["intermediate"])]))
        assert same_state(backbone, before)

    def test_can_be_named(self):
        config = RecastConfig(target_modules=["qkv"], partners=[AdaptFormerConfig(target_modules=["blocks.1.mlp", "3.mlp"])])
        model = get_recast_model(tiny_vit(), config)
        assert [holder.place for holder in partner_holders(model)] == ["blocks.1.mlp", "blocks.3.mlp"]
        config = RecastConfig(target_modules=["conv1"], partners=[CLRConfig(target_modules=r"conv\d")])
        model = get_recast_model(tiny_cnn(), config)
        assert [holder.place for holder in partner_holders(model)] == ["conv1", "conv2"]

    def test_clr_can_leave_out_convolutions_of_one_by_one(self):
        model = get_recast_model(tiny_cnn(), RecastConfig(partners=[CLRConfig(pointwise_kernel_size=None)]))
        assert [holder.place for holder in partner_holders(model)] == ["stem", "conv1", "conv2"]

    @pytest.mark.parametrize(
        ("partner", "message"),
        [
            (AdaptFormerConfig(), "adaptformer: it finds no place"),
            (AdaptFormerConfig(target_modules=["norm"]), "norm: it holds no two layers"),
            (CLRConfig(target_modules=["head"]), "head: Linear is no two-dimensional convolution"),
            (CLRConfig(target_modules=["point"], pointwise_kernel_size=None), "point: it is a 1x1 convolution"),
            (CLRConfig(target_modules=["konv1"]), r"konv1.*names no module of this model. Near: conv1"),
            (PiggybackConfig(target_modules=["norm"]), "norm: the weight of BatchNorm2d is a vector"),
        ],
    )
    def test_that_do_not_exist_or_do_not_suit_are_refused(self, partner, message):
        backbone = tiny_cnn()
        before = frozen_state(backbone)
        with pytest.raises(RecastTargetError, match=message):
            get_recast_model(backbone, RecastConfig(target_modules=["conv1"], partners=[partner]))
        assert same_state(backbone, before)
        assert isinstance(backbone.conv1, nn.Conv2d)

    def test_are_not_copied_whole_by_a_task(self):
        config = RecastConfig(target_modules=["qkv"], partners=["adaptformer"], modules_to_save=["blocks.3.mlp"])
        with pytest.raises(RecastConfigError, match=r"would copy blocks\.3\.mlp"):
            get_recast_model(tiny_vit(), config)
        model = learned("adaptformer")
        with pytest.raises(RecastConfigError, match=r"would copy blocks\.3\.mlp"):
            model.add_adapter("second", RecastConfig(target_modules=["qkv"], modules_to_save=["blocks.3"]))
        assert list(model.peft_config) == ["default"]

    def test_are_not_meant_by_names_of_the_models_own_modules(self):
        config = RecastConfig(target_modules=["qkv"], partners=[AdaptFormerConfig(layer_norm=True)], modules_to_save=["norm"])
        model = get_recast_model(tiny_vit(), config)
        saved = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        assert [n for n in saved if "recast_partners" not in n] == [f"base_model.model.blocks.{i}.norm" for i in range(4)]
        assert all(n.endswith(".adaptformer") for n in saved if "recast_partners" in n)

    def test_keep_their_partner_when_a_later_task_composes_the_weight(self):
        config = RecastConfig(target_modules=["conv1"], partners=[CLRConfig()])
        model = get_recast_model(tiny_cnn(), config, "first").eval()
        learn(model, "first")
        live = outputs(model, image())
        model.add_adapter("second", RecastConfig(target_modules=["conv2", "stem"]))
        learn(model, "second", seed=2)
        assert torch.equal(outputs(model, image()), live)
        model.set_adapter("second")
        second = outputs(model, image())
        mixed = outputs(model, image(), adapter_names=["second", "first", "first"])
        torch.testing.assert_close(mixed, torch.cat([second[:1], live[1:]]), rtol=1e-4, atol=1e-5)

    def test_may_lie_in_a_model_that_calls_all_of_its_children(self):
        backbone = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
        expected = outputs(backbone, image())
        model = get_recast_model(backbone, RecastConfig(target_modules=["0", "2"], partners=["clr"])).eval()
        assert torch.equal(outputs(model, image()), expected)
        learn(model)
        assert not torch.allclose(outputs(model, image()), expected, atol=1e-2)

    def test_that_give_no_tensor_are_said_when_the_model_runs(self):
        class Twice(TinyVit):
            def __init__(self) -> None:
                super().__init__(depth=1)
                inner = self.blocks[0].mlp.forward
                self.blocks[0].mlp.forward = lambda x: (inner(x), None)  # type: ignore[method-assign]

            def forward(self, x: Tensor) -> Tensor:
                return self.blocks[0].mlp(self.blocks[0].attn(x))[0]

        model = get_recast_model(seeded(Twice), RecastConfig(target_modules=["qkv"], partners=["adaptformer"]))
        with pytest.raises(RecastTargetError, match=r"blocks\.0\.mlp takes a Tensor and gives a tuple"):
            model(vit_input())


class TestTheConfig:
    def test_takes_objects_names_and_dictionaries(self):
        config = RecastConfig(partners=[CLRConfig(kernel_size=5), "piggyback", {"method": "adaptformer", "bottleneck": 8}])
        assert config.partners == [CLRConfig(kernel_size=5), PiggybackConfig(), AdaptFormerConfig(bottleneck=8)]
        assert RecastConfig(partners=[]).partners is None
        assert AdaptFormerConfig(target_modules={"b", "a"}).target_modules == ("a", "b")

    def test_is_stored_with_the_task_and_given_back_as_objects(self, tmp_path):
        partners = [AdaptFormerConfig(bottleneck=8, target_modules=["mlp"]), PiggybackConfig(threshold=0.0)]
        RecastConfig(partners=partners, train_coefficients=False).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / CONFIG).read_text())
        assert stored["partners"][0]["method"] == "adaptformer"
        assert stored["partners"][0]["bottleneck"] == 8
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert loaded.partners == partners
        assert loaded.train_coefficients is False

    @pytest.mark.parametrize(
        ("partners", "message"),
        [
            ("adaptformer", "expected a list of partners"),
            (["adaptfromer"], "did you mean 'adaptformer'"),
            ([3], "partners=3: expected a name"),
            ([{"bottleneck": 3}], "with a 'method'"),
            ([{"method": "clr", "size": 3}], "partners clr has no option 'size'; its options: target_modules, kernel_size"),
            (["clr", CLRConfig()], "names 'clr' twice"),
        ],
    )
    def test_refuses_what_is_no_partner(self, partners, message):
        with pytest.raises(RecastConfigError, match=message):
            RecastConfig(partners=partners)

    @pytest.mark.parametrize(
        ("partner", "option", "value"),
        [
            (AdaptFormerConfig, "bottleneck", 0),
            (AdaptFormerConfig, "bottleneck", True),
            (AdaptFormerConfig, "scale", float("nan")),
            (AdaptFormerConfig, "dropout", 1.0),
            (AdaptFormerConfig, "layer_norm", "in"),
            (AdaptFormerConfig, "target_modules", []),
            (AdaptFormerConfig, "target_modules", ""),
            (AdaptFormerConfig, "target_modules", [3]),
            (CLRConfig, "kernel_size", 2),
            (CLRConfig, "kernel_size", None),
            (CLRConfig, "pointwise_kernel_size", 4),
            (PiggybackConfig, "initial_score", 0.001),
            (PiggybackConfig, "threshold", "low"),
        ],
    )
    def test_refuses_values_that_cannot_be_used(self, partner, option, value):
        with pytest.raises(RecastConfigError, match=rf"{partner.__name__}\({option}="):
            partner(**{option: value})

    def test_refuses_another_kind_of_switch(self):
        with pytest.raises(RecastConfigError, match="train_coefficients"):
            RecastConfig(train_coefficients="no")


class TestFiles:
    def refused(self, folder: Path, build: Callable[[], nn.Module], inputs: Tensor) -> None:
        plain = build()
        before, start = frozen_state(plain), outputs(plain, inputs)
        with pytest.raises(RecastLoadError):
            PeftModel.from_pretrained(plain, folder)
        assert same_state(plain, before)
        assert torch.equal(outputs(plain, inputs), start)

    @pytest.mark.parametrize("name", CASES)
    def test_that_are_damaged_leave_the_model_as_it_was(self, name, tmp_path):
        case = CASES[name]
        learned(name).save_pretrained(tmp_path)
        entries = load_file(tmp_path / WEIGHTS)
        key = next(key for key in entries if is_partners(key))
        save_file({k: v for k, v in entries.items() if k != key}, tmp_path / WEIGHTS)
        self.refused(tmp_path, case.build, case.inputs())
        save_file({**entries, key: entries[key][1:].clone()}, tmp_path / WEIGHTS)
        self.refused(tmp_path, case.build, case.inputs())
        save_file({**entries, f"{key}.more": entries[key].clone()}, tmp_path / WEIGHTS)
        self.refused(tmp_path, case.build, case.inputs())

    def test_name_places_as_the_plain_model_does(self, tmp_path):
        get_recast_model(tiny_cnn(), RecastConfig(target_modules=["conv1"], partners=["clr"])).save_pretrained(tmp_path)
        keys = {key for key in load_file(tmp_path / WEIGHTS) if is_partners(key)}
        assert keys == {f"base_model.model.recast_partners.{n}.clr.offset" for n in ("stem", "conv1", "conv2", "point")}

    def test_say_what_is_in_them(self, tmp_path, capsys):
        config = RecastConfig(target_modules=["qkv"], partners=["piggyback", AdaptFormerConfig(bottleneck=5)], num_classes=3)
        model = get_recast_model(tiny_vit(), config)
        model.save_pretrained(tmp_path)
        shown = "piggyback 768 bits, adaptformer 372 numbers"  # worked out in CASES
        parts = set(shown.split(", "))
        card = (tmp_path / "README.md").read_text()
        assert all(part in card for part in parts)
        main(["inspect", str(tmp_path)])
        lines = capsys.readouterr().out.splitlines()
        line = next(line for line in lines if line.startswith("partners"))
        assert set(line.removeprefix("partners").strip().split(", ")) == parts
        assert "further numbers  27" in lines  # the head, 8 * 3 + 3

    def test_fresh_parameters_follow_the_seed_and_leave_the_global_generator(self):
        state = torch.get_rng_state()
        first, again, other = (
            partner_tensors(
                get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], partners=["adaptformer"], seed=seed))
            )
            for seed in (0, 0, 1)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["blocks.0.mlp:down_projection.weight"], other["blocks.0.mlp:down_projection.weight"])
        assert not torch.equal(first["blocks.0.mlp:down_projection.weight"], first["blocks.1.mlp:down_projection.weight"])
        # Kaiming uniform with a = sqrt(5): a bound of 1 / sqrt(inputs)
        down = first["blocks.0.mlp:down_projection.weight"]
        assert down.shape == (64, 8)
        assert 0.9 / math.sqrt(8) < down.abs().max() <= 1 / math.sqrt(8)
        assert not first["blocks.0.mlp:up_projection.weight"].any()


class TestTraining:
    @pytest.mark.parametrize("partner", [AdaptFormerConfig(), PiggybackConfig()])
    def test_a_compiled_model_has_no_break(self, partner):
        model = get_recast_model(tiny_vit(depth=1), RecastConfig(target_modules=["qkv"], partners=[partner])).eval()
        learn(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(outputs(compiled, vit_input()), outputs(model, vit_input()))

    def test_partners_have_a_learning_rate_of_their_own_and_no_decay(self):
        config = RecastConfig(target_modules=["qkv"], partners=["adaptformer", "piggyback"], num_classes=3)
        model = get_recast_model(tiny_vit(), config)
        groups = create_recast_optimizer(model, lr=0.01, partner_lr=0.003, weight_decay=0.1).param_groups
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.05, 0.0), (0.003, 0.0), (0.01, 0.1)]
        assert {id(p) for p in groups[1]["params"]} == {id(p) for n, p in model.named_parameters() if is_partners(n)}
        assert create_recast_optimizer(model, lr=0.01).param_groups[1]["lr"] == 0.01

    def test_coefficients_of_biases_are_trained_like_those_of_weights(self):
        config = RecastConfig(target_modules=["qkv"], num_classes=3, partners=["bias", AdaptFormerConfig(bottleneck=2)])
        model = get_recast_model(tiny_vit(), config)
        names = {id(p): n for n, p in model.named_parameters()}
        for partner_lr, expected in ((None, 0.07), (0.003, 0.003)):
            optimizer = create_recast_optimizer(model, lr=0.01, coefficient_lr=0.07, partner_lr=partner_lr, weight_decay=0.1)
            rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
            assert {rate for name, rate in rates.items() if name.endswith("offset")} == {(expected, 0)}
            assert {rate for name, rate in rates.items() if "_projection" in name} == {(partner_lr or 0.01, 0)}
            assert {rate for name, rate in rates.items() if "recast_coefficients" in name} == {(0.07, 0)}

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        backbone = seeded(
            lambda: timm.models.vision_transformer.VisionTransformer(
                img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
            )
        )
        config = RecastConfig(target_modules=["qkv"], partners=[AdaptFormerConfig(dropout=0.0), PiggybackConfig()])
        model = get_recast_model(backbone, config)
        learn(model)
        images = torch.randn(2, 3, 16, 16)
        gradients = []
        for checkpointed in (False, True):
            model.get_base_model().set_grad_checkpointing(checkpointed)
            model.train().zero_grad()
            model(images).square().sum().backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected)

    def test_several_partners_of_one_task_work_together(self, tmp_path):
        config = RecastConfig(target_modules=["conv1", "conv2"], partners=["clr", "piggyback"], train_norms=True, num_classes=2)
        model = get_recast_model(tiny_cnn(), config)
        optimizer = create_recast_optimizer(model, lr=0.01)
        labels = torch.tensor([0, 1, 0])
        first = F.cross_entropy(model(image()), labels)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(image()), labels).backward()
            optimizer.step()
        assert F.cross_entropy(model(image()), labels) < 0.5 * first
        model.eval()
        live = outputs(model, image())
        model.save_pretrained(tmp_path)
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_cnn(), tmp_path).eval(), image()), live)

    def test_the_bottleneck_drops_out_in_training_alone(self):
        config = RecastConfig(target_modules=["qkv"], partners=[AdaptFormerConfig(dropout=0.5)])
        model = get_recast_model(tiny_vit(), config)
        learn(model)
        model.train()
        assert not torch.equal(model(vit_input()), model(vit_input()))
        model.eval()
        assert torch.equal(outputs(model, vit_input()), outputs(model, vit_input()))

    def test_partners_beside_weights_of_half_precision_are_trained_in_full(self):
        for name in CASES:
            case = CASES[name]
            model = get_recast_model(case.build().to(torch.bfloat16), case.config)
            assert {p.dtype for n, p in model.named_parameters() if is_partners(n)} == {torch.float32}
            learn(model)
            result = model(case.inputs().to(torch.bfloat16))
            assert result.dtype == torch.bfloat16
            result.float().square().sum().backward()
            assert all(p.grad is not None for n, p in model.named_parameters() if is_partners(n))


class TestThePlan:
    def test_shows_where_partners_would_stand_before_anything_is_touched(self):
        backbone = tiny_vit()
        before = frozen_state(backbone)
        config = RecastConfig(target_modules=["qkv"], partners=["piggyback", CASES["adaptformer"].partner])
        config.train_coefficients = False
        plan = plan_recast(backbone, config)
        assert plan.parts["adaptformer"] == {f"blocks.{i}.mlp": 93 for i in range(4)}
        assert plan.parts["piggyback"] == {f"blocks.{i}.attn.qkv": 8 * 24 for i in range(4)}
        assert "piggyback: 4 places (blocks.0.attn.qkv, " in str(plan)
        assert "768 trainable parameters per task" in str(plan)
        assert "coefficients stay at zero" in str(plan)
        assert same_state(backbone, before)
        assert "partner" not in str(plan_recast(backbone, RecastConfig(target_modules=["qkv"])))
        with pytest.raises(RecastTargetError, match="clr"):
            plan_recast(backbone, RecastConfig(target_modules=["qkv"], partners=["clr"]))


class TestBesideALoraPart:
    """Coefficients, a LoRA part, a mask and a bottleneck as one task."""

    @pytest.fixture
    def task(self) -> PeftModel:
        config = RecastConfig(
            target_modules=["fc1", "fc2"],
            lora_config=LoraConfig(r=2, target_modules=["qkv", "fc1"]),
            partners=[AdaptFormerConfig(bottleneck=4), "piggyback"],
        )
        model = get_recast_model(tiny_vit(), config, "task").eval()
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return model

    def test_all_of_them_change_the_output_and_come_back_from_the_file(self, task, tmp_path):
        x = vit_input()
        live, plain = outputs(task, x), outputs(tiny_vit(), x)
        without = {}
        for key in ("recast_coefficients", "lora_B", "recast_masks", "recast_partners"):
            other = copy.deepcopy(task)
            for name, parameter in other.named_parameters():
                if key in name:
                    parameter.data.fill_(1.0 if key == "recast_masks" else 0.0)
            without[key] = outputs(other, x)
        assert not any(torch.allclose(live, other) for other in without.values())
        task.save_pretrained(tmp_path)
        assert torch.equal(outputs(PeftModel.from_pretrained(tiny_vit(), tmp_path / "task", "task").eval(), x), live)
        with task.disable_adapter():
            assert torch.equal(outputs(task, x), plain)

    def test_a_refused_merge_changes_none_of_them(self, task):
        x = vit_input()
        live = outputs(task, x)
        with pytest.raises(RecastBankError, match="adaptformer"):
            task.merge_adapter()
        assert torch.equal(outputs(task, x), live)

    def test_unload_gives_the_plain_model(self, task):
        assert torch.equal(outputs(task.unload(), vit_input()), outputs(tiny_vit(), vit_input()))

    def test_each_has_a_learning_rate_of_its_own(self, task):
        groups = create_recast_optimizer(task, lr=1.0, coefficient_lr=2.0, lora_lr=3.0, partner_lr=4.0).param_groups
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        expected = {"recast_coefficients": 2.0, "lora_": 3.0, "recast_masks": 4.0, "recast_partners": 4.0}
        for name, parameter in task.named_parameters():
            if parameter.requires_grad:
                assert rates[id(parameter)] == next(rate for key, rate in expected.items() if key in name)


def test_sizes_of_a_stored_config_are_not_built_before_they_are_checked(tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], partners=["adaptformer"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    stored["partners"][0]["bottleneck"] = 10**11  # more than any machine has
    path.write_text(json.dumps(stored))
    with pytest.raises(RecastLoadError, match="wrongly shaped"):
        PeftModel.from_pretrained(tiny_vit(), tmp_path)
