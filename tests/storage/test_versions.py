"""What a file was before is kept, listed and put back; the present one is in its place at every moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recast_peft import RecastConfigError
from recast_peft.storage.atomic import write_text
from recast_peft.storage.versions import keeping_version, roll_back, version_path, versions


def write(file: Path, text: str, keep: int = 3) -> None:
    with keeping_version(file, keep):
        write_text(file, text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "pool.safetensors"


def test_the_latest_ones_are_kept(file: Path) -> None:
    write(file, "a")
    assert versions(file) == []
    for text in "bcdef":
        write(file, text)
    assert file.read_text() == "f"
    assert {number: version_path(file, number).read_text() for number in versions(file)} == {3: "c", 4: "d", 5: "e"}
    write(file, "g", keep=0)
    assert file.read_text() == "g"
    assert versions(file) == [3, 4, 5]


def test_rolling_back_and_forth(file: Path) -> None:
    for text in "abc":
        write(file, text)
    assert roll_back(file) == 2
    assert file.read_text() == "b"
    assert [version_path(file, number).read_text() for number in versions(file)] == ["a", "c"]
    assert roll_back(file) == 3
    assert file.read_text() == "c"
    assert roll_back(file, 1) == 1
    assert file.read_text() == "a"
    with pytest.raises(RecastConfigError, match="no version 77 before this one; there are: "):
        roll_back(file, 77)
    assert file.read_text() == "a"


def test_what_others_put_beside_them_is_no_version(file: Path) -> None:
    for text in "abc":
        write(file, text)
    for name in ("007", "0", "\u00b2", "\u0663", "1.old", ".2"):
        (file.parent / ".versions" / file.name / name).write_text("not ours")
    assert versions(file) == [1, 2]
    assert roll_back(file) == 2
    assert versions(file) == [1, 3]


def test_what_fails_becomes_no_version(file: Path) -> None:
    write(file, "a")
    with pytest.raises(RuntimeError), keeping_version(file, 3):
        raise RuntimeError
    assert versions(file) == []
    assert file.read_text() == "a"
    with pytest.raises(RecastConfigError, match="keep="):
        roll_back(file)


def test_going_back_that_fails_becomes_no_version(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, "a")
    write(file, "b")

    def refuse(*args: object) -> None:
        raise OSError

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", refuse)
        roll_back(file)
    assert versions(file) == [1]  # else the next one would go back to what is there
    assert file.read_text() == "b"
    roll_back(file)
    assert file.read_text() == "a"


def test_what_is_interrupted_once_the_new_file_is_there_keeps_the_former(file: Path) -> None:
    write(file, "a")
    with pytest.raises(KeyboardInterrupt), keeping_version(file, 3):
        write_text(file, "b")
        raise KeyboardInterrupt  # while the folder is brought to the disk
    assert (file.read_text(), version_path(file, 1).read_text()) == ("b", "a")


def test_what_a_killed_writer_left_is_no_version(file: Path) -> None:
    write(file, "a")
    write(file, "b")
    os.link(file, file.parent / ".versions" / file.name / "2")  # killed before the new file took the place of this one
    assert versions(file) == [1]
    assert roll_back(file) == 1
    assert (file.read_text(), version_path(file, 2).read_text()) == ("a", "b")
    os.link(file, file.parent / ".versions" / file.name / "3")
    write(file, "c")
    assert [version_path(file, number).read_text() for number in versions(file)] == ["b", "a"]
    assert not [*file.parent.rglob("*.part")]


def test_a_version_does_not_change_with_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, "a")
    write(file, "b")
    write_text(file, "c")
    assert version_path(file, 1).read_text() == "a"

    def refuse(*args: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)  # a file system without such names
    write(file, "d")
    assert [version_path(file, number).read_text() for number in versions(file)] == ["a", "c"]
    assert not [*file.parent.rglob("*.part")]


@pytest.mark.parametrize("keep", [-1, 1.5, True])
def test_a_number_of_versions_that_is_none_is_refused_before_anything_is_written(tmp_path: Path, keep: int) -> None:
    with pytest.raises(RecastConfigError, match=f"keep={keep}: expected a whole number of at least 0"):
        write(tmp_path / "file", "a", keep)
    assert not list(tmp_path.iterdir())
