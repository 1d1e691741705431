"""The record of a task: what a conversion decided, as its file has it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from models import converted, outputs, randomise, tiny_vit, vit_input
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from recast_peft import (
    AutoRecastModel,
    RecastBankError,
    RecastBaseMismatchError,
    RecastConfig,
    RecastConfigError,
    RecastError,
    TaskPool,
    get_recast_model,
)
from recast_peft.options.record import DECIDED, TaskRecord


class TestOfAConversion:
    def test_is_all_that_is_written_to_a_config(self) -> None:
        config = RecastConfig(target_modules="all-linear", max_coefficients=40, lora_config=LoraConfig(r=1))
        before = {name: copy.deepcopy(value) for name, value in vars(config).items()}
        model = get_peft_model(tiny_vit(), config)
        assert model.peft_config["default"] is config
        after = dict(vars(config))
        assert (before.pop("record"), type(after.pop("record"))) == (None, TaskRecord)
        assert before == after

    def test_is_what_the_decided_fields_read_as(self) -> None:
        config = RecastConfig(target_modules=["qkv"], num_coefficient_sets=2, max_coefficients=7, lora_config=LoraConfig(r=1))
        model = get_peft_model(tiny_vit(), config)
        assert config.record is not None
        for name in DECIDED:
            assert getattr(model.peft_config["default"], name) == getattr(config.record, name)
        assert config.num_coefficient_sets == 1  # the budget allows no more
        assert sum(map(len, config.groups.values())) == 4
        assert config.lora_config.target_modules is not None

    def test_is_dropped_when_the_config_is_used_again(self) -> None:
        config = RecastConfig(target_modules=["qkv"], num_coefficient_sets=2, max_coefficients=7)
        get_peft_model(tiny_vit(depth=4), config)
        get_peft_model(tiny_vit(depth=2), config)
        assert config.num_coefficient_sets == 2  # two layers leave room for both
        assert sum(map(len, config.groups.values())) == 2

    def test_stays_when_a_second_conversion_fails(self) -> None:
        config = RecastConfig(target_modules=["qkv"])
        get_peft_model(tiny_vit(), config)
        kept = config.record
        with pytest.raises(Exception, match="qkv"):
            get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
        assert config.record is kept

    def test_of_a_stored_task_is_followed_on_every_model(self, tmp_path: Path) -> None:
        given = {"mine": ["blocks.0.attn.qkv", "blocks.3.attn.qkv"]}
        get_recast_model(tiny_vit(), RecastConfig(groups=given)).save_pretrained(tmp_path)
        config = RecastConfig.from_pretrained(str(tmp_path))
        assert config.is_stored_task
        assert config.record.folder == str(tmp_path)
        for _ in range(2):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path), config=config)
            assert config.groups == given
        with pytest.raises(RecastConfigError, match="groups of a stored task"):
            config.groups = {"other": ["blocks.0.attn.qkv"]}
        with pytest.raises(ValueError, match="other pretrained weights"):
            PeftModel.from_pretrained(tiny_vit(seed=1), str(tmp_path), config=config)

    def test_of_a_stored_task_stays_one_when_it_is_saved_again(self, tmp_path: Path) -> None:
        made = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_templates=1))
        made.save_pretrained(tmp_path / "made")
        assert not made.peft_config["default"].is_stored_task
        measured = made.peft_config["default"].fidelity
        assert 0 < measured["worst_cosine"] < measured["mean_cosine"] < 1
        loaded = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "made"))
        assert loaded.peft_config["default"].fidelity == measured
        loaded.save_pretrained(tmp_path / "again")
        assert loaded.peft_config["default"].is_stored_task
        assert RecastConfig.from_pretrained(str(tmp_path / "again")).fidelity == measured

    def test_of_a_stored_task_says_that_the_model_was_changed_beside_its_targets(self, tmp_path: Path) -> None:
        get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"])).save_pretrained(tmp_path / "made")
        loaded = PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "made"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded.save_pretrained(tmp_path / "same")
        with torch.no_grad():
            loaded.get_base_model().blocks[0].norm.weight.add_(0.5)
        with pytest.warns(UserWarning, match="task 'default' was learned on, but other weights, norms"):
            loaded.save_pretrained(tmp_path / "other")

    def test_results_stay_the_users(self, tmp_path: Path) -> None:
        model = get_recast_model(tiny_vit(), RecastConfig(results={"accuracy": 0.5}))
        model.peft_config["default"].results = {"accuracy": 0.9}
        model.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(str(tmp_path)).results == {"accuracy": 0.9}


@pytest.mark.filterwarnings("ignore:the state dict has other weights")
class TestAfterSomeoneWroteIntoThePretrainedModel:
    """In training with the wrong parameters unfrozen, or by pruning: what the file says must not be the model of before."""

    @pytest.fixture
    def model(self) -> PeftModel:
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], num_classes=3), "t").eval()
        randomise(model, "t")
        return model

    def test_in_a_target(self, model: PeftModel, tmp_path: Path) -> None:
        with torch.no_grad():
            model.get_base_model().blocks[1].attn.qkv.base_layer.weight.clamp_(min=0)
        with pytest.warns(UserWarning, match=r"changed since task 't' was put in \(blocks.1.attn.qkv\)"):
            model.save_pretrained(tmp_path)
        with pytest.raises(RecastBaseMismatchError, match=r"differing: blocks\.1\.attn\.qkv"):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "t"))

    def test_beside_the_targets(self, model: PeftModel, tmp_path: Path) -> None:
        with torch.no_grad():
            model.get_base_model().blocks[1].mlp.fc1.weight.clamp_(min=0)
        with pytest.warns(UserWarning, match=r"changed since task 't' was put in \(beside its targets\)"):
            model.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="other weights, norms or running statistics of the model are not the same"):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path / "t"))

    def test_a_config_that_another_model_used_since_says_what_lies_in_its_own(self, tmp_path: Path) -> None:
        config = RecastConfig(target_modules=["qkv"])
        model = get_peft_model(tiny_vit(), config, "t")
        own = config.surroundings_fingerprint
        get_peft_model(tiny_vit(seed=1), config, "t")
        assert config.surroundings_fingerprint != own
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.save_pretrained(tmp_path)
        assert RecastConfig.from_pretrained(str(tmp_path / "t")).surroundings_fingerprint == own

    def test_nothing_is_said_where_nobody_did(self, model: PeftModel, tmp_path: Path) -> None:
        for other in (model, copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double().float()):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                other.merge_adapter()
                other.save_pretrained(tmp_path)
                other.unmerge_adapter()
                other.save_pretrained(tmp_path)


class TestAfterAStateDictOfAnotherBase:
    @pytest.mark.parametrize("is_emptied", [False, True])
    @pytest.mark.parametrize("fields", [{}, {"num_directions": 2}])
    def test_names_what_the_task_stands_on(self, fields: dict, is_emptied: bool, tmp_path: Path) -> None:
        config = RecastConfig(target_modules=["qkv"], **fields)
        other = get_recast_model(tiny_vit(seed=1), config).eval()
        randomise(other)
        wanted = outputs(other, vit_input())
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], **fields)).eval()
        model.to("meta" if is_emptied else "cpu").load_state_dict(copy.deepcopy(other.state_dict()), assign=is_emptied)
        assert torch.equal(outputs(model, vit_input()), wanted)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = PeftModel.from_pretrained(tiny_vit(seed=1), str(tmp_path)).eval()
        assert torch.equal(outputs(loaded, vit_input()), wanted)
        with pytest.raises(RecastBaseMismatchError):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path))
        pool = TaskPool(model)
        pool.add("stored", tmp_path)
        pool.save(tmp_path / "pool.safetensors")
        TaskPool(other).load(tmp_path / "pool.safetensors")

    def test_names_what_lies_beside(self, tmp_path: Path) -> None:
        changed = tiny_vit()
        changed.blocks[0].norm.weight.data += torch.arange(8.0)
        model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"]))
        model.load_state_dict(get_recast_model(copy.deepcopy(changed), RecastConfig(target_modules=["qkv"])).state_dict())
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PeftModel.from_pretrained(changed, str(tmp_path))
        with pytest.warns(UserWarning, match="other weights, norms"):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path))

    def test_names_what_the_task_stands_on_without_a_tuner_around_the_model(self, tmp_path: Path) -> None:
        other, model = tiny_vit(seed=1), tiny_vit()
        for plain in (other, model):
            inject_adapter_in_model(RecastConfig(target_modules=["qkv"]), plain, "first")
            inject_adapter_in_model(RecastConfig(target_modules=["qkv", "fc1"]), plain, "second")
        randomise(other, "second")
        model.load_state_dict(copy.deepcopy(other.state_dict()))
        save_file(get_peft_model_state_dict(model, adapter_name="second"), tmp_path / "adapter_model.safetensors")
        model.peft_config["second"].save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = PeftModel.from_pretrained(tiny_vit(seed=1), str(tmp_path)).eval()
        assert torch.equal(outputs(loaded, vit_input()), outputs(other.eval(), vit_input()))
        with pytest.raises(RecastBaseMismatchError):
            PeftModel.from_pretrained(tiny_vit(), str(tmp_path))

    def test_refuses_templates_that_no_recipe_makes(self, tmp_path: Path) -> None:
        config = {"target_modules": ["qkv"], "num_groups": 1, "num_templates": 2}
        model = get_recast_model(tiny_vit(), RecastConfig(**config))
        model.load_state_dict({key: value.bfloat16() for key, value in model.state_dict().items()})
        model.save_pretrained(tmp_path)  # they are its own
        model.load_state_dict(get_recast_model(tiny_vit(seed=1), RecastConfig(**config)).state_dict())
        with pytest.raises(RecastBankError, match="came with a state dict"):
            model.save_pretrained(tmp_path)
        with pytest.raises(RecastBankError, match="came with a state dict"):
            model.add_adapter("second", RecastConfig(**config))


class TestAConfigThatWasChangedSince:
    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("head_dtype", "int8", "head_dtype='int8'"),
            ("mimicry", "guess", "mimicry='guess'"),
            ("id2label", {0: "one"}, "id2label must name every class"),
            ("num_classes", 7, r"its num_classes: 7\s+of its head:     3"),
        ],
    )
    def test_is_not_written_where_it_could_not_be_read(self, field, value, said, tmp_path):
        model = converted(num_classes=3)
        randomise(model)
        kept = getattr(model.peft_config["default"], field)
        setattr(model.peft_config["default"], field, value)
        with pytest.raises(RecastError, match=rf"(?s){said}.*[Pp]ut back what it was"):
            model.save_pretrained(tmp_path / "task")
        assert not list(tmp_path.rglob("*.*"))
        setattr(model.peft_config["default"], field, kept)
        model.save_pretrained(tmp_path / "task")
        loaded = AutoRecastModel.from_pretrained(tmp_path / "task", backbone=tiny_vit())
        assert torch.equal(loaded(vit_input()), model(vit_input()))
