"""The command line: what it prints, what it writes, and how it says that something is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from recast_peft import RecastConfig, get_recast_model, save_compressed_model, write_model_card
from recast_peft.cli import main
from recast_peft.storage.atomic import write_text
from recast_peft.storage.versions import keeping_version


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

    def test_it_prints_nothing_that_steers_a_terminal(self, capsys, saved_task):
        path = saved_task[1] / "tasks" / "pets" / "adapter_config.json"
        config = json.loads(path.read_text())
        config["backbone"]["name"] = "\x1b]0;owned\x07\x1b[2Jgoogle/vit\u202e"
        config["groups"] = {f"\x1b[31m{name}": members for name, members in config["groups"].items()}
        path.write_text(json.dumps(config))
        assert main(["inspect", str(saved_task[1] / "tasks" / "pets")]) == 0
        shown = capsys.readouterr().out
        assert "google/vit" in shown
        assert not set(shown) & set("\x1b\x07\u202e")


class TestVerify:
    def task(self, saved_task):
        return saved_task[1] / "tasks" / "pets"

    def found(self, capsys, folder, *options):
        status = main(["verify", str(folder), *options])
        return status, capsys.readouterr().out

    def test_a_whole_task(self, capsys, saved_task):
        status, shown = self.found(capsys, self.task(saved_task))
        assert status == 3  # its backbone is a folder of this machine, without a license
        assert "a task of 8 coefficients, whole" in shown
        assert "no license is stated" in shown
        assert "error" not in shown
        write_model_card(self.task(saved_task), license="mit")
        path = self.task(saved_task) / "adapter_config.json"
        config = json.loads(path.read_text())
        config["backbone"].update(name="google/vit", revision="a" * 40)
        path.write_text(json.dumps(config))
        status, shown = self.found(capsys, saved_task[1] / "tasks")
        assert (status, "license: mit" in shown, f"google/vit at {'a' * 40}" in shown) == (0, True, True)
        assert self.found(capsys, saved_task[1] / "tasks", "--quiet") == (0, "")

    def test_a_flipped_bit(self, capsys, saved_task):
        file = self.task(saved_task) / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        status, shown = self.found(capsys, saved_task[1] / "tasks")
        assert status == 1
        assert re.search(r"error .*pets.*damaged", shown)

    @pytest.mark.parametrize(("value", "status"), [(1e4, 3), (float("nan"), 1)])
    def test_numbers_that_no_task_has(self, capsys, saved_task, value, status):
        file = self.task(saved_task) / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if "coefficients" in key)
        tensors[key].view(-1)[0] = value
        save_file(tensors, file)
        found, shown = self.found(capsys, self.task(saved_task))
        assert found == status
        assert key in shown
        assert "has no checksum" in shown or status == 1

    def test_banks_and_compressed_models(self, capsys, tmp_path):
        torch.manual_seed(0)
        config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16)
        model = get_recast_model(ViTForImageClassification(config), RecastConfig(num_templates=1))
        save_compressed_model(model, tmp_path / "small")
        status, shown = self.found(capsys, tmp_path)
        assert (status, "the rest of a compressed model" in shown) == (3, True)
        header = tmp_path / "small" / "recast_bank.json"
        header.write_text(header.read_text()[:-1])
        status, shown = self.found(capsys, tmp_path)
        assert (status, "not valid JSON" in shown) == (1, True)

    def test_nothing(self, capsys, tmp_path):
        assert self.found(capsys, tmp_path)[0] == 1
        assert self.found(capsys, tmp_path / "missing")[0] == 1


def test_versions_are_listed_and_rolled_back(capsys, tmp_path):
    file = tmp_path / "pool.safetensors"
    for text in ("a", "bb", "ccc"):
        with keeping_version(file, 5):
            write_text(file, text)
    assert main(["versions", str(file)]) == 0
    assert [line.split()[0] + line.split()[3] for line in capsys.readouterr().out.splitlines()] == ["11", "22"]
    assert main(["versions", str(file), "--roll-back", "1"]) == 0
    assert file.read_text() == "a"
    assert main(["versions", str(file), "--roll-back"]) == 0
    assert file.read_text() == "ccc"
    capsys.readouterr()
    assert main(["versions", str(file), "--roll-back", "9"]) == 1
    assert "no version 9" in capsys.readouterr().err


class TestMerge:
    def test_the_plain_checkpoint_needs_no_library(self, capsys, saved_task):
        model, folder = saved_task
        arguments = ["merge", str(folder / "tasks" / "pets"), "--output", str(folder / "plain")]
        assert main(arguments) == 1
        assert "pass the path as backbone=" in capsys.readouterr().err
        assert main([*arguments, "--backbone", str(folder / "base")]) == 0
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
