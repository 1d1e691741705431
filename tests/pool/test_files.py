"""One file for all tasks of a pool: what comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel
from pools import TARGETS, model_with_pool, small_vit, tiny_pool
from safetensors.torch import load_file, save_file
from torch import nn

from recast_peft import RecastConfig, RecastConfigError, RecastLoadError, TaskPool, get_recast_model
from recast_peft.parts.prototypes import fit_prototypes
from recast_peft.pool.files import describe_pool
from recast_peft.storage.tensors import CHECKSUM, read_metadata


def without_checksum(path: Path) -> dict[str, str]:
    """The texts of a file, which may be written again beside other numbers."""
    return {key: text for key, text in read_metadata(path).items() if key != CHECKSUM}


class TestFiles:
    def test_one_that_is_not_there_is_said_to_be_so(self, tmp_path):
        pool = model_with_pool()[1]
        for place, what in ((tmp_path / "none.safetensors", "is not there"), (tmp_path, "is a folder, not a file")):
            with pytest.raises(RecastLoadError, match=what):
                pool.load(place)
        with pytest.raises(RecastLoadError, match="pool.safetensors is a file: expected the folder of a saved task"):
            pool.save(tmp_path / "new" / "pool.safetensors")  # the folder is made
            pool.add("one", tmp_path / "new" / "pool.safetensors")

    def test_one_packed_file_brings_everything_back(self, tmp_path, images):
        model, pool = model_with_pool(3)
        pool.remove("task1")
        pool.add("häuser", RecastConfig(id2label={0: "alt", 1: "neu"}))
        pool.save(tmp_path / "pool.safetensors")
        again_model, again = model_with_pool()
        assert again.load(tmp_path / "pool.safetensors") == ["task0", "häuser", "task2"]
        for name in pool:
            pool.activate(name)
            again.activate(name)
            assert torch.equal(again_model(images), model(images))
        assert again_model.get_base_model().num_classes == 7

    def test_a_task_takes_fewer_than_200_bytes(self, tmp_path):
        with torch.device("meta"):
            empty = timm.create_model("vit_small_patch16_224")
        model = get_recast_model(empty.to_empty(device="cpu").apply(_zero), RecastConfig(target_modules=["qkv"]), "first")
        pool = TaskPool(model)
        pool.save(tmp_path / "none.safetensors")
        for i in range(1000):
            pool.add(f"customer-{i}")
        pool.save(tmp_path / "many.safetensors")
        sizes = {name: (tmp_path / f"{name}.safetensors").stat().st_size for name in ("none", "many")}
        assert (sizes["many"] - sizes["none"]) / 1000 < 200

    def test_damaged_packed_files(self, tmp_path):
        _, pool = model_with_pool(2)
        path = tmp_path / "pool.safetensors"
        pool.save(path)
        whole = path.read_bytes()
        _, fresh = model_with_pool()
        for damaged in (whole[:20], whole[:-30], b"", whole.replace(b"recast-task-pool-2", b"recast-task-pool-9")):
            path.write_bytes(damaged)
            with pytest.raises(RecastLoadError):
                fresh.load(path)
        assert len(fresh) == 0
        path.write_bytes(whole)
        fresh.load(path)
        with pytest.raises(RecastConfigError, match="already"):
            fresh.load(path)

    def test_packed_files_with_wrong_contents(self, tmp_path, images):
        _, pool = model_with_pool(1)
        pool.add("headed", RecastConfig(num_classes=3))
        pool.remember("headed", images)
        path = tmp_path / "pool.safetensors"
        pool.save(path)
        metadata, tensors = without_checksum(path), load_file(path)
        _, fresh = model_with_pool()
        table = tensors["coefficients"]
        for changed, message in (
            ({"coefficients": table[:, 1:].contiguous()}, "table in .* is damaged"),
            ({"coefficients": table / 0}, "2 of 2 tasks in .* not finite"),
            ({"coefficients": table.int()}, "table in .* is damaged"),
            ({"names": tensors["names"][:5]}, "names for 2 tasks"),
            ({"heads.0.weight": torch.zeros(1, 2, 16)}, "classifiers of kind 0 are damaged"),
            ({"heads.0.places": torch.tensor([2])}, "classifier of place 2 among 2 tasks is damaged"),
            ({"heads.0.labels": torch.tensor([1])}, "does not fit the model"),
            ({"remembered.places": torch.tensor([2])}, "remembered for routing is damaged"),
            ({"remembered.scatter": tensors["remembered.scatter"][:, 1:].contiguous()}, "remembered for routing is damaged"),
        ):
            save_file({**tensors, **changed}, path, metadata)
            with pytest.raises(RecastLoadError, match=message):
                fresh.load(path)
        unsaid = metadata["heads"].replace('"classes": 3', '"classes": null')
        for heads in ('[{"classes": 3}]', "[3]", "{", "7", unsaid):
            save_file(tensors, path, {**metadata, "heads": heads})
            with pytest.raises(RecastLoadError, match="damaged or does not fit|not valid JSON|how many classes"):
                fresh.load(path)
        for surroundings in ("3", "true", "[1]", '{"a": 1}'):
            save_file(tensors, path, {**metadata, "surroundings_fingerprint": surroundings})
            with pytest.raises(RecastLoadError, match="is damaged: .*surroundings_fingerprint"):
                fresh.load(path)
        save_file({**tensors, "heads.0.places": torch.tensor(0)}, path, metadata)
        with pytest.raises(RecastLoadError, match="is damaged: .*0-d"):
            describe_pool(path)
        assert len(fresh) == 0

    def test_many_classifiers_make_few_tensors(self, tmp_path, tokens):
        pool = tiny_pool()
        for i in range(30):
            pool.add(f"t{i}", RecastConfig(num_classes=2 + i % 3, seed=i))
        pool.remember("t4", tokens)
        pool.remember("t7", tokens * 2, torch.tensor([0, 1]))
        pool.save(tmp_path / "pool")
        assert len(load_file(tmp_path / "pool")) == 2 + 5 + 3 * 4
        again = tiny_pool()
        again.load(tmp_path / "pool")
        for name in pool:
            assert torch.equal(again.model(tokens, task_ids=[name] * 2), pool.model(tokens, task_ids=[name] * 2))
        assert sorted(again._remembered) == [4, 7]
        assert torch.equal(again.route(tokens), pool.route(tokens))

    def test_classifiers_of_a_file_are_rows_of_its_tensors(self, tmp_path, tokens):
        pool, again, third = tiny_pool(), tiny_pool(), tiny_pool()
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

    def test_a_folder_is_no_file(self, tmp_path):
        pool = tiny_pool()
        with pytest.raises(RecastConfigError, match="is a folder"):
            pool.save(tmp_path)


def _zero(module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data.fill_(0.01)


class TestOtherBanks:
    def test_prototypes_and_a_head_in_half_precision_come_back(self, tmp_path, images):
        def model() -> PeftModel:
            config = RecastConfig(target_modules=TARGETS, num_classes=2, head_type="prototypes", head_module="head")
            return get_recast_model(small_vit(), config, "first").eval()

        first = model()
        fit_prototypes(first, [(images, torch.tensor([0, 1] * 3))])
        expected = first(images)
        pool = TaskPool(first)
        pool.add("prototypes", "first")
        pool.add("half", RecastConfig(num_classes=3, head_dtype="float16", head_module="head"))
        pool.save(tmp_path / "pool")
        again = TaskPool(model())
        again.load(tmp_path / "pool")
        again.activate("prototypes")
        assert torch.equal(again.model(images), expected)
        again.save(tmp_path / "again")
        assert load_file(tmp_path / "again")["heads.1.weight"].dtype == torch.float16


class TestNumbersThatAreNotFinite:
    @pytest.mark.parametrize("where", ["row", "head"])
    def test_are_refused_when_a_pool_is_saved_and_named_when_it_is_read(self, where, tmp_path):
        pool = tiny_pool()
        for i in range(5):
            pool.add(f"customer-{i}", RecastConfig(num_classes=2 + i % 2))
        path = tmp_path / "pool.safetensors"
        pool.save(path)
        good = path.read_bytes()
        metadata, tensors = without_checksum(path), load_file(path)
        if where == "row":
            pool.table[3] = tensors["coefficients"][3] = float("nan")
        else:
            pool.head(3).bias[0] = tensors["heads.1.bias"][1, 0] = float("nan")
        with pytest.raises(RecastConfigError, match=r"1 of 5 tasks .*customer-3"):
            pool.save(path)
        assert path.read_bytes() == good
        save_file(tensors, path, metadata)
        fresh = tiny_pool()
        with pytest.raises(RecastLoadError, match=r"customer-3.*skip_damaged=True"):
            fresh.load(path)
        assert len(fresh) == 0
        assert fresh.load(path, skip_damaged=True) == [f"customer-{i}" for i in (0, 1, 2, 4)]
        assert [fresh.head(fresh.row(name)).out_features for name in fresh] == [2, 3, 2, 2]


GOLDEN = Path(__file__).parent / "data" / "first_format.safetensors"


def test_a_file_of_the_first_format(tokens):
    """Written by the code before the second format, with two classifiers (one of prototypes) and something to route by."""
    pool = tiny_pool()
    pool.load(GOLDEN)
    stored = load_file(GOLDEN)
    answers = {name: stored[f"answer.{name}"] for name in pool}
    assert pool.names == ["plain", "headed", "prototypes"]
    for name, expected in answers.items():
        torch.testing.assert_close(pool.model(tokens, task_ids=[name, name]), expected)
        pool.activate(name)
        torch.testing.assert_close(pool.model(tokens), expected)
    assert pool._heads[1].labels.id2label == {0: "no", 1: "yes"}
    assert sorted(pool._remembered) == [1]


@pytest.mark.parametrize("what", ["remembered", "heads"])
def test_a_file_of_the_first_format_with_a_part_of_no_task(tmp_path, what):
    """Three tasks, and something of an eighth."""
    path = tmp_path / "tasks.safetensors"
    metadata = read_metadata(GOLDEN)
    metadata[what] = metadata[what].replace('"1"', '"7"')
    parts = ("head.1.", "prototypes.1", "scatter.1")
    tensors = load_file(GOLDEN)
    save_file({k.replace("1", "7") if k.startswith(parts) else k: value for k, value in tensors.items()}, path, metadata)
    pool = tiny_pool()
    with pytest.raises(RecastLoadError, match="parts of a task 7, and 3 tasks: it is damaged"):
        pool.load(path)
    assert len(pool) == 0
