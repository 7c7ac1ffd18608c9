"""Records of a run folder held to its traces: each replay is made again, and must give what its record says.

The virtual clock is exact, so the tolerance is zero, on any machine. Neither preset nor model is needed, and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mobile.cli.replay import Trace, open_trace
from mobile.costs.hardware import PROFILES, HardwareProfile
from mobile.costs.rows import AS_IS
from mobile.errors import Refused
from mobile.policies.strategy import resolve
from mobile.replay.replay import replay_requests, why_not_replayable
from mobile.replay.trace import Request
from suites.budget import replay_setup
from suites.measure.replayed import confidences, doubts
from suites.record import VIRTUAL, Record, RunFolder, load
from suites.run_files import read_plan, read_trace_about

ITEM = {
    "prompt_tokens": "prompt_tokens",
    "decode_tokens": "tokens",
    "fallbacks": "fallbacks",
    "ttft_ns": "prefill_ns",
    "decode_ns": "decode_ns",
    "decode_bytes": "decode_bytes",
}  # fields of an item, and the counters that they are


class Held(NamedTuple):
    """A planned cell, and in what its record is not what the trace gives (None: in nothing).

    `replayed` is whether its record is one that a trace gives.
    """

    label: str
    replayed: bool
    wrong: str | None = None


def repeat(run: RunFolder, card: HardwareProfile | None = None, only: str = "") -> Iterator[Held]:
    """Replay each record again whose label holds `only`, a trace at a time. Raise ValueError, OSError for no plan.

    Records on a profile that is no longer known by its name are replayed on `card`, if it is called so.
    """
    found: dict[str, list[tuple[str, Record]]] = {}
    for cell in read_plan(run.plan).cells:
        if only not in cell.label or not run.record(cell.id).exists():
            continue
        try:
            record = load(run.record(cell.id))
        except (ValueError, OSError) as error:
            yield Held(cell.label, True, str(error))
            continue
        config = record.config
        if config.get("kind") is not None or config.get("link") is not None:
            yield Held(cell.label, False)
        elif config.get("generation") is None:
            yield Held(cell.label, True, "its config names no live run")
        else:
            found.setdefault(config["generation"], []).append((cell.label, record))
    for generation, cells in found.items():
        try:
            about, recorded, by_item = _trace(run, generation)
        except (ValueError, OSError) as error:  # Refused is one
            yield from (Held(label, True, str(error)) for label, _ in cells)
            continue
        for label, record in cells:
            try:
                yield Held(label, True, _wrong(record, about, recorded, by_item, card))
            except Refused as refused:
                yield Held(label, True, f"cannot be replayed: {refused}")


def _trace(run: RunFolder, generation: str) -> tuple[dict[str, Any], Trace, dict[int, Request]]:
    """Return what a trace says of itself, the trace, and its requests by item. Raise ValueError, OSError."""
    about = read_trace_about(run, generation)
    recorded, docs = open_trace(run.trace(generation)), about.get("docs")
    if docs is None or len(docs) != len(recorded.requests):
        raise ValueError(f"the trace of live run {generation} does not say which item each request is of")
    return about, recorded, dict(zip(docs, recorded.requests, strict=True))


def _wrong(
    record: Record, about: dict[str, Any], recorded: Trace, by_item: dict[int, Request], card: HardwareProfile | None
) -> str | None:
    """Return the first field in which a record is not what its trace gives. Raise Refused for one that has none."""
    for name in ("model", "task"):
        if about.get(name) != getattr(record, name):
            return f"{name} is {getattr(record, name)!r}, and its trace is of {about.get(name)!r}"
    if lacking := [item.doc for item in record.items if item.doc not in by_item]:
        return f"its trace has no item {lacking[0]}"
    requests = [by_item[item.doc] for item in record.items]
    strategy = resolve(record.strategy, record.gamma)
    if why := why_not_replayable(strategy, recorded.recorder, requests):
        return f"strategy is {record.strategy!r}, and of its trace {why}"
    on = card if card is not None and card.name == record.hardware else PROFILES.get(record.hardware)
    if on is None:
        raise Refused(f"its hardware {record.hardware!r} is known by no name; give its profile with --hardware FILE")
    native = recorded.geometry
    dressed = None if record.geometry == native.name else record.geometry
    rows = record.config.get("rows") or AS_IS
    setup = replay_setup(strategy, native, dressed, on, record.budget, rows=rows)
    taken, ledger, _ = replay_requests(setup, requests)
    size = setup.geometry
    made: dict[str, Any] = {
        "scope": VIRTUAL,
        "lossless": strategy.lossless,
        "slots": setup.slots,
        "geometry": size.name,
        "ceiling_tokens_per_s": size.on_demand_ceiling(on.link_gb_per_s),
        "guesses": tuple((layer, *seen) for layer, seen in sorted(ledger.guesses.items())),
    }
    said = {name: getattr(record, name) for name in made}
    config = {name: getattr(size, name) for name in ("expert_nbytes", "moe_layers", "experts", "top_k")}
    config["link_gb_per_s"] = on.link_gb_per_s
    said_doubts = record.config.get("doubt_histogram")
    if said_doubts is None:  # of an older record, or of no little pass
        config["confidence_histogram"] = confidences(requests, ("little", "big"))
    else:
        config["confidence_histogram"] = confidences(requests)
        config["doubt_histogram"] = _without_last(doubts(requests, [None] * len(requests)))  # a trace knows no more
    for prefix, ours, theirs in (
        ("", made, said),
        *(
            (f"items[{at}].", {name: getattr(counted, of) for name, of in ITEM.items()}, vars(item))
            for at, (item, counted) in enumerate(zip(record.items, taken, strict=True))
        ),
        ("counters.", ledger.stats(), record.counters),
        ("config.", config, {**record.config, "doubt_histogram": _without_last(said_doubts)}),
    ):
        for name, value in ours.items():
            if theirs.get(name) != value:
                return f"{prefix}{name} is {str(theirs.get(name))[:60]}, and its trace gives {str(value)[:60]}"
    return None


def _without_last(rows: Iterable[Sequence[Any]] | None) -> list[list[Any]] | None:
    return None if rows is None else [list(row[:-1]) for row in rows]
