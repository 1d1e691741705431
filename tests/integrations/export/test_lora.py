"""Graphs of tasks that have a LoRA part: its factors are numbers of the task, as its coefficients are."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from exported import called_exactly, distance, header, session, traced
from lora_parts import fill
from models import seeded, small_vit
from peft import LoraConfig, PeftModel
from pooled_parts import CASES, IMAGES, NAMES, pool_of, with_tasks
from safetensors.numpy import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recast_peft import (
    RecastBankError,
    RecastConfig,
    export_program,
    export_task,
    export_tasks,
    get_recast_model,
    rescale_adapter_scale,
)
from recast_peft.integrations.export.graph import prepare

TOLERANCE = 1e-5  # of the norm of the outputs

# What is lowered to ONNX too: every operation of all cases, with the part and beside it, is in these or in ``exported.MODELS``.
IN_ONNX = ("timm's vit", "wide convolutions", "gpt2")


def example(model: PeftModel, x: Tensor) -> Any:
    return x if x.is_floating_point() else {"input_ids": x}


def each_exactly(model: PeftModel, x: Tensor) -> dict[str | None, np.ndarray]:
    found: dict[str | None, np.ndarray] = {}
    for name in NAMES:
        model.set_adapter(name)
        found[name] = called_exactly(model, example(model, x))
    with model.disable_adapter():
        found[None] = called_exactly(model, example(model, x))
    model.set_adapter("t0")
    return found


class TestTaskAsInput:
    @pytest.mark.parametrize("case", CASES)
    def test_one_graph_gives_what_the_model_gives_for_every_task(self, case, tmp_path):
        model, x = with_tasks(case)
        expected = each_exactly(model, x)
        graph = traced(model, example(model, x), tmp_path, case in IN_ONNX)
        layouts = set()
        if case in IN_ONNX:
            layouts.add(session(tmp_path / "graph.onnx").get_modelmeta().custom_metadata_map["recast_layout"])
        for name in ("t0", "t1", "t2"):
            export_task(model, tmp_path / "task", name)
            layouts.add(header(tmp_path / "task")["__metadata__"]["recast_layout"])
            found = graph(load_file(tmp_path / "task"), example(model, x))
            assert distance(found, expected[name]) < TOLERANCE
        assert len(layouts) == 1
        assert distance(expected["t0"], expected["t1"]) > 0.01
        names = export_tasks(model, tmp_path / "tasks", list(NAMES))  # one without the part among them
        rows = load_file(tmp_path / "tasks")
        for i, name in enumerate(names):
            found = graph({key: values[i] for key, values in rows.items()}, example(model, x))
            assert distance(found, expected[name]) < TOLERANCE
        zero = {key: np.zeros_like(values[0]) for key, values in rows.items()}
        assert distance(graph(zero, example(model, x)), expected[None]) < TOLERANCE

    def test_strengths_are_written_with_the_task(self, tmp_path):
        model, x = with_tasks()
        program = export_program(model, x).module()
        with rescale_adapter_scale(model, 0.5):
            task = export_task(model, tmp_path / "task")
            expected = called_exactly(model, x)
        assert distance(program(task, x)["output"].detach().numpy(), expected) < TOLERANCE

    def test_a_pool_gives_the_same_files(self, tmp_path):
        model, _ = with_tasks()
        pool = pool_of(model)
        for name in ("t0", "t1"):
            for key, values in export_task(model, tmp_path / "own", name).items():
                assert torch.equal(export_task(pool, tmp_path / "pooled", name)[key], values)
            said = [header(tmp_path / file)["__metadata__"]["recast_layout"] for file in ("own", "pooled")]
            assert said[0] == said[1]

    def test_a_task_without_the_part_in_a_model_where_others_have_it(self, tmp_path):
        model, x = with_tasks()
        model.set_adapter("alone")
        program = export_program(model, x).module()
        task = export_task(model, tmp_path / "task", "alone")
        assert distance(program(task, x)["output"].detach().numpy(), called_exactly(model, x)) < TOLERANCE

    def test_parts_below_a_layer_of_ours_and_around_it(self, tmp_path):
        config = RecastConfig(target_modules=["fc1"], lora_config=LoraConfig(r=2, target_modules=["qkv", "fc2"]))
        model = get_recast_model(small_vit(), config, "below")
        model.add_adapter("between", RecastConfig(target_modules=["qkv"]))
        model.add_adapter("above", config)
        program = filled_and_exported(model, ["below", "above"], IMAGES)
        for name in ("below", "above"):
            model.set_adapter(name)
            task = export_task(model, tmp_path / "task", name)
            assert distance(program(task, IMAGES)["output"].detach().numpy(), called_exactly(model, IMAGES)) < TOLERANCE

    @pytest.mark.parametrize("targets", [["inner"], ["patches", "inner", "outer"]], ids=str)
    def test_weights_that_are_read_and_modules_that_are_called_by_keyword(self, targets, tmp_path):
        config = RecastConfig(target_modules=targets, group_size=1, lora_config=LoraConfig(r=2, target_modules=PARTS))
        model = get_recast_model(seeded(Reading), config, "task")
        program = filled_and_exported(model, ["task"], IMAGES)
        task = export_task(model, tmp_path / "task")
        assert distance(program(task, IMAGES)["output"].detach().numpy(), called_exactly(model, IMAGES)) < TOLERANCE
        with pytest.raises(RecastBankError, match="the weight of patches is read.*tasks='input'"):
            export_program(model, IMAGES, ["task"])


PARTS = ["patches", "inner", "outer"]


class Reading(nn.Module):
    """Reads the weights of its modules, and calls one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.inner, self.outer = nn.Conv2d(1, 6, 4, 4), Conv1D(8, 6), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        read = sum(
            (module.weight.square() * torch.arange(len(module.weight.flatten())).view_as(module.weight)).sum()
            for module in (self.patches, self.inner, self.outer)
        )
        return self.outer(input=self.inner(self.patches(x).mean((2, 3)))) + read.sqrt()


def filled_and_exported(model: PeftModel, tasks: list[str], x: Tensor) -> Any:
    for seed, name in enumerate(tasks):
        fill(model, name, seed + 1)
    return export_program(model.eval(), x).module()


class TestTable:
    @pytest.mark.parametrize("case", CASES)
    def test_every_sample_has_its_own_task(self, case, tmp_path):
        model, x = with_tasks(case)
        expected, rows, tasks = each_exactly(model, x), torch.tensor([2, 0, -1, 3, 1]), list(NAMES)
        wanted = np.stack([expected[None if row < 0 else tasks[row]][i] for i, row in enumerate(rows)])
        graph = traced(model, example(model, x), tmp_path, case in IN_ONNX, tasks=tasks)
        for samples in (5, 2):
            assert distance(graph(rows[:samples], example(model, x[:samples])), wanted[:samples]) < TOLERANCE
        of_pool = prepare(pool_of(model), example(model, x), tasks)  # as it computes before it is traced
        with torch.no_grad():
            found = next(iter(of_pool.graph(rows, *of_pool.args, **of_pool.kwargs).values())).numpy()
        assert distance(found, wanted) < TOLERANCE

    def test_a_lower_rank_is_filled_up(self, tmp_path):
        model, x = with_tasks()
        options = copy.deepcopy(CASES["timm's vit"][2])
        options["lora_config"] = LoraConfig(r=1, lora_alpha=7, target_modules=["fc1"])
        model.add_adapter("low", RecastConfig(**options))
        fill(model, "low", 9)
        model.set_adapter("low")
        expected = called_exactly(model, x)
        program = export_program(model, x, ["t0", "low"]).module()
        assert distance(program(torch.tensor([1] * 5), x)["output"].detach().numpy(), expected) < TOLERANCE
        with pytest.raises(RecastBankError, match=r"(?s)'t0' has a LoRA part .* no room for.*qkv.*graph: none.*the largest"):
            export_program(model, x, ["low", "t0"])
        with pytest.raises(RecastBankError, match="'t0' has a LoRA part that the graph has no room for"):
            export_tasks(model, tmp_path / "tasks", ["alone", "t0"])
        assert not list(tmp_path.iterdir())


class TestRefusals:
    def test_rows_that_are_no_samples(self):
        class Folded(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.flatten(0, 1)).view(*x.shape)

        config = RecastConfig(target_modules=["1"], lora_config=LoraConfig(r=2, target_modules=["0"]))
        model = get_recast_model(Folded(nn.Linear(4, 4), nn.Linear(4, 4)), config, "task").eval()
        with pytest.raises(RecastBankError, match="0 is called with 6 rows for 2 samples.*tasks='input'"):
            export_program(model, torch.randn(2, 3, 4), ["task"])

    @pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "mica"}])
    def test_more_than_two_factors(self, more, tmp_path):
        config = RecastConfig(target_modules=["qkv"], lora_config=LoraConfig(r=2, target_modules=["fc1"], **more))
        model = get_recast_model(small_vit(), config).eval()
        for export in (lambda: export_program(model, IMAGES), lambda: export_task(model, tmp_path / "task")):
            with pytest.raises(RecastBankError, match=r"more than two factors .*Nothing was written.*merge_and_unload"):
                export()
        assert not list(tmp_path.iterdir())
        plain = model.merge_and_unload()  # what it says instead
        program = torch.export.export(plain, (IMAGES,)).module()
        assert distance(program(IMAGES).detach().numpy(), called_exactly(plain, IMAGES)) < TOLERANCE

    def test_a_module_that_is_computed_by_its_weight(self):
        build = lambda: nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2), nn.Conv2d(4, 4, 3))  # noqa: E731
        config = RecastConfig(target_modules=["0"], group_size=1, lora_config=LoraConfig(r=2))
        model = get_recast_model(build(), config).eval()
        with pytest.raises(RecastBankError, match="a LoRA part at 0, which is computed by its weight"):
            export_program(model, IMAGES)
