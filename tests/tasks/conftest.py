"""What the tests of tasks share."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_tasks import save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task on qkv of a tiny transformer, with a head of its own."""
    folder = tmp_path_factory.mktemp("task")
    save(folder, modules_to_save=["head"])
    return folder
