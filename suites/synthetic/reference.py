"""Reference cells, timed: the synthetic models as plain Transformers runs them, resident or offloaded, and the engine.

Timing is on the wall clock, with the device idle before and after what is timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobile.costs.geometry import GEOMETRIES
from mobile.errors import Refused
from mobile.links.registry import LINKS, real_time_link
from mobile.live_model import compat
from mobile.machine.gpu import cuda_uuid
from mobile.machine.measure.steps import EVERYTHING
from mobile.machine.measure.timing import idle
from mobile.store import HostStore, unpacked
from suites.budget import memory_on
from suites.environment import environment
from suites.record import Item, Record, RunFolder
from suites.synthetic import disk_peers, models
from suites.synthetic.models import Synthetic
from suites.synthetic.reference_cells import DEVICE_MAP, DISK_PEERS, ENGINE_COST, FEW_LAYERS, ReferenceCell
from suites.telemetry import watched

GIB = 2**30
IMPLEMENTATIONS = ("eager", "grouped_mm")  # of Transformers' experts: one by one, as our kernel does, and grouped
BLOCKS = 40  # of four steps each: stock, ours, ours, stock


@dataclass(frozen=True)
class EngineCost:
    """Seconds of a decode step of `layers` MoE layers, everything resident: medians over ABBA blocks.

    `layer_seconds` is the median over blocks of (ours - stock) / layers, between its quartiles. The products are the
    same, so against "eager", whose kernel is ours, it is what the engine adds to a layer beside them.
    """

    stock: str
    layers: int
    blocks: int
    stock_seconds: float
    ours_seconds: float
    layer_seconds: float
    low_seconds: float
    high_seconds: float


def load(pieces: Sequence[ReferenceCell], run: RunFolder) -> None:
    """Load nothing: each cell makes a model of its own."""


def measure(cell: ReferenceCell, loaded: None, run: RunFolder) -> None:
    """Measure the cell and write its record."""
    record(cell, run.path).save(cell.output(run))


def record(cell: ReferenceCell, folder: Path = Path()) -> Record:
    """Measure the cell and return its record; one that this machine cannot do has no items and says why.

    A program that reads from disk finds its checkpoint below `folder` meanwhile.
    """
    begun = time.monotonic()
    device = torch.device(LINKS[cell.link].usual_device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    found: dict[str, Any] = {"engine": None, "refused": None, "stock": None}
    if cell.what in DISK_PEERS:
        found |= disk_peers.fields_of(cell)
    items: tuple[Item, ...] = ()
    layers = 0
    with watched(cuda_uuid() if device.type == "cuda" else None) as telemetry:
        try:
            if cell.what == ENGINE_COST:
                real = GEOMETRIES[cell.model.geometry].moe_layers
                layers = min(cell.layers or real, FEW_LAYERS)
                made = models.make(
                    cell.model.geometry, layers=layers, shrink=cell.shrink, device=device, seed=cell.seed
                )
                found["engine"] = [asdict(engine_cost(made, each)) for each in IMPLEMENTATIONS]
            elif cell.what in DISK_PEERS:
                layers = cell.layers or GEOMETRIES[cell.model.geometry].moe_layers
                peer = disk_peers.measure_peer(cell, folder)
                found |= peer.fields
                items = tuple(
                    _item(number, cell, one["prefill_ns"], one["decode_ns"], one["decode_read_nbytes"] or 0)
                    for number, one in enumerate(peer.repeats)
                )
            else:
                made = models.make(
                    cell.model.geometry, layers=cell.layers, shrink=cell.shrink, device="cpu", seed=cell.seed
                )
                layers = made.geometry.moe_layers
                model = plain(made)
                place = offloaded if cell.what == DEVICE_MAP else resident
                kind = model.config._experts_implementation
                found["stock"] = f"{place(model, device, cell.memory)}; experts by {kind}"
                items = tuple(_item(number, cell, *timed(model, device, cell)) for number in range(cell.repeats))
        except Refused as refused:
            found["refused"] = str(refused)
    return Record(
        id=cell.id,
        scope=cell.scope,
        weights=cell.model.weights,
        model=cell.model.name,
        geometry=cell.model.geometry,
        task=cell.task,
        strategy=cell.what,
        gamma=None,
        lossless=True,
        hardware=environment()["gpu"]["name"] if environment()["gpu"] else "processor",
        budget=cell.budget,
        slots=None,
        seed=cell.seed,
        config={
            "kind": "beside",
            "what": cell.what,
            "control": None,
            "swept": False,
            "family": cell.model.family,
            "training_seed": None,
            "moe_layers": layers,
            "real_moe_layers": GEOMETRIES[cell.model.geometry].moe_layers,
            "shrink": cell.shrink,
            "link": cell.link,
            "link_gb_per_s": None,
            "prompt_tokens": cell.prompt_tokens,
            "decode_tokens": cell.decode_tokens,
            "profile_sources": [],
            "data": [],
            **found,
        },
        environment={**environment(), "telemetry": telemetry()},
        items=items,
        wall_seconds=time.monotonic() - begun,
    )


# --- plain Transformers -----------------------------------------------------------------------------


def plain(made: Synthetic) -> Any:
    """Give the experts back to the model, in host memory, and return it; the store is emptied layer by layer."""
    assert isinstance(made.store, HostStore), "a file is not emptied"
    for number, layer in enumerate(made.layers):
        for name, view in made.store.views(number).items():
            weight = unpacked(view).clone(memory_format=torch.contiguous_format)
            setattr(layer.experts, name, nn.Parameter(weight, requires_grad=False))
        made.store.rows[number] = made.store.rows[number].new_empty(0)
        made.store.views(number).clear()
    return made.model


def resident(model: Any, device: torch.device, _memory: str) -> str:
    """Move everything to the device. Raise Refused where it has no room."""
    if device.type == "cuda":
        need, free = sum(weight.nbytes for weight in model.parameters()), torch.cuda.mem_get_info(device)[0]
        if need + GIB > free:
            raise Refused(f"All of it takes {need / GIB:.1f} GiB and the device has {free / GIB:.1f} GiB free.")
        model.to(device)
    return f"every weight on {device}"


def offloaded(model: Any, device: torch.device, memory: str) -> str:
    """Offload as `device_map="auto"` does: whole modules move, by accelerate's hooks. Raise Refused without it.

    On a CPU every module is offloaded to host memory and fetched again, so that the same hooks run.
    """
    if find_spec("accelerate") is None:
        raise Refused("accelerate is not installed, and Transformers' device_map needs it: pip install accelerate.")
    import accelerate

    if device.type == "cpu":
        accelerate.cpu_offload(model, execution_device=device)
        return "every module offloaded; whole layers move"
    total = torch.cuda.mem_get_info(device)[1]
    room = memory_on(memory, total) - GIB  # for all that is no weight, as much as an engine of that budget keeps back
    number = torch.cuda.current_device() if device.index is None else device.index
    most = {number: room, "cpu": 2 * sum(weight.nbytes for weight in model.parameters())}
    where = accelerate.infer_auto_device_map(model, max_memory=most, no_split_module_classes=model._no_split_modules)
    accelerate.dispatch_model(model, device_map=where, skip_keys=model._skip_keys_device_placement)
    off = sum(place == "cpu" for place in where.values())
    return f"{off} of {len(where)} modules offloaded; whole layers move"


@torch.no_grad()
def timed(model: Any, device: torch.device, cell: ReferenceCell) -> tuple[int, int]:
    """Return the nanoseconds of prefill and of the decode steps, after one step that is not counted."""
    vocabulary = model.config.vocab_size
    tokens = (torch.arange(cell.prompt_tokens + cell.decode_tokens + 1) % vocabulary).to(device)[None]
    idle(device)
    begun = time.perf_counter_ns()
    read = model(tokens[:, : cell.prompt_tokens], use_cache=True, logits_to_keep=1)
    cache = compat.going_on(model, compat.cache_of(read))
    idle(device)
    prefilled = started = time.perf_counter_ns()
    for step in range(cell.prompt_tokens, tokens.shape[1]):
        if step == cell.prompt_tokens + 1:
            idle(device)
            started = time.perf_counter_ns()
        model(tokens[:, step : step + 1], use_cache=True, logits_to_keep=1, **cache)
    idle(device)
    return prefilled - begun, time.perf_counter_ns() - started


def _item(number: int, cell: ReferenceCell, prefill_ns: int, decode_ns: int, decode_nbytes: int = 0) -> Item:
    return Item(
        doc=number,
        prompt_sha256="",
        prompt=None,
        output="",
        fallback_spans=(),
        answer=None,
        correct=None,
        prompt_tokens=cell.prompt_tokens,
        decode_tokens=cell.decode_tokens,
        fallbacks=0,
        ttft_ns=prefill_ns,
        decode_ns=decode_ns,
        decode_bytes=decode_nbytes,
    )


# --- the engine against it --------------------------------------------------------------------------


def engine_cost(made: Synthetic, implementation: str, blocks: int = BLOCKS) -> EngineCost:
    """Time decode steps of the model under the engine and of a plain copy in turn, with everything on the device."""
    theirs = copy.deepcopy(made.model)
    for number, layer in enumerate(compat.moe_layers(theirs)):
        for name, view in made.store.views(number).items():
            weight = unpacked(view).to(made.device, copy=True).contiguous()
            setattr(layer.experts, name, nn.Parameter(weight, requires_grad=False))
    theirs.set_experts_implementation(implementation)
    with made.attached(EVERYTHING, slots=made.geometry.total_experts, link=real_time_link(made.device.type)):
        steps = {"stock": _Steps(theirs, made.device), "ours": _Steps(made.model, made.device)}
        order = ("stock", "ours", "ours", "stock")
        found: dict[str, list[float]] = {name: [] for name in steps}
        for block in range(blocks + 5):  # the first five warm up
            taken = [(name, steps[name].seconds()) for name in order]
            if block >= 5:
                for name in steps:
                    found[name].append(statistics.fmean(t for which, t in taken if which == name))
    layers = made.geometry.moe_layers
    beyond = [(ours - theirs) / layers for ours, theirs in zip(found["ours"], found["stock"], strict=True)]
    low, middle, high = statistics.quantiles(beyond, n=4)
    return EngineCost(
        stock=implementation,
        layers=layers,
        blocks=blocks,
        stock_seconds=statistics.median(found["stock"]),
        ours_seconds=statistics.median(found["ours"]),
        layer_seconds=middle,
        low_seconds=low,
        high_seconds=high,
    )


class _Steps:
    """A decode step of a model, to be timed again and again at the same place of a sequence."""

    @torch.no_grad()
    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.token = torch.tensor([[7]], device=device)
        self.cache = compat.cache_of(model(torch.arange(3, 19, device=device)[None], use_cache=True))
        self.going_on = compat.going_on(model, self.cache)

    @torch.no_grad()
    def seconds(self) -> float:
        """Run the step once and return what it took."""
        idle(self.device)
        begun = time.perf_counter()
        self.model(self.token, logits_to_keep=1, **self.going_on)
        idle(self.device)
        taken = time.perf_counter() - begun
        self.cache.crop(-1)
        return taken
