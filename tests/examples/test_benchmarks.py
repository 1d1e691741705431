"""The benchmarks, on tiny models: every one runs, and what is compared is what it is called."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exported import onnx_tools


class TestTrainingStep:
    def test_it_compares_time_and_memory_and_writes_what_it_prints(self, tmp_path, capsys, monkeypatch):
        import training_step

        arguments = ["--quick", "--targets", "qkv", "--methods", "RECAST", "LoRA r=8", "--output", str(tmp_path)]
        (rows,) = training_step.main(arguments).values()
        assert [row["method"] for row in rows] == ["RECAST", "LoRA r=8"]
        assert rows[0]["numbers"] < 20 < rows[1]["numbers"]
        assert rows[1]["time ratio"] == rows[1]["memory ratio"] == 1
        assert 0 < rows[0]["memory ratio"] < 1.05  # no composed weight is kept
        assert "memory ratio" in capsys.readouterr().out
        written = json.loads((tmp_path / "training_step.json").read_text())
        assert written["quick"]
        assert list(written["tables"].values()) == [rows]
        assert (tmp_path / "training_step.png").stat().st_size > 1000

    def test_peak_memory_counts_what_lives_at_one_moment(self, monkeypatch):
        from memory import peak_bytes

        def work() -> None:
            first = torch.ones(1000)
            del first
            torch.ones(500) + torch.ones(700)[:500]

        assert 4000 <= peak_bytes(work) < 8000


class TestBenchmarks:
    def test_inference_has_every_variant_beside_the_plain_model(self, tmp_path):
        import inference

        tables = inference.main(["--quick", "--batches", "1", "--output", str(tmp_path)])
        assert len(tables) == 2
        for rows in tables.values():
            names = [row["forward pass"] for row in rows]
            assert names[0] == "plain"
            assert {"RECAST, live", "RECAST, merged", "LoRA r=8, live"} <= set(names)
            assert rows[0]["ratio to plain"] == 1
            assert all(row["ms"] > 0 for row in rows)

    def test_variants_of_inference_are_what_they_are_called(self, monkeypatch):
        import inference
        from rivals import backbone, images

        from recast_peft.composition import compose

        made = []
        weighted_sum = compose._weighted_sum
        monkeypatch.setattr(compose, "_weighted_sum", lambda *args, **kwargs: made.append(1) or weighted_sum(*args, **kwargs))
        composed = {}
        with torch.no_grad():
            options = inference.parser().parse_args(["--model", "test_vit"])
            calls = inference.variants(["qkv"], images(backbone("test_vit"), 1), options)
            plain = calls["plain"]()
            for name in ("RECAST, live", "RECAST, merged"):
                assert not torch.equal(calls[name](), plain)  # each draws a task of its own
                made.clear()
                calls[name]()
                composed[name] = len(made)
        assert composed == {"RECAST, live": 2, "RECAST, merged": 0}

    def test_swaps_compile_once(self, tmp_path):
        import swaps

        *_, compiled = swaps.main(["--quick", "--output", str(tmp_path)]).values()
        assert compiled == [{"compiled model": "TaskPool.activate", "swaps": 100, "compilations": 1}]

    def test_mixed_batches_of_one_and_of_four_tasks(self, tmp_path):
        import mixed_batch

        tables = mixed_batch.main(["--quick", "--output", str(tmp_path)])
        assert [len(rows) for rows in tables.values()] == [4, 4]

    def test_a_fleet_of_one_and_of_thirty_tasks(self, tmp_path):
        import fleet

        arguments = ["--quick", "--output", str(tmp_path)] + (["--http"] if find_spec("uvicorn") else [])
        uniform, zipf, batches, sizes = fleet.main(arguments).values()
        others = ["LoRA r=8, all in memory", "LoRA r=8, 25 slots", "a merged model each"]
        servers = ["plain model", *["RECAST pool", *others, *(["RECAST pool, HTTP"] if find_spec("uvicorn") else [])] * 2]
        for rows in (uniform, zipf):
            assert sorted(row["server"] for row in rows) == sorted(servers)
            assert all(0 < row["p50 ms"] <= row["p95 ms"] <= row["p99 ms"] for row in rows)
            assert all(row["MB of the process"] > 0 for row in rows if os.path.isdir("/proc/self"))
        assert [row["batch"] for row in batches] == ["1 tasks, uniform", "30 tasks, uniform", "30 tasks, zipf", "plain model"]
        assert [row["tasks"] for row in sizes] == [1, 30]
        assert sizes[1]["MB of classifiers"] == pytest.approx(30 * sizes[0]["MB of classifiers"])
        assert (tmp_path / "fleet_curves.png").is_file()

    def test_merged_models_answer_for_their_own_samples(self):
        import fleet_servers
        from rivals import backbone, images

        options = SimpleNamespace(model="test_vit")
        x = images(backbone("test_vit"), 3)
        with torch.no_grad():
            parts = fleet_servers.merged_models(2, x, options)([1, 0, 1])
            whole = fleet_servers.plain(x, options)([0] * 3)
        assert sorted(len(part) for part in parts) == [1, 2]
        torch.testing.assert_close(next(part for part in parts if len(part) == 1)[0], whole[1])

    def test_zipf_asks_for_few_tasks_and_uniform_traffic_for_all(self):
        import fleet

        asked = {kind: Counter(itertools.islice(fleet.traffic(50, kind), 5000)) for kind in ("uniform", "zipf")}
        assert {*asked["uniform"]} == {*range(50)}
        assert max(asked["uniform"].values()) < 200
        assert max(asked["zipf"].values()) > 1000

    def test_a_soak_finds_no_wrong_answer_and_would_find_one(self, monkeypatch, tmp_path):
        import soak

        (rows,) = soak.main(["--quick", "--output", str(tmp_path)]).values()
        counts = {row["what"]: row["number"] for row in rows}
        assert counts["answered"] > 10
        assert counts["wrong answers"] == 0
        monkeypatch.setattr(torch, "allclose", lambda *args, **kwargs: False)
        with pytest.raises(SystemExit):
            soak.main(["--seconds", "0.5"])

    def test_files_grow_with_the_numbers_that_a_method_trains(self, tmp_path):
        import files

        saved, pool = files.main(["--quick", "--output", str(tmp_path)]).values()
        size = {row["method"]: row["bytes"] for row in saved}
        numbers = {row["method"]: row["numbers"] for row in saved}
        assert size["RECAST"] < size["IA3"] < size["LoRA r=1"] < size["LoRA r=8"]
        # a number takes four bytes, its name and shape some hundred beside; PEFT's TinyLoRA stores more than it trains
        assert all(4 * numbers[name] < size[name] < 4 * numbers[name] + 3000 for name in set(size) - {"TinyLoRA u=2"})
        assert pool[0]["bytes a task, in the file"] < size["RECAST"]

    def test_one_layer_alone(self, tmp_path):
        import single_layer

        host, products = single_layer.main(["--quick", "--output", str(tmp_path)]).values()
        assert {row["layer"] for row in host} == set(single_layer.METHODS)
        assert next(row for row in host if row["layer"] == "LoRA r=2")["ratio to LoRA"] == 1
        assert [row["million multiplications"] for row in products] == [32 * 64 * 64 / 1e6]

    def test_conversions_say_what_they_cost(self, tmp_path):
        import conversion

        for rows in conversion.main(["--quick", "--output", str(tmp_path)]).values():
            exact, compressed, lora = rows
            assert exact["after GiB"] < exact["model GiB"] * 1.01
            assert compressed["after GiB"] < exact["after GiB"] < lora["after GiB"]

    def test_methods_of_mimicry(self, tmp_path):
        import mimicry

        (rows,) = mimicry.main(["--quick", "--output", str(tmp_path)]).values()
        assert {row["method"] for row in rows} == {"closed_form", "gradient", "autoencoder"}
        assert next(row for row in rows if row["method"] == "closed_form" and row["templates"] == 2)["exact"]

    @pytest.mark.parametrize(
        ("precision", "stored", "computed"),
        [
            ("float32", torch.float32, torch.float32),
            ("autocast", torch.float32, torch.bfloat16),
            ("bfloat16", torch.bfloat16, torch.bfloat16),
        ],
    )
    def test_precisions_are_what_they_are_called(self, precision, stored, computed):
        import inference
        from timing import in_precision, where

        options = inference.parser().parse_args(["--precision", precision])
        model = torch.nn.Linear(3, 2)
        call = in_precision(model, options)
        assert model.weight.dtype == stored
        assert call(torch.ones(1, 3, dtype=stored)).dtype == computed
        assert where(options) == ("" if precision == "float32" else f", {precision}")

    def test_one_command_runs_what_is_asked_for_and_prints_markdown(self, tmp_path, capfd, monkeypatch):
        import run_all

        def run(command: list[str], check: bool) -> None:
            """In this process: another one would import everything again, which takes longer than what it is for."""
            assert command[0] == sys.executable
            monkeypatch.setattr(sys, "argv", command[1:])
            runpy.run_path(command[1], run_name="__main__")

        monkeypatch.setattr(run_all, "subprocess", SimpleNamespace(run=run))
        run_all.main(["--quick", "--only", "files", "--output", str(tmp_path)])
        shown = capfd.readouterr().out
        assert "quick: no measurement" in shown
        assert "| RECAST |" in shown
        (tmp_path / "files.json").write_text((tmp_path / "files.json").read_text().replace('"LoRA r=8"', '"renamed"'))
        run_all.main(["--tables", "--output", str(tmp_path)])
        assert "| renamed |" in capfd.readouterr().out


def test_the_cost_of_a_mixed_batch_is_compared(tmp_path: Path, capsys: Any) -> None:
    import grown_banks_cost

    (rows,) = grown_banks_cost.main(["--quick", "--output", str(tmp_path)]).values()
    numbers = {row["batch"]: row["numbers of a task"] for row in rows}
    depth, width = 2, 64
    assert numbers["RECAST, 4 templates of rank 4"] == 4 * depth
    assert numbers["RECAST, 4 of rank 4 and the weight"] == 5 * depth
    assert numbers["LoRA r=4, adapter_names"] == 4 * (width + 3 * width) * depth
    assert rows[0]["ratio to plain"] == 1
    assert "RECAST, 8 templates of rank 8" in capsys.readouterr().out
    assert (tmp_path / "grown_banks_cost.json").is_file()


def test_exported_graphs_are_compared_with_the_plain_one_and_with_lora(tmp_path: Path) -> None:
    onnx_tools()
    import export

    latency, swaps, sizes = export.main(["--quick", "--no-two", "--output", str(tmp_path)]).values()
    assert [row["graph"] for row in latency] == ["plain", export.ONE, export.TABLE, export.CORE, export.LORA]
    assert all(row["size, ratio to plain"] < 1.5 for row in latency)
    assert len(swaps) == 5
    one, many, with_classifiers, lora = (row["bytes"] for row in sizes)
    assert one < lora
    assert many < with_classifiers
    assert many < 20 * 4 * 4 + 2000  # 20 tasks of 4 numbers
