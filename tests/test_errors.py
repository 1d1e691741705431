"""The exceptions of this library: one family, with the kinds that Python has for them."""

from __future__ import annotations

import pytest
from models import TinyVit

from recast_peft import RecastConfig, RecastError, plan_recast


def test_every_error_of_planning_is_of_one_family() -> None:
    with pytest.raises(RecastError):
        plan_recast(TinyVit(), RecastConfig(target_modules=["nothing"]))
