"""Measurements that `fit_profile` fits a profile to, made on this machine: copies, kernels, steps. Under a minute.

Everything goes the engine's own way: rows over its channel, experts through its kernel, steps through an attached
model. On a GPU the rows lie in registered memory. Without one, the link is a thread that copies within host memory, so
that the same path runs anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig

from mobile.costs.cost_model import EXPERT_LAUNCHES
from mobile.costs.geometry import Geometry
from mobile.errors import Refused
from mobile.kernels import kernel_named
from mobile.kernels.loop import Groups, expert_output
from mobile.links.paced import PacedChannel
from mobile.links.registry import real_time_link
from mobile.links.stream import Channel
from mobile.live_model import compat
from mobile.machine.fit_profile import SIZES, Depth, Measurements, Timing
from mobile.machine.gpu import gpus
from mobile.machine.host import host, software
from mobile.policies.strategy import Strategy
from mobile.runtime.attachment import attach
from mobile.store.layout import layout_of
from mobile.store.memory import HostStore

MIB = 2**20
EVERYTHING = Strategy(
    name="everything-resident", summary="nothing is copied", source="calibration", lossless=True, retain="everything"
)
Say = Callable[[str], None]
Pace = Callable[[int], int]  # nanoseconds that a paced link takes for so many bytes


@dataclass(frozen=True)
class Sizes:
    """The sizes that are timed: experts of `hidden` by each of `widths`, of one layer `experts` of which `top_k` run.

    Rows are read in turn from `pool_nbytes`, so that no cache holds them. A timing is the least of `repeats`, each of
    as many runs as take `at_least_seconds`.
    """

    hidden: int
    widths: tuple[int, ...]
    reads_nbytes: tuple[int, ...]
    pool_nbytes: int
    matmul: int
    depths: tuple[int, ...]
    experts: int = 16
    top_k: int = 8
    tokens: int = 24
    repeats: int = 5
    at_least_seconds: float = 0.05


# A GPU is read in pieces large enough to outlast their launch. Widths give rows like the real families'.
ON_GPU = Sizes(
    hidden=2048,
    widths=(512, 768, 1024, 1408, 2048, 4096),
    reads_nbytes=(64 * MIB, 128 * MIB, 256 * MIB),
    pool_nbytes=512 * MIB,
    matmul=8192,
    depths=(2, 4, 8),
)
ON_CPU = Sizes(
    hidden=512,
    widths=(128, 256, 512, 1024),
    reads_nbytes=(4 * MIB, 8 * MIB, 16 * MIB),
    pool_nbytes=64 * MIB,
    matmul=512,
    depths=(1, 3),
    tokens=8,
    repeats=9,
    at_least_seconds=0.004,
)

# For tests: the same path in seconds. A profile of it is as good as that.
NARROW = Sizes(
    hidden=256,
    widths=(32, 128, 512),
    reads_nbytes=(MIB // 4, MIB, 4 * MIB),
    pool_nbytes=16 * MIB,
    matmul=64,
    depths=(1, 2),
    experts=4,
    top_k=2,
    tokens=4,
    repeats=15,
    at_least_seconds=0.001,
)


def sizes_for(device: torch.device) -> Sizes:
    """Return the sizes to time on a device."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def measure(
    device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None, *, say: Say = lambda what: None
) -> Measurements:
    """Time everything that a profile holds; `say` is called with the name of each part before it is timed.

    The link is as it is; `relinked` times another. Raise Refused as the link does.
    """
    sizes = sizes or sizes_for(device)
    about, taken, total = _machine(device)
    say("copies over the link")
    copied = copies(device, dtype, sizes)
    say("kernels")
    matrices, experts = kernels(device, dtype, sizes)
    rate = tflops(device, dtype, sizes)
    processor, cpu_rate = experts, rate
    if device.type != "cpu":
        say("experts on the processor")
        cpu = torch.device("cpu")
        processor, cpu_rate = host_experts(dtype, sizes), tflops(cpu, dtype, ON_CPU)
    say("decode steps")
    layer, depths = steps(device, dtype, sizes)
    return Measurements(
        device=about.partition(",")[0],
        about=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {about}, {_name(dtype)}",
        copies=copied,
        kernels=(*matrices, *experts),
        cpu_kernels=processor,
        depths=depths,
        layer=layer,
        tflops=rate,
        cpu_tflops=cpu_rate,
        memory_nbytes=total,
        taken_nbytes=taken,
    )


def relinked(
    measured: Measurements,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
    *,
    link_gb_per_s: float | None = None,
    pace: Pace | None = None,
) -> Measurements:
    """Measure the same machine with another link: only the copies are timed again.

    `link_gb_per_s` throttles a real link, `pace` a paced one, as they do in `attach`. Raise Refused as the link does.
    """
    found = copies(device, dtype, sizes or sizes_for(device), link_gb_per_s=link_gb_per_s, pace=pace)
    return replace(measured, copies=found)


def _machine(device: torch.device) -> tuple[str, int, int]:
    """Return a description of the device, the bytes of its memory that cannot be had, and all of its bytes."""
    versions = software()
    if device.type == "cuda":
        torch.zeros(1, device=device)  # so that the context is among what is taken
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        driver = next((gpu.driver for gpu in gpus() if gpu.name == name), None)
        about = f"{name}, driver {driver or 'unknown'}, torch {versions.torch}, CUDA {versions.torch_cuda}"
        return about, total - free - torch.cuda.memory_reserved(device), total
    here = host()
    total = here.memory_total_nbytes or 2**30
    if isinstance(here.container_limit_nbytes, int):
        total = min(total, here.container_limit_nbytes)
    cpu = (here.cpu or "processor").replace(",", " ")
    return (
        f"{cpu}, {torch.get_num_threads()} thread(s), torch {versions.torch}",
        total - (here.usable_nbytes or total),
        total,
    )


def _name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def idle(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(device: torch.device, jobs: Sequence[Callable[[int], Any]], sizes: Sizes) -> list[float]:
    """Return the seconds of one run of each job: the least of some rounds, in which all jobs take turns.

    Other programs can only add to a time, so the least is nearest. A job is called with a number that counts up.
    """
    runs, numbers = [1] * len(jobs), [0] * len(jobs)

    def some(which: int) -> float:
        idle(device)
        begun = time.perf_counter()
        for _ in range(runs[which]):
            jobs[which](numbers[which])
            numbers[which] += 1
        idle(device)
        return time.perf_counter() - begun

    for which in range(len(jobs)):
        some(which)  # warm up
        while (taken := some(which)) < sizes.at_least_seconds:
            more = round(1.2 * runs[which] * sizes.at_least_seconds / max(taken, 1e-6))
            runs[which] = min(4 * runs[which], max(runs[which] + 1, more))
    rounds = [[some(which) / runs[which] for which in range(len(jobs))] for _ in range(sizes.repeats)]
    return [min(each) for each in zip(*rounds, strict=True)]


# --- the link ---------------------------------------------------------------------------------------


def copies(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    *,
    link_gb_per_s: float | None = None,
    pace: Pace | None = None,
) -> tuple[Timing, ...]:
    """Time copies of rows by the engine's own channel and its clock; return the time a row of each size."""
    unreached: Refused | None = None
    with ExitStack() as open_ones:
        timed = []
        for width in sizes.widths:
            layout = layout_of({"w": torch.empty(1, 3 * sizes.hidden * width, dtype=dtype)})
            rows = max(sizes.top_k, sizes.pool_nbytes // layout.nbytes)
            store = HostStore(layout, 1, rows)
            store.rows[0].fill_(1)
            slots = torch.zeros(rows, layout.numel, dtype=dtype, device=device)
            try:
                channel = _channel(device, store, slots, link_gb_per_s, pace)
            except Refused as refused:
                if link_gb_per_s is None:
                    raise
                unreached = refused  # small rows do not reach what is asked for, and larger ones may
                continue
            open_ones.callback(channel.close)
            timed.append((layout.nbytes, rows, channel))
        if unreached is not None and len(timed) < SIZES:
            raise unreached
        rounds = [[_run_of(rows, channel) for _, rows, channel in timed] for _ in range(sizes.repeats + 1)]
    fastest = [min(each) for each in zip(*rounds[1:], strict=True)]  # the first warms the link up
    return tuple(Timing(nbytes, 1, ns / 1e9) for (nbytes, _, _), ns in zip(timed, fastest, strict=True))


def _run_of(rows: int, channel: Channel) -> float:
    """Return the nanoseconds from one copy's end to the next one's: the median of copies that follow on one another."""
    for slot in range(rows):
        channel.begin((0, slot), slot)
    channel.finish(rows - 1)
    ends = [channel.span(slot)[1] for slot in range(rows)]
    return statistics.median(after - before for before, after in pairwise(ends))


def _channel(
    device: torch.device, store: HostStore, slots: torch.Tensor, link_gb_per_s: float | None, pace: Pace | None
) -> Channel:
    def row(key: tuple[int, int]) -> torch.Tensor:
        return store.rows[key[0]][key[1]]

    if device.type == "cuda":
        from mobile.links.cuda import CudaChannel

        return CudaChannel(store, slots, row, link_gb_per_s)

    def fill(key: tuple[int, int], slot: int) -> None:
        slots[slot].copy_(row(key))

    return PacedChannel(fill, 0 if pace is None else pace(store.layout.nbytes))


# --- kernels ----------------------------------------------------------------------------------------


@torch.no_grad()
def kernels(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[tuple[Timing, ...], tuple[Timing, ...]]:
    """One token times matrices that no cache holds; and one expert of a decode step's top-k, by the default kernel.

    All jobs take turns.
    """
    module, kernel, k = _module(dtype), kernel_named("auto", device, dtype), sizes.top_k
    token = torch.ones(1, sizes.hidden, dtype=dtype, device=device)
    each = list(range(k))
    groups = Groups(
        each, [1] * k, each, torch.zeros(k, dtype=torch.long, device=device), torch.arange(k, device=device)
    )
    weights = torch.full((1, k), 1 / k, dtype=dtype, device=device)

    def reading(pool: torch.Tensor) -> Callable[[int], Any]:
        return lambda number: nn.functional.linear(token, pool[number % len(pool)])

    def running(views: Any, slots: int) -> Callable[[int], Any]:
        def run(number: int) -> None:
            wave = [(position, (number * k + position) % slots) for position in each]
            kernel(module, token, weights, groups, [wave], views)

        return run

    jobs, matrices, rows = [], [], []
    for nbytes in sizes.reads_nbytes:
        tall = nbytes // dtype.itemsize // sizes.hidden
        shape = max(2, sizes.pool_nbytes // nbytes), tall, sizes.hidden
        jobs.append(reading(torch.ones(shape, dtype=dtype, device=device)))
        matrices.append(tall * sizes.hidden * dtype.itemsize)
    for width in sizes.widths:
        views, slots, nbytes = _rows(width, device, dtype, sizes)
        jobs.append(running(views, slots))
        rows.append(nbytes)
    seconds = _seconds(device, jobs, sizes)
    several = len(matrices)
    return (
        tuple(Timing(nbytes, 1, taken) for nbytes, taken in zip(matrices, seconds[:several], strict=True)),
        tuple(Timing(nbytes, EXPERT_LAUNCHES, t / k) for nbytes, t in zip(rows, seconds[several:], strict=True)),
    )


@torch.no_grad()
def host_experts(dtype: torch.dtype, sizes: Sizes) -> tuple[Timing, ...]:
    """One expert of one token on the processor, from rows in host memory."""
    cpu, module = torch.device("cpu"), _module(dtype)
    hidden = torch.ones(1, sizes.hidden, dtype=dtype)

    def running(views: Any, slots: int) -> Callable[[int], Any]:
        return lambda number: expert_output(module, hidden, number % slots, views)

    rows = [_rows(width, cpu, dtype, sizes) for width in sizes.widths]
    seconds = _seconds(cpu, [running(views, slots) for views, slots, _ in rows], sizes)
    return tuple(Timing(nbytes, EXPERT_LAUNCHES, t) for (_, _, nbytes), t in zip(rows, seconds, strict=True))


def _rows(width: int, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[dict, int, int]:
    """Experts of that width in rows as the engine lays them out: views, how many, and the bytes of one."""
    shapes = {"gate_up_proj": (2 * width, sizes.hidden), "down_proj": (sizes.hidden, width)}
    layout = layout_of({name: torch.empty(1, *shape, dtype=dtype, device="meta") for name, shape in shapes.items()})
    slots = max(sizes.top_k, sizes.pool_nbytes // layout.nbytes)
    return layout.views(torch.ones(slots, layout.numel, dtype=dtype, device=device)), slots, layout.nbytes


def _module(dtype: torch.dtype) -> Any:
    """Return an experts module of which kernels read only the structure, not the weights."""
    return compat.moe_layers(_model(torch.device("cpu"), dtype, 1, 64, 32, 4, 2))[0].experts


def tflops(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    """Return the rate of a large square product."""
    side = sizes.matmul
    a = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _seconds(device, [lambda number: a @ a], sizes)[0] / 1e12


# --- decode steps -----------------------------------------------------------------------------------


@torch.no_grad()
def steps(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[Geometry, tuple[Depth, ...]]:
    """Decode steps of an attached model with everything resident, at several depths; what calls the model is not in it.

    A step's time is the median of some tokens, the least of that over the turns.
    """
    width = sizes.widths[len(sizes.widths) // 2]
    model = _model(device, dtype, max(sizes.depths), sizes.hidden, width, sizes.experts, sizes.top_k)
    attach(model, EVERYTHING, slots=max(sizes.depths) * sizes.experts, link=real_time_link(device.type))
    geometry = model.mobile.geometry
    prompt, token = torch.arange(3, 11, device=device)[None], torch.tensor([[7]], device=device)
    taken: dict[int, list[float]] = {depth: [] for depth in sizes.depths}
    try:
        for _ in range(sizes.repeats + 1):
            for depth in sizes.depths:  # in turn, so that a busy machine slows all
                model.config.num_hidden_layers = depth
                cache = compat.going_on(model, compat.cache_of(model(prompt, use_cache=True)))
                model(token, **cache)
                taken[depth].append(statistics.median(_step(model, token, cache) for _ in range(sizes.tokens)))
    finally:
        model.mobile.uninstall(give_back=False)
    return geometry, tuple(Depth(depth, min(found[1:])) for depth, found in taken.items())


def _step(model: Any, token: torch.Tensor, cache: dict[str, Any]) -> float:
    """Seconds from an idle device to an idle device."""
    idle(token.device)
    begun = time.perf_counter()
    model(token, **cache)
    idle(token.device)
    return time.perf_counter() - begun


def _model(
    device: torch.device, dtype: torch.dtype, layers: int, hidden: int, width: int, experts: int, top_k: int
) -> Any:
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 128),
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    return model
