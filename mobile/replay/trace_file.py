"""The file of a trace, format `mobile-trace-2`: a numpy .npz archive (zip, deflate) without a tensor or a pickle.

It holds R requests of S steps (forward passes) in all, of a model with L MoE layers; a *row* is one layer of one step,
S * L rows in all, step by step. Arrays, little-endian, and nothing beside them:

    header             uint8    (bytes,)     JSON, UTF-8: {"format": FORMAT, "layers": L, "about": {...}}
    request_steps      uint32   (R,)         steps of each request; they add up to S
    kind               uint8    (S,)         0 prefill, 1 full, 2 little, 3 big
    tokens             uint32   (S,)         tokens in the pass, at least 1
    confidence         float64  (S,)         confidence after a little pass, 0 to 1; NaN: not taken
    experts_lengths    uint16   (S * L,)     active experts of each row
    experts_values     uint16   (sum,)       their ids, strictly ascending within a row
    counts_lengths     uint16   (S * L,)     as experts_lengths, or 0 in all rows of a step: one token each
    counts_values      uint32   (sum,)       tokens that each active expert got, at least 1
    predicted_lengths  uint16   (S * L,)     experts that a big pass's fallback expected; 0 in other kinds
    predicted_values   uint16   (sum,)       their ids, strictly ascending within a row
    ahead_steps        uint32   (A,)         the steps with `ahead`, strictly ascending
    ahead              float16  (A, L - 1, experts)  router logits of layer l + 1 on the router input of layer l

`about` is any JSON object. Where it has "geometry" (the recorded model's own `costs.geometry.Geometry` as a dict), that
must agree with L and with every id. To be compared by `mobile replay` it must have "geometry" and "strategy" (the
name of the strategy that chose the tokens); "gamma" (its threshold, or null) and "signal" (what its confidence is, a
name of `mobile.policies.signals`; without it the strategy's own, as a rule the highest softmax probability) are how it
judged, and the rest is for the reader.

A change of any array, type or meaning is a new number at the end of the format's name. A reader reads its own number
and refuses every other: routing is cheap to record again, and a wrong replay looks like a right one.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from math import prod
from pathlib import Path
from tokenize import TokenError  # what numpy lets through of an array header that is no Python literal
from typing import Any

import numpy as np

from mobile import outputs
from mobile.errors import Refused
from mobile.inputs import open_regular, strict_json

FAMILY, NUMBER = "mobile-trace-", 2
FORMAT = f"{FAMILY}{NUMBER}"
ARRAYS: dict[str, tuple[type[np.generic], int]] = {  # type and number of axes
    "request_steps": (np.uint32, 1),
    "kind": (np.uint8, 1),
    "tokens": (np.uint32, 1),
    "confidence": (np.float64, 1),
    "experts_lengths": (np.uint16, 1),
    "experts_values": (np.uint16, 1),
    "counts_lengths": (np.uint16, 1),
    "counts_values": (np.uint32, 1),
    "predicted_lengths": (np.uint16, 1),
    "predicted_values": (np.uint16, 1),
    "ahead_steps": (np.uint32, 1),
    "ahead": (np.float16, 3),
}
BIG = 3
MOST_EXPANSION = 1032  # what deflate can make of one byte; a member that claims more is not one
# What all arrays may come to: routing repeats itself, but of a long trace a byte never stands for so many.
FREE_NBYTES, MOST_EXPANSION_OF_ALL = 16 * 2**20, 32
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
Arrays = dict[str, np.ndarray]


class Inconsistent(ValueError):
    """A contradiction between arrays, or between them and the format; the message says which."""


def write(path: Path, arrays: Arrays, layers: int, about: dict[str, Any]) -> None:
    """Write a trace; the file appears whole or not at all.

    Raise Refused for inconsistent arrays, or a file that cannot be written.
    """
    try:
        _check(arrays, layers, about)
    except Inconsistent as error:
        raise Refused(f"This trace cannot be written, for {error}.") from error
    header = json.dumps({"format": FORMAT, "layers": layers, "about": about}, sort_keys=True).encode()
    with outputs.open_atomic(path) as file:
        np.savez_compressed(file, allow_pickle=False, header=np.frombuffer(header, dtype=np.uint8), **arrays)


def read(path: Path) -> tuple[Arrays, int, dict[str, Any]]:
    """Read a trace and check it; return its arrays, number of layers and `about`.

    Raise Refused for a truncated, foreign or inconsistent file.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            _check_claims(archive, os.fstat(file.fileno()).st_size)
            header = strict_json(_member(archive, "header", np.uint8, 1).tobytes())
            _refuse_other_formats(path, header["format"])
            if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in ("header", *ARRAYS)):
                raise Inconsistent("its arrays are not those of the format")
            arrays = {name: _member(archive, name, *of) for name, of in ARRAYS.items()}
        layers, about = header["layers"], header["about"]
        _check(arrays, layers, about)
    except Refused:
        raise
    except Inconsistent as error:
        raise Refused(f"{path} is not a consistent {FORMAT} file, for {error}; record it again.") from error
    except OSError as error:
        raise Refused(f"Cannot read {path} ({error.strerror or error}); check its name or record it again.") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        OverflowError,
        RuntimeError,
        MemoryError,
        RecursionError,
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
        TokenError,
    ) as error:
        raise Refused(f"{path} is not a complete {FORMAT} file; record it again.") from error
    return arrays, layers, about


def _refuse_other_formats(path: Path, found: Any) -> None:
    """Raise Refused for another number of this format, Inconsistent for another format."""
    if found == FORMAT:
        return
    number = str(found).removeprefix(FAMILY)
    if not str(found).startswith(FAMILY) or not number.isdecimal():
        raise Inconsistent(f"it calls itself {str(found)[:40]!r}")
    what = "record it again with `mobile trace`" if int(number) < NUMBER else "update mobile-moe"
    raise Refused(f"{path} is a trace of format {found} and this version reads {FORMAT}; {what}.")


def _check_claims(archive: zipfile.ZipFile, nbytes: int) -> None:
    """Raise Inconsistent where the arrays of a file of so many bytes claim to be too large for its routing."""
    most = FREE_NBYTES + MOST_EXPANSION_OF_ALL * nbytes
    if sum(info.file_size for info in archive.infolist()) > most:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        raise Inconsistent(
            f"its arrays claim more than the {most:,} bytes that a file of {nbytes:,} bytes may hold, most of them "
            f"{largest.filename.removesuffix('.npy')[:40]!r} ({largest.file_size:,})"
        )


def _member(archive: zipfile.ZipFile, name: str, dtype: type[np.generic], axes: int) -> np.ndarray:
    """Read one array. Its size is believed only where the header, the directory and the compressed bytes agree."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > MOST_EXPANSION * (info.compress_size + 1) or info.compress_type not in COMPRESSIONS:
        raise Inconsistent(f"the array {name} claims an impossible size, or is not deflated")
    with archive.open(info) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise Inconsistent(f"the array {name} is of another numpy format")
        shape, fortran, found = np.lib.format.read_array_header_1_0(file)
        if found != np.dtype(dtype) or len(shape) != axes or fortran:
            raise Inconsistent(f"the array {name} is not {np.dtype(dtype)} with {axes} axes")
        nbytes = prod(shape) * found.itemsize
        if min(shape) < 0 or file.tell() + nbytes != info.file_size:
            raise Inconsistent(f"the array {name} is not as long as it says")
        return np.frombuffer(file.read(nbytes), dtype=found).reshape(shape)


# --- what must add up -------------------------------------------------------------------------------


def _check(arrays: Arrays, layers: int, about: dict[str, Any]) -> None:
    """Raise Inconsistent for the first thing that does not hold."""

    def demand(holds: bool, otherwise: str) -> None:
        if not holds:
            raise Inconsistent(otherwise)

    demand(type(layers) is int and layers >= 1, "its number of layers is not a count")
    demand(isinstance(about, dict), "what it says about itself is not an object")
    steps, rows = len(arrays["kind"]), len(arrays["kind"]) * layers
    demand(int(arrays["request_steps"].sum(dtype=np.uint64)) == steps, "its requests' steps do not add up")
    demand(len(arrays["tokens"]) == len(arrays["confidence"]) == steps, "its steps are of unequal number")
    demand(not (arrays["kind"] > BIG).any(), "it has a kind of step that there is not")
    demand(bool((arrays["tokens"] > 0).all()), "a step has no tokens")
    sure = arrays["confidence"]
    demand(bool((np.isnan(sure) | ((sure >= 0) & (sure <= 1))).all()), "a confidence is not a probability")
    for name in ("experts", "counts", "predicted"):
        lengths, values = arrays[f"{name}_lengths"], arrays[f"{name}_values"]
        demand(len(lengths) == rows, f"the rows of {name} are not one for each step and layer")
        demand(int(lengths.sum(dtype=np.uint64)) == len(values), f"the lengths of {name} do not add up")
    counted = arrays["counts_lengths"].reshape(steps, layers)
    active = arrays["experts_lengths"].reshape(steps, layers)
    demand(bool(((counted == active).all(axis=1) | ~counted.any(axis=1)).all()), "counts and experts do not pair up")
    demand(bool((arrays["counts_values"] > 0).all()), "an active expert has no tokens")
    predicted = arrays["predicted_lengths"].reshape(steps, layers).any(axis=1)
    demand(not (predicted & (arrays["kind"] != BIG)).any(), "a prediction belongs to no fallback")
    for name in ("experts", "predicted"):
        demand(_ascending(arrays[f"{name}_lengths"], arrays[f"{name}_values"]), f"{name} are not in ascending order")
    with_logits, ahead = arrays["ahead_steps"].astype(np.int64), arrays["ahead"]
    demand(ahead.shape[:2] == (len(with_logits), layers - 1), "`ahead` is not one signal for each layer but the last")
    demand(bool((np.diff(with_logits) > 0).all()) and bool((with_logits < steps).all()), "`ahead` belongs to no step")
    experts = _experts(layers, about, ahead)
    if experts is not None:
        ids = (arrays["experts_values"], arrays["predicted_values"])
        demand(all(int(each.max(initial=0)) < experts for each in ids), f"an expert's id is not below {experts}")
        demand(len(with_logits) == 0 or ahead.shape[2] == experts, f"`ahead` does not cover {experts} experts")


def _ascending(lengths: np.ndarray, values: np.ndarray) -> bool:
    """Return whether values strictly ascend within each row."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    return not ((np.diff(values.astype(np.int64)) <= 0) & (np.diff(row) == 0)).any()


def _experts(layers: int, about: dict[str, Any], ahead: np.ndarray) -> int | None:
    """Return the number of experts a layer of the recorded model; None if the file does not say."""
    geometry = about.get("geometry")
    if geometry is None:
        return ahead.shape[2] if len(ahead) else None
    experts = geometry.get("experts") if isinstance(geometry, dict) else None
    if type(experts) is not int or geometry.get("moe_layers") != layers:
        raise Inconsistent("its geometry is not that of its layers")
    return experts
