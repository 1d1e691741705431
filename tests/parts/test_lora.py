"""One task, two parts: coefficients and a LoRA under one adapter name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_parts import TARGETS, close, expected, fill, lora, lora_parameters, two_parts, with_lora_by_hand
from models import KINDS, composed_weights, layers_of, outputs, reference_model, seeded, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model

from recast_peft import RecastConfig, RecastConfigError, RecastTargetError, create_recast_optimizer, get_recast_model
from recast_peft.parts import lora as lora_part_module
from recast_peft.parts.lora_strength import part_layers


class TestComputation:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_a_fresh_task_changes_nothing(self, targets):
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules=targets)))
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        assert len(lora_parameters(model, "default")) == 2 * 4 * (1 if targets is None else len(targets))

    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    def test_both_parts_add(self, targets):
        model = two_parts(target_modules=targets)
        close(outputs(model, vit_input()), expected(model, vit_input()))

    def test_each_part_can_be_switched_off_alone(self):
        model = two_parts(target_modules=["qkv", "fc1"])
        both = outputs(model, vit_input())
        with model.disable_part("lora"):
            close(outputs(model, vit_input()), outputs(reference_model(tiny_vit(), model, ("task",)), vit_input()))
            with model.disable_part("recast"):
                assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        with model.disable_part("recast"):
            close(outputs(model, vit_input()), outputs(with_lora_by_hand(tiny_vit(), model), vit_input()))
            with pytest.raises(RecastConfigError, match="leave the block of disable_part"):
                model.merge_adapter()
        with pytest.raises(ZeroDivisionError), model.disable_part("lora"):
            _ = 1 / 0
        assert torch.equal(outputs(model, vit_input()), both)
        model.merge_adapter()
        with pytest.raises(RecastConfigError, match="unmerge_adapter"), model.disable_part("lora"):
            pass

    @pytest.mark.parametrize("name", ["task", "v1.2"])
    def test_a_layer_knows_what_a_task_adds_by_its_name(self, name):
        layer = part_layers(two_parts(name, target_modules=["fc1"]))[0]
        (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
        close(layer.get_delta_weight(name), 3 * b.weight @ a.weight)
        with pytest.raises(RecastConfigError, match=rf"'typo' has no LoRA part at blocks.0.mlp.fc1; those that have: {name}"):
            layer.get_delta_weight("typo")

    @pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
    def test_a_module_may_be_called_by_keyword(self, kind):
        """As RECAST's layers may; PEFT's own LoRA refuses."""
        config = RecastConfig(target_modules=["0"], lora_config=LoraConfig(r=2, target_modules=["0", "1"]))
        model = get_recast_model(seeded(KINDS[kind].build), config, "task").eval()
        fill(model)
        x = KINDS[kind].inputs()
        for layer in part_layers(model):
            assert torch.equal(layer(input=x), layer(x))
            with pytest.raises(TypeError, match="x"):
                layer(other=x)
        model.merge_adapter()
        for layer in part_layers(model):
            assert torch.equal(layer(input=x), layer(x))

    def test_a_part_that_is_not_there_cannot_be_switched_off(self):
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]))
        with pytest.raises(RecastConfigError, match="no LoRA part"), model.disable_part("lora"):
            pass
        with pytest.raises(RecastConfigError, match="expected one of 'recast', 'lora'"), model.disable_part("dora"):
            pass

    def test_both_parts_are_trained_together(self):
        model = two_parts().train()
        model(vit_input()).square().sum().backward()
        trained = {k for k, p in model.named_parameters() if p.requires_grad}
        assert trained == {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert len(trained) == 8 + 2 * 8
        assert model.get_nb_trainable_parameters()[0] == 16 + 4 * (2 * (8 + 24) + 2 * (8 + 8))

    def test_the_optimiser_has_a_group_for_each_part(self):
        optimizer = create_recast_optimizer(two_parts(), lr=1e-3, lora_lr=5e-3)
        groups = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        assert groups == [(8, 0.05, 0.0), (16, 5e-3, 0.01)]
        assert create_recast_optimizer(two_parts(), lr=1e-3).param_groups[1]["lr"] == 1e-3

    def test_dora_beside_coefficients_by_hand(self):
        config = RecastConfig(target_modules=["0"], lora_config=lora(use_dora=True))
        plain = seeded(KINDS["linear"].build)
        model = get_recast_model(seeded(KINDS["linear"].build), config, "task").eval()
        assert torch.equal(outputs(model, vit_input()), outputs(plain, vit_input()))
        fill(model)
        weight = composed_weights(plain, model, ("task",))["layers.0.weight"].detach()
        parts = {k.partition(".lora_")[2]: p.detach() for k, p in lora_parameters(model).items()}
        moved = weight + 3.0 * parts["B.task.weight"] @ parts["A.task.weight"]
        magnitude = parts["magnitude_vector.task.weight"]
        plain.layers[0].weight.data = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
        close(outputs(model, vit_input()), outputs(plain, vit_input()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_dtypes(self, dtype):
        model = two_parts(target_modules=["qkv", "fc1"])
        live = outputs(model, vit_input())
        if dtype == torch.float32:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = outputs(model, vit_input())
        else:
            result = outputs(copy.deepcopy(model).to(dtype), vit_input().to(dtype))
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), live, rtol=0.05, atol=0.05)

    def test_compiled_as_one_graph(self):
        model = two_parts(depth=2, target_modules=["qkv", "fc1"]).train()
        expected = outputs(model, vit_input())
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = compiled(vit_input())
        close(found.detach(), expected)
        found.sum().backward()
        mine = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(vit_input()).sum().backward()
        assert len(mine) == 12
        for key, parameter in model.named_parameters():
            if key in mine:
                close(mine[key], parameter.grad)


VARIANTS = {
    "plain": {}, "rank-stabilised": {"use_rslora": True}, "DoRA": {"use_dora": True}, "with bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"}, "MiCA": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "patterns": {"rank_pattern": {"0": 3}, "alpha_pattern": {"0": 7}},
}  # fmt: skip
NOT_BUILT = {  # by PEFT, and what it says
    ("conv2d", "MiCA"): "unsupported variant", ("conv2d", "orthogonal"): "Unknown initialization",
    ("conv2d padded in a circle", "MiCA"): "unsupported variant",
    ("conv2d padded in a circle", "orthogonal"): "Unknown initialization",
    ("conv2d padded in a circle", "with bias"): "computed by its weight",
    ("weight-standardised conv2d", "MiCA"): "unsupported variant",
    ("weight-standardised conv2d", "orthogonal"): "Unknown initialization",
    ("weight-standardised conv2d", "with bias"): "computed by its weight",
    ("linear subclass", "with bias"): "computed by its weight", ("embedding", "with bias"): "has none",
    ("linear without bias", "with bias"): "has none", ("bilinear weight reader", "with bias"): "has none",
}  # fmt: skip
SOME_KINDS = [
    "linear", "linear without bias", "conv2d", "conv2d padded in a circle", "weight-standardised conv2d", "transformers Conv1D",
    "linear subclass", "bilinear weight reader", "embedding",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
class TestVariants:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("name", SOME_KINDS)
    def test_a_variant_works_or_is_refused(self, name, variant, tmp_path):
        kind = KINDS[name]
        config = RecastConfig(target_modules=kind.targets, lora_config=lora(**VARIANTS[variant]))
        if (name, variant) in NOT_BUILT:
            model = seeded(kind.build)
            with pytest.raises(RecastTargetError, match=NOT_BUILT[name, variant]):
                get_recast_model(model, config)
            assert not layers_of(model)
            return
        model = get_recast_model(seeded(kind.build), config, "task").eval()
        x, pretrained = kind.inputs(), outputs(seeded(kind.build), kind.inputs())
        torch.testing.assert_close(outputs(model, x), pretrained, rtol=0, atol=1e-6 if variant == "orthogonal" else 0)
        fill(model)
        live = outputs(model, x)
        with model.disable_part("lora"):
            assert not torch.allclose(outputs(model, x), live, atol=1e-3)
        model.merge_adapter()
        close(outputs(model, x), live)
        model.unmerge_adapter()
        assert torch.equal(outputs(model, x), live)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(seeded(kind.build), tmp_path / "task", adapter_name="again").eval()
        assert torch.equal(outputs(loaded, x), live)
        close(outputs(model.merge_and_unload(), x), live)
        with loaded.disable_adapter():
            assert torch.equal(outputs(loaded, x), pretrained)

    def test_velora_on_linear_layers(self):
        model = two_parts(target_modules=["qkv", "fc1"], velora_config={"num_groups": 4})
        live = outputs(model, vit_input())
        close(live, expected(model, vit_input()))
        model.train()(vit_input()).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in lora_parameters(model).values())
        close(outputs(model.eval().merge_and_unload(), vit_input()), live)

    def test_a_weight_that_is_read_has_the_lora_in_it_with_gradients(self):
        kind = KINDS["bilinear weight reader"]
        model = get_recast_model(seeded(kind.build), RecastConfig(target_modules=kind.targets, lora_config=lora()), "task")
        fill(model)
        model(kind.inputs()).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora_parameters(model).values())


class TestMerging:
    @pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
    @pytest.mark.parametrize("safe", [False, True])
    def test_merging_and_back_to_the_last_bit(self, targets, safe):
        model = two_parts(target_modules=targets)
        live = outputs(model, vit_input())
        pristine = {k: v.clone() for k, v in tiny_vit().state_dict().items()}
        for _ in range(3):
            model.merge_adapter(safe_merge=safe)
            close(outputs(model, vit_input()), live)
            model.unmerge_adapter()
        assert torch.equal(outputs(model, vit_input()), live)
        plain = model.unload()
        assert all(torch.equal(v, pristine[k]) for k, v in plain.state_dict().items())

    @pytest.mark.parametrize("broken", ["recast", "lora"])
    def test_a_task_that_is_not_finite_is_not_merged(self, broken):
        model = two_parts(target_modules=["qkv", "fc2"])
        name = "recast_coefficients" if broken == "recast" else "fc2.lora_B"
        last = [p for key, p in model.named_parameters() if name in key][-1]
        last.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert not any(layer.merged for layer in (*layers_of(model).values(), *part_layers(model)))
        plain = model.unload()
        assert all(torch.equal(v, tiny_vit().state_dict()[k]) for k, v in plain.state_dict().items())

    def test_a_merged_model_that_changes_its_dtype_comes_back(self):
        model = two_parts(target_modules=["qkv", "fc1"])
        model.merge_adapter()
        model.to(torch.float64)
        model.unmerge_adapter()
        with model.disable_adapter():
            close(outputs(model, vit_input().double()), outputs(tiny_vit().double(), vit_input().double()))

    def test_switching_the_whole_task_off_while_it_is_merged(self):
        model = two_parts(target_modules=["qkv", "fc1"], use_dora=True)
        live = outputs(model, vit_input())
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))
        assert torch.equal(outputs(model, vit_input()), live)


class TestCompressedBanks:
    def config(self, **fields: Any) -> RecastConfig:
        return RecastConfig(target_modules=["qkv", "proj"], num_templates=1, lora_config=lora(**fields))

    def test_a_part_where_a_bank_stands_for_the_weights(self, tmp_path):
        model = get_recast_model(tiny_vit(), self.config(), "task").eval()
        without = RecastConfig(target_modules=["qkv", "proj"], num_templates=1)
        assert torch.equal(outputs(model, vit_input()), outputs(get_recast_model(tiny_vit(), without).eval(), vit_input()))
        model.add_adapter("second", self.config(target_modules=["proj", "fc1"]))
        results = {}
        for name in ("task", "second"):
            fill(model, name)
            model.set_adapter(name)
            results[name] = outputs(model, vit_input())
            model.merge_adapter()
            close(outputs(model, vit_input()), results[name])
            model.unmerge_adapter()
            assert torch.equal(outputs(model, vit_input()), results[name])
        assert all(layer.is_released for layer in layers_of(model).values())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "second", adapter_name="second").eval()
        loaded.load_adapter(tmp_path / "task", "task")
        for name in ("second", "task"):
            loaded.set_adapter(name)
            assert torch.equal(outputs(loaded, vit_input()), results[name])

    @pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "mica"}])
    def test_variants_that_start_from_the_pretrained_weight_are_refused(self, fields):
        with pytest.raises(RecastTargetError, match="compressed bank stands for it"):
            get_recast_model(tiny_vit(), self.config(**fields))


class TestRefusals:
    def test_a_failure_in_the_middle_leaves_the_model_as_it_was(self, monkeypatch):
        model = two_parts(target_modules=["qkv", "fc1"])
        live, keys = outputs(model, vit_input()), list(model.state_dict())
        adopted = []
        adopt = lora_part_module._adopt

        def break_at_the_third(*args: Any) -> None:
            adopted.append(args)
            if len(adopted) == 3:
                raise RuntimeError("on purpose")
            adopt(*args)

        monkeypatch.setattr(lora_part_module, "_adopt", break_at_the_third)
        config = RecastConfig(target_modules=["qkv", "fc2"], lora_config=lora(target_modules=["qkv", "fc1", "fc2"]))
        plain = tiny_vit()
        for name, broken in (("on a model with a task", model.base_model.model), ("on a plain model", plain)):
            adopted.clear()
            with pytest.raises(RuntimeError, match="on purpose"):
                model.add_adapter("second", config) if broken is not plain else get_recast_model(plain, config)
            assert adopted, name
        assert list(plain.state_dict()) == list(tiny_vit().state_dict())
        assert list(model.state_dict()) == keys
        assert list(model.peft_config) == ["task"]
        assert torch.equal(outputs(model, vit_input()), live)
        model.merge_adapter()
        close(outputs(model, vit_input()), live)


class TestOtherLoras:
    def test_a_lora_on_other_modules_leaves_the_part_alone(self):
        model = two_parts(target_modules=["qkv"])
        live = outputs(model, vit_input())
        other = get_peft_model(model.base_model.model, LoraConfig(r=2, target_modules=["fc1"]), adapter_name="other").eval()
        assert torch.equal(outputs(other, vit_input()), live)
        assert all(p.requires_grad for p in lora_parameters(model).values())
        other.delete_adapter("other")
        assert torch.equal(outputs(other, vit_input()), live)

    def test_a_part_beside_a_lora_on_other_modules_leaves_it_alone(self):
        plain = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["fc1"]), adapter_name="other").base_model.model
        kinds = {name: type(module) for name, module in plain.named_modules() if name.endswith("fc1")}
        get_recast_model(plain, RecastConfig(target_modules=["proj"], lora_config=lora(target_modules=["qkv"])))
        assert {name: type(module) for name, module in plain.named_modules() if name.endswith("fc1")} == kinds

    @pytest.mark.filterwarnings("ignore")
    def test_a_lora_on_the_same_modules_is_refused_either_way(self):
        model = two_parts(target_modules=["qkv"])
        live = outputs(model, vit_input())
        with pytest.raises(RecastTargetError, match="LoRA part of RECAST tasks"):
            get_peft_model(model.base_model.model, LoraConfig(r=2, target_modules=["fc1", "qkv"]), adapter_name="other")
        assert torch.equal(outputs(model, vit_input()), live)
        assert list(model.peft_config) == ["task"]
        assert not [key for key in model.state_dict() if ".other" in key]
        plain = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["qkv"]), adapter_name="other").base_model.model
        with pytest.raises(RecastTargetError, match="another LoRA stands on blocks.0.attn.qkv"):
            get_peft_model(plain, RecastConfig(target_modules=["fc1"], lora_config=lora(target_modules=["qkv"])))
        assert not layers_of(plain)


def test_the_parts_of_a_mixed_expression_by_hand():
    """One linear layer, all numbers by hand: W x + d0 W x + d1 V x + s B A x + b."""
    kind = KINDS["linear"]
    plain = seeded(kind.build)
    config = RecastConfig(target_modules=["0", "1"], lora_config=lora(r=1, lora_alpha=2, target_modules=["0"]))
    model = get_recast_model(seeded(kind.build), config, "task").eval()
    fill(model)
    layer = model.get_base_model().layers[0]
    first, second = plain.layers[0], plain.layers[1]
    d = layers_of(model)["layers.0"].recast_coefficients["task"][0]
    x = vit_input()
    by_hand = (1 + d[0]) * F.linear(x, first.weight) + d[1] * F.linear(x, second.weight) + first.bias
    by_hand = by_hand + 2 * F.linear(F.linear(x, layer.lora_A["task"].weight), layer.lora_B["task"].weight)
    close(outputs(layer, x), by_hand.detach())
