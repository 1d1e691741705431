"""Names from files stay in their folder, and a repository is a name on the Hub alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from recast_peft.errors import RecastLoadError
from recast_peft.storage.paths import inside, is_hub_name


@pytest.mark.parametrize(
    "name", ["", "/etc", "../bank", "a/../../b", "a\\..\\..\\b", "C:\\bank", "C:bank", "\\\\host\\share", "~/x", "a\0b"]
)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecastLoadError, match="the bank's name is"):
        inside(tmp_path, name, "the bank's name")


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    folder, other = tmp_path / "task", tmp_path / "task-of-others"
    (folder / "real").mkdir(parents=True)
    other.mkdir()
    (folder / "out").symlink_to(other)
    (folder / "in").symlink_to(folder / "real")
    assert inside(folder, "in", "it") == folder / "in"
    assert inside(folder, "real/deeper", "it") == folder / "real" / "deeper"
    with pytest.raises(RecastLoadError, match="link"):
        inside(folder, "out", "it")
    with pytest.raises(RecastLoadError, match="link"):
        inside(folder, "out/deeper", "it")


@pytest.mark.parametrize("name", ["timm/vit", "bert-base-uncased", "user/a.b_c-d"])
def test_names_of_repositories(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        None,
        3,
        "/a/b",
        "./a",
        "../a",
        "a/b/c",
        "https://host/a",
        "hf-hub:a/b",
        "local-dir:/a",
        "C:\\a",
        "a\\b",
        "~/a",
        "a b",
    ],
)
def test_what_is_no_name_of_a_repository(name: object) -> None:
    assert not is_hub_name(name)


def test_a_folder_that_lies_here_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "model").mkdir(parents=True)
    assert is_hub_name("user/model")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("user/model")
