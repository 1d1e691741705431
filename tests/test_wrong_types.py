"""Values of another kind than a verb takes: each is told by what was given and what was expected, whatever verb it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import tiny_vit
from torch import nn

import recast_peft
from recast_peft import AutoRecastModel, RecastConfigError, RecastError
from recast_peft.analysis import protocols, sequence

NO_MODEL = {
    "collapse_coefficient_sets": (),
    "export_program": (torch.zeros(1),),
    "export_task": ("task",),
    "find_coefficient_lr": (torch.zeros(1),),
    "fit_bank": (recast_peft.RecastConfig(),),
    "fit_discriminant_head": ([],),
    "fit_prototypes": ([],),
    "get_recast_model": (),
    "hotswap_adapter": ("folder", "task"),
    "mimicry_report": (),
    "plan_recast": (recast_peft.RecastConfig(),),
    "random_bank": (),
    "save_compressed_model": ("folder",),
}
NO_CONFIG = ("fit_bank", "get_recast_model", "plan_recast", "random_bank")


def nothing(*args: object) -> None:
    raise AssertionError("nothing is trained or measured")


@pytest.mark.parametrize("given", [None, 3, "x", [], {}], ids=repr)
@pytest.mark.parametrize("verb", NO_MODEL)
def test_what_is_no_model(verb, given):
    with pytest.raises(RecastConfigError, match=rf"\b{type(given).__name__}\b.*expected"):
        getattr(recast_peft, verb)(given, *NO_MODEL[verb])


def test_a_plain_model_has_no_task_to_exchange():
    with pytest.raises(RecastConfigError, match="a TinyVit: expected one with RECAST tasks"):
        recast_peft.hotswap_adapter(tiny_vit(), "folder", "task")


@pytest.mark.parametrize("given", [3, "x", [], {}], ids=repr)
@pytest.mark.parametrize("verb", NO_CONFIG)
def test_what_is_no_config(verb, given):
    with pytest.raises(RecastConfigError, match=rf"\b{type(given).__name__}\b.*a RecastConfig"):
        getattr(recast_peft, verb)(tiny_vit(), config=given)


@pytest.mark.parametrize("given", [None, 3, [], {}, ""], ids=repr)
def test_what_is_no_name(given, tmp_path):
    for name_it in (
        lambda: AutoRecastModel.from_pretrained(tmp_path, adapter_name=given),
        lambda: recast_peft.get_recast_model(tiny_vit(), adapter_name=given),
        lambda: recast_peft.get_recast_model(tiny_vit()).load_adapter(tmp_path, given),
    ):
        with pytest.raises(RecastConfigError, match="adapter_name=.*expected a name"):
            name_it()


class TestSequences:
    def test_what_learn_in_sequence_does_not_take(self):
        tasks = {"first": 1}
        for wrong in ({"model": "x"}, {"config": "x"}, {"config": {"first": 3}}, {"grow": "x"}):
            given = {"model": tiny_vit(), "tasks": tasks, "train": nothing, "evaluate": nothing, **wrong}
            with pytest.raises(RecastConfigError, match=rf"({next(iter(wrong))} is a|{next(iter(wrong))}=).*expected"):
                sequence.learn_in_sequence(**given)
        with pytest.raises(RecastConfigError, match="config is a str; a RecastConfig is expected"):
            sequence.Growth(config="x")

    def test_what_the_protocols_do_not_take(self):
        data = torch.utils.data.TensorDataset(torch.zeros(2, 5, 8), torch.zeros(2, dtype=torch.long))
        tasks = {"first": protocols.ClassTask([0, 1], data, data)}
        with pytest.raises(RecastConfigError, match="config is a str; a RecastConfig is expected"):
            protocols.learn_told(tiny_vit(), tasks, nothing, config="x")
        with pytest.raises(RecastConfigError, match="model is a str; an nn.Module is expected"):
            protocols.learn_told("x", tasks, nothing)
        with pytest.raises(RecastConfigError, match=r"tasks\['first'\]=3: expected an instance of ClassTask"):
            protocols.learn_told(tiny_vit(), {"first": 3}, nothing)
        with pytest.raises(RecastConfigError, match="features='x': expected a function"):
            protocols.learn_untold("x", tasks)
        with pytest.raises(RecastConfigError, match="classifier=3: expected an instance of IncrementalClassifier"):
            protocols.learn_untold(nn.Flatten(), tasks, classifier=3)


def test_what_is_no_tensor_and_no_name_of_a_head():
    with pytest.raises(RecastConfigError, match=r"logits=\[\]: expected an instance of Tensor"):
        recast_peft.split_logits([])
    for shape in ((), (3,), (2, 0)):
        with pytest.raises(RecastConfigError, match=rf"(?s)logits.*{re.escape(str(shape))}.*expected.*samples"):
            recast_peft.split_logits(torch.zeros(shape))
    with pytest.raises(RecastConfigError, match=r"head_module=\[\]: expected a text"):
        recast_peft.readout_bank(tiny_vit(), torch.zeros(2, 5, 8), head_module=[])


@pytest.fixture(scope="module")
def verbs(tmp_path_factory):
    """Verbs that take a path, with nothing else wrong."""
    from recast_peft.integrations.serving.access import Tenants
    from recast_peft.integrations.serving.start import open_folder
    from recast_peft.storage import versions

    config = recast_peft.RecastConfig(target_modules=["qkv"])
    bank = recast_peft.random_bank(tiny_vit(), config, num_templates=1)
    model = recast_peft.get_recast_model(tiny_vit(), recast_peft.RecastConfig(bank=bank), "task")
    saved = tmp_path_factory.mktemp("saved")
    model.save_pretrained(saved)
    pool = recast_peft.TaskPool(model)
    matrix = recast_peft.analysis.matrix.AccuracyMatrix(["task"])
    return {
        "save": model.save_pretrained,
        "load": lambda path: model.load_adapter(path, "other"),
        "load from a subfolder": lambda path: model.load_adapter(saved, "other", subfolder=path or 0),
        "build": AutoRecastModel.from_pretrained,
        "build from a subfolder": lambda path: AutoRecastModel.from_pretrained(saved, subfolder=path or 0),
        "save a config": config.save_pretrained,
        "read a config": config.from_json_file,
        "load a bank": recast_peft.load_bank,
        "save a bank": bank.save,
        "save a model's bank": model.base_model.save_bank,
        "write a card": recast_peft.write_model_card,
        "save as a LoRA": lambda path: recast_peft.save_as_lora(path, model, 2, "task"),
        "load a compressed model": lambda path: recast_peft.load_compressed_model(tiny_vit(), path),
        "write a graph": lambda path: recast_peft.export_onnx(model, path, torch.zeros(2, 5, 8)),
        "write a task": lambda path: recast_peft.export_task(model, path, "task"),
        "save a pool": pool.save,
        "load a pool": pool.load,
        "load a pool's folder": pool.load_folder,
        "draw": lambda path: matrix.plot(path or 0),
        "list versions": versions.versions,
        "go back": versions.roll_back,
        "serve": open_folder,
        "read tenants": Tenants.from_file,
    }


@pytest.mark.parametrize("given", [None, 3, b"folder", ["folder"], "a\0b"], ids=repr)
def test_what_is_no_path(verbs, given):
    for name, verb in verbs.items():
        with pytest.raises(RecastError) as refused:
            verb(given)
        assert "expected a path" in str(refused.value) or isinstance(given, str), name


class TestNames:
    @pytest.mark.parametrize("given", [None, 3, ["a"], ["a", ["b"]], {}, ""], ids=repr)
    def test_what_is_no_name_of_one_task(self, given):
        model = recast_peft.get_recast_model(tiny_vit(), adapter_name="a")
        for verb in (model.set_adapter, model.delete_adapter, model.base_model.delete_adapter):
            with pytest.raises(RecastConfigError, match="adapter_name=.*expected a text"):
                verb(given)
        assert list(model.peft_config) == model.active_adapters == ["a"]

    def test_what_is_no_name_of_a_bank(self):
        bank = recast_peft.random_bank(tiny_vit(), num_templates=1)
        for given in (3, ["bank"], Path("bank")):
            with pytest.raises(RecastConfigError, match="name=.*expected a text"):
                bank.under(given)
        with pytest.raises(RecastConfigError, match="bank is a str: expected a StoredBank"):
            recast_peft.push_bank_to_hub("bank", "some/where")


class TestCards:
    @pytest.mark.parametrize("given", [3, ["a"], "x", {"accuracy": object()}], ids=["3", "list", "text", "object"])
    def test_what_is_no_result(self, given, tmp_path):
        recast_peft.get_recast_model(tiny_vit()).save_pretrained(tmp_path)
        before = (tmp_path / "README.md").read_bytes()
        with pytest.raises(RecastConfigError, match="results=.*expected"):
            recast_peft.write_model_card(tmp_path, results=given)
        for argument in ("repo_id", "subfolder", "license"):
            with pytest.raises(RecastConfigError, match=f"{argument}=3: expected a text"):
                recast_peft.write_model_card(tmp_path, **{argument: 3})
        assert (tmp_path / "README.md").read_bytes() == before
