"""Cells timed live: one prompt at a time, each strategy writing its own answers, on the clock of the link.

With the link cuda this is the measurement of wall time on a GPU, real bytes over a real link. With the links virtual
and paced the same code runs anywhere; over virtual its times are those that a replay gives, to the nanosecond.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import mobile
from mobile.checkpoints.examine import download, skeleton
from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.costs.hardware import profile
from mobile.errors import Refused
from mobile.ledger import Counters
from mobile.links.registry import LINKS, needs_gpu
from mobile.live_model.compat import common_layout, geometry_of, moe_layers
from mobile.machine.gpu import cuda_uuid, link_rates
from mobile.policies.strategy import resolve
from suites.budget import is_memory, memory_on, replay_setup
from suites.environment import environment
from suites.identity import Model
from suites.measure.generate import shown, spans_of
from suites.measure.replayed import Measured, record_of
from suites.plan.cells import Cell
from suites.record import Item, Record, RunFolder
from suites.scoring.lm_eval import EngineLM, evaluate, generate, sha256
from suites.telemetry import watched


class TokenClock:
    """A streamer of one sequence: the link's clock and the fallback counter at the time of each token.

    On a GPU a token is given to a streamer when it has been copied to the host, so all kernels behind it are done.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.begun = engine.link.now
        self.times: list[int] = []
        self.fallbacks: list[int] = []
        self._prompted = False

    def put(self, tokens: torch.Tensor) -> None:
        if not self._prompted:  # generate() first shows the prompt
            self._prompted = True
            return
        self.times.append(self.engine.link.now)
        self.fallbacks.append(self.engine.ledger.counters.fallbacks)

    def end(self) -> None:
        """Do nothing: no token is buffered."""

    @property
    def fell(self) -> list[int]:
        """Return the numbers of the tokens that a big pass wrote."""
        before = [self.fallbacks[0], *self.fallbacks[:-1]]
        return [n for n, (old, new) in enumerate(zip(before, self.fallbacks, strict=True)) if new > old]


class TimedLM(EngineLM):
    """Answers alone and in the given order; keeps each answer's clock and what it added to the counters.

    The first prompt is answered once before that, cold; `warm_up` is the clock of that answer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model, tokenizer, batch_size=1)
        self.clocks: dict[str, TokenClock] = {}
        self.taken: dict[str, Counters] = {}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        outputs, engine = [], self.model.mobile
        prompt, options = requests[0].args
        self.warm_up = TokenClock(engine)  # kernels are compiled, memory is touched
        generate(self.model, self.hf_tokenizer, [prompt], options, self.warm_up)
        engine.restart()
        for request in requests:
            prompt, options = request.args
            name, before, clock = sha256(prompt), engine.ledger.counters.copy(), TokenClock(engine)
            [(text, ids)] = generate(self.model, self.hf_tokenizer, [prompt], options, clock)
            engine.residency.end_token()
            self.prompts[name], self.written[name], self.clocks[name] = prompt, ids, clock
            self.taken[name] = engine.ledger.counters.since(before)
            outputs.append(text)
        return outputs


@dataclass(frozen=True)
class Loaded:
    """A model attached for a cell, and for all cells that differ from it in their task only.

    `source` names its folder (of the hub, the commit), `link_gb_per_s` is measured on a GPU, else the profile's.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: str
    link_gb_per_s: float | None


def load(cells: Sequence[Cell], run: RunFolder) -> Loaded:
    """Load the checkpoint of these cells with their strategy attached.

    Raise Refused for a checkpoint that is not the real model it is said to be, and for whatever mobile.load refuses.
    """
    cell = cells[0]
    asked, real = cell.generation.model, needs_gpu(cell.link)
    capacity: dict[str, Any] = {"memory": cell.budget}
    if is_memory(cell.budget) and real:  # refused before anything is downloaded for it
        capacity = {"memory": memory_on(cell.budget, torch.cuda.mem_get_info()[1])}
    folder = checkpoint(asked)
    dtype: Any = "auto" if real else torch.float32
    empty = skeleton(folder, dtype=dtype)
    layers = moe_layers(empty)
    native, named = geometry_of(empty, layers, common_layout(layers)), GEOMETRIES[asked.geometry]
    if asked.weights == "real" and _layer_sizes(native) != _layer_sizes(named):
        raise Refused(
            f"{folder} has {_layer_sizes(native)} MoE layers, experts and top-k, and {named.name} has "
            f"{_layer_sizes(named)}; give the real checkpoint, or another geometry."
        )
    card, strategy = profile(cell.hardware), resolve(cell.strategy, cell.gamma)
    charged = None if LINKS[str(cell.link)].real_time else asked.geometry
    if not is_memory(cell.budget):
        setup = replay_setup(strategy, native, charged, card, cell.budget, rows=cell.generation.rows)
        capacity = {"slots": setup.slots}
    measured = link_rates() if real else None
    if not real:
        torch.set_num_threads(1)  # so that results do not depend on the machine's cores
    model = mobile.load(
        folder,
        strategy,
        **capacity,
        hardware=cell.hardware,
        link=str(cell.link),
        geometry=charged,
        rows=cell.generation.rows,
        progress=False,
        device="cuda" if real else "cpu",
        dtype=dtype,
    )
    rate = card.link_gb_per_s if not real else measured.pinned_gb_per_s if measured is not None else None
    return Loaded(model, AutoTokenizer.from_pretrained(folder), folder.name, rate)


def _layer_sizes(geometry: Geometry) -> tuple[int, ...]:
    return geometry.moe_layers, geometry.experts, geometry.top_k


def checkpoint(model: Model) -> Path:
    """Return the model's folder; download it from the hub unless it is in the cache. Raise Refused."""
    if model.hub is None:
        return model.folder
    try:
        return download(model.hub, revision=model.revision)
    except Refused as refused:
        raise Refused(f"{str(refused).rstrip('.')}; or give --model {model.name}=FOLDER with a copy.") from refused


def measure(cell: Cell, loaded: Loaded, run: RunFolder) -> None:
    """Answer the cell's items and write its record."""
    record(cell, loaded).save(cell.output(run))


def record(cell: Cell, loaded: Loaded) -> Record:
    """Answer the cell's items, one by one, and return what came out and how long it took."""
    begun = time.monotonic()
    generation, engine, strategy = cell.generation, loaded.model.mobile, resolve(cell.strategy, cell.gamma)
    lm = TimedLM(loaded.model, loaded.tokenizer)
    with watched(cuda_uuid(engine.device.index) if needs_gpu(cell.link) else None) as telemetry:
        answers = evaluate(lm, generation.task, cell.docs, generation.folder)
    items = []
    for answer in answers:
        clock, taken = lm.clocks[answer.prompt_sha256], lm.taken[answer.prompt_sha256]
        ids = lm.written[answer.prompt_sha256]
        items.append(
            Item(
                **asdict(answer),
                prompt=shown(generation, lm.prompts[answer.prompt_sha256]),
                fallback_spans=tuple(spans_of(clock.fell, ids, loaded.tokenizer, answer.output)),
                prompt_tokens=taken.prompt_tokens,
                decode_tokens=taken.tokens,
                fallbacks=taken.fallbacks,
                ttft_ns=clock.times[0] - clock.begun,
                decode_ns=clock.times[-1] - clock.times[0],
                decode_bytes=taken.decode_bytes,
            )
        )
    measured = Measured(
        engine.geometry, engine.hardware.name, engine.slots, loaded.link_gb_per_s, tuple(items), engine.ledger
    )
    return record_of(
        cell,
        strategy,
        measured,
        config={
            "generation": None,
            "control": None,
            "batch_of_generation": 1,
            "confidence_histogram": None,
            "timing": "live, each strategy on its own answers",
            "processes": 1,
            "warmup": {"tokens": len(lm.warm_up.times), "ns": lm.warm_up.times[-1] - lm.warm_up.begun},
            "link_measured_gb_per_s": loaded.link_gb_per_s if needs_gpu(cell.link) else None,
            "link_page_locked": getattr(getattr(engine.link, "channel", None), "page_locked", None),
            "dtype": str(engine.store.layout.weight_dtype).removeprefix("torch."),
            "profile_sources": [] if needs_gpu(cell.link) else list(engine.hardware.sources),
            "hub": generation.model.hub,
            "revision": loaded.source if generation.model.hub is not None else None,
        },
        environment={**environment(), "telemetry": telemetry()},
        counters=engine.stats(),
        wall_seconds=time.monotonic() - begun,
    )
