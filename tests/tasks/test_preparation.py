"""Everything that a conversion checks before a model is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import tiny_vit
from peft import PeftModel

from recast_peft import RecastConfig, RecastLoadError, get_recast_model


def test_sizes_of_a_stored_config_are_not_built_before_they_are_checked(tmp_path: Path) -> None:
    model = get_recast_model(tiny_vit(), RecastConfig(target_modules=["qkv"], partners=["adaptformer"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    stored["partners"][0]["bottleneck"] = 10**11  # more than any machine has
    path.write_text(json.dumps(stored))
    with pytest.raises(RecastLoadError, match="wrongly shaped"):
        PeftModel.from_pretrained(tiny_vit(), tmp_path)
