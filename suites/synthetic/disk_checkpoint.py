"""Checkpoints of synthetic models, written to disk tensor by tensor, in the layout that each program reads.

The stock layout is Transformers' own of a model in memory: the experts of a layer in one tensor. One that the hub has,
an expert at a time, could not be memory-mapped: Transformers puts it together in memory. GGUF is llama.cpp's.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mobile.errors import Refused, one_line

SPREAD = 0.02  # of random weights
EMBEDDED = 4.0  # the same of embeddings: they outweigh what layers add, so that each token has experts of its own
LEFT_FREE = 2**30  # of the disk
ROTATED_BY = 64  # elements, for each expert once more
WRITTEN_AT_ONCE = 64 * 2**20
GB = 1e9
DTYPE = torch.bfloat16
GATE_UP = "experts.gate_up_proj"
FLOAT32 = ("norm.weight", "mlp.gate.weight", "shared_expert_gate.weight", ".bias")  # what llama.cpp has as such


def shapes_of(config: Any) -> dict[str, torch.Size]:
    """Return the shape of every weight of the stock model, in the model's order."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return {name: weight.shape for name, weight in model.state_dict().items()}


def nbytes_of(config: Any) -> int:
    """Return the bytes of all weights."""
    return sum(shape.numel() * DTYPE.itemsize for shape in shapes_of(config).values())


def weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Make one weight, the same for the same arguments: norms are one, biases zero, all else is random.

    Stacked experts are one random expert, rotated for each by a number of elements of its own.
    """
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("norm.weight")), dtype=DTYPE)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    if len(shape) == 2:
        spread = EMBEDDED if name.endswith("embed_tokens.weight") else SPREAD
        return torch.empty(shape, dtype=DTYPE).normal_(0, spread, generator=generator)
    made = torch.empty(shape, dtype=DTYPE)
    base = torch.empty(shape[1:], dtype=DTYPE).normal_(0, SPREAD, generator=generator).flatten()
    for number, row in enumerate(made.flatten(1)):
        shift = number * ROTATED_BY % len(base)
        row[: len(base) - shift] = base[shift:]
        row[len(base) - shift :] = base[:shift]
    return made


def write_stock(folder: Path, config: Any, seed: int) -> None:
    """Write config.json and model.safetensors into the folder. Raise Refused where the disk has no room."""
    shapes = shapes_of(config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + shape.numel() * DTYPE.itemsize
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8)  # weights begin at a page
    check_room(folder, at)
    config.save_pretrained(folder)
    try:
        with (folder / "model.safetensors").open("wb", buffering=0) as file:
            _put(file.fileno(), len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                _put(file.fileno(), bytes_of(weight(name, shape, seed)))
    except OSError as error:
        raise Refused(f"A checkpoint of {at / GB:.1f} GB cannot be written ({one_line(error)}).") from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous tensor's memory."""
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def _put(file: int, data: bytes | memoryview) -> None:
    """Append the data, some at a time, synced and out of the page cache."""
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.write(file, view[at : at + WRITTEN_AT_ONCE])
        forget(file)


def forget(file: int) -> None:
    """Sync an open file, and ask the system to drop it from the page cache."""
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def forget_all(folder: Path) -> None:
    """Do so with every file of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                forget(file)
            finally:
                os.close(file)


def check_room(folder: Path, nbytes: int) -> None:
    """Raise Refused unless the folder's disk has room for that many bytes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes + LEFT_FREE:
        raise Refused(
            f"A checkpoint takes {nbytes / GB:.1f} GB of disk and {free / GB:.1f} GB are free; name a folder with room."
        )


def file_system_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return the file system and the device that a folder lies on, like "ext4 on /dev/sda1"; None if unknown."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    place = folder.resolve()
    over = [row for row in lines if len(row) > 2 and place.is_relative_to(row[1])]
    if not over:
        return None
    device, _, kind = max(over, key=lambda row: len(row[1]))[:3]
    return f"{kind} on {device}"


# --- GGUF -------------------------------------------------------------------------------------------


def gguf_weights(shapes: dict[str, torch.Size]) -> Iterator[tuple[str, str, slice, torch.Size]]:
    """Yield, for each tensor of a GGUF file: the stock name it is called after, its source, the rows of it, its shape.

    llama.cpp has gate and up apart, which the stock model stacks.
    """
    for name, shape in shapes.items():
        if name.endswith(GATE_UP):
            half = shape[1] // 2
            for part, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, None))):
                yield name.replace("gate_up_proj", part), name, rows, torch.Size((shape[0], half, shape[2]))
        else:
            yield name, name, slice(None), shape


def write_gguf(path: Path, config: Any, seed: int) -> None:
    """Write the same weights as a GGUF file, in bfloat16 but for norms and routers; without a vocabulary.

    Raise Refused for a family that is not written here, or where the disk has no room. Needs the package gguf.
    """
    import gguf
    import numpy as np

    architectures = {"olmoe": "OLMOE", "qwen2_moe": "QWEN2MOE", "qwen3_moe": "QWEN3MOE"}
    if config.model_type not in architectures:
        raise Refused(
            f"No GGUF file of {config.model_type} is written here: llama.cpp has its attention in other tensors; "
            f"of these it has the same: {', '.join(architectures)}."
        )
    arch = getattr(gguf.MODEL_ARCH, architectures[config.model_type])
    shapes = shapes_of(config)
    check_room(path.parent, nbytes_of(config))
    called = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _describe(writer, config)
    tensors = list(gguf_weights(shapes))
    kinds = gguf.GGMLQuantizationType
    for name, _, _, shape in tensors:
        place = called.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise Refused(f"llama.cpp has no place for the weight {name} of {config.model_type}.")
        if not place.endswith((".weight", ".bias")):  # stacked experts
            place += ".weight"
        wide = name.endswith(FLOAT32)
        dtype = np.dtype(np.float32 if wide else np.float16)  # of two bytes, which BF16 names
        writer.add_tensor_info(
            place, tuple(shape), dtype, shape.numel() * dtype.itemsize, kinds.F32 if wide else kinds.BF16
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        source, held = None, torch.empty(0)
        for name, of, rows, _ in tensors:
            if of != source:
                source, held = of, weight(of, shapes[of], seed)
            part = held[:, rows] if held.ndim == 3 else held
            part = part.float() if name.endswith(FLOAT32) else part
            writer.write_tensor_data(part.contiguous().view(torch.uint8).numpy().reshape(-1))
        writer.close()
    except OSError as error:
        raise Refused(f"{path.name} cannot be written ({one_line(error)}).") from error


def _describe(writer: Any, config: Any) -> None:
    """Add the sizes that llama.cpp reads before the tensors."""
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
