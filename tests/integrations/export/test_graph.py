"""A graph that takes its task: what it refuses before anything is written, and what it leaves alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import timm
import torch
from exported import Inverted, called, onnx_tools, session
from models import converted, randomise, seeded, vit_input
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

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
            with pytest.raises(RecastBankError, match=what) as error:
                export()
            assert ("merge_and_unload" in str(error.value)) is (what != "the partner adaptformer")  # nobody can merge that
        assert list(tmp_path.iterdir()) == []

    def test_a_merged_task_and_wrong_arguments(self, tmp_path):
        model = converted()
        for fault, message in (
            (lambda: prepare(model, vit_input(), "inputs"), "tasks='inputs'"),
            (lambda: prepare(model, vit_input(), way="fast"), "way='fast'"),
            (lambda: prepare(model, "x"), "example is a str"),
            (lambda: prepare(model, vit_input(), dynamic_shapes={"y": {0: "n"}}), "names 'y'"),
            (lambda: prepare(model, vit_input(), ["other"]), "no RECAST task 'other'"),
            (lambda: prepare(model.get_base_model(), vit_input()), "a TinyVit has no RECAST task"),
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

    def test_a_model_in_training_gives_the_graph_of_one_in_evaluation(self, tmp_path):
        model = get_recast_model(WithDropout(), RecastConfig(target_modules=["fc"], modules_to_save=["head"]))
        model.train()
        graph, x = export_program(model, torch.ones(3, 8)).module(), torch.ones(5, 8)
        found = graph(export_task(model, tmp_path / "task"), x)["output"]
        assert not torch.allclose(found, model(x))  # dropout
        torch.testing.assert_close(found, model.eval()(x))


class WithDropout(nn.Module):
    """Has dropout inside of a module that a task can own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Sequential(nn.Dropout(), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.fc(x))


@dataclass
class Outputs:
    """As some models give them, which are no mapping."""

    x: torch.Tensor
    logits: torch.Tensor
    cache: Any = None


class Giving(nn.Module):
    """Gives its input, its logits, or both, in some form."""

    def __init__(self, form):
        super().__init__()
        self.fc, self.form = nn.Linear(8, 3), form

    def forward(self, x):
        return self.form(x, self.fc(x))


class TestOutputs:
    @pytest.mark.parametrize("form", [Outputs, lambda x, logits: {"x": x, "logits": logits, "cache": None}])
    def test_they_have_their_names_and_no_input_s(self, form, tmp_path):
        onnx_tools()
        model = get_recast_model(Giving(form), RecastConfig(target_modules=["fc"])).eval()
        x, task = torch.randn(3, 8), export_task(model, tmp_path / "task")
        logits = model(x).logits if form is Outputs else model(x)["logits"]
        found = export_program(model, x).module()(task, x)
        assert list(found) == ["x", "logits"]
        torch.testing.assert_close(found["logits"], logits)
        graph = session(export_onnx(model, tmp_path / "graph.onnx", x))
        assert [value.name for value in graph.get_outputs()] == ["x_output", "logits"]
        given, logits_there = graph.run(None, {**{k: v.numpy() for k, v in task.items()}, "x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), x)
        torch.testing.assert_close(torch.from_numpy(logits_there), logits.detach())

    @pytest.mark.parametrize("form", [lambda x, y: None, lambda x, y: {}, lambda x, y: (None, [y]), lambda x, y: "text"])
    def test_a_model_that_gives_no_tensor_is_told(self, form):
        model = get_recast_model(Giving(form), RecastConfig(target_modules=["fc"])).eval()
        with pytest.raises(RecastConfigError, match="gives no tensor"):
            export_program(model, torch.randn(3, 8))


class TestReadouts:
    def test_a_graph_reads_as_its_tasks_do(self, tmp_path):
        model = with_readout()
        graph = export_program(model, X).module()
        for name in ("a", "b"):
            model.set_adapter(name)
            export_task(model, tmp_path / name)
            found = graph(load_file(tmp_path / name), X)["output"]
            torch.testing.assert_close(found, torch.from_numpy(called(model, X)), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("tasks", ["input", "table"])
    def test_convolutions_are_read_as_they_lie(self, tasks, tmp_path):
        pretrained = seeded(Inverted)
        x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert pretrained.stem(x).shape == (3, 8, 16, 16)  # as high as blocks have channels: one taken for the other fits
        bank = readout_bank(pretrained, x, progress=False)
        config = RecastConfig(num_classes=3, target_modules=["conv_pwl"], partners=[ReadoutConfig(bank=bank)])
        model = get_recast_model(pretrained, config).eval()
        randomise(model)
        task = export_task(model, tmp_path / "task") if tasks == "input" else torch.zeros(3, dtype=torch.int64)
        found = export_program(model, x, tasks).module()(task, x)["output"]
        torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-4)

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
