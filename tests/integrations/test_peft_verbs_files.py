"""Tasks saved and loaded by PEFT's verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import converted, outputs, randomise, tiny_vit, vit_input
from peft import AutoPeftModel, PeftConfig, PeftModel, PeftModelForSequenceClassification
from pools import TOKENS, text_model
from safetensors.torch import load_file
from three_tasks import NAMES, alone, with_tasks

from recast_peft import RecastConfig, RecastLoadError, get_recast_model


class TestSaving:
    def test_writes_a_folder_for_each_task(self, tmp_path: Path) -> None:
        model = with_tasks()
        expected = alone(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "cars", adapter_name="cars").eval()
        for name in NAMES[1:]:
            loaded.load_adapter(tmp_path / name, name)
        assert all(torch.equal(a, b) for a, b in zip(alone(loaded).values(), expected.values(), strict=True))

    def test_writes_only_the_tasks_that_were_selected(self, tmp_path: Path) -> None:
        with_tasks().save_pretrained(tmp_path, selected_adapters=["birds"])
        assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["birds"]
        with pytest.raises(ValueError, match="planes"):
            with_tasks().save_pretrained(tmp_path, selected_adapters=["planes"])

    @pytest.mark.parametrize("trainable", [True, False])
    def test_can_be_loaded_for_training_or_for_use(self, tmp_path: Path, trainable: bool) -> None:
        with_tasks().save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_vit(), tmp_path / "birds", is_trainable=trainable)
        assert any(p.requires_grad for p in model.parameters()) == trainable
        assert model.peft_config["default"].inference_mode != trainable

    def test_keeps_the_start_of_a_fresh_task(self, tmp_path: Path) -> None:
        converted().save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        assert torch.equal(outputs(model, vit_input()), outputs(tiny_vit(), vit_input()))

    def test_of_a_compressed_task_brings_back_later_ones_beside_it(self, tmp_path: Path) -> None:
        model = with_tasks(1)
        expected = alone(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "flowers", "flowers").eval()
        loaded.load_adapter(tmp_path / "cars", "cars")
        loaded.load_adapter(tmp_path / "birds", "birds")
        assert all(torch.equal(alone(loaded)[name], expected[name]) for name in expected)

    def test_of_a_task_with_part_of_the_targets(self, tmp_path: Path) -> None:
        model = converted(layers_to_transform=[1, 2], layers_pattern="blocks")
        randomise(model)
        model.save_pretrained(tmp_path)
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
        loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(model, vit_input()))

    def test_and_loading_a_task_again_replaces_its_coefficients(self, tmp_path: Path) -> None:
        model = converted()
        randomise(model, seed=1)
        expected = outputs(model, vit_input())
        model.save_pretrained(tmp_path)
        fresh = converted("other")
        for _ in range(2):
            if "again" in fresh.peft_config:
                fresh.delete_adapter("again")
            fresh.load_adapter(tmp_path, "again")
        fresh.set_adapter("again")
        assert torch.equal(outputs(fresh, vit_input()), expected)


class TestAutoClasses:
    def test_read_the_config_for_what_it_is(self, tmp_path: Path) -> None:
        model = converted()
        model.save_pretrained(tmp_path)
        config = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(config, RecastConfig)
        assert config.groups == model.peft_config["default"].groups

    def test_name_the_base_model_that_is_missing(self, tmp_path: Path) -> None:
        converted().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"auto mapping|base"):
            AutoPeftModel.from_pretrained(tmp_path)

    def test_for_a_task_type_take_a_task_that_names_none(self, tmp_path: Path) -> None:
        model = get_recast_model(text_model("SEQ_CLS"), RecastConfig(num_classes=2)).eval()
        randomise(model)
        model.save_pretrained(tmp_path / "with")
        loaded = PeftModelForSequenceClassification.from_pretrained(text_model("SEQ_CLS"), tmp_path / "with").eval()
        assert torch.equal(outputs(loaded, TOKENS)[0], outputs(model, TOKENS)[0])
        get_recast_model(text_model("SEQ_CLS")).save_pretrained(tmp_path / "without")
        with pytest.raises(RecastLoadError, match=r"missing: base_model.model.classifier.weight"):
            PeftModelForSequenceClassification.from_pretrained(text_model("SEQ_CLS"), tmp_path / "without")
