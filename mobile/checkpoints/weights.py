"""The files that hold a checkpoint's weights, found by Transformers' own rule, and the contents of their headers.

The rule is `_get_resolved_checkpoint_files` of transformers.modeling_utils: the file that the configuration names,
else model.safetensors, else the files of the index. Only safetensors are read here.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers.modeling_utils import str_to_torch_dtype

from mobile.checkpoints.headers import Stored, entry, read_header
from mobile.checkpoints.small_files import LARGEST_NBYTES, json_object
from mobile.checkpoints.source import INDEX, SINGLE, Source
from mobile.errors import Refused, one_line, shortened

HEADERS_AT_ONCE = 8  # that are fetched
FOREIGN = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Weights:
    """The files of a checkpoint's weights, in the order they are read: of two with the same key, the later one counts.

    `keys` are the names of all weights and `dtype` their type where an index says so, else None.
    """

    files: tuple[str, ...]
    keys: frozenset[str] | None = None
    dtype: str | None = None


def weights_of(source: Source, explicit: object = None) -> Weights:
    """Return where the weights are; `explicit` is the configuration's `transformers_weights`.

    Raise Refused for files that are missing or lie outside of the checkpoint, and for an index that is not valid.
    """
    if explicit is not None:
        weights = _named_by_config(source, explicit)
    elif source.has(SINGLE):
        weights = Weights((SINGLE,))
    elif source.has(INDEX):
        weights = _listed_in_index(source, INDEX)
    else:
        raise Refused(_no_weights(source))
    for file in weights.files:
        if not source.has(file):
            raise Refused(source.missing_file(file))
    return weights


def holds_weights(source: Source) -> bool:
    """Return whether there is anything that could be meant as weights."""
    return any(name.endswith(FOREIGN) or name == INDEX for name in source.files())


def _no_weights(source: Source) -> str:
    """Return the refusal of a checkpoint without model.safetensors and without an index, with what is there instead."""
    lacks = f"{source.name} lacks {SINGLE}; only complete safetensors checkpoints are read"
    file = next((name for end in FOREIGN for name in source.files() if name.endswith(end)), None)
    if file is None:
        return f"{lacks}."
    if re.search(r"-\d+-of-\d+\.safetensors$", file):
        return f"{lacks}, and {file} is one of several that {INDEX} should list; copy that, too."
    if file.endswith(".safetensors"):
        return f"{lacks}; if {file} is the whole model, give it that name."
    if file.endswith(".gguf"):
        return f"{lacks}, and {file} is not; take the checkpoint that it was made from."
    return f"{lacks}, and {file} is not; load it with Transformers, and save it with save_pretrained."


def _named_by_config(source: Source, name: object) -> Weights:
    """Return the weights in the file or the index that the configuration names. Raise Refused for another name."""
    if isinstance(name, str) and name.endswith(".safetensors"):
        return Weights((_inside(source, name, "transformers_weights in config.json"),))
    if isinstance(name, str) and name.endswith(".safetensors.index.json"):
        return _listed_in_index(source, _inside(source, name, "transformers_weights in config.json"))
    raise Refused(
        f"transformers_weights in {source.name}'s config.json is {shortened(repr(name))}, which is no .safetensors "
        "file or index of such; take it out."
    )


def _listed_in_index(source: Source, name: str) -> Weights:
    """Return the weights that an index lists. Raise Refused for one that is missing, invalid or names other files."""
    if not source.holds(name):
        raise Refused(source.missing_file(name))
    path = source.folder / name
    remedy = "copy it again, or delete it where model.safetensors is whole"
    index = json_object(path, remedy, largest_nbytes=LARGEST_NBYTES)
    places, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise Refused(f'{path} is no index of weights, which has a "weight_map" from weights to files; copy it again.')
    if not isinstance(metadata, dict):
        raise Refused(f'{path} has no "metadata", which Transformers wants in it; write "metadata": {{}} there.')
    files = sorted(set(places.values()))
    for file in files:
        if not file.endswith(".safetensors"):
            raise Refused(f"{path} names {shortened(repr(file))}, which is no .safetensors file; only such are read.")
        _inside(source, file, name)
    dtype = metadata.get("dtype")
    return Weights(tuple(files), frozenset(places), None if dtype is None else str(dtype))


def _inside(source: Source, file: str, named_by: str) -> str:
    """Return the file's name. Raise Refused if it lies outside of the checkpoint's folder, or is no name of a file.

    Links are followed: the files of the hub's cache are links to its blobs.
    """
    shown = shortened(repr(file))
    if os.path.isabs(file) or Path(os.path.normpath(file)).parts[0] == "..":
        raise Refused(f"{shown}, named by {named_by}, lies outside of {source.name}; only files inside are read.")
    if not file.isprintable():
        raise Refused(f"{shown}, named by {named_by}, is no name of a file; copy that again.")
    return file


# --- headers ----------------------------------------------------------------------------------


def stored_dtype(source: Source, weights: Weights) -> torch.dtype:
    """Return the dtype that Transformers takes the weights to have: the index's, else that of the first float weight.

    The first weight is the first by name in the first file. Floats of 8 bits and fewer are passed over, and taken where
    there is nothing else. Of a file that is not here yet only the header is fetched. Raise Refused for an index with an
    unknown dtype.
    """
    if weights.dtype is not None:
        dtype = getattr(torch, weights.dtype, None)
        if not isinstance(dtype, torch.dtype):
            named = shortened(repr(weights.dtype))
            raise Refused(f"The index of {source.name} says that its dtype is {named}; give another dtype.")
        return dtype
    header = _header(source, weights.files[0])
    types = [str_to_torch_dtype.get(header[key].dtype) for key in sorted(header)]
    if not types:
        return torch.float32
    wide = [dtype for dtype in types if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1]
    return wide[0] if wide else types[0] or torch.float32


def stored_keys(source: Source, weights: Weights) -> set[str]:
    """Return the names of all weights in the files; of files that are not here yet only the headers are fetched."""
    return set(stored_tensors(source, weights))


def stored_tensors(source: Source, weights: Weights) -> dict[str, Stored]:
    """Return all tensors by key, from the last file that holds each; of files not here yet only headers are fetched.

    Raise Refused for a header that cannot be read, or is damaged.
    """
    remote = [file for file in weights.files if not source.holds(file)]
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as threads:
        fetched = dict(zip(remote, threads.map(partial(_header, source), remote), strict=True))
    stored: dict[str, Stored] = {}
    for file in weights.files:
        stored |= fetched[file] if file in fetched else _header(source, file)
    return stored


def _header(source: Source, file: str) -> dict[str, Stored]:
    """Return a file's tensors by key. Raise Refused if its header cannot be read."""
    if source.holds(file):
        return read_header(source.folder / file)
    try:
        tensors = HfApi().parse_safetensors_file_metadata(source.name, file, revision=source.commit).tensors
        return {
            key: entry(
                source.folder / file,
                key,
                {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": list(tensor.data_offsets)},
                0,  # places are not known, and not needed before the file is here
            )
            for key, tensor in tensors.items()
        }
    except Exception as error:  # the HTTP client's and the hub's own
        raise Refused(
            f"The header of {file} of {source.name} cannot be read ({one_line(error)}); run it again."
        ) from error
