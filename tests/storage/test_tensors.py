"""Tensor files: what is written is read, what is damaged is refused."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from recast_peft.errors import RecastConfigError, RecastLoadError
from recast_peft.storage.tensors import (
    CHECKSUM,
    check_shapes,
    checksum,
    read_metadata,
    read_shapes,
    read_tensors,
    write_tensors,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "c": torch.zeros(0, 2),
    }


def test_the_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "x.safetensors"
    write_tensors(file, tensors(), {"made by": "me"})
    content = read_tensors(file)
    assert all(torch.equal(content.tensors[key], value) for key, value in tensors().items())
    assert content.metadata["made by"] == "me"
    assert read_metadata(file) == content.metadata
    assert read_shapes(file) == {"a": (3, 4), "b": (5,), "c": (0, 2)}


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    texts = {f"key {i} é \n": "x" * i for i in range(20)}
    for name in "ab":
        write_tensors(tmp_path / name, tensors(), texts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert texts.items() <= read_tensors(tmp_path / "a").metadata.items()


def test_tensors_that_share_memory_are_stored_one_by_one(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    write_tensors(tmp_path / "x", {"whole": whole, "part": whole[2:4], "turned": whole.view(2, 3).T})
    content = read_tensors(tmp_path / "x").tensors
    assert content["part"].tolist() == [2, 3]
    assert content["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    file = tmp_path / "x"
    write_tensors(file, tensors())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the last bit of a number
    file.write_bytes(content)
    with pytest.raises(
        RecastLoadError, match=r"damaged: its numbers(.|\n)*checksum in the file:(.|\n)*checksum of the numbers:"
    ):
        read_tensors(file)


def test_a_changed_digit_of_the_metadata_is_found(tmp_path: Path) -> None:
    file = tmp_path / "x"
    write_tensors(file, tensors(), {"recipe": "[0.25, 0.75]"})
    assert read_tensors(file).metadata["recipe"] == "[0.25, 0.75]"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"0.75", b"0.74"))
    with pytest.raises(RecastLoadError, match="damaged: the texts of its metadata"):
        read_tensors(file)


def test_a_file_of_others_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x")
    assert CHECKSUM not in read_metadata(tmp_path / "x")
    assert set(read_tensors(tmp_path / "x").tensors) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.int64, torch.complex64, torch.float8_e5m2, torch.float8_e4m3fn, torch.uint8]
)
def test_other_kinds_of_numbers_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2).to(dtype)}, tmp_path / "x")
    with pytest.raises(RecastLoadError, match=str(dtype).removeprefix("torch.")):
        read_tensors(tmp_path / "x")
    assert read_tensors(tmp_path / "x", floating=False).tensors["b"].dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.zeros(10, dtype=dtype)
    tensor[7] = value
    save_file({"a": torch.zeros(3), "wrong": tensor}, tmp_path / "x")
    with pytest.raises(RecastLoadError, match="infinity or NaN in wrong"):
        read_tensors(tmp_path / "x")
    assert "wrong" in read_tensors(tmp_path / "x", finite=False).tensors


def with_header(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BAD_FILES = {
    "empty": b"",
    "cut": with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})[:-3],
    "a huge shape": with_header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}}),
    "a shape that overflows": with_header({"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}}),
    "an unknown dtype": with_header({"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}),
    "a dtype that torch has not": with_header({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}),
    "no JSON": with_header(b"\xff" * 40),
    "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "another file": b"PK\x03\x04" * 100,
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_damaged_files_are_one_kind_of_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(BAD_FILES[kind])
    with pytest.raises(RecastLoadError, match="damaged|another kind"):
        read_tensors(tmp_path / "x", "the bank")
    assert isinstance(read_metadata(tmp_path / "x"), dict)
    if kind != "a dtype that torch has not":
        with pytest.raises(RecastLoadError, match="x is damaged"):
            read_shapes(tmp_path / "x")


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RecastLoadError):
            read_tensors(path)


def test_shapes_are_compared() -> None:
    check_shapes("it", tensors(), {"a": (3, 4)})
    with pytest.raises(RecastLoadError, match=r"a: \(3, 4\)\n  expected: \(4, 3\)"):
        check_shapes("it", tensors(), {"a": (4, 3)})
    with pytest.raises(RecastLoadError, match="lacks d\nNothing was loaded"):
        check_shapes("it", tensors(), {"d": (1,)})
    with pytest.raises(RecastLoadError, match=r"lacks d \(and 1 more\)"):
        check_shapes("it", tensors(), {"d": (1,), "a": (4, 3), "e": (1,)})


def test_a_checksum_depends_on_names_shapes_kinds_and_numbers() -> None:
    one = {"a": torch.ones(2, 3)}
    others = [{"b": torch.ones(2, 3)}, {"a": torch.ones(3, 2)}, {"a": torch.ones(2, 3).double()}, {"a": -torch.ones(2, 3)}]
    assert len({checksum(t) for t in [one, *others]}) == 5
    assert checksum(others[2], torch.float32) == checksum(one, torch.float32) == checksum(one)


def test_a_write_replaces_the_file_that_tensors_are_read_from(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", tensors())
    held = load_file(tmp_path / "x")
    write_tensors(tmp_path / "x", {key: value + 1 for key, value in held.items()})
    assert torch.equal(held["a"], tensors()["a"])
    assert torch.equal(read_tensors(tmp_path / "x").tensors["a"], tensors()["a"] + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere have no such names")
def test_a_path_that_is_not_utf8_is_told_and_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9") / "x.safetensors"
    with pytest.raises(RecastConfigError, match="not UTF-8.*Give the folder another name"):
        write_tensors(path, {"a": torch.ones(2)})
    assert not path.parent.exists()
    path.parent.mkdir()
    path.write_bytes(save({"a": torch.ones(2)}))
    for read in (read_tensors, read_shapes):
        with pytest.raises(RecastLoadError, match="not UTF-8.*Give the folder another name"):
            read(path)
