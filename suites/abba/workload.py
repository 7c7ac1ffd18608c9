"""One timed process: the same decode steps of one model under given strategies, wall time to one JSON file.

    python -m suites.abba.workload --strategy mobile --strategy on-demand --out here.json

It imports torch, transformers and the public API of `mobile`, and nothing else of ours, so that this one file times
any commit: `suites.abba` runs it by its path, with that commit's tree in front of all others on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OlmoeConfig

import mobile

HERE = Path(__file__).resolve().parent.parent
SHIPPED = HERE / "models" / "olmoe-tiny"
TEXT = HERE / "tasks" / "data" / "boolean_expressions.jsonl"  # what shipped models were taught, word for word like it
PROMPT = 24  # tokens
NO_LINK = 3  # exit code where the commit that is timed does not have the link; why is the last line of the output
IN_MEMORY = ("tmpfs", "ramfs")  # kinds of file systems
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m suites.abba.workload",
        description="One timed process: the same decode steps of one model under given strategies, to one JSON file.",
    )
    top.add_argument("--strategy", action="append", help="may be given again (default: mobile)")
    top.add_argument("--model", type=Path, default=SHIPPED, help=f"a checkpoint's folder (default: {SHIPPED.name})")
    top.add_argument(
        "--layers",
        type=int,
        help="instead of a checkpoint: so many layers of OLMoE-1B-7B's size with random bf16 weights, 0.8 GB each. "
        "Their routing means nothing, the bytes they move are real",
    )
    top.add_argument("--slots", type=int, help="expert slots on the device (default: a quarter of all experts)")
    top.add_argument("--steps", type=int, default=64, help="decode steps in a repeat (default: 64)")
    top.add_argument("--repeats", type=int, default=5, help="timed repeats (default: 5)")
    top.add_argument("--warm-up", type=int, default=1, help="untimed repeats before them (default: 1)")
    top.add_argument(
        "--link",
        choices=("auto", "cuda", "disk", "paced", "virtual"),
        default="auto",
        help="auto: cuda with a GPU; without one paced, which sleeps for as long as a PCIe 4.0 copy would take. With "
        "disk experts are read from a file, on any machine; with virtual nothing sleeps, and the time is what the "
        "processor takes",
    )
    top.add_argument(
        "--store",
        type=Path,
        metavar="FOLDER",
        help="with --link disk, a folder on the disk that is to be timed; nothing is left in it (default: that of "
        "--out)",
    )
    top.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    return top


def gpu() -> dict[str, str | None] | None:
    """Return name and UUID of the GPU that is timed; None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = getattr(found, "uuid", None)
    return {"name": found.name, "uuid": None if uuid is None else str(uuid)}


def cpu() -> str | None:
    """Return the name that Linux has for the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def disk(folder: Path) -> dict[str, str | None]:
    """Return the file system, its source, and the disk's model, as far as Linux tells; None is unknown."""
    number = folder.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    found: dict[str, str | None] = {"file_system": None, "source": None, "model": None}
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        if line.split()[2] == device:
            found["file_system"], found["source"] = line.split(" - ", 1)[1].split()[:2]
    block = Path(f"/sys/dev/block/{device}").resolve()
    for place in (block, block.parent):  # of a partition the model is one folder up
        if (place / "device/model").is_file():
            found["model"] = (place / "device/model").read_text(encoding="utf-8").strip() or None
    return found


def git(*arguments: str) -> str | None:
    """Ask git about the tree that `mobile` was imported from; as in `suites.environment`, it takes no lock."""
    words = ["git", "--no-optional-locks", "-C", str(Path(mobile.__file__).parent), *arguments]
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def surroundings() -> dict[str, Any]:
    """Return what the time depends on: tree, packages, processor, GPU."""
    status = git("status", "--porcelain")
    return {
        "tree": str(Path(mobile.__file__).resolve().parent.parent),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu(),
        "gpu": gpu(),
    }


def text_ids(folder: Path, length: int) -> list[int]:
    """Return the first `length` tokens of the shipped text, in the model's own tokens. Raise SystemExit for fewer."""
    rows = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(row["prompt"] + row["worked"] for row in rows)
    ids = tokenizer(text, truncation=True, max_length=length).input_ids
    if len(ids) < length:
        raise SystemExit(f"The text has {len(ids)} tokens and {length} are needed; give fewer --steps.")
    return ids


def check_positions(config: Any, length: int) -> None:
    """Raise SystemExit if the model has fewer positions than `length`."""
    positions = getattr(config, "max_position_embeddings", length)
    if length > positions:
        raise SystemExit(f"The model has {positions} positions and {length} are needed; give fewer --steps.")


def quarter(config: Any) -> int:
    """Return a quarter of all experts, and no fewer than a token uses."""
    experts = next(getattr(config, name) for name in EXPERTS if hasattr(config, name))
    layers = config.num_hidden_layers - (getattr(config, "first_k_dense_replace", None) or 0)
    return max(config.num_experts_per_tok, experts * layers // 4)


def layers_of_olmoe(number: int) -> tuple[Any, Any]:
    """Return OLMoE-1B-7B cut down to `number` layers, with the same random weights every time, and its config."""
    config = OlmoeConfig(
        num_hidden_layers=number,
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=1024,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), config


def wait() -> None:
    """Wait until the GPU, if there is one, is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sums(model: Any) -> dict[str, float]:
    """Return the counters of the engine without the rate, which does not add up, and those that are unknown."""
    counted = model.mobile.stats()
    return {name: value for name, value in counted.items() if name != "hit_rate" and isinstance(value, int | float)}


@torch.no_grad()
def repeat(model: Any, ids: torch.Tensor) -> tuple[dict[str, Any], list[int]]:
    """Time prefill and decode of `ids` (1, PROMPT + steps), whatever the model itself would write, on the wall clock.

    Return the time and what the strategy counted in the meantime, and the token the model would have written at
    each step.
    """
    cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
    before, written = sums(model), []
    wait()
    begun = time.perf_counter_ns()
    for at in range(PROMPT, ids.shape[1]):
        output = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        written.append(int(output.logits[0, -1].argmax()))  # as generate() does, the next step waits for this one
    wait()
    taken = time.perf_counter_ns() - begun
    counted = {name: value - before.get(name, 0) for name, value in sums(model).items()}
    return {"wall_ns": taken, "counters": counted}, written


@contextmanager
def place(link: str, store: Path) -> Iterator[dict[str, Any]]:
    """Yield the keywords that name the link, with a folder inside `store` for experts on disk, gone after the block.

    What lies in it then is still read by who has opened it.
    """
    if link != "disk":
        yield {"link": link}
        return
    with tempfile.TemporaryDirectory(prefix="mobile-abba-", dir=store) as folder:
        yield {"link": link, "store": folder}


def check_disk(store: Path) -> None:
    """Raise SystemExit where the commit cannot read experts from a disk, or `store` is none."""
    if "store" not in inspect.signature(mobile.attach).parameters:
        print("no link disk")
        raise SystemExit(NO_LINK)
    if not store.is_dir():
        raise SystemExit(f"There is no folder {store}; give another --store.")
    if disk(store)["file_system"] in IN_MEMORY:
        raise SystemExit(f"{store} lies in memory and on no disk; give another --store.")


def timed(options: argparse.Namespace, device: str, link: str, store: Path) -> Iterator[dict[str, Any]]:
    """Yield one result for each strategy, in the given order."""
    length = PROMPT + options.steps
    made: Any = None
    if options.layers is not None:
        made, config = layers_of_olmoe(options.layers)
        made.to(device)
    else:
        config = AutoConfig.from_pretrained(options.model).get_text_config()
    check_positions(config, length)
    if made is not None:
        numbers = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        numbers = text_ids(options.model, length)
    ids = torch.tensor([numbers], device=device)
    for name in options.strategy or ["mobile"]:
        slots = None if name == "resident" else options.slots or quarter(config)  # it holds all experts
        with place(link, store) as where:
            if made is not None:
                model = mobile.attach(made, name, slots=slots, **where)
            else:
                dtype: Any = "auto" if device == "cuda" else torch.float32
                model = mobile.load(options.model, name, slots=slots, device=device, dtype=dtype, **where)
        for _ in range(options.warm_up):
            repeat(model, ids)
        repeats, written = zip(*(repeat(model, ids) for _ in range(options.repeats)), strict=True)
        yield {
            "strategy": name,
            "slots": slots,
            "repeats": repeats,
            "written": written[-1],
            "ids_sha256": hashlib.sha256(json.dumps(numbers).encode()).hexdigest(),
        }
        mobile.detach(model)


def main() -> None:
    options = parser().parse_args()
    device = "cuda" if torch.cuda.is_available() and options.link in ("auto", "cuda") else "cpu"
    link = {"auto": "cuda" if device == "cuda" else "paced"}.get(options.link, options.link)
    store = options.store or options.out.absolute().parent
    if link == "disk":
        check_disk(store)
    if device == "cpu":
        torch.set_num_threads(1)  # so that the machine's other cores do not decide
    work = {name: getattr(options, name) for name in ("layers", "steps", "repeats", "warm_up")}
    result = {
        **surroundings(),
        **work,
        "link": link,
        "disk": disk(store) if link == "disk" else None,
        "model": options.model.name if options.layers is None else None,
        "strategies": list(timed(options, device, link, store)),
    }
    partial = options.out.with_name(f"{options.out.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.replace(options.out)


if __name__ == "__main__":
    main()
