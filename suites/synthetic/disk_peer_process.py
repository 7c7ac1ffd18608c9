"""One program that reads a model from disk as it goes, timed in this process, whose memory may be capped.

It reads its job, a line of JSON, on standard input, joins the job's memory cgroup before it imports anything large, and
writes what it measured into the job's file. It ends when its standard input does: whoever started it is gone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, Protocol


class Player(Protocol):
    """A model that reads tokens; `how` says how its weights lie."""

    how: str
    vocabulary: int

    def begin(self) -> None:
        """Forget every token."""

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens after those so far, and compute the last one's logits."""


def main() -> None:
    """Do the job of standard input."""
    job = json.loads(sys.stdin.readline())
    Thread(target=_end_with_standard_input, daemon=True).start()
    if job["members"]:
        Path(job["members"]).write_text(str(os.getpid()), encoding="utf-8")
    begun, read = time.perf_counter(), read_nbytes()
    player = PLAYERS[job["program"]](job)
    found: dict[str, Any] = {
        "stock": player.how,
        "load_seconds": time.perf_counter() - begun,
        "load_read_nbytes": since(read),
        "repeats": [timed(player, job["prompt_tokens"], job["decode_tokens"], n) for n in range(job["repeats"])],
        "allocated_nbytes": allocated_nbytes(),
    }
    Path(job["answer"]).write_text(json.dumps(found), encoding="utf-8")


def _end_with_standard_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def timed(player: Player, prompt_tokens: int, decode_tokens: int, repeat: int) -> dict[str, int | None]:
    """Return nanoseconds and bytes read from the disk, of prefill and of decode after one step that is not counted.

    Each repeat has tokens of its own, so that it does not find the experts of the last one in memory.
    """
    count = prompt_tokens + decode_tokens + 1
    tokens = [number % player.vocabulary for number in range(repeat * count, (repeat + 1) * count)]
    player.begin()
    read, begun = read_nbytes(), time.perf_counter_ns()
    player.read(tokens[:prompt_tokens])
    prefill_ns, prefill_read = time.perf_counter_ns() - begun, since(read)
    player.read(tokens[prompt_tokens : prompt_tokens + 1])
    read, begun = read_nbytes(), time.perf_counter_ns()
    for token in tokens[prompt_tokens + 1 :]:
        player.read([token])
    decode_ns = time.perf_counter_ns() - begun
    return {
        "prefill_ns": prefill_ns,
        "decode_ns": decode_ns,
        "prefill_read_nbytes": prefill_read,
        "decode_read_nbytes": since(read),
    }


def read_nbytes() -> int | None:
    """Return the bytes that the disk has read for this process so far, page faults included; None if unknown."""
    return _field(Path("/proc/self/io"), "read_bytes:")


def since(before: int | None) -> int | None:
    """Return how many more they are than `before`."""
    now = read_nbytes()
    return None if now is None or before is None else now - before


def allocated_nbytes() -> int | None:
    """Return the memory of this process that no file stands behind; None if unknown."""
    kib = _field(Path("/proc/self/status"), "RssAnon:")
    return None if kib is None else kib * 1024


def _field(path: Path, name: str) -> int | None:
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    return None


# --- programs ---------------------------------------------------------------------------------------


class Stock:
    """A stock Transformers model."""

    def __init__(self, model: Any, how: str) -> None:
        self.model, self.vocabulary = model, model.config.vocab_size
        self.how = f"{how}; experts by {model.config._experts_implementation}"
        self.begin()

    def begin(self) -> None:
        self.cache: Any = None

    def read(self, tokens: Sequence[int]) -> None:
        import torch

        with torch.no_grad():
            out = self.model(torch.tensor([list(tokens)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values


def disk_offload(job: dict[str, Any]) -> Player:
    """Load as `device_map="auto"` does, which leaves on disk whatever is beyond `weights_nbytes` of memory."""
    from transformers import AutoModelForCausalLM

    _use_processors(job)
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype="bfloat16",
        device_map="auto",
        max_memory={"cpu": job["weights_nbytes"]},
        offload_folder=str(Path(job["folder"]) / "offload"),
    ).eval()
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())  # none where all fits
    return Stock(
        model, f"{places.count('disk')} of {len(places)} modules on disk; a module's file is mapped anew when it runs"
    )


def memory_mapped(job: dict[str, Any]) -> Player:
    """Load with every weight a part of the memory-mapped file, which the system pages in and out."""
    from transformers import AutoModelForCausalLM

    _use_processors(job)
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype="bfloat16").eval()
    return Stock(model, "every weight in a memory-mapped file; pages move")


def _use_processors(job: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(job["threads"])


class LlamaCpp:
    """A GGUF file in llama.cpp, through the low-level functions of llama-cpp-python: there is no vocabulary."""

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers, options.use_mmap, options.use_mlock = 0, True, False
        self.model = llama_cpp.llama_model_load_from_file(job["file"].encode(), options)
        if not self.model:
            raise RuntimeError("llama.cpp does not load the file")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        asked = llama_cpp.llama_context_default_params()
        asked.n_ctx = job["prompt_tokens"] + job["decode_tokens"] + 1
        asked.n_batch = asked.n_ubatch = job["prompt_tokens"]
        asked.n_threads = asked.n_threads_batch = job["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, asked)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.how = "every weight in a memory-mapped file; pages move"

    def begin(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def read(self, tokens: Sequence[int]) -> None:
        given = (self.lib.llama_token * len(tokens))(*tokens)  # the batch only points to it
        batch = self.lib.llama_batch_get_one(given, len(tokens))
        if code := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp does not decode (code {code})")
        self.lib.llama_get_logits_ith(self.context, -1)  # waits for them


PLAYERS: dict[str, Callable[[dict[str, Any]], Player]] = {
    "disk_offload": disk_offload,
    "mmap": memory_mapped,
    "llama.cpp": LlamaCpp,
}

if __name__ == "__main__":
    main()
