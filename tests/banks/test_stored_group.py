"""A group of a stored bank: what its header says, and what of a header is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from grown_weights import grown

from recast_peft import RecastLoadError, load_bank
from recast_peft.banks.files import BANK_CONFIG


class TestReading:
    def test_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        grown().save(tmp_path)
        file = tmp_path / BANK_CONFIG
        content = {key: value for key, value in json.loads(file.read_text()).items() if key != "checksum"}
        file.write_text(json.dumps(content).replace('"plain": true', '"plain": false'))
        with pytest.raises(RecastLoadError, match="lacks .*only_grown"):
            load_bank(tmp_path)
