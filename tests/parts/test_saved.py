"""Norms of a task, and running statistics of the pretrained model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from language_models import numbers
from llamas import llama
from models import Around, state, tiny_vit, vit_input
from peft import PeftModel
from pools import text_model
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import nn
from torch.optim.swa_utils import update_bn
from transformers import IBertConfig, IBertModel

from recast_peft import RecastConfig, RecastTargetError, get_recast_model, plan_recast


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext", "test_byobnet"])
def test_all_norms_are_found_with_and_without_an_activation(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    norms = {n for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))}
    config = RecastConfig(train_norms=True, train_coefficients=False)
    assert set(plan_recast(model, config).parts["norms"]) == norms
    trained = get_recast_model(model, config)
    assert sum(p.requires_grad for p in trained.parameters()) == 2 * len(norms)


@pytest.mark.parametrize("way", ["model.train", "base.train", "outer.train", "update_bn", "update_bn of a model around"])
def test_running_statistics_stay_those_of_the_pretrained_model(way: str) -> None:
    backbone = timm.create_model("test_resnet", num_classes=0).train()
    for _ in range(3):
        backbone(torch.randn(4, 3, 32, 32))
    plain = copy.deepcopy(backbone).eval()
    model = get_recast_model(backbone, RecastConfig())
    x = torch.randn(4, 3, 32, 32)
    if way == "update_bn":
        update_bn([x], model)
    elif way == "update_bn of a model around":
        update_bn([x], Around(model.get_base_model()))
    else:
        base = model.get_base_model()
        module = {"model.train": model, "base.train": base, "outer.train": Around(base)}[way]
        module.train()
        module(x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))
    left = model.unload()
    assert not any(m._forward_pre_hooks for m in left.modules())


def first(output: object) -> torch.Tensor:
    return getattr(output, "logits", output)  # type: ignore[return-value]


MOVED_IN_TRAINING = {  # layers that keep more than a batch norm's statistics, under names of their own
    "EvoNorm": lambda: EvoNorm2dB0(8),
    "instance norm": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
    "spectral norm by hooks": lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)),
    "batch norm that holds an activation": lambda: BatchNormAct2d(8),
    "batch norm without affine": lambda: nn.BatchNorm2d(8, affine=False, momentum=None),
}


@pytest.mark.parametrize("kind", MOVED_IN_TRAINING)
def test_whatever_calls_in_training_would_move_stays_the_pretrained_models(kind: str) -> None:
    def backbone() -> nn.Module:
        torch.manual_seed(0)
        convolutions = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        return nn.Sequential(*convolutions, MOVED_IN_TRAINING[kind](), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    before, plain, x = backbone().state_dict(), backbone().train(), torch.randn(4, 3, 8, 8)
    plain(x)
    assert any(not torch.equal(value, before[key]) for key, value in plain.state_dict().items())  # so there is something
    model = get_recast_model(backbone(), RecastConfig(target_modules=["0", "1"])).train()
    for _ in range(3):
        model(x).sum().backward()
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_ranges_of_activations_stay_the_pretrained_models() -> None:
    config = IBertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30, quant_mode=True
    )
    model = get_recast_model(IBertModel(config), RecastConfig()).train()
    ranges = {name: own.clone() for name, own in model.state_dict().items() if name.endswith(("x_min", "x_max"))}
    model(input_ids=torch.arange(2, 8)[None])
    assert len(ranges) > 20
    assert all(torch.equal(value, ranges[name]) for name, value in model.state_dict().items() if name in ranges)


class TestNorms:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("backbone", [tiny_vit, llama], ids=["LayerNorm", "LlamaRMSNorm"])
    def test_are_trained_in_float32_and_computed_with_as_the_models_own(
        self, backbone: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path
    ) -> None:
        """A bfloat16 has steps of 1/256 of its size, and a fresh task changes nothing."""
        plain = backbone().to(dtype)
        x = torch.arange(12).view(2, 6) if backbone is llama else vit_input().to(dtype)
        config = RecastConfig(train_norms=True, train_coefficients=False)
        model = get_recast_model(copy.deepcopy(plain), config, "task").eval()
        assert torch.equal(first(model(x)), first(plain(x)))
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {parameter.dtype for parameter in own.values()} == {torch.float32}
        first(model(x)).float().square().sum().backward()
        with torch.no_grad():
            for parameter in own.values():
                assert parameter.grad is not None
                before = parameter.clone()
                parameter.mul_(1 + 1e-4)
                assert not torch.equal(parameter, before) or not before.any()
                parameter.add_(0.1)
            rounded = {
                key.removeprefix("base_model.model.").replace(".modules_to_save.task", ""): value.to(dtype)
                for key, value in numbers(model, "task").items()
            }
            expected = copy.deepcopy(plain)
            assert not expected.load_state_dict(rounded, strict=False).unexpected_keys
            live = first(model(x))
            assert torch.equal(live, first(expected(x)))
            assert not torch.equal(live, first(plain(x)))
            assert torch.equal(first(torch.compile(model, backend="eager")(x)), live)
            model.save_pretrained(tmp_path)
            again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "task", "task").eval()
            assert all(torch.equal(value, numbers(again, "task")[key]) for key, value in numbers(model, "task").items())
            assert torch.equal(first(again(x)), live)
            left = again.merge_and_unload()
            assert torch.equal(first(left(x)), live)
            assert {parameter.dtype for parameter in left.parameters()} == {dtype}

    def test_have_the_dtype_of_the_models_own_for_whoever_reads_them(self) -> None:
        """HF's Mamba gives a norm its input in the dtype of the norm's weight."""
        model = get_recast_model(tiny_vit().bfloat16(), RecastConfig(train_norms=True)).get_base_model()
        norm = model.blocks[0].norm
        own = norm.modules_to_save["default"].weight
        assert (own.dtype, norm.weight.dtype) == (torch.float32, torch.bfloat16)
        norm.weight.float().sum().backward()
        assert own.grad is not None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_are_asked_for_their_dtype_in_a_batch_of_several_tasks(self, dtype: torch.dtype) -> None:
        class Asking(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.norm(x.to(self.norm.weight.dtype)))

        model = get_recast_model(Asking().to(dtype), RecastConfig(target_modules=["head"], train_norms=True), "task").eval()
        x = torch.randn(2, 4)
        assert model(x, adapter_names=["task", "__base__"]).dtype == dtype

    def test_stay_in_half_precision_for_who_asks_for_it(self) -> None:
        """FSDP1 takes one dtype alone."""
        config = RecastConfig(train_norms=True, num_classes=3)
        model = get_recast_model(tiny_vit().bfloat16(), config, autocast_adapter_dtype=False)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_running_statistics_stay_the_pretrained_models(self):
        model = get_recast_model(timm.create_model("resnet10t", num_classes=3), RecastConfig(num_classes=2))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.train()
        model(torch.randn(4, 3, 32, 32))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_a_task_can_own_its_norms(self, tmp_path):
        def backbone() -> nn.Module:
            torch.manual_seed(0)
            return timm.create_model("resnet10t", num_classes=3)

        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        model = get_recast_model(backbone(), RecastConfig(num_classes=2, train_norms=True))
        base = backbone().eval()(x)
        model.train()
        model(x * 3).sum().backward()
        owned = [n for n, p in model.named_parameters() if p.requires_grad and "bn1" in n]
        assert owned
        model.eval()
        live = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert any(key.endswith("running_mean") for key in stored)
        again = PeftModel.from_pretrained(backbone(), tmp_path).eval()
        assert torch.equal(again(x), live)


def test_a_module_that_the_model_does_not_have_is_refused() -> None:
    model = tiny_vit()
    before = state(model)
    with pytest.raises(RecastTargetError, match="modules_to_save names nrom, .*did you mean 'norm'"):
        get_recast_model(model, RecastConfig(modules_to_save=["nrom", "head"]))
    assert state(model) == before


class Shared(nn.Module):
    """A norm and a classifier that stand at two places each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = self.last_norm = nn.LayerNorm(4)
        self.heads = nn.ModuleList([nn.Linear(4, 3)])
        self.again = self.heads[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last_norm(self.second(self.norm(self.first(x))))
        return self.heads[0](y) + 2 * self.again(y + 1)


class TestModulesThatStandAtSeveralPlaces:
    CONFIGS = (
        {"train_norms": True},
        {"modules_to_save": ["last_norm"]},
        {"modules_to_save": ["again"]},
        {"modules_to_save": ["norm", "last_norm", "heads.0"]},
    )

    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    def test_are_owned_at_all_of_them(self, config: dict, tmp_path: Path) -> None:
        x, plain, expected = torch.randn(2, 4), Shared(), Shared()
        model = get_recast_model(Shared(), RecastConfig(target_modules=["first", "second"], **config))
        changed = {
            "norm": config.get("train_norms") or "last_norm" in config.get("modules_to_save", ()),
            "again": any(name in config.get("modules_to_save", ()) for name in ("again", "heads.0")),
        }
        with torch.no_grad():
            for name, module in model.get_base_model().named_modules():
                if name.endswith("modules_to_save.default"):
                    module.weight.mul_(2)
                    module.bias.add_(1)
            for name in filter(changed.get, changed):
                expected.get_submodule(name).weight.mul_(2)
                expected.get_submodule(name).bias.add_(1)
            assert not torch.allclose(expected(x), plain(x))
            torch.testing.assert_close(model(x), expected(x))
            model.save_pretrained(tmp_path)
            torch.testing.assert_close(PeftModel.from_pretrained(Shared(), tmp_path)(x), expected(x))
            assert torch.equal(copy.deepcopy(model).unload()(x), plain(x))
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(x), expected(x))
        assert set(dict(merged.named_parameters())) == set(dict(plain.named_parameters()))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (["shared"], "a parameter of shared is also that of encoder.embed_tokens, decoder.embed_tokens, lm_head, which keeps"),
        (["embed_tokens"], "of encoder.embed_tokens, decoder.embed_tokens is also that of shared, lm_head, which"),
        (["shared", "embed_tokens", "lm_head"], None),
        (["wo"], None),
    ],
)
def test_modules_that_keep_the_pretrained_one_of_a_tied_parameter_are_named(saved: list[str], message: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_recast_model(text_model("SEQ_2_SEQ_LM"), RecastConfig(target_modules=["q"], modules_to_save=saved))
    said = [str(one.message) for one in caught if "modules_to_save" in str(one.message)]
    assert len(said) == (message is not None)
    assert message is None or message in said[0]
