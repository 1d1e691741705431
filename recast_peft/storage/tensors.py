"""Safetensors files: written whole with a checksum of what is in them, read with care.

Safetensors itself refuses a file whose header does not describe its bytes exactly, so that no shape can ask for more memory
than the file has. Here come the kinds of numbers that are expected, that they are finite, and the checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RecastConfigError, RecastLoadError
from ..validation import a_path, check_arguments
from .atomic import staged

CHECKSUM = "recast_checksum"  # the entry of a file's metadata: of its tensors
TEXTS_CHECKSUM = "recast_texts_checksum"  # the same of its other entries
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGEST = 100.0  # of coefficients; 1 moves a weight by as much as the weight itself
TRIES = 50  # to read a file that is replaced again and again
_NOT_UTF8 = "its path is not UTF-8, and safetensors opens no such file. Give the folder another name."
_CHUNK = 1 << 22  # numbers that are looked at in one go


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds.

    Attributes:
        tensors: by name.
        metadata: texts by name, the checksum among them where the file has one.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @cached_property
    def content(self) -> str:
        """The checksum of the tensors."""
        return checksum(self.tensors)


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors whole or not at all, with a checksum.

    Args:
        path: path of the file; its folder is made if it is missing.
        tensors: by name, on any device; those that share memory are stored one by one.
        metadata: texts by name.

    Raises:
        RecastConfigError: if the path is not UTF-8, since the file could not be read.
        OSError: if the disk is full.
    """
    if not _is_utf8(path):
        raise RecastConfigError(f"{os.fspath(path)} cannot be written: {_NOT_UTF8}")
    held: set[int] = set()  # memory that is stored already
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        plain[key] = value.clone() if value.numel() and place in held else value
        held.add(place)
    texts = {"format": "pt", **(metadata or {}), CHECKSUM: checksum(plain)}
    texts[TEXTS_CHECKSUM] = _texts_checksum(texts)
    with staged(path) as beside:
        save_file(plain, beside, metadata=texts)
        _sort_metadata(beside)


def _sort_metadata(path: Path) -> None:
    """Put the texts of a file in order: safetensors writes them in one that differs from time to time."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def read_tensors(path: str | os.PathLike, what: str | None = None, *, floating: bool = True, finite: bool = True) -> TensorFile:
    """Read a whole safetensors file.

    Args:
        path: path of the file.
        what: it is called in messages; None is its path.
        floating: refuse all but float64, float32, float16 and bfloat16; integers, bits and 8-bit floats are named.
        finite: refuse infinity and NaN.

    Raises:
        RecastLoadError: if the file cannot be read, does not hold what is expected, or its checksum is of
            another content. A file without a checksum (of earlier versions) is read.
    """
    check_arguments(a_path, path=path)
    what = what or str(path)
    try:
        tensors, metadata = _of_one_moment(path)
    except Exception as reason:  # safetensors and torch have a kind of error for each kind of damage
        raise _unreadable(what, path, reason) from reason
    if floating:
        check_floating(what, tensors)
    if finite:
        check_finite(what, tensors)
    content = TensorFile(tensors, metadata)
    _check_content(what, content)
    return content


def _of_one_moment(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a file that another process may replace meanwhile: it is opened once for each of the two."""
    for attempt in range(TRIES):
        before = os.stat(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception:
            if attempt + 1 < TRIES and not _same_file(before, os.stat(path)):
                continue
            raise
        if _same_file(before, os.stat(path)):
            break
    return tensors, metadata


def _same_file(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_ino, before.st_mtime_ns, before.st_size) == (after.st_ino, after.st_mtime_ns, after.st_size)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The texts of a safetensors file; empty if there is no such file, or it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # whoever reads the numbers says what is wrong with it
        return {}


def read_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Shapes by name; no number is read.

    Raises:
        RecastLoadError: if the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as reason:
        raise _unreadable(str(path), path, reason) from reason


def _unreadable(what: str, path: str | os.PathLike, reason: Exception) -> RecastLoadError:
    if not os.path.isfile(path):
        found = "a folder, not a file" if os.path.isdir(path) else "not there"
        return RecastLoadError(f"{what} cannot be read: {os.fspath(path)} is {found}")
    if not _is_utf8(path):
        return RecastLoadError(f"{what} cannot be read: {_NOT_UTF8}")
    return _unusable(what, f"is damaged or incomplete: {reason}")


def _unusable(what: str, why: str) -> RecastLoadError:
    return RecastLoadError(f"{what} {why}\nNothing was loaded; fetch it again.")


def _is_utf8(path: str | os.PathLike) -> bool:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_floating(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers of a kind that no weight or coefficient has (``RecastLoadError``)."""
    wrong = [key for key, tensor in tensors.items() if tensor.dtype not in FLOATING]
    if wrong:
        kinds = f"{_name(tensors[wrong[0]].dtype)}\n  expected: {', '.join(map(_name, FLOATING))}"
        raise _unusable(what, f"holds numbers of another kind{_and_more(wrong)}\n  {wrong[0]}: {kinds}")


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse infinity and NaN (``RecastLoadError``)."""
    wrong = [key for key, tensor in tensors.items() if not tensor.is_meta and not _finite(tensor)]
    if wrong:
        raise _unusable(what, f"holds infinity or NaN in {wrong[0]}{_and_more(wrong)}")


def _finite(tensor: Tensor) -> bool:
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point() and flat.element_size() == 1:
        flat = flat.float()  # torch compares no 8-bit floats
    return all(bool(torch.isfinite(flat[start : start + _CHUNK]).all()) for start in range(0, flat.numel(), _CHUNK))


def outliers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Coefficients that only a damaged file holds: by name the largest one of each tensor that exceeds ``LARGEST``."""
    sizes = {key: float(tensor.abs().max()) for key, tensor in tensors.items() if tensor.numel()}
    return {key: size for key, size in sizes.items() if size > LARGEST}


def check_shapes(what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse missing tensors and other shapes (``RecastLoadError``)."""
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise _unusable(what, f"lacks {missing[0]}{_and_more(missing)}")
    wrong = [key for key, shape in expected.items() if tuple(tensors[key].shape) != tuple(shape)]
    if wrong:
        shapes = f"{tuple(tensors[wrong[0]].shape)}\n  expected: {tuple(expected[wrong[0]])}"
        raise _unusable(what, f"holds another shape{_and_more(wrong)}\n  {wrong[0]}: {shapes}")


def _check_content(what: str, file: TensorFile) -> None:
    stored = file.metadata.get(CHECKSUM)
    if stored is None:  # of an earlier version, of another program, or taken out by hand
        return
    if stored != file.content:
        sums = f"  checksum in the file:   {stored}\n  checksum of the numbers: {file.content}"
        raise _unusable(what, f"is damaged: its numbers are not those that were written\n{sums}")
    texts = file.metadata.get(TEXTS_CHECKSUM)
    if texts is not None and texts != _texts_checksum(file.metadata):
        raise _unusable(what, "is damaged: the texts of its metadata are not those that were written")


def _texts_checksum(metadata: Mapping[str, str]) -> str:
    texts = sorted((key, text) for key, text in metadata.items() if key != TEXTS_CHECKSUM)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def checksum(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """A hash of names, shapes and numbers: 16 hexadecimal digits of SHA-256.

    Args:
        tensors: by name.
        dtype: that numbers are seen in; None takes them as they are.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {dtype or tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):  # in parts: a copy in another dtype of all at once would be large
            part = flat[start : start + _CHUNK]
            digest.update((part if dtype is None else part.to(dtype)).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
