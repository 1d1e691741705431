"""What lies in the folder of a saved task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from hub_tasks import files_of
from models import converted
from peft import LoraConfig
from peft.utils import PeftType

from recast_peft import PiggybackConfig, RecastLoadError
from recast_peft.hub.task_files import has_task_numbers, numbers_by_key, read_task_config, task_sizes, tasks_inside
from recast_peft.hub.transfer import fetch_task


class TestFetched:
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


class TestSizes:
    def test_are_those_of_every_part_by_hand(self, tmp_path: Path) -> None:
        part = LoraConfig(r=2, target_modules=["fc1"])
        partners = [PiggybackConfig(target_modules=["fc2"])]
        model = converted(num_classes=3, lora_config=part, partners=partners)
        model.save_pretrained(tmp_path)
        sizes = task_sizes(tmp_path)
        assert sizes.coefficients == 4 * 2  # four layers in groups of two
        assert sizes.lora == 4 * 2 * (8 + 16)  # of rank 2, from 8 to 16 numbers
        assert sizes.partners == {"piggyback": 4 * 16 * 8}  # a bit for each weight
        assert sizes.of_partners() == "piggyback 512 bits"
        assert sizes.others == 3 * 8 + 3  # the classifier
        assert sizes.beside == 512 + 27
        assert sizes.all == 8 + 192 + 512 + 27
        assert sizes.file_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
        assert sizes.config_bytes == (tmp_path / "adapter_config.json").stat().st_size

    def test_coefficients_that_are_not_trained_do_not_count(self, tmp_path: Path) -> None:
        converted(num_classes=3, train_coefficients=False).save_pretrained(tmp_path)
        sizes = task_sizes(tmp_path)
        assert (sizes.coefficients, sizes.others) == (0, 27)

    @pytest.mark.parametrize("sharing", [2, "all", "blocks", "roles"])
    def test_coefficients_that_modules_share_count_once(self, sharing: str | int, tmp_path: Path) -> None:
        model = converted(num_classes=3, target_modules=["qkv", "fc1"], coefficient_sharing=sharing)
        trained = sum(p.numel() for n, p in model.named_parameters() if "recast_coefficients" in n)
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path / "old", safe_serialization=False)
        for folder in (tmp_path, tmp_path / "old"):
            assert task_sizes(folder).coefficients == trained < sum(numbers_by_key(folder).values()) - 27
        assert f" ({trained} coefficients)" in (tmp_path / "README.md").read_text()

    def test_an_old_pickle_is_counted_alike(self, tmp_path: Path) -> None:
        model = converted(num_classes=3)
        model.save_pretrained(tmp_path / "new")
        model.save_pretrained(tmp_path / "old", safe_serialization=False)
        assert numbers_by_key(tmp_path / "old") == numbers_by_key(tmp_path / "new")
        (tmp_path / "old" / "adapter_model.bin").write_bytes(b"no pickle")
        with pytest.raises(RecastLoadError, match=r"adapter_model\.bin is damaged or incomplete"):
            numbers_by_key(tmp_path / "old")


def test_a_folder_of_tasks_and_one_without_numbers(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "no task").mkdir()
    assert tasks_inside(tmp_path) == ["a", "b"]
    assert tasks_inside(tmp_path / "a" / "adapter_config.json") == tasks_inside(tmp_path / "missing") == []
    assert not has_task_numbers(tmp_path / "a")
    with pytest.raises(RecastLoadError, match=r"holds no adapter_model\.safetensors.*Copy the whole folder"):
        numbers_by_key(tmp_path / "a")
    with pytest.raises(RecastLoadError, match="it is no saved task"):
        read_task_config(tmp_path)
