"""The command line: what it prints, what it writes, and how it says that something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from recast_peft import RecastConfig, get_recast_model
from recast_peft.cli import main


@pytest.fixture
def saved_task(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    backbone = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = get_recast_model(backbone, RecastConfig(num_classes=3), "pets").eval()
    for name, parameter in model.named_parameters():
        if "pets" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "tasks")
    return model, tmp_path


class TestPlan:
    def test_it_prints_the_plan_of_a_timm_model(self, capsys):
        assert main(["plan", "vit_small_patch16_224", "--target-modules", "qkv"]) == 0
        shown = capsys.readouterr().out
        assert "blocks.{10,11}.attn.qkv" in shown
        assert "6 banks, 12 target modules, 24 numbers per task" in shown

    @pytest.mark.parametrize(("targets", "numbers"), [(["all-mlp"], 48), ([r"blocks\.[01]\..*qkv"], 4), (["qkv", "fc1"], 48)])
    def test_shorthands_patterns_and_names(self, capsys, targets, numbers):
        assert main(["plan", "vit_small_patch16_224", "--target-modules", *targets]) == 0
        assert f" {numbers} numbers per task" in capsys.readouterr().out

    def test_a_transformers_folder(self, capsys, saved_task):
        assert main(["plan", str(saved_task[1] / "base"), "--num-groups", "1"]) == 0
        assert "numbers per task" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["no_such_model"], "neither to timm nor to transformers"),
            (["test_vit", "--target-modules", "qqkv"], "Near: .*qkv"),
            (["test_vit", "--group-size", "0"], "group_size=0"),
        ],
    )
    def test_errors_are_said_without_a_traceback(self, capsys, arguments, said):
        assert main(["plan", *arguments]) == 1
        printed = capsys.readouterr()
        assert not printed.out
        assert "Traceback" not in printed.err
        assert re.search(said, printed.err, flags=re.DOTALL)


class TestInspect:
    def test_it_says_what_a_task_is(self, capsys, saved_task):
        assert main(["inspect", str(saved_task[1] / "tasks" / "pets")]) == 0
        shown = capsys.readouterr().out
        # both feed-forward layers of two blocks, two templates each; a head of 16 x 3 and 3 numbers
        assert "coefficients     8\n" in shown
        assert "further numbers  51\n" in shown
        assert "classes          3\n" in shown
        assert "banks            exact\n" in shown

    def test_a_folder_without_a_task(self, capsys, tmp_path):
        assert main(["inspect", str(tmp_path)]) == 1
        assert str(tmp_path) in capsys.readouterr().err


class TestMerge:
    def test_the_plain_checkpoint_needs_no_library(self, capsys, saved_task):
        model, folder = saved_task
        assert main(["merge", str(folder / "tasks" / "pets"), "--output", str(folder / "plain")]) == 0
        plain = AutoModelForImageClassification.from_pretrained(folder / "plain").eval()
        x = torch.randn(2, 3, 16, 16)
        assert plain(x).logits.shape == (2, 3)
        assert torch.allclose(plain(x).logits, model(pixel_values=x).logits, atol=1e-5)
        assert not [key for key in load_file(folder / "plain" / "model.safetensors") if "recast" in key]

    def test_a_folder_with_something_in_it_is_left_alone(self, capsys, saved_task):
        _, folder = saved_task
        assert main(["merge", str(folder / "tasks" / "pets"), "--output", str(folder / "base")]) == 1
        assert "not empty" in capsys.readouterr().err


def test_it_is_a_program():
    done = subprocess.run([sys.executable, "-m", "recast_peft.cli", "--help"], capture_output=True, text=True, check=True)
    assert "plan" in done.stdout
    assert "merge" in done.stdout
