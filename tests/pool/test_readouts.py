"""Tasks of a pool whose classifiers read several blocks: all of them by the same bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from recast_peft import ReadoutConfig, RecastBankError, RecastConfig, StoredBank, TaskPool, get_recast_model, readout_bank

X = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(2))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0).eval()


@pytest.fixture(scope="module")
def bank() -> StoredBank:
    return readout_bank(vit(), torch.randn(20, 3, 160, 160, generator=torch.Generator().manual_seed(1)), progress=False)


def config(bank: StoredBank | None, seed: int = 0, **fields: Any) -> RecastConfig:
    partners = None if bank is None else [ReadoutConfig(bank=bank)]
    return RecastConfig(init_weights=False, seed=seed, partners=partners, **{"num_classes": 3, **fields})


def with_tasks(bank: StoredBank) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model with two tasks, and what each gives as an adapter."""
    model = get_recast_model(vit(), config(bank), "a")
    model.add_adapter("b", config(bank, 2, num_classes=5))
    model.eval()
    found = {}
    with torch.no_grad():
        for name in "ab":
            model.set_adapter(name)
            found[name] = model(X)
    return model, found


def test_each_task_is_what_it_is_as_an_adapter(bank: StoredBank) -> None:
    model, alone = with_tasks(bank)
    pool = TaskPool(model)
    for name in "ab":
        pool.add(name, name)
    with torch.no_grad():
        for name in "ab":
            for merge in (False, True):
                pool.activate(name, merge=merge)
                torch.testing.assert_close(model(X), alone[name], atol=1e-5, rtol=1e-4)
        pool.deactivate()
        assert torch.equal(model(X), vit()(X))
        mixed = model(X[:2], task_ids=["b", "a"])
        torch.testing.assert_close(mixed[0], alone["b"][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mixed[1, :3], alone["a"][1], atol=1e-5, rtol=1e-4)


def test_samples_of_the_pretrained_model_read_as_it_does(bank: StoredBank) -> None:
    model = get_recast_model(vit(), config(bank, num_classes=None), "a").eval()
    pool = TaskPool(model)
    pool.add("a", "a")
    with torch.no_grad():
        alone = model(X)
        mixed = model(X, task_ids=["a", None, "a", None])
        torch.testing.assert_close(mixed[::2], alone[::2], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mixed[1::2], vit()(X)[1::2], atol=1e-5, rtol=1e-4)


def test_saved_and_loaded(bank: StoredBank, tmp_path: Path) -> None:
    stored = bank.save(tmp_path / "bank")
    model, alone = with_tasks(stored)
    model.save_pretrained(tmp_path / "tasks")
    pool = TaskPool(model)
    pool.load_folder(tmp_path / "tasks")
    pool.save(tmp_path / "pool")
    fresh = TaskPool(get_recast_model(vit(), config(stored, 7), "other").eval())
    fresh.load(tmp_path / "pool")
    with torch.no_grad():
        for name in "ab":
            fresh.activate(name)
            torch.testing.assert_close(fresh.model(X), alone[name], atol=1e-5, rtol=1e-4)


def test_tasks_that_read_otherwise_are_refused(bank: StoredBank, tmp_path: Path) -> None:
    stored = bank.save(tmp_path / "bank")
    model, _ = with_tasks(stored)
    model.add_adapter("plain", config(None))
    model.save_pretrained(tmp_path / "tasks")
    pool, other = TaskPool(model), TaskPool(model, like="plain", slot="other")
    for these, name in ((pool, "plain"), (other, "a")):
        for source in (name, tmp_path / "tasks" / name, model.peft_config[name]):
            with pytest.raises(RecastBankError, match="reads otherwise than those of the pool"):
                these.add("new", source)
    pool.add("a", "a")
    pool.save(tmp_path / "pool")
    with pytest.raises(RecastBankError, match="reads otherwise than those of the pool"):
        other.load(tmp_path / "pool")
    assert not len(other)


def test_without_a_classifier_nothing_reads_new_features_by_the_models_own(bank: StoredBank, tmp_path: Path) -> None:
    def with_classifier() -> nn.Module:
        plain = vit()
        torch.manual_seed(1)
        plain.reset_classifier(7)  # type: ignore[operator]
        return plain

    model = get_recast_model(with_classifier(), config(bank), "a").eval()
    model.add_adapter("b", config(bank, 2))
    model.add_weighted_adapter(["a", "b"], [0.0, 0.0], "none", heads="none")
    model.set_adapter("none")
    with torch.no_grad():
        torch.testing.assert_close(model(X), with_classifier()(X), atol=1e-5, rtol=1e-4)
        model.save_pretrained(tmp_path, selected_adapters=["none"])
        loaded = PeftModel.from_pretrained(with_classifier(), tmp_path / "none", "none").eval()
        torch.testing.assert_close(loaded(X), model(X), atol=1e-5, rtol=1e-4)
    pool = TaskPool(model, like="a")
    pool.add("a", "a")
    state = {k: v for k, v in load_file(tmp_path / "none" / "adapter_model.safetensors").items() if "coefficients" in k}
    for source in (None, state, RecastConfig(partners=[ReadoutConfig(bank=bank)])):
        with pytest.raises(
            RecastBankError, match="'new' has no classifier of its own, and the tasks of the pool have a readout"
        ):
            pool.add("new", source)
        with pytest.raises(RecastBankError, match="'a' has no classifier of its own"):
            pool.replace("a", source)
    with pytest.raises(RecastBankError, match="'sum' has no classifier of its own"):
        pool.add_weighted_adapter(["a"], [1.0], "sum", heads="none")
    assert pool.names == ["a"]
    features = TaskPool(get_recast_model(vit(), config(bank, num_classes=None), "a"))
    features.add("new")
    features.save(tmp_path / "pool")
    features.model.save_pretrained(tmp_path / "tasks")
    with pytest.raises(RecastBankError, match="a task in .*pool has no classifier of its own"):
        pool.load(tmp_path / "pool")
    with pytest.raises(RecastBankError, match="a task in .*tasks has no classifier of its own"):
        pool.load_folder(tmp_path / "tasks")
    assert pool.names == ["a"]


def test_a_fresh_task_may_name_the_bank_by_where_it_lies(bank: StoredBank, tmp_path: Path) -> None:
    bank.save(tmp_path / "bank")
    pool = TaskPool(with_tasks(bank)[0])
    fresh = RecastConfig(num_classes=3, partners=[ReadoutConfig(bank=str(tmp_path / "bank"))])
    pool.add("fresh", fresh)
    readout_bank(vit(), torch.randn(9, 3, 160, 160), progress=False).save(tmp_path / "other")
    with pytest.raises(RecastBankError, match="reads otherwise"):
        pool.add("other", RecastConfig(num_classes=3, partners=[ReadoutConfig(bank=str(tmp_path / "other"))]))
    assert pool.names == ["fresh"]
