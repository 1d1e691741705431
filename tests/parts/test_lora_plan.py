"""The LoRA part of a task as it is planned: targets, numbers, and what PEFT has no LoRA for."""

from __future__ import annotations

import re

import pytest
import torch
from lora_parts import fill, lora, lora_parameters
from models import KINDS, Repeated, layers_of, seeded, tiny_vit
from peft import PeftModel
from timm.models.resnet import BasicBlock, ResNet
from transformers import MambaConfig, MambaForCausalLM

from recast_peft import RecastConfig, RecastTargetError, get_recast_model, plan_recast
from recast_peft.parts.lora_strength import part_layers
from recast_peft.planning.roles import SHORTHANDS


def resnet():
    return seeded(lambda: ResNet(BasicBlock, (2, 1, 1, 1), num_classes=0, channels=(8, 8, 8, 8), stem_width=8))


class TestNamesOfSharedModules:
    """A module of a block that stands at two places has two names."""

    def targets(self, **part: object) -> list[str]:
        config = RecastConfig(target_modules=["0", "own"], lora_config={"r": 1, **part})
        model = get_recast_model(Repeated(), config)
        return [layer.module_name for layer in part_layers(model)]

    @pytest.mark.parametrize("wanted", [["tail.0"], ["blocks.0.0", "tail.0"], r"tail\.0"])
    def test_all_of_them_mean_the_module(self, wanted, recwarn):
        assert self.targets(target_modules=wanted) == ["blocks.0.0"]
        assert not recwarn.list

    @pytest.mark.parametrize("wanted", [["0", "own"], None, "all-linear"])
    @pytest.mark.parametrize("excluded", ["tail.0", "blocks.0.0"])
    def test_all_of_them_leave_it_out(self, wanted, excluded, recwarn):
        more = ["again"] if wanted == "all-linear" else []
        assert sorted(self.targets(target_modules=wanted, exclude_modules=[excluded, *more])) == ["blocks.1.0", "own"]
        assert not recwarn.list

    def test_a_layer_under_two_names_is_refused_by_both(self):
        for name in ("first", "again"):
            with pytest.raises(RecastTargetError, match="first cannot be a target: the module is shared by first and again"):
                self.targets(target_modules=[name])


class TestNamesThatAreEndings:
    """The name of a module is the ending of others', as ``conv1`` of a ResNet is of ``layer1.0.conv1``."""

    @pytest.mark.parametrize("targets", [r"conv1", r"conv1|layer1\.0\.conv1", r"conv1|layer[12]\.\d\.conv[12]", r".*conv1"])
    def test_a_saved_task_is_found_again(self, targets, tmp_path):
        config = RecastConfig(target_modules=targets, lora_config=lora(), init_weights=False)
        model = get_recast_model(resnet(), config, "task").eval()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(resnet(), tmp_path / "task", "task").eval()
        named = [[layer.module_name for layer in part_layers(found)] for found in (model, loaded)]
        assert named[0] == named[1] == [n for n, _ in resnet().named_modules() if re.fullmatch(targets, n)]
        x = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(loaded(x), model(x))

    def test_so_is_a_sum(self, tmp_path):
        targets = r"conv1|layer1\.0\.conv[12]"
        parts = {"one": lora(r=2, target_modules=r"conv1|layer1\.0\.conv2"), "two": lora(r=3, target_modules=r"layer1.*conv\d")}
        model = get_recast_model(resnet(), RecastConfig(target_modules=targets, group_size=1, lora_config=parts["one"]), "one")
        model.add_adapter("two", RecastConfig(target_modules=targets, group_size=1, lora_config=parts["two"]))
        fill(model.eval(), "one", 1)
        fill(model, "two", 2)
        model.add_weighted_adapter(["one", "two"], [1, 2], "sum")
        ranks = {layer.module_name: layer.r["sum"] for layer in part_layers(model) if layer.has_task("sum")}
        assert (ranks["conv1"], ranks["layer1.0.conv1"], ranks["layer1.0.conv2"], ranks["layer1.1.conv1"]) == (2, 3, 5, 3)
        model.set_adapter("sum")
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(resnet(), tmp_path / "sum", "sum").eval()
        x = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore")
class TestVariants:
    @pytest.mark.parametrize(
        ("name", "targets", "message"),
        [
            ("multi-head attention", ["0", "1"], "torch's multi-head attention"),
            ("conv2d depth-wise", ["0", "1", "2"], "rank 2"),
            ("conv2d with dilation and groups", ["0", "1", "2"], "PEFT has no such LoRA"),
        ],
    )
    def test_modules_that_peft_has_no_sound_lora_for(self, name, targets, message):
        model = seeded(KINDS[name].build)
        before = list(model.state_dict())
        with pytest.raises(RecastTargetError, match=message):
            get_recast_model(model, RecastConfig(target_modules=targets, lora_config=lora()))
        assert list(model.state_dict()) == before

    @pytest.mark.parametrize("verb", [plan_recast, get_recast_model])
    def test_modules_of_mamba_that_peft_refuses(self, verb):
        sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "state_size": 4, "num_hidden_layers": 2}
        model = seeded(lambda: MambaForCausalLM(MambaConfig(**sizes)))
        with pytest.raises(RecastTargetError, match=r"(?s)layers\.0\.mixer\.out_proj.*Mamba.*exclude_modules"):
            verb(model, RecastConfig(target_modules=["in_proj"], lora_config=lora(target_modules=["out_proj"])))
        verb(model, RecastConfig(target_modules=["in_proj"], lora_config=lora(target_modules=["in_proj"])))


class TestPlan:
    def test_the_plan_counts_both_parts(self):
        config = RecastConfig(target_modules=["qkv"], max_coefficients=8, lora_config=lora(target_modules=["fc1"]))
        plan = plan_recast(tiny_vit(), config)
        assert (plan.num_coefficients, plan.num_lora_numbers) == (8, 4 * 2 * (8 + 16))
        assert "LoRA part: 192 numbers per task on 4 target modules, 200 with the coefficients" in str(plan)

    @pytest.mark.parametrize(
        ("fields", "targets"),
        [
            ({}, ["blocks.1.attn.qkv", "blocks.3.attn.qkv"]),
            ({"target_modules": "all-mlp", "exclude_modules": ["fc2"]}, [f"blocks.{i}.mlp.fc1" for i in range(4)]),
            ({"target_modules": r".*\.[02]\..*fc1"}, ["blocks.0.mlp.fc1", "blocks.2.mlp.fc1"]),
            ({"target_modules": ["fc1"], "layers_to_transform": [1], "layers_pattern": "blocks"}, ["blocks.1.mlp.fc1"]),
        ],
    )
    def test_targets_of_its_own(self, fields, targets):
        config = RecastConfig(target_modules=r".*\.[13]\..*qkv", lora_config=lora(**fields))
        assert list(plan_recast(tiny_vit(), config).lora.targets) == targets
        model = get_recast_model(tiny_vit(), config, "task")
        wanted = {key for key in lora_parameters(model) if key.endswith("lora_A.task.weight")}
        assert len(wanted) == len(targets)
        assert all(any(target in key for key in wanted) for target in targets)

    def test_a_shorthand_that_was_added_names_targets_here_too(self, monkeypatch):
        monkeypatch.setitem(SHORTHANDS, "all-first-mlp", lambda candidate: candidate.name.endswith("fc1"))
        config = RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules="all-first-mlp"))
        assert list(plan_recast(tiny_vit(), config).lora.targets) == [f"blocks.{i}.mlp.fc1" for i in range(4)]


class TestRefusals:
    def test_targets_that_are_not_there(self):
        model = tiny_vit()
        with pytest.raises(RecastTargetError, match="not found in the base model"):
            get_recast_model(model, RecastConfig(target_modules=["qkv"], lora_config=lora(target_modules=["nothing"])))
        assert not layers_of(model)

    def test_the_classifier_that_the_task_owns(self):
        config = RecastConfig(
            target_modules=["qkv"], num_classes=5, head_module="head", lora_config=lora(target_modules=["head"])
        )
        with pytest.raises(RecastTargetError, match="head is trained whole with this task"):
            get_recast_model(tiny_vit(), config)
