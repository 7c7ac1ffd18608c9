"""Live runs: a model answers items of a task under one gating, scored by lm-eval; its routing is recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import mobile
from mobile.checkpoints.examine import skeleton
from mobile.costs.geometry import Geometry
from mobile.costs.hardware import profile
from mobile.costs.rows import AS_IS
from mobile.live_model.compat import MoeLayer, common_layout, geometry_of, moe_layers
from mobile.policies.strategy import LeastRecentlyUsed, Strategy, resolve, strategies
from mobile.replay import trace
from mobile.replay.replay import time_requests
from suites.budget import replay_setup
from suites.plan.cells import Generation
from suites.record import RunFolder, write_json
from suites.run_files import read_plan
from suites.scoring.lm_eval import EngineLM, evaluate, first_tokens, generate, task_config
from suites.tasks.catalogue import PUBLISHED

BATCH = 100
RESIDENT_NBYTES = 2**30  # of experts that are answered with from slots; of more there is not a second copy in memory
CHECKED_TOKENS = 8  # of each task's first item, written again, live and alone, see `checked_strategies`


def load(pieces: Sequence[Generation], folder: RunFolder) -> None:
    """Load nothing: each live run reads its model anew, since a control changes the weights."""


def measure(generation: Generation, loaded: None, folder: RunFolder) -> None:
    """Answer, score, record, check, and write both files, the answers last."""
    # 1. Load the model, with its routers shuffled for a control.
    begun = time.monotonic()
    torch.set_num_threads(1)  # so that results do not depend on the machine's cores
    strategy = resolve(generation.strategy, generation.gamma)
    model, native = _attached(generation, strategy)
    tokenizer = AutoTokenizer.from_pretrained(generation.model.folder)
    # 2. Answer and score every item in batches, recording routing.
    lm = EngineLM(model, tokenizer, BATCH)
    answers = evaluate(lm, generation.task, generation.docs, generation.folder)
    mobile.detach(model)
    requests = [lm.traces[answer.prompt_sha256] for answer in answers]
    prompts = [lm.prompts[answer.prompt_sha256] for answer in answers]
    spans = [
        fallback_spans(request, lm.written[answer.prompt_sha256], tokenizer, answer.output)
        for request, answer in zip(requests, answers, strict=True)
    ]
    # 3. Check one item alone and against a replay.
    first = _Answered(prompts[0], requests[0], lm.written[answers[0].prompt_sha256])
    checked = checked_strategies(generation, _tasks(generation.model.name, folder))
    checks = dict(_checks(generation, checked, native, model, tokenizer, first))
    # 4. Write the trace, then the answers, which prove that it is there.
    path = folder.trace(generation.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "geometry": native.as_record(),
        "model": generation.model.name,
        "strategy": strategy.name,
        "gamma": generation.gamma,
        "docs": generation.docs,
        "generation": generation.id,
        "task": generation.task,
    }
    trace.save(path, requests, native.moe_layers, about)
    write_json(
        generation.output(folder),
        {
            "answers": [
                {**asdict(answer), "prompt": shown(generation, prompt), "fallback_spans": fell}
                for answer, prompt, fell in zip(answers, prompts, spans, strict=True)
            ],
            "checks": checks,
            "agreed": [[int(alike) for alike in lm.agreed[answer.prompt_sha256]] for answer in answers],
            "batch": BATCH,
            "generation": generation.id,
            "model": generation.model.name,
            "task": generation.task,
            "wall_seconds": time.monotonic() - begun,
        },
    )


def _attached(generation: Generation, strategy: Strategy) -> tuple[Any, Geometry]:
    """Return the model with the strategy attached, and its own sizes, those of rows as they are.

    Detached, it has the weights that it answered with: of packed rows those that they were unpacked to.
    """
    folder = generation.model.folder
    empty = skeleton(folder, dtype=torch.float32)
    layers = moe_layers(empty)
    native = geometry_of(empty, layers, common_layout(layers))
    slots = strategy.min_slots(native)
    if generation.rows != AS_IS:
        loaded = mobile.load(
            folder,
            strategy,
            slots=slots,
            rows=generation.rows,
            link="virtual",
            device="cpu",
            dtype=torch.float32,
            progress=False,
        )
        return loaded, native
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    if generation.scrambled:
        scramble(moe_layers(model), generation.seed)
    if native.total_experts * native.expert_nbytes <= RESIDENT_NBYTES:
        return mobile.attach(model, all_resident(strategy), slots=native.total_experts, kernel="grouped"), native
    return mobile.attach(model, strategy, slots=slots), native


def all_resident(strategy: Strategy) -> Strategy:
    """Return a strategy of the same tokens and routing that keeps all experts in slots, so that nothing is copied.

    `strategy` must not choose by what is in slots, see `Strategy.knows_cache`.
    """
    return replace(
        strategy,
        retain="everything",
        evict=LeastRecentlyUsed,
        lookahead=None,
        on_cpu=None,
        prefetch_on_fallback=False,
        guess_slots=0,
    )


def scramble(layers: Sequence[MoeLayer], seed: int) -> None:
    """Shuffle the rows of every router's weight, so that each expert gets another's tokens: the canary."""
    shuffled = torch.Generator().manual_seed(seed)
    for layer in layers:
        weight = layer.router.weight
        weight.data = weight.data[torch.randperm(len(weight), generator=shuffled)]


def shown(generation: Generation, prompt: str) -> str | None:
    """Return the prompt where we may print it, None for a published task."""
    return None if generation.task in PUBLISHED else prompt


def fallback_spans(
    request: trace.Request, ids: list[int], tokenizer: PreTrainedTokenizerBase, output: str
) -> list[tuple[int, int]]:
    """Return the ranges of characters of `output` that big passes wrote; prefill wrote the first of `ids`."""
    written = [step.kind in ("full", "little") for step in request]
    fell = [sum(written[: number + 1]) for number, step in enumerate(request) if step.kind == "big"]
    return spans_of(fell, ids, tokenizer, output)


def spans_of(
    fell: Sequence[int], ids: list[int], tokenizer: PreTrainedTokenizerBase, output: str
) -> list[tuple[int, int]]:
    """Return the ranges of characters of `output` that the tokens with these numbers in `ids` wrote."""
    spans: list[tuple[int, int]] = []
    for number in fell:
        start, end = (len(tokenizer.decode(ids[:n], skip_special_tokens=True)) for n in (number, number + 1))
        start, end = min(start, len(output)), min(end, len(output))
        if spans and spans[-1][1] >= start:  # it touches; or the text was shorter once a character was whole
            start, end = spans[-1][0], max(spans.pop()[1], end)
        if end > start:
            spans.append((start, end))
    return spans


@dataclass(frozen=True)
class _Answered:
    """An item as a batch answered it: its prompt, its routing, and the ids of the tokens that were written."""

    prompt: str
    request: trace.Request
    written: list[int]


def checked_strategies(generation: Generation, tasks: Sequence[str]) -> list[Strategy]:
    """Return the strategies that one item of a live run is begun under again: those that may replay it, or some.

    A gating of its own is checked on every task. Full K's routing serves many strategies, whose ledgers have nothing
    to do with the task, so that they are shared out: each is checked on one of `tasks`, those that the run asks the
    model, and all of them on every task where that is not known.
    """
    strategy = resolve(generation.strategy, generation.gamma)
    if not strategy.routes_as_full_k:
        return [strategy]
    same_routing = [one for one in strategies().values() if one.routes_as_full_k and not one.needs_future]
    if generation.task not in tasks:
        return same_routing
    turn = tasks.index(generation.task)
    return same_routing[turn :: len(tasks)] or same_routing[turn % len(same_routing) :][:1]


def _tasks(model: str, run: RunFolder) -> list[str]:
    """Return the tasks that a run is to ask the model, in the order of its plan; none without a plan."""
    if not run.plan.is_file():
        return []
    cells = read_plan(run.plan).cells
    return list(dict.fromkeys(cell.task for cell in cells if cell.model == model and cell.task is not None))


def _checks(
    generation: Generation,
    checked: Sequence[Strategy],
    native: Geometry,
    model: Any,
    tokenizer: Any,
    answered: _Answered,
) -> Iterator[tuple[str, bool]]:
    """Begin one item again, alone, under each of the strategies `checked`; yield what has to hold.

    The tokens are those of the batch, and the ledger that of a replay. The batch's numbers may differ from a single
    row's in their last bits, so this is checked, not assumed: on every task, for each gating that lived through it.
    """
    options = task_config(generation.task, generation.folder)["generation_kwargs"]
    options = {**options, "max_gen_toks": min(options["max_gen_toks"], CHECKED_TOKENS)}
    begun = first_tokens(answered.request, CHECKED_TOKENS)
    for one in checked:
        setup = replay_setup(one, native, generation.model.geometry, profile(generation.hardware), "smallest")
        mobile.attach(model, one, slots=setup.slots, geometry=generation.model.geometry, hardware=generation.hardware)
        [(_, ids)] = generate(model, tokenizer, [answered.prompt], options)
        model.mobile.residency.end_token()
        live = model.mobile.ledger
        mobile.detach(model)
        _, replayed = time_requests(setup, [begun])
        yield f"{one.name}: tokens alone equal tokens in the batch", ids == answered.written[:CHECKED_TOKENS]
        equal = (live.counters, live.guesses) == (replayed.counters, replayed.guesses)
        yield f"{one.name}: live ledger equals replay", equal
