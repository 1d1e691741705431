"""Fused experts of mixtures: named in the plan, composed where ``target_parameters`` names them, as in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import layers_of, randomise
from peft import PeftModel
from sweep.transformers_cases import transformers_cases
from torch import Tensor, nn

from recast_peft import RecastConfig, RecastLayer, RecastTargetError, get_recast_model, plan_recast
from recast_peft.banks.directions_bank import main_directions

MIXTURES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]
IDS = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers_cases()[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the initial weights are so small that experts would not be seen
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs)[0]


@pytest.mark.parametrize("name", MIXTURES)
def test_defaults_leave_experts_out_and_say_why(name: str) -> None:
    plan = plan_recast(built(name), RecastConfig())
    experts = [target for target in plan.skipped if target.endswith("experts")]
    assert experts
    assert all("target_parameters" in plan.skipped[target] and "down_proj" in plan.skipped[target] for target in experts)


def computes_like(model: PeftModel, plain: nn.Module, before: torch.Tensor, name: str, folder: Path) -> None:
    """The trained model gives what the changed plain one does, live, saved and merged, and without its task what was before."""
    live = logits(model)
    assert not torch.allclose(live, before, atol=1e-3)
    torch.testing.assert_close(live, logits(plain), rtol=1e-4, atol=1e-4)
    model.save_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(built(name), folder).eval()), live)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), live)
    model.unmerge_adapter()
    assert torch.equal(logits(model), live)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model.merge_and_unload()), live)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("parameter", ["down_proj", "gate_up_proj"])
def test_experts_are_composed_like_any_weight(name: str, parameter: str, tmp_path: Path) -> None:
    plain = built(name)
    before = logits(plain)
    model = get_recast_model(built(name), RecastConfig(target_parameters=[f"experts.{parameter}"])).eval()
    assert torch.equal(logits(model), before)
    model(input_ids=IDS)[0].square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for coefficients in trained:
            coefficients.uniform_(-0.2, 0.2, generator=generator)
    layers = {layer.module_name: layer for layer in model.modules() if isinstance(layer, RecastLayer)}
    for members in model.peft_config["default"].groups.values():
        weights = [plain.get_submodule(member).get_parameter(parameter).detach().clone() for member in members]
        assert weights[0].ndim == 3
        for member, weight in zip(members, weights, strict=True):
            offsets = layers[member].recast_coefficients["default"].detach().mean(dim=0)
            changed = weight + sum(offset * template for offset, template in zip(offsets, weights, strict=True))
            plain.get_submodule(member).get_parameter(parameter).data.copy_(changed)
    computes_like(model, plain, before, name, tmp_path)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_have_cores_between_their_main_directions(name: str, tmp_path: Path) -> None:
    plain = built(name)
    before = logits(plain)
    config = RecastConfig(target_parameters=["experts.down_proj"], num_directions=2)
    model = get_recast_model(built(name), config).eval()
    assert torch.equal(logits(model), before)
    randomise(model)
    model(input_ids=IDS)[0].square().sum().backward()
    for member, layer in layers_of(model).items():
        core = layer.recast_coefficients["default"]
        assert core.grad is not None
        assert core.grad.abs().sum() > 0
        weight = plain.get_submodule(member).get_parameter("down_proj").detach()
        left, right = main_directions(weight, 2)  # of experts by everything else
        assert (left.shape, right.shape) == ((len(weight), 2), (2, weight[0].numel()))
        weight += (left @ core.detach()[0].double().view(2, 2) @ right).view(weight.shape).to(weight.dtype)
    computes_like(model, plain, before, name, tmp_path)


def test_modules_beside_experts_and_certain_layers() -> None:
    model = built("mixtral")
    both = plan_recast(model, RecastConfig(target_parameters=["experts.down_proj"], target_modules=["q_proj"]))
    assert {name.rpartition(".")[2] for name in both.targets} == {"experts", "q_proj"}
    one = plan_recast(model, RecastConfig(target_parameters=["experts.down_proj"], layers_to_transform=[1]))
    assert one.targets == ("model.layers.1.mlp.experts",)
    whole = plan_recast(model, RecastConfig(target_parameters=["model.layers.0.mlp.experts.down_proj"]))
    assert whole.targets == ("model.layers.0.mlp.experts",)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["experts.down_proj", "experts.gate_up_proj"], "are of one module"),
        (["experts.down_prj"], r"(?s)no parameter called 'experts.down_prj'.*near: model.layers"),
        (["experts.down_proj", "nothing.at_all"], "no parameter called 'nothing.at_all'"),
        (["input_layernorm.weight"], "vector"),
    ],
)
def test_parameters_that_cannot_be_composed_are_refused(parameters: list[str], message: str) -> None:
    with pytest.raises(RecastTargetError, match=message):
        plan_recast(built("mixtral"), RecastConfig(target_parameters=parameters))


def test_a_later_task_may_not_take_another_parameter_of_the_module() -> None:
    model = get_recast_model(built("mixtral"), RecastConfig(target_parameters=["experts.down_proj"]), "first")
    model.add_adapter("second", RecastConfig(target_parameters=["experts.down_proj"]))
    with pytest.raises(RecastTargetError, match="gate_up_proj and down_proj are of one module"):
        model.add_adapter("third", RecastConfig(target_parameters=["experts.gate_up_proj"]))
    assert list(model.peft_config) == ["first", "second"]


def test_a_batch_of_several_tasks_is_refused() -> None:
    config = RecastConfig(target_parameters=["experts.down_proj"], init_weights=False)
    model = get_recast_model(built("mixtral"), config, "first").eval()
    model.add_adapter("second", config)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):  # tokens come without their samples
        logits(model, adapter_names=["first", "second"])
