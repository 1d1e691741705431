"""Graphs of tasks that train a core between the main directions of each weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import MODELS, called_exactly, distance, traced, two_tasks
from safetensors.numpy import load_file

from recast_peft import export_task
from recast_peft.integrations.export.graph import prepare

TOLERANCE = 1e-5  # of the norm of the outputs


@pytest.mark.parametrize(("name", "in_onnx"), [("vit", True), ("cnn", True), ("bert", False), ("llama", False)])
def test_one_graph_gives_what_the_model_gives_for_every_task(name, in_onnx, tmp_path):
    build, config, inputs = MODELS[name]
    model = two_tasks(build, config, num_directions=2)
    graph = traced(model, inputs[0], tmp_path, in_onnx)
    for task in ("first", "second"):
        model.set_adapter(task)
        expected = called_exactly(model, inputs[0])
        export_task(model, tmp_path / task, task)
        assert distance(graph(load_file(tmp_path / task), inputs[0]), expected) < TOLERANCE
    model.set_adapter("fresh")
    fresh = called_exactly(model, inputs[0])
    assert fresh.shape != expected.shape or distance(expected, fresh) > 1e-3


def test_a_core_is_added_where_less_is_to_be_added_to():
    """A runtime joins the bias of a wide layer to the activation behind it where nothing stands between the two."""
    build, config, inputs = MODELS["vit"]
    layers = prepare(two_tasks(build, config, num_directions=2), inputs[0]).graph.layers()
    assert {layer.name.rpartition(".")[2]: bool(layer.before) for layer in layers} == {"fc1": True, "fc2": False}
    build, config, inputs = MODELS["cnn"]
    layers = prepare(two_tasks(build, config, num_directions=2), inputs[0]).graph.layers()
    assert not any(layer.before for layer in layers if layer.base.weight.ndim > 2)


@pytest.mark.parametrize("name", ["vit", "bert", "cnn"])  # the last with depthwise convolutions
def test_a_table_has_a_core_for_each_sample(name, tmp_path):
    build, config, inputs = MODELS[name]
    model = two_tasks(build, config, num_directions=2)
    graph = traced(model, inputs[0], tmp_path, False, tasks=["first", "fresh"])
    for x in (inputs[0], inputs[2]):  # of another number of samples
        rows = np.arange(len(x["input_ids"] if isinstance(x, dict) else x)) % 2
        found = graph(torch.from_numpy(rows), x)
        for row, task in enumerate(("first", "fresh")):
            model.set_adapter(task)
            expected = called_exactly(model, x)
            assert distance(found[rows == row], expected[rows == row]) < TOLERANCE
