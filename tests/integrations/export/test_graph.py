"""A graph that takes its task: what it refuses before anything is written, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from exported import called, onnx_tools
from models import converted, randomise, vit_input
from peft import LoraConfig
from safetensors.torch import load_file

from recast_peft import (
    PiggybackConfig,
    ReadoutConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    TaskPool,
    export_onnx,
    export_program,
    export_task,
    get_recast_model,
    readout_bank,
)
from recast_peft.integrations.export.graph import prepare

REFUSED: dict[str, dict[str, Any]] = {
    "a LoRA part that is more than two factors": {"lora_config": LoraConfig(r=2, use_dora=True)},
    "the partner adaptformer": {"partners": ["adaptformer"]},
    "the partner piggyback": {"partners": [PiggybackConfig()]},
    "a compressed bank": {"num_templates": 1, "group_size": 2},
    "biases of the model": {"bias": "all"},
}


class TestRefusals:
    @pytest.mark.parametrize("what", REFUSED)
    def test_what_a_graph_cannot_express_is_refused_before_anything_is_written(self, what, tmp_path):
        onnx_tools()
        model = converted(**REFUSED[what])
        for export in (
            lambda: export_onnx(model, tmp_path / "new" / "graph.onnx", vit_input()),
            lambda: export_task(model, tmp_path / "new" / "task"),
        ):
            with pytest.raises(RecastBankError, match=what):
                export()
        assert list(tmp_path.iterdir()) == []

    def test_a_merged_task_and_wrong_arguments(self, tmp_path):
        model = converted()
        for fault, message in (
            (lambda: prepare(model, vit_input(), "inputs"), "tasks='inputs'"),
            (lambda: prepare(model, vit_input(), way="fast"), "way='fast'"),
            (lambda: prepare(model, "x"), "example is a str"),
            (lambda: prepare(model, vit_input(), dynamic_shapes={"y": {0: "n"}}), "names 'y'"),
            (lambda: prepare(model, vit_input(), ["other"]), "no RECAST task 'other'"),
            (lambda: prepare(model.get_base_model(), vit_input()), "a TinyVit was given"),
            (lambda: prepare(TaskPool(model), vit_input()), "the pool is empty"),
            (lambda: export_task(TaskPool(model), tmp_path / "task"), "no task of the pool is active"),
            (lambda: export_task(TaskPool(model), tmp_path / "task", ""), "the pool has no task ''"),
        ):
            with pytest.raises(RecastConfigError, match=message):
                fault()
        model.merge_adapter()
        with pytest.raises(RecastBankError, match="unmerge_adapter"):
            prepare(model, vit_input())
        assert list(tmp_path.iterdir()) == []


class TestTheModel:
    def test_the_model_is_not_touched(self):
        model = converted(num_classes=3)
        randomise(model)
        model.train()
        before = called(model, vit_input())
        modules, parameters = list(model.modules()), dict(model.named_parameters())
        export_program(model, vit_input())
        assert list(model.modules()) == modules
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert model.training
        assert np.array_equal(called(model, vit_input()), before)


class TestReadouts:
    def test_a_graph_reads_as_its_tasks_do(self, tmp_path):
        model = with_readout()
        graph = export_program(model, X).module()
        for name in ("a", "b"):
            model.set_adapter(name)
            export_task(model, tmp_path / name)
            found = graph(load_file(tmp_path / name), X)["output"]
            torch.testing.assert_close(found, torch.from_numpy(called(model, X)), atol=1e-5, rtol=1e-4)

    def test_a_table_takes_no_task_that_reads_otherwise(self):
        model = with_readout()
        assert prepare(model, X, "table").names == ["a", "b"]
        with pytest.raises((RecastBankError, RecastConfigError), match="plain"):
            prepare(model, X, ["a", "plain"])
        assert prepare(model, X, ["plain"]).source.identity != prepare(model, X, ["a"]).source.identity


X = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def with_readout():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0).eval()
    bank = readout_bank(vit, torch.randn(20, 3, 160, 160), progress=False)
    own = {"num_classes": 3, "init_weights": False}
    model = get_recast_model(vit, RecastConfig(partners=[ReadoutConfig(bank=bank)], **own), "a")
    model.add_adapter("b", RecastConfig(partners=[ReadoutConfig(bank=bank)], seed=1, **own))
    model.add_adapter("plain", RecastConfig(**own))
    return model.eval()
