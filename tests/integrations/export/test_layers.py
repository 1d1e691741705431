"""Modules that compute with a task that is given to the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exported import TOLERANCE, Inverted, called, distance, images, onnx_tools, recast, run, session, traced, two_tasks
from grown_biases import source
from models import Mlp, randomise, seeded, small_vit, vit_input
from peft import PeftModel
from torch import Tensor, nn

from recast_peft import (
    BiasConfig,
    RecastBankError,
    RecastConfig,
    TaskPool,
    export_onnx,
    export_program,
    export_task,
    get_recast_model,
    grow_bias_bank,
)
from recast_peft.parts.bias_part import bias_coefficients


class Normed(nn.Module):
    """Three blocks of a norm and an MLP. Input: ``(batch, tokens, width)``."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.ModuleDict({"norm": nn.LayerNorm(8), "mlp": Mlp(8, 16)}) for _ in range(3)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["mlp"](block["norm"](x))
        return x


def mlps() -> nn.Module:
    return seeded(Normed)


def with_biased_norms() -> nn.Module:
    model = seeded(Inverted)
    model.load_state_dict(source(0, lambda: model), strict=False)  # they are zero
    return model


def grown(**options: Any) -> BiasConfig:
    """On a bank of what moved biases, and scales of norms."""
    sources = [source(seed, mlps) for seed in range(3)]
    for name, tensor in sources[0].items():
        if name.endswith("norm.weight"):
            sources[0][name] = tensor * torch.linspace(0.5, 1.5, len(tensor))
    return BiasConfig(bank=grow_bias_bank(mlps(), sources, **options))


BIASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[], BiasConfig], Callable[[int], Tensor]]] = {
    "linear layers": (mlps, {}, BiasConfig, vit_input),
    "norms": (mlps, {}, lambda: BiasConfig(target_modules=["norm", "fc1"]), vit_input),
    "convolutions, and norms with an activation inside": (
        with_biased_norms,
        {"target_modules": ["conv_pw"]},
        lambda: BiasConfig(target_modules=["bn1", "bn2", "conv_reduce"]),
        images,
    ),
    "a grown bank": (mlps, {"target_modules": ["fc1"]}, grown, vit_input),
    "a grown bank that blocks share": (mlps, {}, lambda: grown(group_size=3, num_templates=2), vit_input),
    "a grown bank with scales of norms": (mlps, {}, lambda: grown(scales=True), vit_input),
}


def with_biases(what: str) -> tuple[PeftModel, Callable[[int], Tensor]]:
    """A model with two tasks of coefficients of weights and biases."""
    build, config, biases, inputs = BIASES[what]
    partner = biases()
    model = get_recast_model(build(), RecastConfig(**config, partners=[partner]), "first")
    model.add_adapter("second", RecastConfig(**config, partners=[partner]))
    for seed, name in enumerate(("first", "second")):
        randomise(model, name, seed, 0.1)
        with torch.no_grad():
            for offset in bias_coefficients(model.get_base_model(), name).values():
                offset.copy_(torch.randn(offset.shape, generator=torch.Generator().manual_seed(seed)) * 0.5)
    return model.eval(), inputs


# What is lowered to ONNX too: every operation of all cases is in these.
IN_ONNX = ("convolutions, and norms with an activation inside", "a grown bank with scales of norms")


class TestWays:
    @pytest.mark.parametrize("way", ["weight", "output"])
    def test_both_ways_of_computing_give_the_same(self, way, tmp_path):
        onnx_tools()
        pictures = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(3))
        model = two_tasks(small_vit, {"num_classes": 4}, group_size=2)
        assert [layer.recast_bank["first"].num_templates for layer in recast(model)] == [2] * 4
        graph = session(export_onnx(model, tmp_path / "graph.onnx", pictures[:2], way=way))
        import onnx

        counted = [node.op_type for node in onnx.load(tmp_path / "graph.onnx").graph.node]
        assert (counted.count("Mul") >= 4 * 2) == (way == "output")  # a product for each template of each layer
        assert distance(run(graph, export_task(model, tmp_path / "task"), pictures), called(model, pictures)) < TOLERANCE


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


@pytest.mark.parametrize("what", BIASES)
class TestBiases:
    def test_as_an_input(self, what, tmp_path):
        model, inputs = with_biases(what)
        graph = traced(model, inputs(2), tmp_path, what in IN_ONNX)
        seen = []
        for name in ("first", "second"):
            model.set_adapter(name)
            task, x = export_task(model, tmp_path / "task"), inputs(3)
            assert list(task) == ["coefficients"]
            live = called(model, x)
            assert distance(graph(task, x), live) < TOLERANCE
            seen.append(live)
            for offset in bias_coefficients(model.get_base_model(), name).values():
                offset.data.zero_()
            assert distance(called(model, x), live) > 1e-3  # the biases matter
        assert distance(*seen) > 1e-3

    def test_in_a_table(self, what, tmp_path):
        model, inputs = with_biases(what)
        expected = []
        for name in ("second", "first", "first"):
            model.set_adapter(name)
            expected.append(called(model, inputs(4)))
        with model.disable_adapter():
            expected.insert(2, called(model, inputs(4)))
        pool = TaskPool(model)
        for name in ("first", "second"):
            pool.add(name, name)
        graph = traced(pool, inputs(2), tmp_path, what in IN_ONNX, tasks="table")
        found = graph(torch.tensor([1, 0, -1, 0]), inputs(4))
        assert distance(found, np.stack([one[i] for i, one in enumerate(expected)])) < TOLERANCE
