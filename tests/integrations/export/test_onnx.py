"""ONNX graphs: the task goes in beside the inputs, and the graph gives what the model gives."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import (
    MODELS,
    TOLERANCE,
    Inverted,
    backbone,
    bert,
    called,
    called_exactly,
    distance,
    header,
    images,
    onnx_tools,
    run,
    session,
    texts,
    two_tasks,
)
from models import KINDS, seeded, small_vit
from peft import PeftModel
from safetensors.numpy import load_file

from recast_peft import RecastConfig, RecastConfigError, TaskPool, export_onnx, export_task, get_recast_model


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory):
    """A model of ``MODELS`` with two tasks, its graph, and the folder of the graph."""

    @cache
    def made(name: str) -> tuple[PeftModel, Any, Path]:
        onnx_tools()
        build, config, samples = MODELS[name]
        model, folder = two_tasks(build, config), tmp_path_factory.mktemp(name)
        return model, session(export_onnx(model, folder / "graph.onnx", samples[EXAMPLE[name]])), folder

    return made


EXAMPLE = {"vit": 1, "cnn": 0, "bert": 0, "llama": 0}  # of one sample and of several


class TestTaskAsInput:
    @pytest.mark.parametrize("name", MODELS)
    def test_one_graph_gives_what_the_model_gives_for_every_task(self, name, graph_of):
        build, _, samples = MODELS[name]
        model, graph, folder = graph_of(name)
        seen = []
        for task in ("first", "second", "fresh"):
            model.set_adapter(task)
            export_task(model, folder / "task")
            tensors = load_file(folder / "task")
            for inputs in samples:
                found = run(graph, tensors, inputs)
                assert distance(found, called_exactly(model, inputs)) < TOLERANCE
                seen.append(found)
        assert seen[0].shape[-1] == seen[-1].shape[-1]
        assert distance(seen[0], seen[6]) > 0.01  # the tasks differ
        if name == "llama":  # nothing but coefficients: at zero the graph is the plain model
            zero = {name: np.zeros_like(values) for name, values in tensors.items()}
            assert list(zero) == ["coefficients"]
            assert distance(run(graph, zero, samples[1]), called_exactly(build(), samples[1])) < TOLERANCE

    def test_the_graph_says_what_it_takes_and_a_file_says_which_graph_it_is_for(self, graph_of, tmp_path):
        model, graph, _ = graph_of("vit")
        shapes = {value.name: value.shape for value in graph.get_inputs()}
        assert shapes == {
            "coefficients": [8],
            "head.bias": ["classes"],
            "head.weight": ["classes", 64],
            "x": ["batch", 3, 160, 160],
        }
        export_task(model, tmp_path / "task", "second")
        said = header(tmp_path / "task")["__metadata__"]
        assert json.loads(said["recast_tasks"]) == ["second"]
        assert said["recast_layout"] == graph.get_modelmeta().custom_metadata_map["recast_layout"]
        other = get_recast_model(backbone("test_vit", 5, depth=2), RecastConfig())
        export_task(other, tmp_path / "other")
        assert header(tmp_path / "other")["__metadata__"]["recast_layout"] != said["recast_layout"]  # another base

    def test_norms_and_their_statistics_are_inputs_too(self, tmp_path):
        onnx_tools()
        config = RecastConfig(train_norms=True, target_modules=["conv_pw"], num_classes=4)
        model = get_recast_model(seeded(Inverted), config).eval()
        graph = session(export_onnx(model, tmp_path / "graph.onnx", images()))
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                if "modules_to_save" in name and tensor.is_floating_point():
                    tensor.mul_(1 + 0.1 * torch.rand(tensor.shape))
        assert distance(run(graph, export_task(model, tmp_path / "task"), images()), called(model, images())) < TOLERANCE


class TestTable:
    def test_every_sample_has_its_own_task(self, tmp_path):
        onnx_tools()
        model = two_tasks(lambda: backbone("test_vit", num_classes=5, depth=2), {"num_classes": 4})
        pool = TaskPool(model)
        for name in ("second", "first"):
            pool.add(name, name)
        graph = session(export_onnx(pool, tmp_path / "graph.onnx", images(), tasks="table"))
        said = graph.get_modelmeta().custom_metadata_map
        assert json.loads(said["recast_tasks"]) == ["second", "first"]
        x = images(4)
        found = run(graph, {"rows": np.array([1, 0, -1, 1])}, x)
        with torch.no_grad():
            expected = model(x, task_ids=["first", "second", None, "first"]).numpy()
        assert np.array_equal(np.isfinite(found), np.isfinite(expected))
        real = np.isfinite(expected)
        assert real.sum(axis=1).tolist() == [4, 6, 5, 4]
        assert distance(found[real], expected[real]) < TOLERANCE
        for row in (2, -2, -3):  # numbers of no task, which an index from the end would make another task's
            with pytest.raises(Exception, match="out of (data )?bounds|invalid index"):
                run(graph, {"rows": np.array([1, row, 0, 0])}, x)


class TestRefusals:
    def test_a_failure_while_writing_leaves_the_old_graph(self, tmp_path, monkeypatch):
        onnx_tools()

        path = tmp_path / "graph.onnx"
        path.write_text("old")

        def fail(self: Any, place: Path, **options: Any) -> None:
            Path(place).write_text("half")
            raise OSError("disk full")

        monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
        kind = KINDS["linear"]
        model = get_recast_model(seeded(kind.build), RecastConfig(target_modules=kind.targets)).eval()
        with pytest.raises(OSError, match="disk full"):
            export_onnx(model, path, kind.inputs())
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"opset_version": 99}, "opset_version=99: this graph can only be written in version"),
            ({"input_names": ["x"]}, "input_names is what export_onnx itself gives"),
            ({"dynamic_shapes": {"x": {9: "n"}}}, "{9: 'n'} of 'x': expected a dimension from 0 to"),
            ({"dynamic_shapes": {"x": {0: 5}}}, "{0: 5} of 'x': expected a dimension"),
            ({"dynamic_shapes": {"x": 5}}, "expected names by input and dimension"),
        ],
        ids=str,
    )
    def test_what_torch_would_not_write_as_it_was_asked(self, options, message, tmp_path):
        onnx_tools()
        kind = KINDS["linear"]
        model = get_recast_model(seeded(kind.build), RecastConfig(target_modules=kind.targets)).eval()
        with pytest.raises(RecastConfigError, match=message):
            export_onnx(model, tmp_path / "graph.onnx", kind.inputs(), **options)
        assert list(tmp_path.iterdir()) == []

    def test_a_graph_that_is_none_in_the_version_that_was_asked(self, tmp_path):
        onnx_tools()
        model = get_recast_model(small_vit(depth=2), RecastConfig(target_modules=["qkv"])).eval()
        with pytest.raises(RecastConfigError, match="opset_version=17: this graph cannot be written in it .*Split"):
            export_onnx(model, tmp_path / "graph.onnx", torch.randn(2, 1, 16, 16), tasks="table", opset_version=17)
        assert list(tmp_path.iterdir()) == []


class TestQuantised:
    def test_a_graph_in_int8_still_swaps(self, tmp_path):
        """As near to the model as the quantised graph of the merged model is, for each task."""
        onnx_tools()
        from onnxruntime.quantization import quantize_dynamic

        def in_int8(path: Path) -> Any:
            quantize_dynamic(path, path.with_suffix(".int8"))
            return session(path.with_suffix(".int8"))

        model = two_tasks(bert, {"num_classes": 4})
        fixed = {name: {0: "batch"} for name in texts()}
        graph = in_int8(export_onnx(model, tmp_path / "graph.onnx", texts(), way="output", dynamic_shapes=fixed))
        assert (tmp_path / "graph.int8").stat().st_size < 0.6 * (tmp_path / "graph.onnx").stat().st_size
        found = {}
        for task in ("first", "second"):
            tensors = export_task(model, tmp_path / "task", task)
            other = two_tasks(bert, {"num_classes": 4})
            other.set_adapter(task)
            live = called(other, texts())
            merged = other.merge_and_unload()
            plain = tmp_path / f"{task}.onnx"
            torch.onnx.export(merged.eval(), (), plain, kwargs=texts(), dynamo=True, verbose=False)
            expected = distance(run(in_int8(plain), {}, texts()), live)
            found[task] = run(graph, tensors, texts())
            assert distance(found[task], live) < 1.5 * expected + 0.01
        assert distance(found["first"][:, :4], found["second"][:, :4]) > 0.1
