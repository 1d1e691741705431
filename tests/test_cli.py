"""The command line: what it prints, what it writes, and how it says that something is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from models import move
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import recast_peft
from recast_peft import RecastConfig, TaskPool, get_recast_model, save_compressed_model, write_model_card
from recast_peft.cli import main
from recast_peft.storage.atomic import write_text
from recast_peft.storage.versions import keeping_version

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def saved_task(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    backbone = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = get_recast_model(backbone, RecastConfig(num_classes=3), "pets").eval()
    move(model, "pets", size=1.0)
    model.save_pretrained(tmp_path / "tasks")
    return model, tmp_path


class TestPlan:
    def test_it_prints_the_plan_of_a_timm_model(self, capsys):
        assert main(["plan", "vit_small_patch16_224", "--target-modules", "qkv"]) == 0
        shown = capsys.readouterr().out
        assert "blocks.{10,11}.attn.qkv" in shown
        assert "6 banks, 12 target modules, 24 numbers per task" in shown

    def test_it_builds_no_weights(self, capsys, tmp_path, monkeypatch):
        made = []
        monkeypatch.setattr("recast_peft.cli.plan_recast", lambda model, config: made.append(model))
        ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(tmp_path)
        for name in ("test_vit", str(tmp_path)):
            assert main(["plan", name]) == 0
        assert all(parameter.is_meta for model in made for parameter in model.parameters())

    def test_a_model_that_needs_numbers_while_it_is_built_is_planned_too(self, capsys, monkeypatch):
        def build(name):
            assert torch.ones(2).sum().item() == 2
            return nn.Sequential(nn.Linear(4, 4))

        monkeypatch.setattr("timm.create_model", build)
        assert main(["plan", "test_vit", "--target-modules", "0"]) == 0
        assert "1 numbers per task" in capsys.readouterr().out

    @pytest.mark.parametrize(("targets", "numbers"), [(["all-mlp"], 48), ([r"blocks\.[01]\..*qkv"], 4), (["qkv", "fc1"], 48)])
    def test_shorthands_patterns_and_names(self, capsys, targets, numbers):
        assert main(["plan", "vit_small_patch16_224", "--target-modules", *targets]) == 0
        assert f" {numbers} numbers per task" in capsys.readouterr().out

    def test_a_transformers_folder(self, capsys, saved_task):
        assert main(["plan", str(saved_task[1] / "base"), "--num-groups", "1"]) == 0
        assert "numbers per task" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("built", "kind"),
        [(BertModel, "bert"), (BertForMaskedLM, "bert"), (BertForTokenClassification, "bert"), (ViTModel, "vit")],
    )
    def test_a_transformers_folder_has_the_names_of_its_class_and_a_classifier_where_asked(self, capsys, tmp_path, built, kind):
        built(built.config_class(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(tmp_path)
        assert main(["plan", str(tmp_path)]) == 0
        prefix = f"{kind}." if "For" in built.__name__ else ""
        assert f"\n{prefix}encoder.layer." in capsys.readouterr().out.replace("\nlayers.", "\nencoder.layer.")
        assert main(["plan", str(tmp_path), "--num-classes", "3"]) == 0
        shown = capsys.readouterr().out
        assert f"\n{kind}." in shown
        assert "head: 1 place (classifier), 51 trainable parameters" in shown

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["no_such_model"], "neither to timm nor to transformers"),
            (["test_vit", "--target-modules", "qqkv"], "Near: .*qkv"),
            (["test_vit", "--group-size", "0"], "plan: --group-size 0: expected"),
            (["test_vit", "--group-size", "-3"], "plan: --group-size -3: expected"),
            (["test_vit", "--group-size", "2", "--num-groups", "3"], "--group-size 2 and --num-groups 3 were both given"),
            (["test_vit", "--num-templates", "9"], "--num-templates 9 is above .*\n  --group-size: 2\n.*larger --group-size"),
            (["test_vit", "--target-modules", "fc1", "norm"], "that --target-modules names.*with --exclude-modules"),
            (["test_vitt"], "did you mean 'test_vit.?'"),
        ],
    )
    def test_errors_are_said_without_a_traceback(self, capsys, arguments, said):
        assert main(["plan", *arguments]) == 1
        printed = capsys.readouterr()
        assert not printed.out
        assert "Traceback" not in printed.err
        assert re.search(said, printed.err, flags=re.DOTALL)

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_size": "wide"},
            {"hidden_size": -3},
            {"hidden_size": 30, "num_attention_heads": 7},
            {"architectures": "x", "num_hidden_layers": []},
        ],
    )
    def test_a_config_that_makes_no_model_is_an_error_without_a_traceback(self, capsys, tmp_path, fields):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **fields}))
        assert main(["plan", str(tmp_path)]) == 1
        assert "transformers" in capsys.readouterr().err

    @pytest.mark.parametrize("named", ["BertConfig", "pipeline", "NoSuchModel", 3])
    def test_a_class_that_is_no_model_is_not_called(self, capsys, tmp_path, named):
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [named], **small}))
        assert main(["plan", str(tmp_path)]) == 0
        assert "\nencoder.layer" in capsys.readouterr().out

    def test_a_classifier_and_modules_to_leave_out(self, capsys):
        assert main(["plan", "test_vit", "--num-classes", "10", "--exclude-modules", r".*blocks\.[1-5].*"]) == 0
        shown = capsys.readouterr().out
        assert "head: 1 place (head), 650 trainable parameters per task" in shown  # 64 features and a bias for 10 classes
        assert "2 banks, 2 target modules" in shown

    def test_a_saved_task_is_no_model(self, capsys, saved_task):
        task = str(saved_task[1] / "tasks" / "pets")
        assert main(["plan", task]) == 1
        assert f"recast-peft inspect {task}" in capsys.readouterr().err


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

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_file_of_a_task_means_the_task(self, capsys, saved_task, file):
        assert main(["inspect", str(saved_task[1] / "tasks" / "pets" / file)]) == 0
        assert "coefficients     8\n" in capsys.readouterr().out

    def test_a_pool(self, capsys, saved_task):
        model, folder = saved_task
        pool = TaskPool(model)
        pool.add("pets", "pets")
        for i in range(6):
            pool.add(f"fresh{i}")
        pool.save(folder / "pool.safetensors")
        assert main(["inspect", str(folder / "pool.safetensors")]) == 0
        shown = capsys.readouterr().out
        assert "tasks           7: pets, fresh0, fresh1, fresh2, fresh3, ...\n" in shown
        assert "coefficients    8 each\n" in shown
        assert "classifiers     1\n" in shown
        assert main(["inspect", str(FIXTURES / "pool.safetensors")]) == 0  # of the first format
        assert re.search(r"tasks +8: a, b.*\nclassifiers +2\n", capsys.readouterr().out, flags=re.DOTALL)
        assert main(["inspect", str(folder / "base" / "model.safetensors")]) == 1
        assert "is no file of a TaskPool" in capsys.readouterr().err
        assert main(["inspect", str(folder / "pool.safetensors"), "--subfolder", "pets"]) == 1
        assert "is a file, in which --subfolder says nothing" in capsys.readouterr().err

    def test_one_of_several_tasks_is_asked_for_by_the_option(self, capsys, saved_task):
        model, folder = saved_task
        model.add_adapter("toys", RecastConfig())
        model.save_pretrained(folder / "tasks")
        assert main(["inspect", str(folder / "tasks")]) == 1
        assert "holds 2 tasks, in pets, toys: say which one with --subfolder\n" in capsys.readouterr().err
        assert main(["inspect", str(folder / "tasks"), "--subfolder", "toys"]) == 0

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
        (self.task(saved_task) / "adapter_config.json").rename(saved_task[1] / "away")
        status, shown = self.found(capsys, saved_task[1] / "tasks")
        assert (status, "holds no adapter_config.json" in shown) == (1, True)
        (saved_task[1] / "away").rename(self.task(saved_task) / "adapter_config.json")
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

    def test_the_file_of_a_pool(self, capsys, saved_task):
        status, shown = self.found(capsys, FIXTURES / "pool.safetensors")
        assert (status, "a packed pool of" in shown) == (3, True)  # the first version wrote no checksum
        assert self.found(capsys, saved_task[1] / "base" / "model.safetensors")[0] == 1

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
    assert main(["versions", str(file), "--roll-back", "0"]) == 1  # no number is the latest, and 0 is a number
    assert "no version 0" in capsys.readouterr().err
    assert file.read_text() == "ccc"
    file.unlink()
    assert main(["versions", str(file)]) == 0  # what is left of it can be put back


def test_a_file_without_versions_and_none_at_all_are_told_apart(capsys, tmp_path):
    (tmp_path / "pool.safetensors").write_text("a")
    assert main(["versions", str(tmp_path / "pool.safetensors")]) == 0
    assert "has no version before this one" in capsys.readouterr().out
    assert main(["versions", str(tmp_path / "nothing")]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"recast-peft {recast_peft.__version__}\n"


class TestMerge:
    def test_the_plain_checkpoint_needs_no_library(self, capsys, saved_task):
        model, folder = saved_task
        arguments = ["merge", str(folder / "tasks" / "pets"), "--output", str(folder / "plain")]
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert "pass the path as --backbone\nGive the path of a checkpoint with --backbone." in said
        assert "backbone=" not in said
        assert main([*arguments, "--backbone", str(folder / "base")]) == 0
        plain = AutoModelForImageClassification.from_pretrained(folder / "plain").eval()
        x = torch.randn(2, 3, 16, 16)
        assert plain(x).logits.shape == (2, 3)
        assert torch.allclose(plain(x).logits, model(pixel_values=x).logits, atol=1e-5)
        assert not [key for key in load_file(folder / "plain" / "model.safetensors") if "recast" in key]

    def test_timm_builds_its_model_from_the_folder_with_its_labels(self, tmp_path):
        torch.manual_seed(0)
        backbone = timm.create_model("test_vit", num_classes=0)
        torch.save(backbone.state_dict(), tmp_path / "base.pth")
        model = get_recast_model(backbone, RecastConfig(id2label={1: "bus", 0: "van"}, init_weights=False), "cars").eval()
        model.save_pretrained(tmp_path / "tasks")
        tasks, out, base = (str(tmp_path / name) for name in ("tasks", "out", "base.pth"))
        assert main(["merge", tasks, "--output", out, "--backbone", base]) == 0
        x = torch.randn(2, 3, 160, 160)
        plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        torch.testing.assert_close(plain(x), model(x))
        assert plain.pretrained_cfg["label_names"] == ["van", "bus"]

    def test_labels_go_with_a_transformers_model(self, saved_task):
        _, folder = saved_task
        backbone = ViTForImageClassification.from_pretrained(folder / "base")
        config = RecastConfig(id2label={0: "van", 1: "bus"}, init_weights=False)
        get_recast_model(backbone, config, "cars").save_pretrained(folder / "cars")
        assert main(["merge", str(folder / "cars"), "--output", str(folder / "out"), "--backbone", str(folder / "base")]) == 0
        assert AutoModelForImageClassification.from_pretrained(folder / "out").config.id2label == {0: "van", 1: "bus"}

    def test_a_folder_with_an_adapter_is_no_backbone(self, capsys, saved_task):
        _, folder = saved_task
        backbone = ViTForImageClassification.from_pretrained(folder / "base")
        lora = get_peft_model(backbone, LoraConfig(target_modules="all-linear"))
        lora.save_pretrained(folder / "lora")
        arguments = ["merge", str(folder / "tasks" / "pets"), "--output", str(folder / "out")]
        assert main([*arguments, "--backbone", str(folder / "lora")]) == 1
        assert "has an adapter in it (adapter_config.json), merge that first" in capsys.readouterr().err
        assert not (folder / "out").exists()

    def test_a_full_disk_leaves_nothing(self, capsys, saved_task, monkeypatch):
        _, folder = saved_task
        out = folder / "full"

        def fail(model, path, *args, **kwargs):
            (Path(path) / "config.json").write_text("{}")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        arguments = ["merge", str(folder / "tasks" / "pets"), "--output", str(out), "--backbone", str(folder / "base")]
        with monkeypatch.context() as patch:
            patch.setattr(ViTForImageClassification, "save_pretrained", fail)
            assert main(arguments) == 1
        assert "No space left on device" in capsys.readouterr().err
        assert list(out.iterdir()) == []
        assert main(arguments) == 0

    def test_a_folder_with_something_in_it_is_left_alone(self, capsys, saved_task):
        _, folder = saved_task
        assert main(["merge", str(folder / "tasks" / "pets"), "--output", str(folder / "base" / "config.json")]) == 1
        assert "is a file; nothing was written" in capsys.readouterr().err
        assert main(["merge", str(folder / "tasks" / "pets"), "--output", str(folder / "base")]) == 1
        assert "not empty" in capsys.readouterr().err


@pytest.fixture
def named_otherwise(tmp_path):
    """A pool of one task whose name neither ASCII nor Windows' western encoding has."""
    pool = TaskPool(get_recast_model(nn.Sequential(nn.Linear(4, 4)), RecastConfig(target_modules=["0"]), "a"))
    pool.add("\N{CAT FACE}", RecastConfig())
    pool.save(tmp_path / "pool.safetensors")
    return str(tmp_path / "pool.safetensors")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_is_escaped(monkeypatch, named_otherwise, encoding):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding))
    assert main(["inspect", named_otherwise]) == 0
    assert ("\N{CAT FACE}".encode() if encoding == "utf-8" else rb"\U0001f431") in output.getvalue()


def test_output_that_nobody_reads_is_no_error(monkeypatch, capsys, named_otherwise):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["inspect", named_otherwise]) == 141
    assert not capsys.readouterr().err


def test_no_output_at_all_is_no_error(monkeypatch, capsys, named_otherwise):
    monkeypatch.setattr(sys, "stdout", None)  # a shell's >&-
    assert main(["inspect", named_otherwise]) == 0
    assert not capsys.readouterr().err


def test_an_interruption_is_no_traceback(monkeypatch, capsys, named_otherwise):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("recast_peft.cli.describe_pool", interrupted)
    assert main(["inspect", named_otherwise]) == 130
    assert capsys.readouterr() == ("", "")


def test_it_is_a_program(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "recast_peft.cli")
    monkeypatch.setattr(sys, "argv", ["recast-peft", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("recast_peft.cli", run_name="__main__")
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "plan" in said
    assert "merge" in said
