"""Signal cells measured: every decode token of full K's answers run both ways, then each signal on its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import mobile
from mobile.live_model.compat import common_layout, geometry_of, moe_layers
from mobile.policies.big_little import MOBILE
from mobile.policies.signals import PROBABILITY, SIGNALS
from mobile.policies.strategy import BigLittle
from mobile.runtime.confidence import confidence, replay_routers
from mobile.runtime.engine import Engine
from mobile.runtime.forward_pass import ForwardPass
from suites.environment import environment
from suites.plan.signal_cells import SignalCell
from suites.record import Record, RunFolder
from suites.scoring.lm_eval import Written, generate, score, task_config
from suites.tasks.files import shipped, sources
from suites.tasks.fresh import training_side

BATCH = 100
ALWAYS = 2.0  # a gamma above every confidence: full K's own tokens
DIGITS = 4  # of a doubt, 1 - confidence, in a record


class Loaded(NamedTuple):
    """An attached model and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def engine(self) -> Engine:
        """Return the engine behind the model."""
        engine: Engine = self.model.mobile
        return engine

    def answer(self, prompts: Sequence[str], task: dict[str, Any], begin: Callable[[int], None] | None = None) -> list:
        """Return the text of each prompt, in batches; `begin` is told the number of each batch's first prompt."""
        texts = []
        for first in range(0, len(prompts), BATCH):
            if begin is not None:
                begin(first)
            chunk = list(prompts[first : first + BATCH])
            texts += [text for text, _ in generate(self.model, self.tokenizer, chunk, task["generation_kwargs"])]
        return texts


@dataclass
class Compared:
    """Both passes of every decode token by item: whether they agree on it, and 1 - confidence by signal."""

    layers: Sequence[Any]
    signals: Sequence[str]
    items: int
    first: int = 0  # the item that is row 0 of the batch
    agree: list[list[int]] = field(init=False)
    doubts: dict[str, list[list[float]]] = field(init=False)

    def __post_init__(self) -> None:
        self.agree = [[] for _ in range(self.items)]
        self.doubts = {signal: [[] for _ in range(self.items)] for signal in self.signals}

    def begin(self, first: int) -> None:
        """Take note of a batch's first item."""
        self.first = first

    def __call__(self, little: ForwardPass, logits: torch.Tensor, big_logits: torch.Tensor) -> None:
        """Add the rows that are still being written."""
        alike = (logits.argmax(-1) == big_logits.argmax(-1)).tolist()
        live = [True] * len(alike) if little.live is None else little.live.tolist()
        replayed = replay_routers(self.layers, little) if any(SIGNALS[s].replays_routers for s in self.signals) else []
        found = {signal: confidence(signal, logits, little, replayed) for signal in self.signals}
        doubts = {signal: (1 - value.double()).tolist() for signal, value in found.items()}
        for row in (row for row, writes in enumerate(live) if writes):
            self.agree[self.first + row].append(int(alike[row]))
            for signal, values in doubts.items():
                self.doubts[signal][self.first + row].append(float(f"{values[row]:.{DIGITS}g}"))

    def gamma_at(self, signal: str, rate: float) -> float:
        """Return the gamma below which this share of all tokens is."""
        ordered = sorted(doubt for item in self.doubts[signal] for doubt in item)
        return 1 - ordered[max(0, min(len(ordered) - 1, len(ordered) - 1 - round(rate * len(ordered))))]

    def rate_at(self, gamma: float) -> float:
        """Return the share of tokens whose highest probability is below gamma."""
        doubts = [doubt for item in self.doubts[PROBABILITY] for doubt in item]
        return sum(doubt > 1 - gamma for doubt in doubts) / len(doubts) if doubts else 0.0


def load(pieces: Sequence[SignalCell], run: RunFolder) -> Loaded:
    """Load and attach the model that the cells share."""
    torch.set_num_threads(1)  # so that results do not depend on the machine's cores
    folder = pieces[0].model.folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    layers = moe_layers(model)
    mobile.attach(model, MOBILE, slots=MOBILE.min_slots(geometry_of(model, layers, common_layout(layers))))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Loaded(model, tokenizer)


def measure(cell: SignalCell, loaded: Loaded, run: RunFolder) -> None:
    """Compare the signals on full K's tokens, answer by each at the paper's fallback rate, and write the record."""
    begun = time.monotonic()
    task, engine, docs = task_config(cell.task), loaded.engine, cell.docs
    items = shipped(cell.task)
    prompts = [items[doc]["prompt"] for doc in docs]
    # 1. Full K's own tokens, each run both ways: of the training side for gammas, of the test side for the result.
    training_prompts = [item.prompt for item in training_side(cell.task, cell.items, cell.seed)]
    fresh, _ = _compared(loaded, cell.signals, training_prompts, task)
    seen, full = _compared(loaded, cell.signals, prompts, task)
    # 2. Each signal by itself, at the gamma that gives it the paper's fallback rate on the training side.
    right = _right(full, prompts, task, docs)
    rate, live = fresh.rate_at(MOBILE.gamma or 0.0), []
    for signal in cell.signals:
        gamma = MOBILE.gamma or 0.0 if signal == PROBABILITY else fresh.gamma_at(signal, rate)
        with engine.gated(BigLittle(gamma, signal)):
            answers = loaded.answer(prompts, task)
            stats = engine.stats()
        pairs = list(zip(right, _right(answers, prompts, task, docs), strict=True))
        lost, gained = (sum(pair == kind for pair in pairs) for kind in ((True, False), (False, True)))
        counts = {"tokens": stats["tokens"], "fallbacks": stats["fallbacks"], "lost": lost, "gained": gained}
        live.append({"signal": signal, "gamma": gamma, **counts})
    # 3. The record.
    _record(cell, engine, seen, live, time.monotonic() - begun).save(cell.output(run))


def _compared(
    loaded: Loaded, signals: Sequence[str], prompts: Sequence[str], task: dict[str, Any]
) -> tuple[Compared, list[str]]:
    """Return both passes of every token of full K's answers, and the answers."""
    found = Compared(loaded.engine.layers, signals, len(prompts))
    with loaded.engine.gated(BigLittle(ALWAYS)), loaded.engine.comparing(found):
        return found, loaded.answer(prompts, task, found.begin)


def _right(texts: Sequence[str], prompts: Sequence[str], task: dict[str, Any], docs: list[int]) -> list[bool]:
    """Return which texts lm-eval scores as right."""
    return [answer.correct for answer in score(Written(dict(zip(prompts, texts, strict=True))), task, docs)]


def _record(cell: SignalCell, engine: Engine, seen: Compared, live: list[dict[str, Any]], seconds: float) -> Record:
    """Return the record; its counters are what must repeat exactly."""
    native = engine.plan.native
    tokens = sum(map(len, seen.agree))
    counters = {"tokens": tokens, "disagreements": tokens - sum(map(sum, seen.agree))}
    for each in live:
        counters |= {f"{each['signal']}_{name}": each[name] for name in ("fallbacks", "lost", "gained")}
    return Record(
        id=cell.id,
        scope=cell.scope,
        weights=cell.model.weights,
        model=cell.model.name,
        geometry=cell.model.geometry,
        task=cell.task,
        strategy=cell.strategy,
        gamma=cell.gamma,
        lossless=False,
        hardware=cell.hardware,
        budget=cell.budget,
        slots=engine.slots,
        seed=cell.seed,
        config={
            "kind": cell.kind,
            "swept": False,
            "profile_sources": [],
            "link_gb_per_s": None,
            "moe_layers": native.moe_layers,
            "experts": native.experts,
            "top_k": native.top_k,
            "family": cell.model.family,
            "training_seed": cell.model.training_seed,
            "items": cell.items,
            "data": sources(cell.task, None),
            "docs": cell.docs,
            "agree": seen.agree,
            "doubts": seen.doubts,
            "live": live,
        },
        environment=environment(),
        counters=counters,
        wall_seconds=seconds,
    )
