"""The disk link beside a plain reader of the same rows, and the engine's Python for an expert. `nox -s bench`."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import mobile
from mobile.ledger import Event, Key, Ledger
from mobile.links.stream import StreamLink
from mobile.links.threads import ThreadChannel
from mobile.store.disk import bytes_of, page_aligned_rows
from mobile.store.layout import PAGE

LAYERS, TOP_K, ROUNDS, WARM_UP = 2, 8, 40, 4


def quartiles(values: Sequence[float], digits: int = 3) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    ordered = sorted(values)
    return [round(ordered[len(ordered) * part // 4], digits) for part in (1, 2, 3)]


def step_of(model) -> Callable[[], None]:
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values
    tokens = iter(range(6, 10**9))

    @torch.no_grad()
    def step() -> None:
        model(torch.tensor([[next(tokens) % 1000]]), past_key_values=cache)
        cache.crop(-1)

    return step


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator:
    """Two layers of OLMoE-1B-7B's size in bf16, 1.6 GB of experts in a file without a name, and 16 slots."""
    try:
        os.close(os.open(tmp_path, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT, 0o600))
    except OSError as error:
        pytest.skip(f"{tmp_path} takes no direct reads ({error}); give --basetemp on a disk")
    torch.manual_seed(0)
    config = OlmoeConfig(
        num_hidden_layers=LAYERS, vocab_size=1024, intermediate_size=1024, num_experts=64, num_experts_per_tok=TOP_K
    )
    config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    yield mobile.attach(model, "on-demand-overlap", slots=2 * TOP_K, link="disk", store=tmp_path)
    model.mobile.close()


def busy_seconds(loads: Sequence[Event]) -> float:
    """Seconds in which any of the copies was under way: the union of their spans."""
    total = until = 0
    for load in sorted(loads, key=lambda load: load.start_ns):
        total += max(0, load.end_ns - max(load.start_ns, until))
        until = max(until, load.end_ns)
    return total / 1e9


def read_plainly(engine, keys: Sequence[Key], memory: Sequence[memoryview], depth: int) -> None:
    """The limit: `depth` threads that read rows in turn, and look at none of them."""
    turns, file = iter(enumerate(keys)), engine.store.file
    taking = threading.Lock()

    def read() -> None:
        while True:
            with taking:
                number, key = next(turns, (0, None))
            if key is None:
                return
            assert os.preadv(file._reading, [memory[number]], file._offset(*key)) == len(memory[number])

    threads = [threading.Thread(target=read) for _ in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_by_link(link: StreamLink, keys: Sequence[Key]) -> None:
    """The link with nothing computed beside it."""
    for slot, key in enumerate(keys):
        link.submit(key, slot, demand=True)
    for key in keys:
        link.wait(key)


def test_disk_link_beside_a_plain_reader(benchmark, on_disk):
    """On-demand-overlap decode steps, the link alone, and a plain reader, in turn: the same rows, order and depth.

    Each layer's rows are one batch for all, since no on-demand link can know the next layer's, and all read into memory
    of the same kind. The rate in a step counts the time in which any copy is under way, with experts computed beside
    it. `unchecked` is the link alone without the checksum of each row, which takes time of a processor.
    """
    engine, step = on_disk.mobile, step_of(on_disk)
    depth, row = len(engine.link.channel.threads), engine.store.layout.nbytes
    rows = page_aligned_rows(TOP_K, engine.store.layout)
    memory = [bytes_of(one) for one in rows]
    for one in memory:
        one[:] = bytes(len(one))  # so that the system gives it pages now, as a slot has them

    def fill_unchecked(key: Key, slot: int) -> None:
        file = engine.store.file
        assert os.preadv(file._reading, [bytes_of(engine.slot_rows[slot])], file._offset(*key)) == row

    links = {
        name: StreamLink(ThreadChannel(fill, depth), row, Ledger(0), lambda *_: None, committed=depth + 1)
        for name, fill in (("alone", engine.fill), ("unchecked", fill_unchecked))
    }
    rates: dict[str, list[float]] = {"step": [], "alone": [], "unchecked": [], "plain": []}
    turns = iter(range(10**9))

    def one_round() -> None:
        engine.ledger.events.clear()
        step()
        loads = sorted((event for event in engine.ledger.events if event.what == "load"), key=lambda e: e.start_ns)
        batches = [[load.about for load in batch] for _, batch in groupby(loads, key=lambda load: load.about[0])]
        nbytes = len(loads) * row
        assert [len(batch) for batch in batches] == [TOP_K] * LAYERS
        rates["step"].append(nbytes / busy_seconds(loads) / 1e9)
        names = [*links, "plain"]
        for name in names if next(turns) % 2 else reversed(names):
            begun = time.perf_counter()
            for batch in batches:
                if name == "plain":
                    read_plainly(engine, batch, memory, depth)
                else:
                    read_by_link(links[name], batch)
            rates[name].append(nbytes / (time.perf_counter() - begun) / 1e9)

    benchmark.pedantic(one_round, rounds=ROUNDS, iterations=1, warmup_rounds=WARM_UP)
    for link in links.values():
        link.close()
    kept = {name: found[WARM_UP:] for name, found in rates.items()}
    benchmark.extra_info["depth"] = depth
    for name, found in kept.items():
        benchmark.extra_info[f"{name}_gb_per_s"] = quartiles(found)
    for name in ("step", *links):
        pairs = zip(kept[name], kept["plain"], strict=True)
        benchmark.extra_info[f"{name}_over_plain"] = quartiles([ours / plain for ours, plain in pairs])


def test_python_for_an_expert_over_the_disk_link(benchmark, tmp_path):
    """Microseconds that a step takes longer than stock eager's, an expert: all but the kernels and the read itself.

    Experts of a page each are loaded on demand through the link's queue and threads, whose read does nothing.
    """
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=32,
        intermediate_size=10,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1024,
        num_experts=64,
        num_experts_per_tok=TOP_K,
        eos_token_id=None,
    )
    stock = AutoModelForCausalLM.from_config(config).eval()
    stock.set_experts_implementation("eager")
    ours = mobile.attach(copy.deepcopy(stock), "on-demand-overlap", slots=2 * TOP_K, link="disk", store=tmp_path)
    assert ours.mobile.store.layout.nbytes == PAGE
    ours.mobile.store.file.read = lambda *_: None
    steps = {"stock": step_of(stock), "ours": step_of(ours)}
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}

    def both() -> None:
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)

    benchmark.pedantic(both, rounds=200, iterations=1, warmup_rounds=20)
    experts = config.num_hidden_layers * TOP_K
    pairs = zip(seconds["ours"][20:], seconds["stock"][20:], strict=True)
    benchmark.extra_info["us_an_expert"] = quartiles([(mine - theirs) / experts * 1e6 for mine, theirs in pairs], 1)
    mobile.detach(ours)
