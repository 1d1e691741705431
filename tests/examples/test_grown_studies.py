"""The scripts that measure grown banks: no bank has seen the task that is held out, and the rows are what their names say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from glyph_backbone import load_backbone
from study import Study
from training import Schedule

from recast_peft import RecastConfig, get_recast_model

TASKS = ("greek", "hebrew", "arrows")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    import grown_banks

    return grown_banks


@pytest.fixture
def banks(script: Any, tmp_path: Path) -> Any:
    study = Study(tmp_path / "runs.jsonl", Schedule(epochs=1, batch_size=16), 3, 3, say=lambda line: None)
    return script.Banks(tmp_path / "banks", study, TASKS)


class TestTheStudy:
    def test_sources_follow_the_held_out_task_in_a_circle(self, banks: Any) -> None:
        assert banks.others("greek") == ["hebrew", "arrows"]
        assert banks.others("arrows", 1) == ["greek"]
        assert banks.others("damage") == list(TASKS)

    def test_banks_are_made_from_the_others_alone_and_once(self, banks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []
        original = banks.source

        def note(name: str, seed: int, *targets: Any) -> Any:
            asked.append(name)
            return original(name, seed, *targets)

        monkeypatch.setattr(banks, "source", note)
        grown = banks.grown("hebrew", 0, None, None, 1, True)
        assert sorted(asked) == ["arrows", "greek"]
        monkeypatch.setattr(banks, "images", lambda *args: pytest.fail("made a second time"))
        banks.grown.cache_clear()
        assert banks.grown("hebrew", 0, None, None, 1, True).fingerprint == grown.fingerprint
        assert banks.seconds("greek-") > 0

    def test_rows_have_the_numbers_of_their_templates(self, script: Any, banks: Any) -> None:
        wanted = [
            (script.grown_method("two", banks, 0.1), 8 * 2),
            (script.grown_method("one", banks, 0.1, count=1), 8),
            (script.grown_method("and the weight", banks, 0.1, plain=True), 8 * 3),
            (script.shared_method("beside plain", banks, 0.1, 2), 8 * 4),
            (script.wide_method("more modules", banks, 0.1, 2), 24 * 2),
            (script.plain_method(6), 6 * 6 + 2 * 2),
            (script.bias_method("biases alone", banks, 0.1, None, ()), 8 * 2),
            (script.bias_method("one template", banks, 0.1, 1, ["fc1"]), 8 + 8),
            (script.bias_method("one source", banks, 0.1, None, ["fc1"], 1), 8 + 8),
            (script.bias_method("and the MLP", banks, 0.1, 4, ["fc1", "fc2"]), 8 * 2 + 16),
            (script.both_method("weights and biases", banks, 0.1, 1), 8 * 2 + 8),
        ]
        assert len({str(method.settings) for method, _ in wanted}) == 11
        task = banks.images("hebrew", 0)
        for method, numbers in wanted:
            model = method.build(load_backbone(), task, 0)
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "head" not in n}
            assert sum(p.numel() for p in trained.values()) == numbers, method.name

    def test_a_start_from_the_mean_has_seen_the_others_alone(self, script: Any, banks: Any) -> None:
        method = script.from_mean("from the mean", banks, script.PROBE)
        assert method.settings != script.PROBE.settings
        model = method.build(load_backbone(), banks.images("hebrew", 0), 0)
        plain = dict(load_backbone().named_parameters())
        greek, arrows = (banks.bias_source(name, 0) for name in ("greek", "arrows"))
        for name, parameter in model.named_parameters():
            if name.startswith("head"):
                continue
            wanted = (greek[name] + arrows[name]) / 2 if name.endswith("bias") else plain[name]
            torch.testing.assert_close(parameter, wanted)
        assert not torch.equal(greek["blocks.0.mlp.fc1.bias"], arrows["blocks.0.mlp.fc1.bias"])

    def test_rows_of_practice_tasks_have_seen_no_other(self, script: Any, banks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []
        original = banks.bias_source
        monkeypatch.setattr(banks, "bias_source", lambda name, seed: asked.append(name) or original(name, seed))
        method = script.bias_method("practised", banks, 0.1, 2, ["fc1"], None, True)
        assert method.settings["sources"] == list(script.PRACTICE)
        models = {name: method.build(load_backbone(), banks.images(name, 0), 0) for name in ("hebrew", "arrows")}
        script.from_mean("moved", banks, script.PROBE, True).build(load_backbone(), banks.images("hebrew", 0), 0)
        assert set(asked) == set(script.PRACTICE)
        banks_of = [
            config.partner_bank("bias")["fingerprint"] for config in (m.peft_config["default"] for m in models.values())
        ]
        assert banks_of[0] == banks_of[1]  # one bank, whatever comes
        numbers = [p for n, p in models["hebrew"].named_parameters() if p.requires_grad and "head" not in n]
        assert sum(p.numel() for p in numbers) == 8 * 2 + 8


def test_the_cost_of_a_mixed_batch_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    import grown_banks_cost

    (rows,) = grown_banks_cost.main(["--quick", "--output", str(tmp_path)]).values()
    numbers = {row["batch"]: row["numbers of a task"] for row in rows}
    depth, width = 6, 64
    assert numbers["RECAST, 4 templates of rank 4"] == 4 * depth
    assert numbers["RECAST, 4 of rank 4 and the weight"] == 5 * depth
    assert numbers["LoRA r=4, adapter_names"] == 4 * (width + 3 * width) * depth
    assert rows[0]["ratio to plain"] == 1
    assert "RECAST, 8 templates of rank 8" in capsys.readouterr().out
    assert (tmp_path / "grown_banks_cost.json").is_file()


def test_tasks_of_a_bank_in_one_batch_are_those_alone() -> None:
    """What the cost is measured of computes what the tasks compute one by one."""
    from recast_peft import TaskPool, random_bank

    backbone = load_backbone()
    bank = random_bank(backbone, RecastConfig(target_modules=["qkv"], group_size=1), num_templates=4, rank=4)
    pool = TaskPool(get_recast_model(backbone, RecastConfig(bank=bank), "first").eval())
    for name in ("one", "two"):
        pool.add(name)
    pool.table.data[:2].normal_(std=0.3)
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        both = pool.model(x, task_ids=torch.tensor([0, 1]))
        for row, name in enumerate(("one", "two")):
            with pool.use(name):
                alone = pool.model(x)[row]
            assert torch.allclose(both[row], alone, atol=1e-4)
            assert not torch.allclose(both[row], pool.model(x)[row], atol=1e-2)
