"""One name is enough: the backbone that a task names is found again, and nothing else is taken for it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_backbones import BASE, TASK, TIMM_SIZES, learned, make_timm, make_transformers, output, serve_timm, serve_transformers
from hub_server import HubServer, folder_content
from huggingface_hub import constants
from models import outputs, randomise, state, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model
from timm.models import save_for_hf
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ViTForImageClassification

from recast_peft import (
    AutoRecastModel,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    RecastHubError,
    RecastLayer,
    RecastLoadError,
    RecastTargetError,
    get_recast_model,
    push_task_to_hub,
    push_tasks_to_hub,
)


class TestATimmBackboneOnTheHub:
    def test_is_built_from_the_tasks_name_alone(self, hub: HubServer, tmp_path: Path) -> None:
        commit = serve_timm(hub, tmp_path)
        model = learned(timm.create_model(f"hf-hub:{BASE}", pretrained=True).eval(), num_classes=3)
        backbone = model.peft_config["default"].backbone
        assert backbone["name"] == f"hf-hub:{BASE}"
        assert backbone["revision"] == commit
        assert backbone["input_size"] == [3, 32, 32]
        assert (backbone["mean"], backbone["std"]) == ([0.5] * 3, [0.5] * 3)
        push_task_to_hub(model, TASK)
        loaded = AutoRecastModel.from_pretrained(TASK)
        assert torch.equal(output(loaded), output(model))
        assert not torch.equal(output(loaded)[:, :3], output(make_timm())[:, :3])
        assert not loaded.training

    def test_by_one_of_timms_own_names_is_pinned_to_its_commit(self, hub: HubServer, tmp_path: Path) -> None:
        repository = "timm/test_vit.r160_in1k"
        first = make_timm(0, img_size=160, num_classes=1000)
        save_for_hf(first, tmp_path / "0", safe_serialization=True)
        commit = hub.add(repository, folder_content(tmp_path / "0"))
        model = learned(timm.create_model("test_vit", pretrained=True, num_classes=0, img_size=32).eval(), num_classes=3)
        backbone = model.peft_config["default"].backbone
        assert (backbone["name"], backbone["tag"]) == ("test_vit.r160_in1k", "r160_in1k")
        assert (backbone["repository"], backbone["revision"]) == (repository, commit)
        model.save_pretrained(tmp_path / "task")
        save_for_hf(make_timm(1, img_size=160, num_classes=1000), tmp_path / "1", safe_serialization=True)
        hub.add(repository, folder_content(tmp_path / "1"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = AutoRecastModel.from_pretrained(tmp_path / "task", cache_dir=tmp_path / "fresh")
        assert torch.equal(output(loaded), output(model))

    @pytest.mark.parametrize("name", [f"hf-hub:{BASE}", "test_vit"])
    def test_works_offline_from_the_cache(self, hub: HubServer, tmp_path: Path, monkeypatch: Any, name: str) -> None:
        serve_timm(hub, tmp_path)
        save_for_hf(make_timm(img_size=160, num_classes=1000), tmp_path / "full", safe_serialization=True)
        hub.add("timm/test_vit.r160_in1k", folder_content(tmp_path / "full"))
        model = timm.create_model(name, pretrained=True, **({} if ":" in name else {"img_size": 32, "num_classes": 0}))
        push_task_to_hub(learned(model.eval()), TASK)
        online = output(AutoRecastModel.from_pretrained(TASK))
        count = len(hub.requests)
        assert torch.equal(output(AutoRecastModel.from_pretrained(TASK, local_files_only=True)), online)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert torch.equal(output(AutoRecastModel.from_pretrained(TASK)), online)
        assert len(hub.requests) == count

    def test_may_be_in_the_format_before_safetensors(self, hub: HubServer, tmp_path: Path) -> None:
        serve_timm(hub, tmp_path, is_old=True)
        model = learned(timm.create_model(f"hf-hub:{BASE}", pretrained=True).eval())
        model.save_pretrained(tmp_path / "task")
        loaded = AutoRecastModel.from_pretrained(tmp_path / "task", cache_dir=tmp_path / "fresh")
        assert torch.equal(output(loaded), output(model))

    def test_that_is_private_opens_with_the_token(self, hub: HubServer, tmp_path: Path, monkeypatch: Any) -> None:
        serve_timm(hub, tmp_path, private=True)
        model = learned(timm.create_model(f"hf-hub:{BASE}", pretrained=True).eval())
        push_task_to_hub(model, TASK, private=True)
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(RecastHubError, match="private or gated"):
            AutoRecastModel.from_pretrained(TASK, cache_dir=tmp_path / "fresh")
        loaded = AutoRecastModel.from_pretrained(TASK, cache_dir=tmp_path / "fresh", token="hf_writer")
        assert torch.equal(output(loaded), output(model))


class TestATransformersBackboneOnTheHub:
    def test_is_built_from_the_tasks_name_alone(self, hub: HubServer, tmp_path: Path) -> None:
        commit = serve_transformers(hub, tmp_path)
        model = learned(ViTForImageClassification.from_pretrained(BASE).eval())
        backbone = model.peft_config["default"].backbone
        assert (backbone["name"], backbone["revision"]) == (BASE, commit)
        assert backbone["class"] == "ViTForImageClassification"
        model.push_to_hub(TASK)
        loaded = AutoRecastModel.from_pretrained(TASK, adapter_name="mine")
        assert list(loaded.peft_config) == ["mine"]
        assert torch.equal(output(loaded), output(model))
        assert not torch.equal(output(loaded), output(make_transformers()))

    def test_stays_at_its_revision_when_its_repository_moves_on(self, hub: HubServer, tmp_path: Path) -> None:
        serve_transformers(hub, tmp_path)
        model = learned(ViTForImageClassification.from_pretrained(BASE).eval())
        push_task_to_hub(model, TASK)
        serve_transformers(hub, tmp_path, seed=1)
        loaded = AutoRecastModel.from_pretrained(TASK, cache_dir=tmp_path / "fresh")
        assert torch.equal(output(loaded), output(model))

    def test_at_a_revision_that_peft_was_told_of_is_found(self, hub: HubServer, tmp_path: Path) -> None:
        serve_transformers(hub, tmp_path)
        hub.repositories[BASE].branches["v2"] = hub.repositories[BASE].branches["main"]
        second = serve_transformers(hub, tmp_path, seed=1, branch="v2")
        ViTForImageClassification.from_pretrained(BASE)
        base = ViTForImageClassification.from_pretrained(BASE, revision="v2").eval()
        model = get_recast_model(base, revision="v2")
        assert model.peft_config["default"].backbone["revision"] in (second, "v2")
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(0.5)
        push_task_to_hub(model.eval(), TASK)
        assert torch.equal(output(AutoRecastModel.from_pretrained(TASK)), output(model))

    def test_of_other_weights_is_refused(self, hub: HubServer, tmp_path: Path) -> None:
        serve_transformers(hub, tmp_path)
        model = learned(ViTForImageClassification.from_pretrained(BASE).eval())
        described = {**model.peft_config["default"].backbone, "revision": None}
        model = learned(ViTForImageClassification.from_pretrained(BASE).eval(), backbone=described)
        push_task_to_hub(model, TASK)
        serve_transformers(hub, tmp_path, seed=1)
        with pytest.raises(RecastBaseMismatchError, match=f"built from '{BASE}', as the task says"):
            AutoRecastModel.from_pretrained(TASK)

    def test_works_offline_from_the_cache(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        serve_transformers(hub, tmp_path)
        push_task_to_hub(learned(ViTForImageClassification.from_pretrained(BASE).eval()), TASK)
        online = output(AutoRecastModel.from_pretrained(TASK))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        count = len(hub.requests)
        assert torch.equal(output(AutoRecastModel.from_pretrained(TASK)), online)
        assert len(hub.requests) == count

    def test_can_be_given_options(self, hub: HubServer, tmp_path: Path) -> None:
        serve_transformers(hub, tmp_path)
        push_task_to_hub(learned(ViTForImageClassification.from_pretrained(BASE).eval()), TASK)
        loaded = AutoRecastModel.from_pretrained(TASK, backbone={"dtype": torch.bfloat16}, is_trainable=True)
        assert loaded.get_base_model().dtype == torch.bfloat16
        assert any(parameter.requires_grad for parameter in loaded.parameters())

    def test_without_the_head_that_the_task_used_warns(self, hub: HubServer, tmp_path: Path) -> None:
        serve_transformers(hub, tmp_path)
        base = ViTForImageClassification.from_pretrained(BASE, num_labels=9, ignore_mismatched_sizes=True)
        push_task_to_hub(learned(base), TASK)
        with pytest.warns(UserWarning, match=r"classifier\.(bias|weight).*random"):
            loaded = AutoRecastModel.from_pretrained(TASK)
        assert loaded.config.num_labels == 9

    def test_with_the_head_that_the_task_stores_is_silent(self, hub: HubServer, tmp_path: Path) -> None:
        serve_transformers(hub, tmp_path)
        base = ViTForImageClassification.from_pretrained(BASE, num_labels=9, ignore_mismatched_sizes=True)
        model = learned(base, modules_to_save=["classifier"])
        push_task_to_hub(model, TASK)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*random.*")
            loaded = AutoRecastModel.from_pretrained(TASK)
        assert torch.equal(output(loaded), output(model))


class TestADownloadThatBreaks:
    @pytest.mark.parametrize("file", ["adapter_model.safetensors", "model.safetensors"])
    def test_leaves_nothing_half_loaded(self, hub: HubServer, tmp_path: Path, monkeypatch: Any, file: str) -> None:
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        serve_timm(hub, tmp_path)
        model = learned(timm.create_model(f"hf-hub:{BASE}", pretrained=True).eval())
        push_task_to_hub(model, TASK)
        hub.broken = {f"/{file}"}
        fresh = tmp_path / "fresh"
        with pytest.raises((RecastHubError, RecastLoadError)):
            AutoRecastModel.from_pretrained(TASK, cache_dir=fresh)
        hub.broken = set()
        assert torch.equal(output(AutoRecastModel.from_pretrained(TASK, cache_dir=fresh)), output(model))

    def test_does_not_touch_the_model_that_was_handed_over(self, hub: HubServer, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        push_task_to_hub(learned(make_timm()), TASK)
        hub.broken = {"adapter_model.safetensors"}
        backbone = make_timm()
        with pytest.raises(RecastHubError):
            AutoRecastModel.from_pretrained(TASK, backbone=backbone)
        assert not any(isinstance(module, RecastLayer) for module in backbone.modules())


class TestABackboneThatIsGiven:
    """A timm model without pretrained weights has none that could be found."""

    @pytest.fixture
    def task(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        learned(make_timm(), num_classes=3).save_pretrained(tmp_path / "task")
        torch.save(make_timm().state_dict(), tmp_path / "weights.pth")
        save_for_hf(make_timm(), tmp_path / "folder", model_args=TIMM_SIZES, safe_serialization=True)
        return tmp_path / "task"

    def test_can_be_a_model_keywords_a_file_or_a_folder(self, task: Path, tmp_path: Path) -> None:
        wanted = output(learned(make_timm(), num_classes=3))
        ways: list[Any] = [
            make_timm(),
            {"checkpoint_path": str(tmp_path / "weights.pth")},
            tmp_path / "weights.pth",
            str(tmp_path / "folder"),
        ]
        for backbone in ways:
            assert torch.equal(output(AutoRecastModel.from_pretrained(task, backbone=backbone)), wanted)

    def test_is_asked_for_where_it_cannot_be_found(self, task: Path) -> None:
        with pytest.raises(RecastLoadError, match="Pass backbone="):
            AutoRecastModel.from_pretrained(task)

    def test_is_held_against_the_fingerprint(self, task: Path) -> None:
        model = make_timm(seed=1)
        with pytest.raises(RecastBaseMismatchError, match="backbone="):
            AutoRecastModel.from_pretrained(task, backbone=model)
        assert not any(isinstance(module, RecastLayer) for module in model.modules())
        with pytest.raises(RecastBaseMismatchError):
            AutoRecastModel.from_pretrained(task, backbone={"pretrained": False})

    @pytest.mark.parametrize("given", [3, ["weights.pth"]])
    def test_of_another_kind_is_refused(self, task: Path, given: Any) -> None:
        with pytest.raises(RecastConfigError, match="backbone="):
            AutoRecastModel.from_pretrained(task, backbone=given)

    def test_can_have_a_classifier_that_the_task_s_has_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        bare = timm.create_model("test_resnet", num_classes=0).eval()
        whole = timm.create_model("test_resnet").eval()
        whole.load_state_dict(bare.state_dict(), strict=False)
        model = learned(bare, num_classes=3)
        model.save_pretrained(tmp_path / "task")
        torch.save(whole.state_dict(), tmp_path / "whole.pth")
        torch.save({k: v for k, v in whole.state_dict().items() if "layer1" not in k}, tmp_path / "part.pth")
        loaded = AutoRecastModel.from_pretrained(tmp_path / "task", backbone=tmp_path / "whole.pth")
        assert torch.equal(output(loaded), output(model))
        with pytest.raises(RecastLoadError, match=r"lacks or has besides layer1"):
            AutoRecastModel.from_pretrained(tmp_path / "task", backbone=tmp_path / "part.pth")

    def test_at_a_path_where_there_is_nothing_is_refused(self, task: Path) -> None:
        with pytest.raises(RecastLoadError, match="no checkpoint at"):
            AutoRecastModel.from_pretrained(task, backbone="nowhere.pth")


class TestAFolder:
    def test_of_a_transformers_backbone_works_without_a_network(self, tmp_path: Path) -> None:
        make_transformers().save_pretrained(tmp_path / "base")
        model = learned(ViTForImageClassification.from_pretrained(tmp_path / "base").eval())
        model.save_pretrained(tmp_path / "task")
        with pytest.raises(RecastLoadError, match="no name on the Hub(.|\n)*pass the path as backbone="):
            AutoRecastModel.from_pretrained(str(tmp_path / "task"))
        loaded = AutoRecastModel.from_pretrained(tmp_path / "task", backbone=tmp_path / "base")
        assert torch.equal(output(loaded), output(model))

    def test_of_a_language_model_becomes_the_class_of_its_task_type(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        BertForSequenceClassification(BertConfig(**sizes, vocab_size=20, num_labels=2)).save_pretrained(tmp_path / "base")
        base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        model = learned(base, task_type="SEQ_CLS")
        model.save_pretrained(tmp_path / "task")
        loaded = AutoRecastModel.from_pretrained(tmp_path / "task", backbone=tmp_path / "base")
        assert type(loaded) is type(model)
        words = torch.tensor([[1, 5, 9]])
        assert torch.equal(loaded(words).logits, model(words).logits)

    def test_in_a_subfolder_is_found(self, hub: HubServer, tmp_path: Path) -> None:
        serve_transformers(hub, tmp_path)
        model = learned(ViTForImageClassification.from_pretrained(BASE).eval(), name="cars")
        model.add_adapter("birds", RecastConfig())
        push_tasks_to_hub(model, "ada/all")
        assert torch.equal(output(AutoRecastModel.from_pretrained("ada/all", subfolder="cars")), output(model))

    def test_without_a_backbones_name_says_so(self, tmp_path: Path) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layers[1](self.layers[0](x))

        learned(Plain(), target_modules=["0", "1"]).save_pretrained(tmp_path)
        with pytest.raises(RecastLoadError, match="does not say which backbone"):
            AutoRecastModel.from_pretrained(tmp_path)

    def test_takes_no_keyword_that_it_does_not_know(self, tmp_path: Path) -> None:
        with pytest.raises(RecastConfigError, match=r"dtype.*backbone=\{"):
            AutoRecastModel.from_pretrained(tmp_path, dtype=torch.float16)
        with pytest.raises(RecastConfigError, match="from_pretrained"):
            AutoRecastModel()


def test_the_real_client_with_nothing_changed_in_it(hub: HubServer, tmp_path: Path) -> None:
    """A process of its own, told of the server by HF_ENDPOINT alone; and no package is there that is not needed."""
    serve_transformers(hub, tmp_path)
    model = learned(ViTForImageClassification.from_pretrained(BASE).eval())
    push_task_to_hub(model, TASK)
    script = (
        "import sys, torch\n"
        "sys.modules.update(dict.fromkeys(('timm', 'matplotlib', 'sklearn', 'PIL')))\n"
        "from recast_peft import AutoRecastModel\n"
        "torch.set_num_threads(1)\n"
        f"model = AutoRecastModel.from_pretrained({TASK!r})\n"
        "pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))\n"
        "with torch.no_grad():\n"
        "    torch.save(model(pixels).logits, sys.argv[1])\n"
        "print(model.push_to_hub('ada/again').oid)\n"
    )
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "out.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "out.pt"), output(model), atol=1e-6)
    assert done.stdout.split()[-1] == hub.repositories["ada/again"].branches["main"]


class Twins(nn.Module):
    """Two networks of equal weights, as a student and its teacher are at first; the first one computes."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = tiny_vit(), tiny_vit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x) + self.teacher(x)


@pytest.mark.parametrize("way", ["auto", "load_adapter"])
def test_a_key_mapping_says_which_of_equal_modules_are_meant(way: str, tmp_path: Path) -> None:
    alone = get_recast_model(tiny_vit(), RecastConfig(), "task").eval()
    randomise(alone, "task")
    alone.save_pretrained(tmp_path)
    folder, x, mapping = str(tmp_path / "task"), vit_input(), {"^": "teacher."}
    expected = outputs(alone, x) + outputs(tiny_vit(), x)

    def load(key_mapping: Any, name: str) -> PeftModel:
        if way == "auto":
            return AutoRecastModel.from_pretrained(folder, backbone=Twins(), key_mapping=key_mapping, adapter_name=name)
        model = get_recast_model(Twins(), RecastConfig(target_modules=["student.blocks.0.attn.qkv"]), "first")
        model.load_adapter(folder, name, key_mapping=key_mapping)
        model.set_adapter(name)
        return model.eval()

    with pytest.raises(RecastTargetError, match="key_mapping"):
        load(None, "task")
    for wrong in ({"(": ""}, {"a": 1}, ["a"]):
        with pytest.raises(RecastConfigError, match="key_mapping"):
            load(wrong, "task")
    model = load(mapping, "task")
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again", selected_adapters=["task"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # stored under the model's own names, with what the model has beside its targets
        again = PeftModel.from_pretrained(Twins(), tmp_path / "again" / "task", "again").eval()
    torch.testing.assert_close(outputs(again, x), expected, rtol=1e-5, atol=1e-6)


def test_a_model_of_another_method_is_told_where_recast_goes() -> None:
    lora = get_peft_model(tiny_vit(), LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()
    expected = outputs(lora, vit_input())
    with pytest.raises(RecastConfigError, match=r"get_recast_model\(model\.base_model\.model, config\)"):
        get_recast_model(lora, RecastConfig())
    around = get_recast_model(lora.base_model.model, RecastConfig(), "task").eval()
    assert torch.equal(outputs(around, vit_input()), expected)


@pytest.mark.parametrize(("task_type", "needed"), [("CAUSAL_LM", "prepare_inputs_for_generation"), ("SEQ_CLS", "config")])
def test_a_task_type_that_the_model_is_not_made_for_is_refused_before_anything_changes(task_type: str, needed: str) -> None:
    model = tiny_vit()
    before = state(model)
    with pytest.raises(RecastConfigError, match=f"task_type='{task_type}' is for models of transformers with '{needed}'"):
        get_recast_model(model, RecastConfig(task_type=task_type))
    assert state(model) == before


def test_a_file_with_the_task_type_of_other_models_is_refused_likewise(tmp_path: Path) -> None:
    get_recast_model(tiny_vit(), RecastConfig()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"task_type": null', '"task_type": "CAUSAL_LM"'))
    model = tiny_vit()
    before = state(model)
    with pytest.raises(RecastConfigError, match="task_type='CAUSAL_LM' is for models of transformers"):
        AutoRecastModel.from_pretrained(tmp_path, backbone=model)
    assert state(model) == before
