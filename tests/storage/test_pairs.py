"""A file and its companion are replaced as one, whenever the process is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recast_peft.storage import pairs
from recast_peft.storage.atomic import write_text
from recast_peft.storage.pairs import companion_of, read_companion, staged_pairs
from recast_peft.storage.tensors import read_tensors

FILE, COMPANION = "x.safetensors", "x.json"


class Killed(BaseException):
    """What a kill is in these tests: nothing after it runs."""


def save(folder: Path, value: int) -> None:
    with staged_pairs(folder, {FILE: COMPANION}) as inside:
        save_file({"a": torch.full((2,), float(value))}, inside / FILE)
        write_text(inside / COMPANION, str(value))
        write_text(inside / "other.txt", str(value))


def pair(folder: Path) -> tuple[int, int]:
    number = int(read_tensors(folder / FILE).tensors["a"][0])
    return number, int(read_companion(folder / FILE, folder / COMPANION))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_kill_between_two_moves_leaves_the_old_or_the_new_pair(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    assert pair(tmp_path) == (1, 1)
    done = []

    def replace(new: Path, old: Path) -> None:
        if len(done) == steps:
            raise Killed
        done.append(old)
        return real(new, old)

    real = pairs.replace
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pairs, "replace", replace)
        save(tmp_path, 2)
    assert pair(tmp_path) == ((1, 1) if steps < 2 else (2, 2))
    save(tmp_path, 3)  # what is left over does not matter to the next writer
    assert pair(tmp_path) == (3, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", COMPANION, FILE]


def test_the_same_companion_again(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 1)
        assert pair(tmp_path) == (1, 1)


def test_a_companion_that_was_changed_by_hand_is_the_one_that_is_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write_text(tmp_path / COMPANION, "5")
    assert companion_of(tmp_path / FILE, tmp_path / COMPANION) == tmp_path / COMPANION
    assert pair(tmp_path) == (1, 5)


def test_a_lone_file_is_moved_as_it_is(tmp_path: Path) -> None:
    with staged_pairs(tmp_path, {FILE: COMPANION}) as inside:
        save_file({"a": torch.ones(1)}, inside / FILE)
    assert (tmp_path / FILE).is_file()
    with pytest.raises(FileNotFoundError):
        read_companion(tmp_path / FILE, tmp_path / COMPANION)
