"""Safetensors files by explicit reads: the header, checked as the library checks it, and tensors.

The library maps a file into memory. A map of a file that another program cuts short ends the process (SIGBUS), and
nothing can be caught; a read that comes back short is refused.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import torch
from transformers.modeling_utils import str_to_torch_dtype

from mobile.checkpoints.small_files import LARGEST_NBYTES
from mobile.errors import Refused, one_line, shortened

LFS_POINTER = b"version https://git-lfs"
LONGEST_KEY = 1000  # characters of a weight's name
LENGTH = struct.Struct("<Q")  # a file begins with its header's length
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
DTYPES: dict[str, torch.dtype] = {
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    **str_to_torch_dtype,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype as the header spells it ("BF16"), its shape, and the place of its bytes."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, file: BinaryIO, row: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tensor, read from its open file: in place, where the `row` that it is for can take it as it is.

        Raise Refused if the file ends before the tensor does.
        """
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            raise Refused(f"{self.path} holds {shortened(self.key)} as {self.dtype}, which is not read.")
        in_place = row is not None and row.dtype == dtype and row.shape == self.shape and row.is_contiguous()
        tensor = row if row is not None and in_place else torch.empty(self.shape, dtype=dtype)
        if self.nbytes:
            data: Any = tensor.view(-1).view(torch.uint8).numpy()
            into, at = memoryview(data), 0
            while at < self.nbytes:
                got = os.preadv(file.fileno(), [into[at:]], self.start + at)
                if got == 0:
                    raise Refused(f"{self.path} was cut short while it was read; copy it again.")
                at += got
        return tensor


@dataclass(frozen=True)
class Unread:
    """A stored tensor for Transformers, which reads it when it is indexed, as a slice of the library is."""

    stored: Stored
    file: BinaryIO

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.stored.read(self.file)[index]

    def get_dtype(self) -> str:
        """Return its dtype as the header spells it."""
        return self.stored.dtype

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self.stored.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """Return a file's tensors by key. Raise Refused if the file is damaged: its tensors must fill it without a gap."""
    try:
        nbytes = path.stat().st_size
        content, start = _header_text(path, nbytes)
        return _checked(path, json.loads(content, object_pairs_hook=_once), start, nbytes)
    except (OSError, ValueError, RecursionError) as error:
        if _is_pointer(path):
            raise Refused(f"{path} is a Git LFS pointer in place of the weights; run: git lfs pull") from error
        raise Refused(f"{path} is damaged or cut short ({one_line(error)}); copy it again.") from error


def _header_text(path: Path, nbytes: int) -> tuple[str, int]:
    """Return the header's text, and where the tensors begin. Raise ValueError if the file cannot hold it."""
    first = _bytes_of(path, 0, LENGTH.size)
    if len(first) < LENGTH.size:
        raise ValueError("it is too small for a header")
    [length] = LENGTH.unpack(first)
    if length > min(LARGEST_NBYTES, nbytes - LENGTH.size):
        raise ValueError(f"its header would take {length:,} bytes")
    content = _bytes_of(path, LENGTH.size, length)
    if len(content) < length:
        raise ValueError("it ends inside of its header")
    return content.decode(), LENGTH.size + length


def _bytes_of(path: Path, start: int, nbytes: int) -> bytes:
    """Return a part of a file, which NumPy opens and closes in one call: Ctrl-C at no line here leaves it open."""
    return np.fromfile(path, np.uint8, nbytes, offset=start).tobytes()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary. Raise ValueError if a name has two values."""
    named: dict[str, Any] = {}
    for name, value in pairs:
        if named.setdefault(name, value) != value:
            raise ValueError(f"its header has {shortened(name)!r} twice")
    return named


def _checked(path: Path, entries: Any, start: int, nbytes: int) -> dict[str, Stored]:
    """Return the tensors that a header lists. Raise ValueError for the first that is wrong."""
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    about = entries.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("its header has __metadata__ that is no object of words")
    stored = [entry(path, key, listed, start) for key, listed in entries.items()]
    end = start
    for tensor in sorted(stored, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise ValueError(f"{shortened(tensor.key)!r} does not begin where the tensor before it ends")
        end += tensor.nbytes
    if end != nbytes:
        raise ValueError(f"its tensors end at byte {end:,} of {nbytes:,}")
    return {tensor.key: tensor for tensor in stored}


def entry(path: Path, key: str, listed: Any, start: int) -> Stored:
    """Return one tensor of a header. Raise ValueError if its dtype, shape and place do not agree."""
    named: dict[str, Any] = listed if isinstance(listed, dict) else {}
    dtype, shape, place = named.get("dtype"), named.get("shape"), named.get("data_offsets")
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if len(key) > LONGEST_KEY:
        raise ValueError(f"its header has a name of {len(key):,} characters")
    if dtype is None or bits is None or not _sizes(shape) or not _sizes(place) or len(place) != 2:
        raise ValueError(f"its header has no dtype, shape and place of {shortened(key)!r}")
    first, last = place
    if (last - first) * 8 != prod(shape) * bits:
        raise ValueError(f"the bytes of {shortened(key)!r} are not those of its shape")
    return Stored(path, key, dtype, tuple(shape), start + first, last - first)


def _sizes(sizes: Any) -> TypeGuard[list[int]]:
    """Return whether it is a list of at most 64 whole numbers, each of 63 bits, as PyTorch takes for a shape."""
    return isinstance(sizes, list) and len(sizes) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in sizes)


def _is_pointer(path: Path) -> bool:
    try:
        return _bytes_of(path, 0, len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False
