"""What lies in the folder of a saved task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from hub_tasks import files_of, make_model
from peft.utils import PeftType

from recast_peft import RecastConfigError, RecastLoadError, push_task_to_hub
from recast_peft.hub.transfer import fetch_task


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


class TestFetched:
    @pytest.fixture
    def pushed(self, hub: HubServer) -> HubServer:
        push_task_to_hub(make_model("default"), "ada/flowers")
        return hub

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
