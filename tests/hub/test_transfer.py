"""Tasks and banks on a Hub-compatible server: pushed whole, fetched whole, with a card that says what they are."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from peft import PeftModel, PeftModelForFeatureExtraction, get_peft_model
from peft.utils import PeftType
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import recast_peft
from recast_peft import (
    AutoRecastModel,
    RecastConfig,
    RecastConfigError,
    RecastHubError,
    RecastLayer,
    RecastLoadError,
    StoredBank,
    TaskPool,
    fit_bank,
    get_recast_model,
    load_bank,
    push_bank_to_hub,
    push_task_to_hub,
    push_tasks_to_hub,
    write_model_card,
)
from recast_peft.banks.card import write_bank_card
from recast_peft.hub.transfer import fetch_task

TASK_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make_backbone(seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5))


def learn(model: PeftModel, name: str, seed: int) -> None:
    """Give a task numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in f"{key}." and "recast_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def make_model(*names: str, config: RecastConfig | None = None) -> PeftModel:
    model = get_recast_model(make_backbone(), config or RecastConfig(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, RecastConfig())
    for seed, name in enumerate(names):
        learn(model, name, seed)
    return model.eval()


def output(model: nn.Module, task: str | None = None) -> torch.Tensor:
    if task is not None:
        model.set_adapter(task)
    with torch.no_grad():
        return model(pixel_values=PIXELS).logits


def metadata(card: bytes | str) -> dict[str, Any]:
    text = card.decode() if isinstance(card, bytes) else card
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.DOTALL)[1])


def files_of(hub: HubServer, name: str, revision: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.repositories[name].find(revision).files.items() if path[0] != "."}


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

    def test_takes_the_numbers_by_the_protocol_for_large_files(self, hub: HubServer) -> None:
        push_task_to_hub(make_model("flowers"), "ada/flowers")
        assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
        assert files_of(hub, "ada/flowers")["adapter_model.safetensors"] in hub.large.values()

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

    def test_to_a_new_branch_leaves_main_alone(self, hub: HubServer) -> None:
        model = make_model("flowers")
        push_task_to_hub(model, "ada/flowers")
        before = files_of(hub, "ada/flowers")
        learn(model, "flowers", 99)
        push_task_to_hub(model, "ada/flowers", revision="second")
        assert files_of(hub, "ada/flowers") == before
        kept = PeftModel.from_pretrained(make_backbone(), "ada/flowers").eval()
        second = PeftModel.from_pretrained(make_backbone(), "ada/flowers", revision="second").eval()
        assert torch.equal(output(second), output(model))
        assert not torch.equal(output(kept), output(second))

    def test_as_a_request_leaves_main_alone(self, hub: HubServer) -> None:
        model = make_model("flowers")
        push_task_to_hub(model, "ada/flowers")
        before = files_of(hub, "ada/flowers")
        learn(model, "flowers", 99)
        assert push_task_to_hub(model, "ada/flowers", create_pr=True).pr_url.endswith("/ada/flowers/discussions/1")
        assert files_of(hub, "ada/flowers") == before
        requested = files_of(hub, "ada/flowers", "refs/pr/1")["adapter_model.safetensors"]
        assert requested != before["adapter_model.safetensors"]

    def test_again_keeps_what_the_owner_wrote(self, hub: HubServer) -> None:
        model = make_model("flowers")
        push_task_to_hub(model, "ada/flowers", results={"accuracy": 0.25})
        card = files_of(hub, "ada/flowers")["README.md"].decode()
        edited = card.replace("\n---\n", "\nlanguage: fr\nlicense: mit\n---\n\nMy own words.\n", 1) + "\nAnd the end.\n"
        hub.add("ada/flowers", {"README.md": edited.encode()})
        push_task_to_hub(model, "ada/flowers", results={"accuracy": 0.75})
        card = files_of(hub, "ada/flowers")["README.md"].decode()
        assert "My own words." in card
        assert "And the end." in card
        assert "| accuracy | 0.75 |" in card
        assert "0.25" not in card
        assert card.count("# flowers") == 1
        assert metadata(card)["language"] == "fr"
        assert metadata(card)["license"] == "mit"

    def test_private_is_closed_to_others(self, hub: HubServer) -> None:
        push_task_to_hub(make_model("flowers"), "ada/secret", private=True)
        assert fetch_task("ada/secret", token="hf_writer").is_dir()
        with pytest.raises(RecastHubError, match="private or gated"):
            fetch_task("ada/secret", token="hf_reader", force_download=True, cache_dir=constants.HF_HUB_CACHE + "-other")


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

    def test_lists_them_in_the_card(self, hub: HubServer) -> None:
        push_tasks_to_hub(make_model("cars", "birds"), "ada/all", results={"cars": {"accuracy": 0.5}})
        card = files_of(hub, "ada/all")["README.md"].decode()
        assert "| [cars](cars/README.md) | 16 | accuracy 0.5 |" in card
        assert "| [birds](birds/README.md) | 16 | - |" in card
        assert {"recast", "peft"} <= set(metadata(card)["tags"])

    def test_twice_lists_them_once(self, hub: HubServer) -> None:
        model = make_model("default", "cars")
        for _ in range(2):
            push_tasks_to_hub(model, "ada/all")
        card = files_of(hub, "ada/all")["README.md"].decode()
        assert card.count("[cars](cars/README.md)") == 1
        assert card.count("recast: begin") == 1

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
        assert type(pickle.loads(pickle.dumps(model))) is type(model)


class TestARefusal:
    @pytest.mark.parametrize(("token", "status"), [("hf_wrong", "401"), ("hf_reader", "403")])
    def test_of_the_token_commits_nothing(self, hub: HubServer, token: str, status: str) -> None:
        with pytest.raises(RecastHubError, match=status):
            push_task_to_hub(make_model("flowers"), "ada/flowers", token=token)
        assert hub.repositories == {}

    @pytest.mark.parametrize("step", ["preupload", "/lfs/objects/batch", "/commit/"])
    def test_half_way_leaves_the_repository_as_it_was(self, hub: HubServer, step: str) -> None:
        model = make_model("flowers")
        push_task_to_hub(model, "ada/flowers")
        before = dict(hub.repositories["ada/flowers"].branches)
        learn(model, "flowers", 99)
        hub.failing[step] = 400
        with pytest.raises(RecastHubError, match="ada/flowers"):
            push_task_to_hub(model, "ada/flowers")
        assert hub.repositories["ada/flowers"].branches == before


class TestFetching:
    @pytest.fixture
    def pushed(self, hub: HubServer) -> HubServer:
        push_task_to_hub(make_model("default"), "ada/flowers")
        return hub

    def test_says_that_a_repository_is_missing(self, hub: HubServer) -> None:
        with pytest.raises(RecastHubError, match=r"'ada/nothing'.*no such repository"):
            fetch_task("ada/nothing")

    def test_says_that_a_name_is_no_name(self, hub: HubServer) -> None:
        with pytest.raises(RecastHubError, match="no such folder"):
            fetch_task("./not/here/at/all")

    def test_says_that_a_revision_is_missing(self, pushed: HubServer) -> None:
        with pytest.raises(RecastLoadError, match="no such revision"):
            fetch_task("ada/flowers", revision="v9")

    def test_says_that_a_subfolder_is_missing(self, pushed: HubServer) -> None:
        with pytest.raises(RecastLoadError, match="no such file"):
            fetch_task("ada/flowers", "cars")

    def test_says_that_the_token_is_refused(self, pushed: HubServer) -> None:
        with pytest.raises(RecastHubError, match="401"):
            fetch_task("ada/flowers", token="hf_wrong")

    def test_takes_tags_and_commits(self, pushed: HubServer) -> None:
        HfApi().create_tag("ada/flowers", tag="v1")
        first = hub_commit(pushed, "ada/flowers")
        hub_file = files_of(pushed, "ada/flowers")["adapter_config.json"]
        pushed.add("ada/flowers", {"adapter_config.json": hub_file + b"\n"})
        for revision in ("v1", first):
            assert (fetch_task("ada/flowers", revision=revision) / "adapter_config.json").read_bytes() == hub_file
        assert (fetch_task("ada/flowers") / "adapter_config.json").read_bytes() == hub_file + b"\n"

    def test_of_a_download_that_breaks_raises_and_can_be_tried_again(
        self, pushed: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        pushed.broken.add("adapter_model.safetensors")
        with pytest.raises(RecastHubError, match=r"adapter_model\.safetensors"):
            fetch_task("ada/flowers")
        backbone = make_backbone()
        with pytest.raises(Exception, match=r".+"):
            PeftModel.from_pretrained(backbone, "ada/flowers")
        assert not any(isinstance(module, RecastLayer) for module in backbone.modules())
        pushed.broken.clear()
        assert {path.name for path in fetch_task("ada/flowers").iterdir()} >= TASK_FILES - {"README.md"}

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

    def test_works_from_the_cache_without_a_request(self, pushed: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        online = fetch_task("ada/flowers")
        count = len(pushed.requests)
        assert fetch_task("ada/flowers", local_files_only=True) == online
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch_task("ada/flowers") == online
        assert len(pushed.requests) == count

    def test_offline_without_the_cache_says_so(self, pushed: HubServer, tmp_path: Path) -> None:
        with pytest.raises(RecastHubError, match="not in the Hub.s cache"):
            fetch_task("ada/flowers", local_files_only=True, cache_dir=tmp_path / "empty")

    def test_of_an_old_file_format_works(self, hub: HubServer, tmp_path: Path) -> None:
        make_model("default").save_pretrained(tmp_path / "old", safe_serialization=False)
        hub.add("ada/old", {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()})
        for _ in range(2):
            assert (fetch_task("ada/old") / "adapter_model.bin").is_file()
        assert (fetch_task("ada/old", local_files_only=True) / "adapter_model.bin").is_file()

    def test_finds_the_only_task_of_a_repository_or_a_folder(self, hub: HubServer, tmp_path: Path) -> None:
        make_model("cars").save_pretrained(tmp_path / "local")
        assert fetch_task(tmp_path / "local").name == "cars"
        hub.add("ada/one", {f"cars/{p.name}": p.read_bytes() for p in (tmp_path / "local" / "cars").iterdir()})
        assert fetch_task("ada/one").name == "cars"

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

    def test_of_another_method_says_which(self, hub: HubServer) -> None:
        hub.add("ada/lora", {"adapter_config.json": json.dumps({"peft_type": "LORA"}).encode()})
        hub.add("ada/lora", {"adapter_model.safetensors": b""})
        with pytest.raises(RecastLoadError, match=str(PeftType.LORA.value)):
            fetch_task("ada/lora")

    def test_of_a_damaged_file_says_so(self, pushed: HubServer) -> None:
        content = files_of(pushed, "ada/flowers")["adapter_model.safetensors"]
        pushed.add("ada/flowers", {"adapter_model.safetensors": content[:-7]})
        with pytest.raises(RecastLoadError, match="damaged or incomplete"):
            fetch_task("ada/flowers")


def hub_commit(hub: HubServer, name: str) -> str:
    return hub.repositories[name].branches["main"]


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


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b'{"a": 1', b"\xff\xfe{}", b"[" * 100_000, b'{"peft_type": []}']
)
def test_a_damaged_config_is_one_kind_of_error_when_a_task_is_loaded(content: bytes, tmp_path: Path) -> None:
    make_model("flowers").save_pretrained(tmp_path)
    (tmp_path / "flowers" / "adapter_config.json").write_bytes(content)
    model = make_model("cars")
    with pytest.raises(RecastConfigError):
        model.load_adapter(tmp_path / "flowers", "flowers")
    assert list(model.peft_config) == ["cars"]


class TestTheCard:
    def save(self, folder: Path, **fields: Any) -> str:
        config = RecastConfig(**fields)
        model = make_model("default", config=config)
        model.save_pretrained(folder)
        return (folder / "README.md").read_text()

    def test_counts_what_the_file_holds(self, tmp_path: Path) -> None:
        # 4 blocks, both feed-forward layers, each in 2 groups of 2: 2 roles x 4 layers x 2 templates
        card = self.save(tmp_path / "flowers", modules_to_save=["classifier"])
        head = 5 * 16 + 5
        size = (tmp_path / "flowers" / "adapter_model.safetensors").stat().st_size
        assert f"| Numbers trained | {16 + head} (16 coefficients) |" in card
        assert f"| Size | {size:,} bytes" in card
        assert "| Targets | 8 modules in 4 banks:" in card
        assert "exact" in card

    def test_counts_the_norms_that_a_task_owns(self, tmp_path: Path) -> None:
        counts = {}
        for norms in (False, True):
            config = RecastConfig(train_norms=norms)
            make_model("default", config=config).save_pretrained(tmp_path / str(norms))
            card = (tmp_path / str(norms) / "README.md").read_text()
            counts[norms] = int(re.search(r"\| Numbers trained \| ([\d,]+)", card)[1].replace(",", ""))
        owned = sum(p.numel() for m in make_backbone().modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
        assert owned > 0
        assert counts[True] == counts[False] + owned

    def test_says_how_it_is_compressed_and_how_well(self, tmp_path: Path) -> None:
        card = self.save(tmp_path / "flowers", num_templates=1)
        assert "compressed: 4 templates stand for 8 pretrained weights" in card
        assert "exact" not in card
        plain, errors, cosines = make_backbone(), [], []
        composed = make_model("default", config=RecastConfig(num_templates=1)).base_model
        for layer in (module for module in composed.modules() if isinstance(module, RecastLayer)):
            wanted, mine = plain.get_submodule(layer.module_name).weight, layer.compose([])
            errors.append(((mine - wanted).norm() / wanted.norm()).item())
            cosines.append(torch.cosine_similarity(mine.flatten(), wanted.flatten(), dim=0).item())
        assert max(errors) > 0.1
        shown = re.search(r"cosine to them ([\d.]+) in the mean and ([\d.]+) at worst, relative error ([\d.]+)", card)
        expected = (sum(cosines) / 8, min(cosines), sum(errors) / 8)
        assert [float(number) for number in shown.groups()] == [pytest.approx(value, abs=1e-3) for value in expected]

    def test_links_the_base_model(self, tmp_path: Path) -> None:
        known = {"library": "transformers", "name": "google/vit", "class": "ViTForImageClassification", "revision": "abc"}
        card = self.save(tmp_path / "flowers", backbone=known)
        data = metadata(card)
        assert data["base_model"] == "google/vit"
        assert data["base_model_relation"] == "adapter"
        assert data["library_name"] == "peft"
        assert {"recast", "peft", "transformers", "base_model:adapter:google/vit"} <= set(data["tags"])
        assert data["pipeline_tag"] == "image-classification"
        assert "[google/vit](https://huggingface.co/google/vit), revision `abc`" in card

    def test_does_not_link_a_folder_of_this_machine(self, tmp_path: Path) -> None:
        make_backbone().save_pretrained(tmp_path / "base")
        base = ViTForImageClassification.from_pretrained(tmp_path / "base")
        get_recast_model(base).save_pretrained(tmp_path / "flowers")
        assert "base_model" not in metadata((tmp_path / "flowers" / "README.md").read_text())

    def test_loads_by_the_lines_that_it_shows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_backbone().save_pretrained(tmp_path / "base")
        base = ViTForImageClassification.from_pretrained(tmp_path / "base")
        model = get_recast_model(base)
        learn(model, "default", 3)
        model.save_pretrained(tmp_path / "flowers")
        lines = re.search(r"```python\n(.*?)```", (tmp_path / "flowers" / "README.md").read_text(), re.DOTALL)[1]
        assert len([line for line in lines.splitlines() if line]) <= 3
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(lines, names)
        assert torch.equal(output(names["model"]), output(model.eval()))

    def test_shows_accuracy_to_the_hub(self, tmp_path: Path) -> None:
        known = {"library": "timm", "name": "a.b", "class": "X", "num_classes": 5, "license": "cc-by-4.0"}
        self.save(tmp_path / "flowers", backbone=known, results={"accuracy": 0.5, "dataset": "CUB Birds"})
        data = metadata(Path(write_model_card(tmp_path / "flowers", repo_id="ada/birds")).read_text())
        (result,) = data["model-index"][0]["results"]
        assert result["dataset"] == {"name": "CUB Birds", "type": "cub-birds"}
        assert result["metrics"][0]["value"] == 0.5
        assert data["license"] == "cc-by-4.0"

    def test_takes_a_license_over_what_it_knew(self, tmp_path: Path) -> None:
        self.save(tmp_path / "flowers", backbone={"library": "timm", "name": "a.b", "license": "cc-by-4.0"})
        path = write_model_card(tmp_path / "flowers", license="mit")
        assert metadata(Path(path).read_text())["license"] == "mit"

    def test_takes_the_place_of_pefts_template_alone(self, tmp_path: Path) -> None:
        card = self.save(tmp_path / "flowers")
        assert "Framework versions" not in card
        own = "---\ntags: [mine]\n---\n\n# My model\n"
        (tmp_path / "flowers" / "README.md").write_text(own)
        card = self.save(tmp_path / "flowers")
        assert "# My model" in card
        assert "AutoRecastModel" in card
        assert {"mine", "recast"} <= set(metadata(card)["tags"])

    def test_is_not_written_for_a_config_alone(self, tmp_path: Path) -> None:
        RecastConfig().save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json"}

    def test_of_a_folder_without_a_task_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RecastLoadError, match=r"adapter_config\.json"):
            write_model_card(tmp_path)
        RecastConfig().save_pretrained(tmp_path)
        with pytest.raises(RecastLoadError, match=r"adapter_model\.safetensors"):
            write_model_card(tmp_path)

    def test_stays_when_the_trainer_writes_its_own(self, tmp_path: Path) -> None:
        model = make_model("default")
        model.save_pretrained(tmp_path)
        (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# What the Trainer wrote\n")
        model.create_or_update_model_card(str(tmp_path))
        card = (tmp_path / "README.md").read_text()
        assert "# What the Trainer wrote" in card
        assert "AutoRecastModel" in card


class TestABank:
    """Templates that do not follow from the pretrained weights are stored once, and tasks name them."""

    @pytest.fixture(scope="class")
    def bank(self) -> StoredBank:
        config = RecastConfig(num_templates=1, mimicry={"method": "gradient", "steps": 5})
        return fit_bank(make_backbone(), config)

    def test_is_pushed_with_a_card(self, hub: HubServer, bank: StoredBank) -> None:
        push_bank_to_hub(bank, "ada/bank", base_model="google/vit")
        files = files_of(hub, "ada/bank")
        assert set(files) == {"README.md", "recast_bank.json", "recast_bank.safetensors"}
        assert len(hub.repositories["ada/bank"].commits) == 2
        card = files["README.md"].decode()
        assert "| Targets | 8 modules: `vit.layers.*.mlp.fc1`" in card
        assert "| Banks | 4, with 4 templates |" in card
        assert metadata(card)["base_model"] == "google/vit"
        assert load_bank("ada/bank").fingerprint == bank.fingerprint

    def test_is_found_by_the_tasks_name(self, hub: HubServer, bank: StoredBank, monkeypatch: Any, tmp_path: Path) -> None:
        push_bank_to_hub(bank, "ada/bank", private=True)
        make_backbone().save_pretrained(tmp_path / "base")
        hub.add("ada/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
        base = ViTForImageClassification.from_pretrained("ada/base")
        model = get_recast_model(base, RecastConfig(bank=load_bank("ada/bank")))
        learn(model, "default", 3)
        push_task_to_hub(model.eval(), "ada/task")
        assert "| Fidelity of the base | stored bank `ada/bank`; cosine" in files_of(hub, "ada/task")["README.md"].decode()
        fresh = {"cache_dir": tmp_path / "fresh"}
        assert torch.equal(output(AutoRecastModel.from_pretrained("ada/task", **fresh)), output(model))
        monkeypatch.delenv("HF_TOKEN")
        elsewhere = {"cache_dir": tmp_path / "elsewhere"}
        with pytest.raises(RecastHubError, match="ada/bank"):
            AutoRecastModel.from_pretrained("ada/task", **elsewhere)
        loaded = AutoRecastModel.from_pretrained("ada/task", token="hf_writer", **elsewhere)
        assert torch.equal(output(loaded), output(model))

    def test_without_its_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RecastLoadError, match=r"recast_bank\.json"):
            write_bank_card(tmp_path)
