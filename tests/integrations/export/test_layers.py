"""Modules that compute with a task that is given to the call."""

from __future__ import annotations

import pytest
import torch
from exported import TOLERANCE, bert, called, distance, onnx_tools, run, session, texts, two_tasks
from torch import Tensor, nn

from recast_peft import RecastBankError, RecastConfig, export_onnx, export_program, export_task, get_recast_model


class TestWays:
    @pytest.mark.parametrize("way", ["weight", "output"])
    def test_both_ways_of_computing_give_the_same(self, way, tmp_path):
        onnx_tools()
        model = two_tasks(bert, {"num_classes": 4}, group_size=4)
        graph = session(export_onnx(model, tmp_path / "graph.onnx", texts(), way=way))
        products = {"weight": "MatMul", "output": "Mul"}
        import onnx

        counted = [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node]
        assert counted.count(products[way]) > 30
        assert distance(run(graph, export_task(model, tmp_path / "task"), texts()), called(model, texts())) < TOLERANCE


class TestRows:
    def test_modules_that_are_called_with_other_rows_than_samples_are_refused(self):
        class Merged(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x.reshape(-1, 4)).sum()

        model = get_recast_model(Merged(), RecastConfig(target_modules=["fc"])).eval()
        with pytest.raises(RecastBankError, match="10 rows for 2 samples"):
            export_program(model, torch.randn(2, 5, 4), tasks="table")
        found = export_program(model, torch.randn(2, 5, 4)).module()({"coefficients": torch.zeros(1)}, torch.ones(2, 5, 4))
        assert torch.isfinite(found["output"])
