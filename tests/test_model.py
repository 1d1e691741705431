"""The tuner: a conversion happens wholly or not at all, everywhere with the same answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from models import TinyVit, converted, layers_of, outputs, randomise, state, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from recast_peft import RecastConfig, RecastConfigError, RecastError, RecastModel, get_recast_model


class TestAConversion:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target_modules": ["nothing"]}, "not found"),
            ({"target_modules": ["qkv"], "num_groups": 1, "num_templates": 9}, "num_templates=9"),
            ({"groups": {"x": ["nothing"]}}, "does not have"),
            ({"target_modules": ["norm"]}, "vector"),
        ],
    )
    @pytest.mark.parametrize("convert", [get_recast_model, get_peft_model])
    def test_that_is_refused_leaves_the_model_as_it_was(self, convert: Callable, options: dict[str, Any], message: str) -> None:
        model, config = tiny_vit(), RecastConfig(**options)
        before, fields = state(model), copy.deepcopy(config.to_dict())
        with pytest.raises(RecastError, match=message):
            convert(model, config)
        assert state(model) == before
        written = {k: v for k, v in config.to_dict().items() if k not in ("base_model_name_or_path", "peft_version")}
        assert written.items() <= fields.items()

    @pytest.mark.parametrize(
        "wrap",
        [
            get_recast_model,
            lambda m, c: get_recast_model(m.get_base_model(), c),
            lambda m, c: get_peft_model(m, c, "second"),
            lambda m, c: get_peft_model(nn.Sequential(m), c, "second"),
        ],
    )
    def test_of_a_model_that_is_converted_already_is_refused(self, wrap: Callable) -> None:
        model = converted()
        before = state(model)
        with pytest.raises(RecastConfigError, match=r"converted already(?s:.*)add_adapter"):
            wrap(model, RecastConfig(target_modules=["qkv"]))
        assert state(model) == before

    @pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
    def test_of_a_converted_model_by_PEFT_under_the_same_name_is_refused(self) -> None:
        model = converted()
        with pytest.raises(RecastConfigError, match=r"has a task 'default'"):
            get_peft_model(model.get_base_model(), RecastConfig(target_modules=["qkv"]))

    @pytest.mark.parametrize("wrap", [get_recast_model, get_peft_model])
    def test_of_a_model_of_PEFT_is_refused(self, wrap: Callable) -> None:
        model = get_peft_model(tiny_vit(), LoraConfig(target_modules=["fc1"]), "lora")
        before = state(model)
        with pytest.raises(RecastConfigError, match=r"other methods' adapters \(lora\): put RECAST around the model inside"):
            wrap(model, RecastConfig(target_modules=["fc1"]), "second")
        assert state(model) == before

    def test_with_another_method_s_config_is_refused(self) -> None:
        with pytest.raises(RecastConfigError, match="LoraConfig; a RecastConfig is expected"):
            get_recast_model(tiny_vit(), LoraConfig())  # type: ignore[arg-type]

    def test_without_a_config_takes_the_defaults(self) -> None:
        model = get_recast_model(tiny_vit())
        assert set(layers_of(model)) == {f"blocks.{i}.mlp.{leaf}" for i in range(4) for leaf in ("fc1", "fc2")}

    def test_through_PEFT_is_the_same(self) -> None:
        mine, theirs = converted(), get_peft_model(tiny_vit(), RecastConfig(target_modules=["qkv"])).eval()
        assert isinstance(mine, PeftModel)
        assert str(mine.base_model) == str(theirs.base_model)
        assert mine.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()

    @pytest.mark.parametrize("task_type", ["FEATURE_EXTRACTION", None])
    def test_gives_the_model_of_its_task_type(self, task_type: str | None) -> None:
        model = tiny_vit()
        model.config = {"model_type": "tiny"}
        model.get_input_embeddings = lambda: nn.Embedding(2, 2)
        model = get_recast_model(model, RecastConfig(target_modules=["qkv"], task_type=task_type))
        assert isinstance(model, peft.PeftModelForFeatureExtraction) == (task_type is not None)

    @pytest.mark.parametrize("training", [True, False])
    def test_keeps_the_mode(self, training: bool) -> None:
        model = get_recast_model(tiny_vit().train(training), RecastConfig(target_modules=["qkv"]))
        assert all(layer.training == training for layer in layers_of(model).values())

    def test_trains_48_numbers_for_the_setting_of_the_paper(self) -> None:
        # 12 blocks x 2 templates x 2 coefficient sets (paper, RECAST-Att)
        model = converted(depth=12, num_coefficient_sets=2)
        assert model.get_nb_trainable_parameters()[0] == 48

    def test_says_what_is_trained(self, capsys: pytest.CaptureFixture[str]) -> None:
        converted().print_trainable_parameters()
        assert "trainable params: 8 " in capsys.readouterr().out


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("templates", [None, 1])
    def test_keeps_coefficients_in_float32_or_more(self, dtype: torch.dtype, templates: int | None) -> None:
        plain = tiny_vit().to(dtype)
        model = get_recast_model(plain, RecastConfig(target_modules=["qkv"], num_templates=templates))
        for layer in layers_of(model).values():
            assert layer.recast_coefficients["default"].dtype == torch.float32
        model.to(torch.bfloat16)
        for layer in layers_of(model).values():
            assert layer.recast_coefficients["default"].dtype == torch.float32
            assert layer.weight.dtype == torch.bfloat16
        model.double()
        for layer in layers_of(model).values():
            assert layer.recast_coefficients["default"].dtype == layer.weight.dtype == torch.float64

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_in_the_weights_is_close_to_float32(self, dtype: torch.dtype) -> None:
        model = converted()
        randomise(model)
        expected = outputs(model, vit_input())
        model.to(dtype)
        torch.testing.assert_close(outputs(model, vit_input().to(dtype)).float(), expected, rtol=0.05, atol=0.02)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_in_the_weights_still_trains(self, dtype: torch.dtype) -> None:
        model = get_recast_model(tiny_vit().to(dtype), RecastConfig(target_modules=["qkv"])).train()
        model(vit_input().to(dtype)).float().square().sum().backward()
        for layer in layers_of(model).values():
            gradient = layer.recast_coefficients["default"].grad
            assert gradient.dtype == torch.float32
            assert gradient.abs().sum() > 0

    @pytest.mark.parametrize("merged", [True, False])
    def test_of_autocast_is_that_of_the_plain_model(self, merged: bool) -> None:
        plain, model = tiny_vit(), converted()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = outputs(plain, vit_input())
            if merged:
                model.merge_adapter()
            assert torch.equal(outputs(model, vit_input()), expected)

    def test_of_autocast_reaches_the_gradient(self) -> None:
        model = converted()
        randomise(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(vit_input()).float().square().sum()
        loss.backward()
        rough = [layer.recast_coefficients["default"].grad.clone() for layer in layers_of(model).values()]
        model.zero_grad()
        model(vit_input()).square().sum().backward()
        for mine, layer in zip(rough, layers_of(model).values(), strict=True):
            torch.testing.assert_close(mine, layer.recast_coefficients["default"].grad, rtol=0.1, atol=0.05)

    def test_of_coefficients_can_be_that_of_the_weights_for_those_who_ask(self) -> None:
        model = tiny_vit().bfloat16()
        model = get_recast_model(model, RecastConfig(target_modules=["qkv"]), autocast_adapter_dtype=False)
        assert {layer.recast_coefficients["default"].dtype for layer in layers_of(model).values()} == {torch.bfloat16}
        assert torch.isfinite(outputs(model, vit_input().bfloat16())).all()

    @pytest.mark.parametrize("when", ["before", "after", "both"])
    def test_may_change_at_any_time(self, when: str) -> None:
        inputs = vit_input().bfloat16()
        plain = tiny_vit()
        expected = outputs(tiny_vit().bfloat16(), inputs)
        if when != "after":
            plain = plain.bfloat16()
        model = get_recast_model(plain, RecastConfig(target_modules=["qkv"])).eval()
        if when != "before":
            model = model.bfloat16()
        assert torch.equal(outputs(model, inputs), expected)


class TestTraining:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("templates", [None, 1])
    def test_with_gradient_checkpointing_gives_the_same_gradients(self, reentrant: bool, templates: int | None) -> None:
        class Checkpointed(TinyVit):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=reentrant)
                return self.head(x.mean(dim=1))

        model = converted(num_templates=templates)
        randomise(model)
        other = copy.deepcopy(model)
        other.base_model.model.__class__ = Checkpointed
        for m in (model, other):
            m(vit_input().requires_grad_()).square().sum().backward()
        for mine, theirs in zip(layers_of(other).values(), layers_of(model).values(), strict=True):
            assert torch.equal(mine.recast_coefficients["default"].grad, theirs.recast_coefficients["default"].grad)

    def test_several_steps_in_bfloat16_moves_by_less_than_bfloat16_could_hold(self) -> None:
        model = get_recast_model(tiny_vit().bfloat16(), RecastConfig(target_modules=["qkv"]))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(parameters, lr=1.0)
        for parameter in parameters:
            parameter.data.fill_(1.0)
            parameter.grad = torch.full_like(parameter, 1e-5)
        optimiser.step()
        assert all((p == 1.0 - 1e-5).all() for p in parameters)

    def test_many_sets_reaches_every_one_with_its_share(self) -> None:
        one, many = converted(num_coefficient_sets=1), converted(num_coefficient_sets=4)
        for model in (one, many):
            F.mse_loss(model(vit_input()), torch.ones(2, 3)).backward()
        for a, b in zip(layers_of(one).values(), layers_of(many).values(), strict=True):
            gradient = b.recast_coefficients["default"].grad
            torch.testing.assert_close(gradient, a.recast_coefficients["default"].grad.expand(4, -1) / 4)

    def test_does_not_reach_the_input_s_graph_where_nothing_needs_it(self) -> None:
        model = converted(inference_mode=True)
        assert not model(vit_input()).requires_grad
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
class TestBesideAnotherTuner:
    def test_a_lora_around_a_recast_layer_adds_to_it(self) -> None:
        model = converted()
        randomise(model)
        live = outputs(model, vit_input())
        both = get_peft_model(model.get_base_model(), LoraConfig(target_modules=["qkv"], r=2), "lora").eval()
        assert torch.equal(outputs(both, vit_input()), live)  # LoRA starts at nothing
        composed = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}
        expected = tiny_vit()
        for name, wrapped in [
            (n.removeprefix("base_model.model."), m) for n, m in both.named_modules() if hasattr(m, "lora_B")
        ]:
            down, up = wrapped.lora_A["lora"].weight, wrapped.lora_B["lora"].weight
            nn.init.normal_(up)
            weight = composed[name] + wrapped.scaling["lora"] * up @ down
            expected.get_submodule(name).weight.data = weight.detach()
        torch.testing.assert_close(outputs(both, vit_input()), outputs(expected, vit_input()), rtol=1e-5, atol=1e-5)

    def test_a_recast_around_a_lora_layer_keeps_it(self) -> None:
        lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["fc1"], r=2, init_lora_weights=False)).eval()
        live = outputs(lora, vit_input())
        both = get_recast_model_on(lora)
        assert torch.equal(outputs(both, vit_input()), live)
        randomise(both)
        assert not torch.allclose(outputs(both, vit_input()), live, atol=1e-4)


def get_recast_model_on(lora: PeftModel) -> PeftModel:
    return get_peft_model(lora.get_base_model(), RecastConfig(target_modules=["qkv"])).eval()


def test_the_tuner_is_an_ordinary_tuner_of_PEFT() -> None:
    model = converted()
    assert isinstance(model.base_model, RecastModel)
    assert model.active_adapter == "default"
    assert model.base_model.targeted_module_names == [f"blocks.{i}.attn.qkv" for i in range(4)]
    status = model.get_model_status()
    assert status.adapter_model_type == "RecastModel"
    assert status.trainable_params == 8
    assert status.num_adapter_layers == 4
    assert {layer.name.rpartition(".")[2] for layer in model.get_layer_status()} == {"qkv"}
