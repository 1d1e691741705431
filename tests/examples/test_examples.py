"""The demo and its data: small runs, and the path for named backbones and data sets on made data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import demo
import glyphs
import practice_bank
import pytest
import torch
from glyph_backbone import BACKBONE_PATH, load_backbone
from peft import LoraConfig
from PIL import Image
from practice_bank import load_practice_bank
from study import (
    NotRun,
    Run,
    Study,
    parameter_groups,
    peft_method,
    recast_method,
    refitted_accuracy,
    train_method,
    validation_split,
)
from study_tables import Row, precision, table
from training import Schedule, features_of, train_probe
from transformers import ViTConfig, ViTForImageClassification

from recast_peft import BiasConfig, RecastConfig, get_recast_model


def small(*more: str) -> list[str]:
    return ["--tasks", "arrows", "damage", "--train-per-class", "6", "--test-per-class", "5", "--epochs", "2", *more]


class TestDemo:
    def test_it_learns_saves_reloads_and_compares(self, tmp_path, capsys):
        summary = demo.main([*small(), "--output", str(tmp_path)])
        shown = capsys.readouterr().out
        assert "the same accuracies on all 2 tasks" in shown
        assert "forgetting: +0.000" in shown
        matrix = summary["matrix"]["values"]
        assert matrix[0][0] == matrix[1][0]
        assert summary["numbers"] == {"linear probe": 0, "RECAST": 32, "RECAST, bank": 48, "LoRA r=8": 24_576}
        assert set(summary["results"]) == {"arrows", "damage"}
        for name in ("arrows", "damage"):
            folder = tmp_path / "tasks" / name
            # config and coefficients beside the head of 96 x 20 and 96 x 10 numbers
            head = 4 * 97 * (20 if name == "arrows" else 10)
            assert sum((folder / f).stat().st_size for f in demo.TASK_FILES) - head < 6000
        assert json.loads((tmp_path / "demo.json").read_text())["results"] == summary["results"]
        assert (tmp_path / "demo.txt").read_text().strip() == shown.strip()
        with Image.open(tmp_path / "demo.png") as picture:
            assert picture.width > 800

    def test_a_named_backbone_needs_named_data(self, tmp_path):
        with pytest.raises(SystemExit, match="go together"):
            demo.main(["--backbone", "test_vit", "--output", str(tmp_path)])


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


def test_paired_differences_by_hand():
    from study_tables import paired

    # differences 2, 4, 6 and 8 points: mean 5, standard deviation sqrt(20 / 3), standard error sqrt(20 / 3 / 4)
    mean, error = paired({"a": [0.52, 0.54], "b": [0.66, 0.68]}, {"a": [0.5, 0.5], "b": [0.6, 0.6]})
    assert (mean, error) == (pytest.approx(5), pytest.approx(math.sqrt(5 / 3)))


class TestStudy:
    """The harness of the accuracy studies."""

    def test_a_run_is_made_once_and_another_setting_is_another_run(self, tmp_path):
        schedule = Schedule(epochs=1)
        told: list[str] = []
        first = Study(tmp_path / "runs.jsonl", schedule, 4, 4, say=told.append)
        method = recast_method("RECAST", {"target_modules": ["qkv"]}, 0.05)
        run = first.run(method, "damage", seed=0)
        assert run.numbers == 16
        assert first.run(replace(method, name="another name"), "damage", seed=0) == run
        assert len(told) == 1

        again = Study(tmp_path / "runs.jsonl", schedule, 4, 4, only_known=True)
        assert again.run(method, "damage", seed=0) == run
        others = [
            (again, method.scaled(2), {"task": "damage", "seed": 0}),
            (again, recast_method("RECAST", {"target_modules": ["fc1"]}, 0.05), {"task": "damage", "seed": 0}),
            (again, method, {"task": "damage", "seed": 1}),
            (again, method, {"task": "arrows", "seed": 0}),
            (again, method, {"task": "damage", "seed": 0, "split": "validation"}),
            (Study(tmp_path / "runs.jsonl", Schedule(epochs=2), 4, 4, only_known=True), method, {"task": "damage", "seed": 0}),
        ]
        for study, other, asked in others:
            with pytest.raises(NotRun, match="has no run of RECAST"):
                study.run(other, **asked)

    def test_validation_images_are_training_images_that_are_not_trained_on(self):
        task = glyphs.load_task("damage", train_per_class=6, test_per_class=2)
        split = validation_split(task)
        assert split.train_labels.tolist() == sorted(list(range(10)) * 4)
        assert split.test_labels.tolist() == sorted(list(range(10)) * 2)
        parts = [{image.numpy().tobytes() for image in images} for images in (split.train_images, split.test_images)]
        assert parts[0] | parts[1] == {image.numpy().tobytes() for image in task.train_images}
        assert not parts[0] & parts[1]

    @pytest.mark.parametrize(("start", "best"), [(1.0, 1.0), (0.1, 1.0), (10.0, 1.0), (0.001, 0.1)])
    def test_the_search_climbs_to_the_best_rate_but_not_for_ever(self, tmp_path, monkeypatch, start, best):
        study = Study(tmp_path / "runs.jsonl")
        tried = set()

        def run(self, method, task, seed, split="test"):
            assert split == "validation"
            tried.add(method.lrs[""])
            return Run(1 - abs(math.log10(method.lrs[""])) / 10, 0.0, 1, 0.0)

        monkeypatch.setattr(Study, "run", run)
        found = study.tune(peft_method("a", LoraConfig, {}, start))
        assert found.lrs[""] == pytest.approx(best, rel=0.02)
        assert len(tried) <= 6

    def test_the_search_takes_the_best_classifier_and_the_best_rate_beside_it(self, tmp_path, monkeypatch):
        study = Study(tmp_path / "runs.jsonl")
        asked = set()

        def run(self, method, task, seed, split="test"):
            asked.add((task, seed, split))
            best = 1.0 if method.head_decay == 10 else 0.1  # with less decay a smaller rate is best
            loss = abs(math.log10(method.lrs[""] / best)) / 10
            return Run(1 - loss - (method.head_lr != 0.003) / 2 - (method.head_decay != 10) / 2, 0.0, 1, 0.0)

        monkeypatch.setattr(Study, "run", run)
        heads = [(lr, decay) for lr in (0.003, 0.01) for decay in (0.01, 10.0, 30.0)]
        found = study.tune(peft_method("a", LoraConfig, {}, 0.1), ["arrows"], 11, "test", heads)
        assert (found.head_lr, found.head_decay) == (0.003, 10)
        assert found.lrs[""] == pytest.approx(1.0, rel=0.02)
        assert asked == {("arrows", 11, "test")}

    def test_the_classifier_is_trained_as_its_method_says(self):
        task = glyphs.load_task("damage", train_per_class=2, test_per_class=2)
        method = replace(recast_method("RECAST", {"target_modules": ["fc1"]}, 0.05), head_lr=0.02, head_decay=7.0)
        head, coefficients = parameter_groups(method.build(load_backbone(), task, 0), method, 0.1)
        assert (head["lr"], head["weight_decay"]) == (0.02, 7.0)
        assert (coefficients["lr"], coefficients["weight_decay"]) == (0.05, 0.0)

    def test_what_is_trained_needs_a_rate(self):
        task = glyphs.load_task("damage", train_per_class=2, test_per_class=2)
        method = replace(peft_method("LoRA", LoraConfig, {"target_modules": ["qkv"]}, 0.1), lrs={"recast_": 0.1})
        with pytest.raises(ValueError, match="lora_A.* is trained, but has no learning rate"):
            train_method(method, task, Schedule(epochs=1))

    def test_the_refitted_classifier_is_that_of_linear_discriminant_analysis(self):
        generator = torch.Generator().manual_seed(0)
        means = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
        labels = torch.arange(3).repeat(400)
        features = means[labels] + torch.randn(1200, 2, generator=generator)
        train, test = slice(0, 600), slice(600, 1200)
        task = glyphs.Task("a", ("a", "b", "c"), features[train], labels[train], features[test], labels[test])
        nearest = torch.cdist(features[test], means).argmin(1)  # the best there is for such features
        assert refitted_accuracy(task) == pytest.approx(float((nearest == labels[test]).float().mean()), abs=0.015)

    def test_gain_spread_and_share_are_those_worked_out_by_hand(self):
        def row(name, numbers, gains, refitted):
            accuracies = {task: [0.5 + g / 100 for g in each] for task, each in gains.items()}
            return Row(name, name, numbers, {"": 0.1}, accuracies, gains, accuracies, refitted, (0.01, 10.0))

        rows = [
            row("linear probe", 0, {"a": [0.0, 0.0], "b": [0.0, 0.0]}, {"a": [0.0, 0.0], "b": [0.0, 0.0]}),
            # by seed 1.5 and 4.5
            row("small", 48, {"a": [1.0, 3.0], "b": [2.0, 6.0]}, {"a": [1.0, 1.0], "b": [2.0, 2.0]}),
            # by seed 3 and 5
            row("large", 9000, {"a": [4.0, 4.0], "b": [2.0, 6.0]}, {"a": [4.0, 4.0], "b": [2.0, 2.0]}),
        ]
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows, "large").splitlines()[2:]]
        assert cells[0] == [
            "linear probe",
            "0",
            "0.1",
            "0.01, 10",
            "50.0",
            "+0.00 ± 0.00",
            "-",
            "50.0",
            "+0.00 ± 0.00",
            "-",
            "2",
        ]
        assert cells[1] == [
            "small",
            "48",
            "0.1",
            "0.01, 10",
            "53.0",
            "+3.00 ± 2.12",
            "75 %",
            "53.0",
            "+1.50 ± 0.00",
            "50 %",
            "2",
        ]
        assert cells[2][:7] == ["large", "9,000", "0.1", "0.01, 10", "54.0", "+4.00 ± 1.41", "100 %"]
        assert precision(rows) == pytest.approx(((4.5 / 2 + 2 / 2) / 2) ** 0.5)
        assert precision(rows[:1]) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of runs that two studies share."""
    return str(tmp_path_factory.mktemp("study") / "runs.jsonl")


class TestAccuracy:
    def test_methods_have_the_numbers_that_their_names_say(self):
        import accuracy

        task = glyphs.load_task("damage", train_per_class=1, test_per_class=1)
        expected = [(n, make(n)) for n in accuracy.RECAST_SIZES for make in (accuracy.recast, accuracy.tinylora)]
        expected += [
            (32, accuracy.recast_all_four(1)),
            (64, accuracy.recast_all_four(2)),
            # 8 or 16 weights and the 32 biases of the blocks; 64 weights and they
            *zip((40, 48, 96), accuracy.ROWS["RECAST with biases"], strict=True),
        ]  # not the patch embedding's projection
        for numbers, method in expected:
            groups = parameter_groups(method.build(load_backbone(), task, 0), method, 0.1)
            assert sum(p.numel() for p in groups[0]["params"]) == 97 * 10
            assert sum(p.numel() for group in groups[1:] for p in group["params"]) == numbers

    def test_it_compares_and_goes_on_where_it_stood(self, tmp_path, runs, capsys):
        import accuracy

        arguments = ["--quick", "--runs", runs, "--output", str(tmp_path)]
        rows = accuracy.main(arguments)
        assert [(row.name, row.numbers) for row in rows] == [
            ("linear probe", 0), ("RECAST, 48", 48), ("TinyLoRA, 48", 48), ("LoRA r=8", 24_576)
        ]  # fmt: skip
        assert rows[0].gain == 0
        assert len({row.accuracies["arrows"][0] for row in rows}) > 2
        assert "TinyLoRA, 48, arrows, seed 11, test" in capsys.readouterr().out
        assert [row["gains"] for row in json.loads((tmp_path / "results.json").read_text())] == [row.gains for row in rows]
        assert (tmp_path / "picture.png").stat().st_size > 1000

        assert accuracy.main([*arguments, "--table"]) == rows
        shown = capsys.readouterr().out
        assert "seed 11" not in shown
        assert shown == (tmp_path / "table.md").read_text()

    def test_a_task_of_two_parts_beside_each_alone(self, tmp_path, runs, capsys):
        import mixing

        rows = mixing.main(["--quick", "--runs", runs, "--output", str(tmp_path)])
        assert {row.name: row.numbers for row in rows} == {
            "linear probe": 0,
            "RECAST, all four, groups of 1": 32,
            "LoRA r=1": 3072,
            "LoRA r=8": 24_576,
            "RECAST + LoRA r=1": 3104,
            "RECAST + LoRA r=8": 24_608,
        }
        by_name = {row.name: row for row in rows}
        mean = 50 * sum(
            by_name["RECAST + LoRA r=1"].accuracies[task][0] - by_name["LoRA r=1"].accuracies[task][0]
            for task in ("arrows", "damage")
        )
        assert f"| LoRA r=1 | {mean:+.2f} |" in capsys.readouterr().out
        assert by_name["RECAST + LoRA r=8"].lrs == {
            "recast_": by_name["RECAST, all four, groups of 1"].lrs["recast_"],
            "lora_": by_name["LoRA r=8"].lrs[""],
        }


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

        from recast_peft.composition import composed as module

        made = []
        compose = module.compose_weight
        monkeypatch.setattr(module, "compose_weight", lambda *args, **kwargs: made.append(1) or compose(*args, **kwargs))
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
        assert composed == {"RECAST, live": 6, "RECAST, merged": 0}

    def test_estimated_gradients_are_near_the_exact_ones(self, tmp_path):
        import gradient_noise

        for rows in gradient_noise.main(["--quick", "--output", str(tmp_path)]).values():
            error = {row["gradient"]: row["error"] for row in rows}
            assert 0 < error["bfloat16"] < 0.05

    def test_swaps_compile_once(self, tmp_path):
        import swaps

        *_, compiled = swaps.main(["--quick", "--output", str(tmp_path)]).values()
        assert compiled == [{"compiled model": "TaskPool.activate", "swaps": 100, "compilations": 1}]

    def test_mixed_batches_of_one_and_of_four_tasks(self, tmp_path):
        import mixed_batch

        tables = mixed_batch.main(["--quick", "--output", str(tmp_path)])
        assert [len(rows) for rows in tables.values()] == [4, 4]

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

    def test_one_command_runs_what_is_asked_for_and_prints_markdown(self, tmp_path, capfd):
        import run_all

        run_all.main(["--quick", "--only", "files", "--output", str(tmp_path)])
        shown = capfd.readouterr().out
        assert "quick: no measurement" in shown
        assert "| RECAST |" in shown
        (tmp_path / "files.json").write_text((tmp_path / "files.json").read_text().replace('"LoRA r=8"', '"renamed"'))
        run_all.main(["--tables", "--output", str(tmp_path)])
        assert "| renamed |" in capfd.readouterr().out


class TestOrders:
    def test_the_order_changes_nothing_for_recast_and_fine_tuning_forgets(self):
        import task_orders

        arguments = ["--tasks", "arrows", "damage", "--train-per-class", "12", "--test-per-class", "10", "--epochs", "5"]
        result = task_orders.main(arguments)
        recast = [row for row in result["orders"] if row["method"] == "RECAST"]
        assert all(row["final"] == recast[0]["final"] and row["forgetting"] == 0 for row in recast)
        assert max(row["forgetting"] for row in result["orders"] if row["method"] == "fine-tuning") > 0.05
        routing = result["routing"]
        assert routing["task found"] > 0.6
        assert routing["class found"] <= min(routing["task found"], routing["class found, task given"] + 0.05)


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("test", 4)):
        for value, name in enumerate(("dark", "light")):
            folder = tmp_path / "shades" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 60, (20, 20, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray((noise + 150 * value).to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return tmp_path / "shades"


class TestNamedSources:
    def test_a_timm_name_and_a_folder_of_images(self, tmp_path, folder_of_images):
        arguments = ["--backbone", "test_vit", "--untrained", "--dataset", str(folder_of_images), "--epochs", "3"]
        summary = demo.main([*arguments, "--output", str(tmp_path / "out")])
        assert summary["results"]["shades"]["linear probe"] > 0.9

    def test_a_transformers_folder(self, tmp_path, folder_of_images):
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
        )
        ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        arguments = ["--backbone", str(tmp_path / "vit"), "--dataset", str(folder_of_images), "--epochs", "2"]
        summary = demo.main([*arguments, "--output", str(tmp_path / "out")])
        assert summary["numbers"]["RECAST"] > 0
        assert summary["matrix"]["tasks"] == ["shades"]

    def test_a_torchvision_name(self):
        from named_sources import load_named_backbone, load_named_task

        task = load_named_task("FakeData", load_named_backbone("test_vit", pretrained=False), limit=12)
        assert task.train_images.shape == (12, 3, 160, 160)
        assert task.test_labels.shape == (12,)

    def test_a_name_that_nobody_knows(self):
        from named_sources import load_named_backbone

        with pytest.raises(ValueError, match="known neither to timm .near: .*nor to transformers"):
            load_named_backbone("vit_smal_patch16")


class TestGlyphs:
    def test_the_same_seed_draws_the_same_images_and_another_seed_others(self):
        first, same, other = (glyphs.load_task("greek", seed=s, train_per_class=3, test_per_class=2) for s in (1, 1, 2))
        assert torch.equal(first.train_images, same.train_images)
        assert not torch.equal(first.train_images, other.train_images)

    @pytest.mark.parametrize("name", glyphs.TASKS)
    def test_every_task_has_images_of_all_its_classes(self, name):
        task = glyphs.load_task(name, train_per_class=2, test_per_class=1)
        assert task.train_images.shape == (2 * task.num_classes, 1, 28, 28)
        assert task.test_labels.tolist() == list(range(task.num_classes))
        assert torch.isfinite(task.train_images).all()
        assert task.train_images.flatten(1).std(dim=1).min() > 0.1

    def test_pretraining_shows_no_character_of_a_task(self):
        reserved = {character for characters in glyphs._RESERVED.values() for character in characters}
        assert not reserved & set(glyphs.pretraining_characters())

    def test_practice_tasks_show_pretraining_characters_alone_and_differ(self):
        first, same, second = (glyphs.practice_task(i, train_per_class=2, test_per_class=1) for i in (0, 0, 1))
        assert torch.equal(first.train_images, same.train_images)
        assert len(set(first.class_names)) == glyphs.PRACTICE_CLASSES
        assert set(first.class_names) | set(second.class_names) <= set(glyphs.pretraining_characters())
        assert set(first.class_names) != set(second.class_names)
        assert first.train_images.shape == (2 * glyphs.PRACTICE_CLASSES, 1, 28, 28)

    def test_no_image_of_handwriting_is_both_trained_and_tested(self):
        first, second = glyphs._split_bitmaps(glyphs.TASKS["handwriting"], 3, 40, 40, torch.Generator().manual_seed(0))
        seen = {image.numpy().tobytes() for image in first}
        assert not any(image.numpy().tobytes() in seen for image in second)

    @pytest.mark.parametrize(("name", "count"), [("nothing", 4), ("greek", 0), ("handwriting", 5000)])
    def test_bad_requests(self, name, count):
        with pytest.raises(ValueError):
            glyphs.load_task(name, train_per_class=count)


class TestPracticeBank:
    def test_the_shipped_bank_fits_the_backbone_and_moves_its_biases(self):
        bank = load_practice_bank()
        assert bank.nbytes == 5 * 4 * sum(p.numel() for n, p in load_backbone().blocks.named_parameters() if "bias" in n)
        config = RecastConfig(target_modules=["fc1"], partners=[BiasConfig(bank=bank)], train_coefficients=False)
        model = get_recast_model(load_backbone(), config).eval()
        images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        before = model(images)
        assert torch.equal(before, load_backbone()(images))
        for name, parameter in model.named_parameters():
            if name.endswith("offset"):
                parameter.data.add_(0.2)
        assert not torch.allclose(model(images), before, atol=0.1)

    def test_a_bank_has_a_template_for_each_task_that_was_practised(self, tmp_path, monkeypatch, capsys):
        bank = practice_bank.practice_bank(tasks=2, train_per_class=1, epochs=1)
        assert {group.num_templates for group in bank.groups.values()} == {2}
        monkeypatch.setattr(practice_bank, "practice_bank", lambda: bank)
        practice_bank.main(["--output", str(tmp_path / "bank")])
        assert load_practice_bank(tmp_path / "bank").fingerprint == bank.fingerprint
        assert f"{bank.nbytes:,} bytes" in capsys.readouterr().out


class TestBackbone:
    def test_it_is_small_and_knows_more_than_chance(self):
        assert BACKBONE_PATH.stat().st_size < 2_000_000
        task = glyphs.load_task("arrows", train_per_class=15, test_per_class=10)
        trained, _ = train_probe(load_backbone(), task, Schedule(epochs=10, probe_epochs=30))
        torch.manual_seed(0)
        random = load_backbone()
        for parameter in random.parameters():
            if parameter.ndim > 1:
                torch.nn.init.trunc_normal_(parameter, std=0.02)
        untrained, _ = train_probe(random, task, Schedule(epochs=10, probe_epochs=30))
        assert trained > untrained + 0.1

    def test_features_are_what_reaches_the_head(self):
        backbone, images = load_backbone(), torch.randn(3, 1, 28, 28)
        assert torch.allclose(features_of(backbone, images), backbone(images))
