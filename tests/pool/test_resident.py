"""What a pool holds: classifiers as tensors, numbers that are finite, files; and what it says when something is wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import TinyVit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from recast_peft import RecastConfig, RecastConfigError, RecastLoadError, TaskPool, get_recast_model
from recast_peft.storage.tensors import CHECKSUM
from recast_peft.storage.versions import roll_back, versions


def make(**options) -> TaskPool:
    torch.manual_seed(0)
    model = get_recast_model(TinyVit().eval(), RecastConfig(target_modules=["qkv"]), "first").eval()
    return TaskPool(model, **options)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class TestClassifiers:
    def test_of_one_kind_share_a_module_and_take_their_tensors(self):
        pool = make()
        for i in range(50):
            pool.add(f"t{i}", RecastConfig(num_classes=4, id2label={0: "a", 1: "b", 2: "c", 3: "d"}, seed=i))
        heads = list(pool._heads.values())
        assert len({id(head.kind) for head in heads}) == len({id(head.labels) for head in heads}) == 1
        assert pool.sizes()["heads"] == 50 * 4 * (4 * 8 + 4)
        assert "50 with a classifier" in repr(pool)
        assert "heads 7,200 bytes" in repr(pool)

    def test_in_half_precision_take_half(self, tokens):
        whole, half = make(), make(head_dtype="float16")
        for pool in (whole, half):
            pool.add("task", RecastConfig(num_classes=4, seed=3))
        assert half.sizes()["heads"] * 2 == whole.sizes()["heads"]
        out, expected = (pool.model(tokens, task_ids=["task", "task"]) for pool in (half, whole))
        assert out.dtype == torch.float32
        assert not torch.equal(out, expected)
        torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)
        half.activate("task")
        assert torch.allclose(half.model(tokens), out, atol=1e-6)
        half.model.to(torch.float64)
        assert half.model(tokens.double(), task_ids=["task", "task"]).dtype == torch.float64
        assert half.sizes()["heads"] * 2 == whole.sizes()["heads"]
        with pytest.raises(RecastConfigError, match="head_dtype='int8'"):
            make(head_dtype="int8")

    def test_that_will_be_saved_in_half_precision_lose_no_bit_in_memory(self):
        pool = make()
        pool.add("task", RecastConfig(num_classes=4, seed=3, head_dtype="float16"))
        exact = make()
        exact.add("task", RecastConfig(num_classes=4, seed=3))
        assert torch.equal(pool.head(0).weight, exact.head(0).weight)

    def test_that_were_asked_for_can_be_written_to(self, tokens):
        pool = make()
        pool.add("task", RecastConfig(num_classes=4))
        before = pool.model(tokens, task_ids=["task", "task"])
        pool.head(pool.row("task")).bias.add_(1)
        torch.testing.assert_close(pool.model(tokens, task_ids=["task", "task"]), before + 1)

    def test_of_more_than_one_layer(self, tokens):
        torch.manual_seed(0)
        plain = TinyVit().eval()
        plain.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
        config = {"target_modules": ["qkv"], "head_module": "head"}
        model = get_recast_model(plain, RecastConfig(num_classes=5, **config), "own").eval()
        for name, parameter in model.named_parameters():
            if ".own." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        expected = model(tokens)
        pool = TaskPool(model)
        pool.add("task", "own")
        pool.add("other", RecastConfig(num_classes=2, head_module="head"))
        torch.testing.assert_close(pool.model(tokens, task_ids=["task", "other"])[0], expected[0])
        pool.activate("task")
        torch.testing.assert_close(model(tokens), expected)


class TestNumbersThatAreNotFinite:
    def test_are_refused_when_a_task_is_put_in(self):
        pool = make()
        state = {f"base_model.model.blocks.{i}.attn.qkv.recast_coefficients": torch.zeros(1, 2) for i in range(4)}
        state["base_model.model.blocks.2.attn.qkv.recast_coefficients"][0, 1] = float("inf")
        with pytest.raises((RecastConfigError, RecastLoadError), match="finite|NaN"):
            pool.add("bad", state)
        for layer in pool.model.modules():
            if "first" in getattr(layer, "recast_bank", {}):
                layer.recast_coefficients["first"].data.fill_(float("nan"))
        with pytest.raises(RecastConfigError, match="'diverged' holds numbers that are not finite"):
            pool.add("diverged", "first")
        assert len(pool) == 0

    @pytest.mark.parametrize("where", ["row", "head"])
    def test_are_refused_when_a_pool_is_saved_and_named_when_it_is_read(self, where, tmp_path):
        pool = make()
        for i in range(5):
            pool.add(f"customer-{i}", RecastConfig(num_classes=2 + i % 2))
        path = tmp_path / "pool.safetensors"
        pool.save(path)
        good = path.read_bytes()
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = {key: value for key, value in file.metadata().items() if key != CHECKSUM}
        if where == "row":
            pool.table[3] = tensors["coefficients"][3] = float("nan")
        else:
            pool.head(3).bias[0] = tensors["heads.1.bias"][1, 0] = float("nan")
        with pytest.raises(RecastConfigError, match=r"1 of 5 tasks .*customer-3"):
            pool.save(path)
        assert path.read_bytes() == good
        save_file(tensors, path, metadata)
        fresh = make()
        with pytest.raises(RecastLoadError, match=r"customer-3.*skip_damaged=True"):
            fresh.load(path)
        assert len(fresh) == 0
        assert fresh.load(path, skip_damaged=True) == [f"customer-{i}" for i in (0, 1, 2, 4)]
        assert [fresh.head(fresh.row(name)).out_features for name in fresh] == [2, 3, 2, 2]


class TestFiles:
    def test_many_classifiers_make_few_tensors(self, tmp_path, tokens):
        pool = make()
        for i in range(30):
            pool.add(f"t{i}", RecastConfig(num_classes=2 + i % 3, seed=i))
        pool.remember("t4", tokens)
        pool.remember("t7", tokens * 2, torch.tensor([0, 1]))
        pool.save(tmp_path / "pool")
        assert len(load_file(tmp_path / "pool")) == 2 + 5 + 3 * 4
        again = make()
        again.load(tmp_path / "pool")
        for name in pool:
            assert torch.equal(again.model(tokens, task_ids=[name] * 2), pool.model(tokens, task_ids=[name] * 2))
        assert sorted(again._remembered) == [4, 7]
        assert torch.equal(again.route(tokens), pool.route(tokens))

    def test_classifiers_of_a_file_are_rows_of_its_tensors(self, tmp_path, tokens):
        pool, again, third = make(), make(), make()
        for i in range(6):
            pool.add(f"t{i}", RecastConfig(num_classes=2 + i % 2, seed=i))
        pool.save(tmp_path / "pool")
        again.load(tmp_path / "pool")
        assert len({head.tensors[0].untyped_storage().data_ptr() for head in again._heads.values()}) == 2  # one for each size
        assert again.sizes() == pool.sizes()
        with torch.no_grad():
            again.head(again.row("t1")).weight.mul_(2)  # a module of its own from now on
        again.remove("t2")
        again.replace("t3", RecastConfig(num_classes=4))
        again.save(tmp_path / "again")
        third.load(tmp_path / "again")
        for name in again:
            assert torch.equal(third.model(tokens, task_ids=[name] * 2), again.model(tokens, task_ids=[name] * 2))
        for name in ("t0", "t4", "t5"):
            assert torch.equal(third.model(tokens, task_ids=[name] * 2), pool.model(tokens, task_ids=[name] * 2))
        assert not torch.equal(third.model(tokens, task_ids=["t1"] * 2), pool.model(tokens, task_ids=["t1"] * 2))

    def test_a_save_keeps_what_the_file_was_and_one_that_fails_does_not(self, tmp_path):
        pool, path = make(), tmp_path / "pool.safetensors"
        pool.add("old")
        pool.save(path, keep=2)
        pool.replace("old", RecastConfig(num_classes=2))
        pool.save(path, keep=2)
        pool.table[pool.row("old")] = float("nan")
        with pytest.raises(RecastConfigError, match="not finite"):
            pool.save(path, keep=2)
        assert versions(path) == [1]
        pools = [make(), make()]
        pools[0].load(path)
        roll_back(path)
        pools[1].load(path)
        assert [other.head(other.row("old")) is None for other in pools] == [False, True]

    def test_a_folder_is_no_file(self, tmp_path):
        pool = make()
        with pytest.raises(RecastConfigError, match="is a folder"):
            pool.save(tmp_path)
        pool.save(tmp_path / "new" / "pool.safetensors")
        assert (tmp_path / "new" / "pool.safetensors").is_file()

    def test_folders_that_hold_no_task_say_where_one_may_be(self, tmp_path):
        pool = make()
        pool.model.save_pretrained(tmp_path / "tasks")
        for folder, hint in (
            (tmp_path, "load_folder takes one of them"),
            (tmp_path / "tasks" / "first", r"pool\.add\('first'"),
            (tmp_path / "nowhere", "no such folder"),
        ):
            with pytest.raises(RecastLoadError, match=hint):
                pool.load_folder(folder)
        assert pool.load_folder(tmp_path / "tasks") == ["first"]


class TestGrowing:
    def test_inside_inference_mode(self, tokens):
        model = make().model
        with torch.inference_mode():
            pool = TaskPool(model, slot="grown")
            for i in range(40):
                pool.add(f"t{i}", RecastConfig(num_classes=3, seed=i))
            pool.model(tokens, task_ids=["t1", "t39"])
        pool.requires_grad_()
        with torch.enable_grad():
            pool.model(tokens, task_ids=["t1", "t39"]).square().sum().backward()
        assert pool.table.grad[39].any()
        with torch.no_grad():
            pool.table.add_(1)
        pool.add("later")

    def test_a_copy_is_a_pool_of_its_own(self, tokens):
        pool = make()
        pool.add("a", RecastConfig(num_classes=3))
        other = copy.deepcopy(pool)
        other.add("b")
        other.table[0] = 1
        assert pool.names == ["a"]
        assert not torch.allclose(other.model(tokens, task_ids=["a", "a"]), pool.model(tokens, task_ids=["a", "a"]))


class TestMessages:
    def test_of_bad_tasks_of_a_call(self, tokens):
        pool = make()
        pool.add("a")
        for tasks in (["a", 3], "aa", 3, torch.zeros(2), [[0, 0]]):
            with pytest.raises(RecastConfigError, match=r"task_ids must be .*pool\.ids"):
                pool.model(tokens, task_ids=tasks)
        with pytest.raises(RecastConfigError, match="in a list"):
            pool.ids("a")
        with pytest.raises(RecastConfigError, match="no task 'b'; it has 1: a"):
            pool.model(tokens, task_ids=["a", "b"])
        with pytest.raises(RecastConfigError, match="source is a int"):
            pool.add("b", 3)

    def test_of_a_run_of_several_processes(self, monkeypatch):
        pool = make()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RecastConfigError, match="each process would train other numbers"):
            pool.parameters()


GOLDEN = Path(__file__).parent / "data" / "first_format.safetensors"


def test_a_file_of_the_first_format(tokens):
    """Written by the code before the second format, with two classifiers (one of prototypes) and something to route by."""
    pool = make()
    pool.load(GOLDEN)
    with safe_open(GOLDEN, framework="pt") as file:
        answers = {name: file.get_tensor(f"answer.{name}") for name in pool}
    assert pool.names == ["plain", "headed", "prototypes"]
    for name, expected in answers.items():
        torch.testing.assert_close(pool.model(tokens, task_ids=[name, name]), expected)
        pool.activate(name)
        torch.testing.assert_close(pool.model(tokens), expected)
    assert pool._heads[1].labels.id2label == {0: "no", 1: "yes"}
    assert sorted(pool._remembered) == [1]
