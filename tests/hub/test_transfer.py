"""Tasks and banks on a Hub-compatible server: pushed whole, fetched whole, with a card that says what they are."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from hub_tasks import TASK_FILES, files_of, make_backbone, make_model, output
from peft import PeftModel, PeftModelForFeatureExtraction, get_peft_model

import recast_peft
from recast_peft import (
    RecastConfig,
    RecastConfigError,
    RecastHubError,
    RecastLoadError,
    TaskPool,
    get_recast_model,
    push_task_to_hub,
    push_tasks_to_hub,
)
from recast_peft.hub.transfer import fetch_task


class TestPushingATask:
    def test_makes_the_repository_with_one_commit_that_peft_can_load(self, hub: HubServer) -> None:
        model = make_model("flowers")
        info = push_task_to_hub(model, "ada/flowers")
        assert hub.repositories["ada/flowers"].history() == ["initial commit", "Upload task flowers"]
        assert set(files_of(hub, "ada/flowers")) == TASK_FILES
        assert info.oid == hub.repositories["ada/flowers"].branches["main"]
        loaded = PeftModel.from_pretrained(make_backbone(), "ada/flowers").eval()
        assert not torch.equal(output(loaded), output(make_backbone().eval()))
        assert torch.equal(output(loaded), output(model))

    def test_by_pefts_own_verb_brings_our_card(self, hub: HubServer) -> None:
        make_model("flowers").push_to_hub("ada/flowers", commit_message="mine", tags=["x"], max_shard_size="1GB")
        assert hub.repositories["ada/flowers"].history()[-1] == "mine"
        card = files_of(hub, "ada/flowers")["README.md"].decode()
        assert "AutoRecastModel" in card
        assert "More Information Needed" not in card

    def test_that_peft_made_works_as_well(self, hub: HubServer) -> None:
        model = get_peft_model(make_backbone(), RecastConfig())
        push_task_to_hub(model, "ada/plain")
        assert "AutoRecastModel" in files_of(hub, "ada/plain")["README.md"].decode()

    def test_stores_and_shows_results(self, hub: HubServer) -> None:
        model = make_model("flowers")
        push_task_to_hub(model, "ada/flowers", results={"accuracy": 0.87654321, "dataset": "Oxford Flowers"})
        files = files_of(hub, "ada/flowers")
        assert json.loads(files["adapter_config.json"])["results"]["accuracy"] == 0.87654321
        assert "| accuracy | 0.8765 |" in files["README.md"].decode()


class TestPushingAllTasks:
    def test_is_one_commit_in_pefts_layout(self, hub: HubServer) -> None:
        model = make_model("default", "cars", "birds")
        expected = {name: output(model, name) for name in ("default", "cars", "birds")}
        push_tasks_to_hub(model, "ada/all", results={"cars": {"accuracy": 0.5}})
        assert len(hub.repositories["ada/all"].commits) == 2
        subfolders = {f"{folder}/{file}" for folder in ("cars", "birds") for file in TASK_FILES}
        assert set(files_of(hub, "ada/all")) == TASK_FILES | subfolders
        loaded = PeftModel.from_pretrained(make_backbone(), "ada/all")
        for name in ("cars", "birds"):
            loaded.load_adapter("ada/all", name, subfolder=name)
        for name, wanted in expected.items():
            assert torch.equal(output(loaded.eval(), name), wanted)
        assert len({str(value) for value in expected.values()}) == 3

    def test_can_be_some_of_them(self, hub: HubServer) -> None:
        push_tasks_to_hub(make_model("default", "cars", "birds"), "ada/two", ["cars", "birds"])
        assert {path.partition("/")[0] for path in files_of(hub, "ada/two")} == {"README.md", "cars", "birds"}

    @pytest.mark.parametrize("names", [[], ["planes"], ["default", "planes"]])
    def test_that_are_not_there_is_refused_before_the_hub_is_asked(self, hub: HubServer, names: list[str]) -> None:
        with pytest.raises(RecastConfigError, match=r"planes|at least one"):
            push_tasks_to_hub(make_model("default"), "ada/none", names)
        assert hub.requests == []

    def test_one_needs_a_name_when_two_are_active(self, hub: HubServer) -> None:
        model = make_model("default", "cars")
        model.base_model.set_adapter(["default", "cars"])
        with pytest.raises(RecastConfigError, match="adapter_name"):
            push_task_to_hub(model, "ada/none")
        assert hub.requests == []

    def test_that_somebody_else_pushes_to_meanwhile_loses_nothing(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        push_tasks_to_hub(make_model("cars", "birds"), "ada/all")
        write = recast_peft.hub.transfer.write_repository_card

        def someone_pushes_between(*args: Any, **kwargs: Any) -> str:
            hub.add("ada/all", {"README.md": b"# of somebody else"})
            return write(*args, **kwargs)

        model = make_model("fish", "cats")
        with monkeypatch.context() as patch:
            patch.setattr(recast_peft.hub.transfer, "write_repository_card", someone_pushes_between)
            with pytest.raises(RecastHubError, match="Somebody else pushed meanwhile: push again"):
                push_tasks_to_hub(model, "ada/all")
        assert files_of(hub, "ada/all")["README.md"] == b"# of somebody else"


class TestTheClassThatShares:
    def test_is_pefts_own_to_everyone_else(self) -> None:
        model = make_model("default")
        assert isinstance(model, PeftModel)
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert type(again) is type(model)
            assert torch.equal(output(again), output(model))

    def test_stays_the_class_of_the_task_type(self) -> None:
        model = get_recast_model(make_backbone(), RecastConfig(task_type="FEATURE_EXTRACTION"))
        assert isinstance(model, PeftModelForFeatureExtraction)
        assert type(model).__name__ == "PeftModelForFeatureExtraction"  # by which transformers' pipelines know it
        assert type(pickle.loads(pickle.dumps(model))) is type(model)


class TestFetching:
    def test_takes_all_files_from_one_commit(self, pushed: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        original = files_of(pushed, "ada/flowers")["adapter_model.safetensors"]
        answer = recast_peft.hub.transfer.fetch_file

        def someone_pushes_between(name: str, file: str, *rest: Any) -> str:
            path = answer(name, file, *rest)
            if file == "adapter_config.json":
                pushed.add("ada/flowers", {"adapter_model.safetensors": b"other"})
            return path

        monkeypatch.setattr(recast_peft.hub.transfer, "fetch_file", someone_pushes_between)
        folder = fetch_task("ada/flowers")
        assert (folder / "adapter_model.safetensors").read_bytes() == original

    def test_of_an_old_file_format_works(self, hub: HubServer, tmp_path: Path) -> None:
        make_model("default").save_pretrained(tmp_path / "old", safe_serialization=False)
        hub.add("ada/old", {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()})
        for _ in range(2):
            assert (fetch_task("ada/old") / "adapter_model.bin").is_file()
        assert (fetch_task("ada/old", local_files_only=True) / "adapter_model.bin").is_file()

    def test_finds_the_only_task_of_a_repository_or_a_folder(self, hub: HubServer, tmp_path: Path) -> None:
        make_model("cars").save_pretrained(tmp_path / "local")
        assert fetch_task(tmp_path / "local").name == "cars"
        first = hub.add("ada/one", {f"cars/{p.name}": p.read_bytes() for p in (tmp_path / "local" / "cars").iterdir()})
        assert fetch_task("ada/one").name == "cars"
        hub.add("ada/one", {f"birds/{p.name}": p.read_bytes() for p in (tmp_path / "local" / "cars").iterdir()})
        assert fetch_task("ada/one", revision=first).name == "cars"

    def test_finds_it_for_a_model_that_has_tasks(self, hub: HubServer, tmp_path: Path) -> None:
        learned = make_model("cars")
        learned.save_pretrained(tmp_path)
        hub.add("ada/one", {f"cars/{p.name}": p.read_bytes() for p in (tmp_path / "cars").iterdir()})
        model = get_recast_model(make_backbone(), RecastConfig()).eval()
        model.load_adapter("ada/one", "cars")
        assert torch.equal(output(model, "cars"), output(learned))
        hub.add("ada/one", {f"birds/{p.name}": p.read_bytes() for p in (tmp_path / "cars").iterdir()})
        with pytest.raises(RecastLoadError, match=r"birds, cars.*subfolder"):
            model.load_adapter("ada/one", "again")

    @pytest.mark.parametrize("is_offline", [True, False])
    def test_finds_the_only_task_in_the_cache(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool
    ) -> None:
        make_model("cars").save_pretrained(tmp_path)
        task = {p.name: p.read_bytes() for p in (tmp_path / "cars").iterdir()}
        first = hub.add("ada/one", {f"tasks/cars/{name}": content for name, content in task.items()})
        expected = fetch_task("ada/one")
        hub.add("ada/one", {f"birds/{name}": content for name, content in task.items()})
        fetch_task("ada/one", "birds")
        options = {} if is_offline else {"local_files_only": True}
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
        with pytest.warns(UserWarning, match=r"the cache holds one task, in 'birds'.*subfolder="):
            assert fetch_task("ada/one", **options).name == "birds"
        with pytest.warns(UserWarning, match="tasks/cars"):
            assert fetch_task("ada/one", revision=first, **options) == expected
        with pytest.raises(RecastHubError, match="not in the Hub's cache"):
            fetch_task("ada/other", **options)
        with pytest.raises(RecastHubError, match="not in the Hub's cache"):
            fetch_task("ada/one", "fish", **options)

    def test_of_several_tasks_asks_which(self, hub: HubServer, tmp_path: Path) -> None:
        model = make_model("cars", "birds")
        push_tasks_to_hub(model, "ada/all")
        model.save_pretrained(tmp_path / "local")
        for name in ("ada/all", tmp_path / "local"):
            with pytest.raises(RecastLoadError, match=r"birds, cars.*subfolder"):
                fetch_task(name)
            assert fetch_task(name, "cars").name == "cars"

    def test_of_a_repository_without_a_task_says_so(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add("ada/empty", {"README.md": b"nothing"})
        for name in ("ada/empty", tmp_path):
            with pytest.raises(RecastLoadError, match="holds no task"):
                fetch_task(name)


class TestAPool:
    """Tasks go from the Hub into a pool one by one."""

    def test_takes_tasks_by_their_names_and_is_left_alone_by_a_refusal(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        push_tasks_to_hub(make_model("flowers", "cars"), "ada/tasks", private=True)
        model = make_model("first")
        pool = TaskPool(model)
        for task in ("flowers", "cars"):
            pool.add(task, "ada/tasks", subfolder=task)
        for task in ("flowers", "cars"):
            pool.activate(task)
            assert torch.equal(output(model), output(make_model("flowers", "cars"), task))
        with pytest.raises(RecastLoadError, match="subfolder="):
            pool.add("which", "ada/tasks")
        with pytest.raises(RecastHubError, match="no such repository"):
            pool.add("missing", "ada/missing")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(RecastHubError, match="token"):
            pool.add("closed", "ada/tasks", subfolder="cars", cache_dir=tmp_path / "fresh")
        assert pool.names == ["flowers", "cars"]


def test_a_push_that_fails_leaves_nothing_in_the_config(hub: HubServer) -> None:
    model = make_model("flowers")
    model.peft_config["flowers"].results = {"accuracy": 0.1}
    hub.failing["/commit/"] = 400
    with pytest.raises(RecastHubError):
        push_task_to_hub(model, "ada/flowers", results={"accuracy": 0.9, "loss": 1.0})
    assert model.peft_config["flowers"].results == {"accuracy": 0.1}
    hub.failing.clear()
    push_task_to_hub(model, "ada/flowers", results={"accuracy": 0.9})
    assert model.peft_config["flowers"].results == {"accuracy": 0.9}


@pytest.mark.parametrize("results", [{"cars": 0.5}, [{"accuracy": 0.5}], {"birds": {"accuracy": 0.5}}, {"nothing": {}}, 3])
def test_results_that_no_pushed_task_would_have_are_refused(results: Any) -> None:
    model = make_model("cars", "birds")
    with pytest.raises(RecastConfigError, match="results=.*tasks that are pushed"):
        push_tasks_to_hub(model, "ada/cars", ["cars"], results=results)
    assert model.peft_config["birds"].results is None
