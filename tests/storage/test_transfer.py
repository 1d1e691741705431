"""Files from the Hub and to it: whole, or one error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from hub_tasks import TASK_FILES, files_of, hub_commit, learn, make_backbone, make_model, metadata, output
from huggingface_hub import HfApi, constants
from peft import PeftModel

from recast_peft import RecastHubError, RecastLayer, RecastLoadError, push_task_to_hub
from recast_peft.hub.transfer import fetch_task


class TestARefusal:
    @pytest.mark.parametrize(("token", "status"), [("hf_wrong", "401"), ("hf_reader", "403")])
    def test_of_the_token_commits_nothing(self, hub: HubServer, token: str, status: str) -> None:
        with pytest.raises(RecastHubError, match=f"the Hub answered {status}. The token is not valid for this"):
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


class TestACommit:
    def test_takes_the_numbers_by_the_protocol_for_large_files(self, hub: HubServer) -> None:
        push_task_to_hub(make_model("flowers"), "ada/flowers")
        assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
        assert files_of(hub, "ada/flowers")["adapter_model.safetensors"] in hub.large.values()

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


class TestFetchingFiles:
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
