"""Partners: AdaptFormer, Piggyback and CLR beside RECAST, and alone, on transformers and convolutional networks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from models import TinyVit, layers_of, outputs, reference_model, seeded, tiny_vit, vit_input
from partner_cases import (
    CASES,
    ON_BIASES,
    ON_WEIGHTS,
    WEIGHTS,
    TinyCnn,
    expected_model,
    frozen_state,
    image,
    is_partners,
    learn,
    learned,
    same_state,
    tiny_cnn,
)
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora as peft_convert_to_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recast_peft import (
    PARTNERS,
    AdaptFormerConfig,
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
)
from recast_peft.cli import main
from recast_peft.parts.partner import PartnerHook


def test_every_partner_has_a_case():
    own = {m for m, config in PARTNERS.items() if config.__module__.startswith("recast_peft.") and config.is_trained}
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
        # coefficients of biases can be combined and pooled with their like: tests/parts/test_bias.py
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


@pytest.mark.parametrize("name", ON_WEIGHTS + ON_BIASES)
def test_merging_into_a_plain_model_keeps_the_output(name):
    model = learned(name)
    live = outputs(model, CASES[name].inputs())
    plain = model.merge_and_unload()
    assert list(plain.state_dict()) == list(CASES[name].build().state_dict())
    torch.testing.assert_close(outputs(plain, CASES[name].inputs()), live, rtol=1e-5, atol=1e-6)


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


def test_partners_stay_where_they_are_when_another_wrapper_comes_between() -> None:
    class Around(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x)

    model = learned("adaptformer")
    live = outputs(model, CASES["adaptformer"].inputs())
    blocks = model.get_base_model().blocks
    for i, block in enumerate(blocks):
        blocks[i] = Around(block)
    model.add_adapter("second", RecastConfig(target_modules=["qkv"]))
    assert torch.equal(outputs(model, CASES["adaptformer"].inputs()), live)


def test_a_place_that_is_gone_is_named() -> None:
    model = learned("adaptformer")
    model.get_base_model().blocks[0].mlp = nn.Identity()
    model.get_base_model().blocks[0].add_module("other", model.get_base_model().blocks[0]._modules.pop("mlp"))
    with pytest.raises(RecastTargetError, match=r"blocks.0.mlp, where tasks have the partner adaptformer, is no longer"):
        model.add_adapter("second", RecastConfig(target_modules=["qkv"]))


def test_a_model_that_was_compiled_before_takes_partners(tmp_path: Path) -> None:
    """A compiled model passes assignments on to the model that it holds; this ended in a bare KeyError."""
    config = RecastConfig(target_modules=["qkv"], partners=[AdaptFormerConfig(target_modules=["mlp"])])
    model = get_recast_model(torch.compile(tiny_vit(), backend="eager"), config, "task").eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_vit(), tmp_path / "task", "task").eval()
    assert torch.equal(outputs(model, vit_input()), outputs(plain, vit_input()))
    assert not torch.equal(outputs(plain, vit_input()), outputs(tiny_vit(), vit_input()))
