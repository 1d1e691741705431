"""The demo on a few pictures: everything it says is there, and what it reloads is what it learned."""

from __future__ import annotations

import json
from dataclasses import replace

import demo
import pytest
from PIL import Image
from worlds import PICTURES
from worlds.pictures import category_icons, make_task, words_in_scripts


def test_it_learns_saves_reloads_mixes_and_compares(tmp_path, capsys, monkeypatch):
    tasks = {
        "icons": lambda: make_task("icons", category_icons, 2, 1),
        "scripts": lambda: make_task("scripts", words_in_scripts, 2, 1),
    }
    monkeypatch.setattr(demo, "WORLDS", {"pictures": replace(PICTURES, tasks=tasks)})
    monkeypatch.setattr(demo, "SHORT", {"pictures": tuple(tasks)})
    arguments = ["--output", str(tmp_path), "--worlds", "pictures", "--epochs", "1", "--methods", "probe", "LoRA r=1"]
    arguments += ["--processes", "1"]
    (found,) = demo.main(arguments).values()
    shown = capsys.readouterr().out
    assert "reloaded into a fresh backbone: the same accuracies on all 2 tasks" in shown
    assert "forgetting: +0.000" in shown
    assert list(found) == [demo.RECAST, "probe", "LoRA r=1"]
    assert 0 < found[demo.RECAST].trainable < 50
    assert 0 < found[demo.RECAST].bytes < found["LoRA r=1"].bytes
    assert set(found[demo.RECAST].accuracies) == {"icons", "scripts"}
    difference = float(shown.split("own task alone, to ")[1].split()[0])
    assert difference < 1e-4
    assert (tmp_path / "pictures" / "icons" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "demo.json").read_text())["pictures"]["probe"]["trainable"] == 0
    assert (tmp_path / "demo.txt").read_text().strip() == shown.strip()
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 500


def test_the_table_by_hand():
    one = demo.Result(trainable=48, bytes=3000, seconds=20.0, accuracies={"a": 50.0, "b": 60.0})
    head, row, note = demo.table({demo.RECAST: one}).splitlines()
    assert head.split() == ["method", "trainable", "bytes", "seconds", "a", "b", "mean"]
    assert row.split() == ["RECAST", "48", "3,000", "10.0", "50.0", "60.0", "55.0"]
    assert note.startswith("(")


@pytest.mark.parametrize("name", demo.RIVALS)
def test_rivals_are_methods_of_the_frontier(name):
    import frontier

    assert name == frontier.PROBE or demo.RATES[name] == frontier.METHODS[name].rates["text"]
