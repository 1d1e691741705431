"""The frontier: runs are made once, figures are those worked out by hand, every method learns."""

from __future__ import annotations

from dataclasses import replace

import frontier
import pytest
import torch
from frontier import REFERENCE, Run
from worlds import PICTURES, TEXT, text
from worlds.base import Split, Task
from worlds.pictures import category_icons, make_task
from worlds.training import accuracy, fresh_classifier, train

from recast_peft import KnownPictures, MissingWords


@pytest.fixture(scope="module")
def icons():
    """A task of 20 pictures."""
    return make_task("icons", category_icons, 2, 1)


@pytest.fixture
def small(monkeypatch, icons):
    """The world of pictures with one small task and one epoch."""
    world = replace(PICTURES, tasks={"icons": lambda: icons}, epochs=1)
    monkeypatch.setattr(frontier, "ALL_WORLDS", {"pictures": world})
    return world


def test_runs_are_made_once_and_shown(small, tmp_path, capsys, monkeypatch):
    methods = ["--methods", frontier.PROBE, "RECAST", "LoRA r=1", "--output", str(tmp_path), "--worlds", "pictures"]
    tables = frontier.main(methods)
    found = {row.method: row for row in tables["pictures"]}
    assert list(found) == [frontier.PROBE, "RECAST", "LoRA r=1"]  # by trainable parameters
    assert found[frontier.PROBE].bytes == found[frontier.PROBE].trainable == 0
    assert 0 < found["RECAST"].trainable < 50 < found["LoRA r=1"].trainable
    assert found["RECAST"].bytes < found["LoRA r=1"].bytes
    assert "| RECAST |" in capsys.readouterr().out
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    monkeypatch.setattr(frontier, "run", lambda *_, **__: pytest.fail("a run that was there already"))
    assert frontier.main(methods) == tables


def test_each_world_learns_its_own_task_of_a_name(small, icons, tmp_path, monkeypatch):
    others = replace(small, name="vit", tasks={"icons": lambda: replace(icons, classes=("other",))})
    monkeypatch.setattr(frontier, "ALL_WORLDS", {"pictures": small, "vit": others})
    found = {}

    def run(world, task, method, seed, rate, **_):
        found[world.name] = task.classes
        return Run(world.name, task.name, method, seed, rate, 50.0, 0, 0, 1.0)

    monkeypatch.setattr(frontier, "run", run)
    frontier.main(["--methods", frontier.PROBE, "--output", str(tmp_path), "--worlds", "pictures", "vit"])
    assert found == {"pictures": icons.classes, "vit": ("other",)}


def test_a_third_and_three_times_each_rate(small):
    options = frontier.parse(["--every-rate", "--methods", frontier.PROBE, "RECAST", "VeRA", "--worlds", "pictures"])
    found = [(method, rate) for _, _, method, _, rate in frontier.jobs(options, {"pictures": small})]
    assert found == [(frontier.PROBE, 0.0), ("RECAST", 0.03), ("RECAST", 0.009), ("RECAST", 0.09)]  # VeRA has no rate here


def test_the_best_rate_and_the_share_are_those_worked_out_by_hand():
    def one(method, task, rate, percent):
        return Run("text", task, method, 0, rate, percent, 7, 70, 1.0)

    runs = [one(frontier.PROBE, task, 0.0, 50.0) for task in "ab"]
    runs += [one(REFERENCE, "a", 1.0, 60.0), one(REFERENCE, "b", 1.0, 70.0)]  # 15 points on the mean
    runs += [one("RECAST", "a", 1.0, 53.0), one("RECAST", "b", 1.0, 53.0)]
    runs += [one("RECAST", "a", 2.0, 56.0), one("RECAST", "b", 2.0, 53.0)]  # better on the mean: 4.5 of 15
    runs += [one("RECAST", "a", 4.0, 99.0)]  # on one task alone: not compared
    runs += [one("IA3", "a", 1.0, 60.0)]
    found = {row.method: row for row in frontier.rows(runs, "text")}
    assert found["RECAST"].accuracies == {"a": 56.0, "b": 53.0}
    assert found["RECAST"].share == pytest.approx(30.0)
    assert found["IA3"].share is None


def test_a_bank_is_practised_once_without_labels(monkeypatch):
    sentences = text.make_task("kind", text.by_kind, 30, 1)
    hidden = replace(sentences, train=Split(sentences.train.inputs, torch.zeros(0)))
    world = replace(TEXT, tasks={"kind": lambda: hidden})
    monkeypatch.setattr(frontier, "BANKS", {})
    family = MissingWords(*TEXT.special_tokens[:1], TEXT.special_tokens[1:], words=2, examples=4, least=2)
    monkeypatch.setattr(frontier, "PRACTICE", {"tasks": 2, "epochs": 3, "family": family, "progress": False})
    first, second = (frontier.practised(world) for _ in range(2))
    assert first.partners[0].bank is second.partners[0].bank
    model = frontier.get_recast_model(TEXT.backbone(), first)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 12 + 2 * 6  # a scale for each MLP weight, a number for each task's template in each block


def test_a_bank_of_pictures_gives_forty_eight_numbers(monkeypatch, small):
    monkeypatch.setattr(frontier, "BANKS", {})
    family = KnownPictures(pictures=2, views=4)
    monkeypatch.setattr(frontier, "PRACTICE", {"tasks": 3, "epochs": 3, "family": family, "progress": False})
    model = frontier.adapted(small, "RECAST, bank from practice tasks")
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 16 * 3  # in each block a number for each template
    assert all("%2Ebn" in name or ".bn" in name for name in trained)


def test_the_loop_learns_and_keeps_the_order(icons):
    torch.manual_seed(0)
    centres = torch.randn(3, 5)
    labels = torch.arange(60) % 3
    split = Split((centres[labels] + 0.1 * torch.randn(60, 5),), labels)
    task = Task("made", ("x", "y", "z"), split, split)
    world = replace(PICTURES, width=5)

    def learned(seed):
        head = fresh_classifier(world, 3)
        train(lambda part: head(part.inputs[0]), torch.optim.AdamW(head.parameters(), lr=0.05), task.train, world, 10, seed)
        assert accuracy(lambda part: head(part.inputs[0]), task.test) == 100
        return head.weight.detach()

    assert torch.equal(learned(0), learned(0))
    assert not torch.equal(learned(0), learned(1))
