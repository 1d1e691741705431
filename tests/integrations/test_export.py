"""Exported graphs: the task goes in beside the inputs, and the graph gives what the model gives."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from models import KINDS, converted, layers_of, randomise, seeded, tiny_vit, vit_input
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from recast_peft import (
    BiasConfig,
    PiggybackConfig,
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    TaskPool,
    export_aoti,
    export_onnx,
    export_program,
    export_task,
    export_tasks,
    get_recast_model,
    grow_bank,
    rescale_adapter_scale,
)
from recast_peft.integrations.export.graph import prepare

TOLERANCE = 1e-6  # of the norm of the outputs, in float32
IDS = torch.randint(3, 20, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0


def onnx_tools() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    return pytest.importorskip("onnxruntime")


def backbone(name: str) -> nn.Module:
    return seeded(lambda: timm.create_model(name, num_classes=0))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return seeded(lambda: BertForSequenceClassification(config))


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        use_cache=False,
    )
    return seeded(lambda: LlamaForCausalLM(config))


def images(samples: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(samples, 3, 160, 160, generator=torch.Generator().manual_seed(seed))


def texts(samples: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids, mask = IDS.repeat(2, 2)[:samples, :length], MASK.repeat(2, 1)[:samples].repeat(1, 2)[:, :length]
    return {"input_ids": ids.contiguous(), "attention_mask": mask.contiguous()}


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[Any]]] = {
    "vit": (lambda: backbone("test_vit"), {"num_classes": 4}, [images(), images(1), images(3)]),
    "cnn": (lambda: backbone("test_efficientnet"), {"num_classes": 4}, [images(), images(1), images(3)]),
    "bert": (bert, {"num_classes": 4}, [texts(), texts(1, 5), texts(4, 9)]),
    "llama": (llama, {}, [{"input_ids": IDS}, {"input_ids": IDS[:1, :3]}, {"input_ids": IDS.repeat(2, 2)}]),
}


def two_tasks(build: Callable[[], nn.Module], config: dict[str, Any], **more: Any) -> PeftModel:
    """A model with the tasks ``first`` and ``second``, which differ in everything, also in the number of classes."""
    model = get_recast_model(build(), RecastConfig(**config, **more), "first")
    other = {**config, **({"num_classes": 6} if "num_classes" in config else {})}
    model.add_adapter("second", RecastConfig(**other, **more))
    model.add_adapter("fresh", RecastConfig(**config, **more))
    randomise(model, "first", 1, 0.1)
    randomise(model, "second", 2, 0.1)
    model.set_adapter("first")
    return model.eval()


def called(model: nn.Module, inputs: Any) -> np.ndarray:
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return (output if isinstance(output, Tensor) else output.logits).numpy()


def session(path: Path) -> Any:
    tools = onnx_tools()
    options = tools.SessionOptions()
    options.intra_op_num_threads = 1
    return tools.InferenceSession(str(path), options)


def run(graph: Any, task: dict[str, Any], inputs: Any) -> np.ndarray:
    given = inputs if isinstance(inputs, dict) else {"x": inputs}
    wanted = {value.name for value in graph.get_inputs()}
    feed = {name: np.asarray(value) for name, value in {**task, **given}.items() if name in wanted}
    return graph.run(None, feed)[0]


def distance(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


class TestTaskAsInput:
    @pytest.mark.parametrize("name", MODELS)
    def test_one_graph_gives_what_the_model_gives_for_every_task(self, name, tmp_path):
        onnx_tools()
        build, config, samples = MODELS[name]
        model = two_tasks(build, config)
        export_onnx(model, tmp_path / "graph.onnx", samples[0])
        graph = session(tmp_path / "graph.onnx")
        seen = []
        for task in ("first", "second", "fresh"):
            model.set_adapter(task)
            export_task(model, tmp_path / "task")
            tensors = load_file(tmp_path / "task")
            for inputs in samples:
                found = run(graph, tensors, inputs)
                assert distance(found, called(model, inputs)) < TOLERANCE
                seen.append(found)
        assert seen[0].shape[-1] == seen[-1].shape[-1]
        assert distance(seen[0], seen[6]) > 0.01  # the tasks differ

    @pytest.mark.parametrize("name", ["vit", "llama"])
    def test_a_fresh_task_is_the_plain_model(self, name, tmp_path):
        onnx_tools()
        build, _, samples = MODELS[name]
        model = get_recast_model(build(), RecastConfig()).eval()
        randomise(model, size=0.1)
        export_onnx(model, tmp_path / "graph.onnx", samples[0])
        zero = {"coefficients": np.zeros(export_task(model, tmp_path / "task")["coefficients"].shape, np.float32)}
        found = run(session(tmp_path / "graph.onnx"), zero, samples[1])
        assert distance(found, called(build(), samples[1])) < TOLERANCE

    def test_the_graph_says_what_it_takes_and_a_file_says_which_graph_it_is_for(self, tmp_path):
        onnx_tools()
        model = two_tasks(*MODELS["vit"][:2])
        graph = session(export_onnx(model, tmp_path / "graph.onnx", images(1)))
        shapes = {value.name: value.shape for value in graph.get_inputs()}
        assert shapes == {
            "coefficients": [24],
            "head.bias": ["classes"],
            "head.weight": ["classes", 64],
            "x": ["batch", 3, 160, 160],
        }
        export_task(model, tmp_path / "task", "second")
        said = header(tmp_path / "task")["__metadata__"]
        assert json.loads(said["recast_tasks"]) == ["second"]
        assert said["recast_layout"] == graph.get_modelmeta().custom_metadata_map["recast_layout"]
        other = get_recast_model(seeded(lambda: timm.create_model("test_vit", num_classes=0), 5), RecastConfig())
        export_task(other, tmp_path / "other")
        assert header(tmp_path / "other")["__metadata__"]["recast_layout"] != said["recast_layout"]  # another base

    def test_norms_and_their_statistics_are_inputs_too(self, tmp_path):
        onnx_tools()
        config = RecastConfig(train_norms=True, target_modules=["conv_pw"], num_classes=4)
        model = get_recast_model(backbone("test_efficientnet"), config).eval()
        graph = session(export_onnx(model, tmp_path / "graph.onnx", images()))
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                if "modules_to_save" in name and tensor.is_floating_point():
                    tensor.mul_(1 + 0.1 * torch.rand(tensor.shape))
        assert distance(run(graph, export_task(model, tmp_path / "task"), images()), called(model, images())) < TOLERANCE

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


class TestTable:
    def test_every_sample_has_its_own_task(self, tmp_path):
        onnx_tools()
        model = two_tasks(lambda: seeded(lambda: timm.create_model("test_vit", num_classes=5)), {"num_classes": 4})
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

    def test_without_a_classifier_of_its_own_the_pretrained_model_has_no_logits(self):
        model = two_tasks(*MODELS["vit"][:2])
        program = export_program(model, images(), tasks=["second", "first"])
        logits = program.module()(torch.tensor([1, 0, -1]), images(3))["output"]
        assert logits[:2].isnan().sum() == 0
        assert logits[2].isnan().all()
        model.set_adapter("second")
        assert distance(logits[1:2, :6].numpy(), called(model, images(3))[1:2]) < TOLERANCE

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


class TestProgram:
    def test_a_task_goes_in_as_its_file_is_read(self, tmp_path):
        build, config, samples = MODELS["bert"]
        model = two_tasks(build, config)
        program = export_program(model, samples[0])
        path = tmp_path / "program.pt2"
        torch.export.save(program, path)
        module = torch.export.load(path).module()
        for task in ("first", "second"):
            model.set_adapter(task)
            export_task(model, tmp_path / task)
            for inputs in samples:
                found = module(load_tensors(tmp_path / task), **inputs)["logits"]
                assert distance(found.numpy(), called(model, inputs)) < TOLERANCE

    def test_a_fresh_task_changes_nothing_to_the_last_bit(self):
        model = get_recast_model(backbone("test_vit"), RecastConfig()).eval()
        module = export_program(model, images()).module()
        assert torch.equal(module({"coefficients": torch.zeros(24)}, images())["output"], torch.tensor(called(model, images())))

    @pytest.mark.parametrize("rank", [None, 2])
    @pytest.mark.parametrize("plain", [True, False])
    def test_tasks_on_a_grown_bank(self, rank, plain):
        moved = seeded(lambda: tiny_vit(seed=0))
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if "qkv.weight" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
        bank = grow_bank(tiny_vit(), [moved], RecastConfig(target_modules=["qkv"]), rank=rank, plain_templates=plain)
        model = get_recast_model(tiny_vit(), RecastConfig(bank=bank)).eval()
        randomise(model)
        task = {"coefficients": torch.cat([layer.recast_coefficients["default"][0] for layer in recast(model)]).detach()}
        found = export_program(model, vit_input()).module()(task, vit_input())["output"]
        assert distance(found.numpy(), called(model, vit_input())) < TOLERANCE
        assert distance(found.numpy(), called(tiny_vit(), vit_input())) > 1e-3

    @pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
    def test_aotinductor_compiles_it(self, tmp_path):
        model = converted(num_classes=3)
        randomise(model)
        path = export_aoti(model, tmp_path / "model.pt2", vit_input())
        compiled = torch._inductor.aoti_load_package(str(path))
        for seed in (1, 2):
            randomise(model, seed=seed)
            found = compiled(export_task(model, tmp_path / "task"), vit_input(3))["output"]
            assert distance(found.detach().numpy(), called(model, vit_input(3))) < TOLERANCE


def recast(model: nn.Module) -> list[Any]:
    return list(layers_of(model).values())


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def shown(language: str) -> str:
    """The code in a language that the page on files shows."""
    page = (Path(__file__).parents[2] / "docs" / "reference" / "files.md").read_text()
    return page.split(f"```{language}\n")[1].split("```")[0]


class TestFiles:
    def test_a_task_is_read_in_a_few_lines_without_any_library(self, tmp_path):
        model = two_tasks(*MODELS["vit"][:2])
        written = export_task(model, tmp_path / "task", "second")
        content = (tmp_path / "task").read_bytes()
        length = int.from_bytes(content[:8], "little")
        start, end = json.loads(content[8 : 8 + length])["coefficients"]["data_offsets"]
        assert (8 + length) % 4 == 0  # numbers can be looked at where they lie
        assert np.array_equal(np.frombuffer(content[8 + length + start : 8 + length + end], "<f4"), written["coefficients"])

    def test_the_code_that_the_page_on_files_shows_reads_one(self, tmp_path):
        """In C and JavaScript, where they are installed; what stands around it is all that the page leaves out."""
        written = export_task(two_tasks(*MODELS["vit"][:2]), tmp_path / "digits.safetensors", "second")
        expected = [written["coefficients"].tolist(), written["head.weight"].flatten().tolist()]
        ran = 0
        if compiler := shutil.which("cc"):
            print_it = 'for (size_t i = 0, n, k = 0; k < 2; k++) { float *x = read_tensor("digits.safetensors", names[k], &n);'
            print_it += " for (i = 0; i < n; i++) printf(\"%.9g%c\", x[i], i + 1 < n ? ' ' : '\\n'); free(x); }"
            names = 'const char *names[] = {"coefficients", "head.weight"};'
            (tmp_path / "read.c").write_text(f"{shown('c')}\nint main(void) {{ {names} {print_it} return 0; }}\n")
            subprocess.run([compiler, "-Wall", "-Werror", "-o", "read", "read.c"], cwd=tmp_path, check=True)
            said = subprocess.run(["./read"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
            assert [[float(np.float32(x)) for x in line.split()] for line in said.splitlines()] == expected
            ran += 1
        if node := shutil.which("node"):
            before = (
                'const fetch = async p => ({arrayBuffer: async () => new Uint8Array(require("fs").readFileSync(p)).buffer});'
                "const ort = {Tensor: class { constructor(t, data, dims) { this.data = data; this.dims = dims; } }};"
                "const image = null; const session = {run: async feeds => { const f = n => [...feeds[n].data];"
                'console.log(JSON.stringify([f("coefficients"), f("head.weight")])); return {}; }};'
            )
            (tmp_path / "read.js").write_text(f"{before}\n(async () => {{\n{shown('javascript')}\n}})();\n")
            said = subprocess.run([node, "read.js"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
            assert json.loads(said) == expected
            ran += 1
        if not ran:
            pytest.skip("neither a C compiler nor node")

    def test_the_strength_of_a_task_and_the_mean_of_its_sets_are_what_is_written(self, tmp_path):
        model = converted(num_coefficient_sets=2)
        randomise(model)
        full = export_task(model, tmp_path / "task")["coefficients"]
        first = layers_of(model)["blocks.0.attn.qkv"].recast_coefficients["default"]
        assert torch.equal(full[:2], first.mean(0))
        with rescale_adapter_scale(model, 0.5):
            assert torch.allclose(export_task(model, tmp_path / "task")["coefficients"], full / 2)

    def test_many_tasks_lie_in_one_file_row_by_row(self, tmp_path):
        model = converted("one", num_classes=3)
        pool = TaskPool(model)
        for i in range(50):
            pool.add(f"task {i}", RecastConfig(num_classes=3, seed=i))
        with torch.no_grad():
            pool.table[:50] = torch.randn(50, pool.table.shape[1])
        assert export_tasks(pool, tmp_path / "tasks") == pool.names
        stored = load_file(tmp_path / "tasks")
        alone = export_task(pool, tmp_path / "task", "task 7")
        assert {key: value[7].tolist() for key, value in stored.items()} == {k: v.tolist() for k, v in alone.items()}
        assert json.loads(header(tmp_path / "tasks")["__metadata__"]["recast_tasks"])[7] == "task 7"
        assert not np.array_equal(stored["head.weight"][7], stored["head.weight"][8])

    def test_tasks_of_other_sizes_do_not_share_a_file(self, tmp_path):
        model = two_tasks(*MODELS["vit"][:2])
        with pytest.raises(RecastConfigError, match=r"first.*\n.*second"):
            export_tasks(model, tmp_path / "tasks")
        assert export_tasks(model, tmp_path / "tasks", ["first", "fresh"]) == ["first", "fresh"]


REFUSED: dict[str, dict[str, Any]] = {
    "a LoRA part": {"lora_config": LoraConfig(r=2)},
    "the partner adaptformer": {"partners": ["adaptformer"]},
    "coefficients of biases": {"partners": [BiasConfig()]},
    "masks on its weights": {"partners": [PiggybackConfig()]},
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
            (lambda: prepare(model, vit_input(), ["other"]), "'other' is no RECAST task"),
            (lambda: prepare(model.get_base_model(), vit_input()), "a TinyVit was given"),
            (lambda: prepare(TaskPool(model), vit_input()), "the pool is empty"),
            (lambda: export_task(TaskPool(model), tmp_path / "task"), "no task of the pool is active"),
        ):
            with pytest.raises(RecastConfigError, match=message):
                fault()
        model.merge_adapter()
        with pytest.raises(RecastBankError, match="unmerge_adapter"):
            prepare(model, vit_input())
        assert list(tmp_path.iterdir()) == []

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


class TestQuantised:
    def test_a_graph_in_int8_still_swaps(self, tmp_path):
        """As near to the model as the quantised graph of the merged model is, for each task."""
        onnx_tools()
        from onnxruntime.quantization import quantize_dynamic

        def in_int8(path: Path) -> Any:
            quantize_dynamic(path, path.with_suffix(".int8"))
            return session(path.with_suffix(".int8"))

        model = two_tasks(bert, {"num_classes": 4})
        graph = in_int8(export_onnx(model, tmp_path / "graph.onnx", texts(), way="output"))
        assert (tmp_path / "graph.int8").stat().st_size < 0.6 * (tmp_path / "graph.onnx").stat().st_size
        found = {}
        for task in ("first", "second"):
            tensors = export_task(model, tmp_path / "task", task)
            other = two_tasks(bert, {"num_classes": 4})
            other.set_adapter(task)
            live = called(other, texts())
            merged = other.merge_and_unload()
            dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=32)}
            shapes = {"input_ids": dims, "attention_mask": dims}
            plain = tmp_path / f"{task}.onnx"
            torch.onnx.export(merged.eval(), (), plain, kwargs=texts(), dynamic_shapes=shapes, dynamo=True, verbose=False)
            expected = distance(run(in_int8(plain), {}, texts()), live)
            found[task] = run(graph, tensors, texts())
            assert distance(found[task], live) < 1.5 * expected + 0.01
        assert distance(found["first"][:, :4], found["second"][:, :4]) > 0.1
