"""Files of tasks: read without any library, one task or many."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import MODELS, backbone, header, two_tasks
from grown_biases import grown, on
from models import converted, layers_of, randomise, vit_input
from safetensors.numpy import load_file

from recast_peft import (
    RecastBankError,
    RecastConfig,
    RecastConfigError,
    TaskPool,
    export_onnx,
    export_task,
    export_tasks,
    get_recast_model,
    rescale_adapter_scale,
)
from recast_peft.parts.bias_part import bias_holders


def shown(language: str, page: str = "reference/files.md") -> str:
    """The code in a language that a page shows."""
    text = (Path(__file__).parents[3] / "docs" / page).read_text()
    return text.split(f"```{language}\n")[1].split("```")[0]


# What the page that draws has in a browser: its script is run on it, and then a person's choice is made.
BROWSER = """
const fs = require("fs"), location = {origin: ""}, ran = [];
class Option { constructor(text) { this.text = text; } }
const fetch = async p => ({arrayBuffer: async () => new Uint8Array(fs.readFileSync(p)).buffer});
const session = {run: async feeds => { ran.push(feeds); return {output: {data: [ran.length]}}; }};
const ort = {env: {wasm: {}}, InferenceSession: {create: async () => session},
  Tensor: class { constructor(type, data, dims) { this.data = [...data]; this.dims = dims; } }};
const pixels = new Uint8ClampedArray(4 * 160 * 160);
const context = {getImageData: () => ({data: pixels}), clearRect: () => pixels.fill(0)};
const pad = {getContext: () => context}, wipe = {}, logits = {};
const task = {options: [], selectedIndex: 0, add(option) { this.options.push(option); }};
(async () => {
  %s
  await last;
  pixels.set([255, 0, 51, 255], 4 * 161);
  task.selectedIndex = 7;
  task.onchange();
  await last;
  const {x, ...fed} = ran[1];
  const lit = x.data.map((value, i) => [i, value]).filter(pair => pair[1]);
  const names = task.options.map(option => option.text);
  console.log(JSON.stringify({names, fed, lit, dims: x.dims, said: logits.textContent}));
})();
"""


class TestFiles:
    def test_a_task_is_read_in_a_few_lines_without_any_library(self, tmp_path):
        model = two_tasks(*MODELS["vit"][:2])
        written = export_task(model, tmp_path / "task", "second")
        content = (tmp_path / "task").read_bytes()
        length = int.from_bytes(content[:8], "little")
        start, end = json.loads(content[8 : 8 + length])["coefficients"]["data_offsets"]
        assert (8 + length) % 4 == 0  # numbers can be looked at where they lie
        assert np.array_equal(np.frombuffer(content[8 + length + start : 8 + length + end], "<f4"), written["coefficients"])

    def test_the_python_that_the_page_on_files_shows_reads_one(self, tmp_path):
        written = export_task(two_tasks(*MODELS["vit"][:2]), tmp_path / "task", "second")
        names: dict[str, Any] = {}
        exec(shown("python"), names)
        read = names["read_task"](tmp_path / "task")
        assert {name: value.tolist() for name, value in read.items()} == {
            name: value.tolist() for name, value in written.items()
        }

    @pytest.mark.skipif(shutil.which("node") is None, reason="no node")
    def test_the_page_of_the_guide_switches_between_a_hundred(self, tmp_path):
        pool = TaskPool(converted("one", num_classes=3))
        for i in range(100):
            pool.add(f"task {i}", RecastConfig(num_classes=3, seed=i))
        with torch.no_grad():
            pool.table[:100] = torch.randn(100, pool.table.shape[1])
        export_tasks(pool, tmp_path / "tasks.safetensors")
        script = shown("html", "how_to/export.md").split("<script>")[1].split("</script>")[0]
        (tmp_path / "page.js").write_text(BROWSER % script)
        ran = subprocess.run(["node", "page.js"], cwd=tmp_path, check=True, capture_output=True, text=True)
        said = json.loads(ran.stdout)
        assert said["names"] == pool.names
        alone = export_task(pool, tmp_path / "task", "task 7")
        assert {name: one["data"] for name, one in said["fed"].items()} == {n: t.flatten().tolist() for n, t in alone.items()}
        assert {name: one["dims"] for name, one in said["fed"].items()} == {n: list(t.shape) for n, t in alone.items()}
        place, blue = 161, np.float32(51 / 255)  # second row, second pixel: red and blue
        assert said["lit"] == [[place, 1], [2 * 160 * 160 + place, float(blue)]]
        assert (said["dims"], said["said"]) == ([1, 3, 160, 160], "2")

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

    def test_the_strength_of_biases_is_written_and_one_of_norms_is_refused(self, tmp_path):
        model = converted(partners=["bias"])
        randomise(model)
        with torch.no_grad():
            for holder in bias_holders(model):
                holder.modules_to_save["default"].offset.fill_(0.5)
        full = export_task(model, tmp_path / "task")["coefficients"]
        with rescale_adapter_scale(model, 0.5):
            assert torch.allclose(export_task(model, tmp_path / "task")["coefficients"], full / 2)
        assert full.count_nonzero() == len(full)
        on_bank = on(grown())
        bias_holders(on_bank)[0].set_scale("default", 0.5)
        with pytest.raises(RecastConfigError, match="strengths of 0.5 and 1 at biases"):
            export_task(on_bank, tmp_path / "task")
        model = converted(train_norms=True)
        with rescale_adapter_scale(model, 0.5), pytest.raises(RecastBankError, match=r"a strength at the norm blocks\.0\.norm"):
            export_task(model, tmp_path / "task")

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
        assert export_tasks(model, tmp_path / "task", "first") == ["first"]  # a name, and no list of letters


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    model = converted(group_size=1)
    for write in (export_task, export_tasks):
        with pytest.raises(RecastConfigError, match=r"is a folder; expected the name of a file, such as tasks?\.safetensors"):
            write(model, tmp_path)
    with pytest.raises(RecastConfigError, match=r"is a folder; expected the name of a file, such as model\.onnx"):
        export_onnx(model, tmp_path, vit_input())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("numbers", [1, 2])
def test_cores_and_groups_of_as_many_numbers_are_told_apart(numbers, tmp_path):
    for name, config in (("cores", {"num_directions": numbers}), ("groups", {"group_size": numbers**2})):
        model = get_recast_model(backbone("test_vit", depth=4), RecastConfig(target_modules=["qkv"], **config))
        assert export_task(model, tmp_path / name)["coefficients"].shape == (4 * numbers**2,)
    first, second = (header(tmp_path / name)["__metadata__"]["recast_layout"] for name in ("cores", "groups"))
    assert first != second
