"""Judgement of the trials of `suites.abba`: the ratio of two sides' speeds, its interval, and what else differs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Annotated, Any

from reports.checks import trial_file
from reports.elements import numbers
from reports.elements.page import Report, Section, Table
from reports.stats.intervals import Interval, geometric_mean
from suites.record import FEWEST_PROCESSES, LATEST_TRIAL, TRIAL, TRIAL_FORMAT, read_json
from suites.strict_json import called, read_bytes
from suites.typed_json import Holding, typed

MIN_RATIO = 0.95  # of the base's speed
REGRESSION, PASSED, INCONCLUSIVE = "REGRESSION", "PASSED", "INCONCLUSIVE"
SAME_FACTS = {
    "gpu": "GPU",
    "cpu": "processor",
    "torch": "PyTorch",
    "transformers": "Transformers",
    "python": "Python",
    "link": "link",
    "disk": "disk",
    "model": "model",
    "layers": "number of layers",
    "steps": "number of steps",
    "repeats": "number of repeats",
}


class Unjudgeable(ValueError):
    """There is no trial, or its processes did not do the same work on the same machine."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of one strategy (or pair of them): the second side's tokens/s over the first side's.

    `written` says whether both would have written the same tokens; `counters` are those that are not zero on both
    sides, as (name, first, second), a repeat's mean; `verdict` is None where no gate is asked.
    """

    name: str
    ratio: Interval
    tokens_per_s: tuple[float, float]
    written: str
    counters: tuple[tuple[str, float, float], ...]
    verdict: str | None


@dataclass(frozen=True)
class Judgement:
    """All comparisons of a trial, and the warnings that a reader must see first."""

    lines: tuple[Comparison, ...]
    warnings: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Return whether any comparison is a regression."""
        return any(line.verdict == REGRESSION for line in self.lines)


def latest() -> Path:
    """Return the folder of the last trial started from here. Raise Unjudgeable if there is none."""
    try:
        return Path(os.fsdecode(read_bytes(LATEST_TRIAL)).rstrip("\r\n"))
    except (OSError, ValueError) as error:
        raise Unjudgeable("No trial was run from here; run: nox -s regression, or nox -s compare -- A B") from error


def read(folder: Path) -> dict[str, Any]:
    """Read the trial in a folder. Raise Unjudgeable if there is none, or it is of another format."""
    try:
        found = read_json(folder / TRIAL)
    except (OSError, ValueError) as error:
        raise Unjudgeable(f"{folder} holds no trial ({error}); run: nox -s regression") from error
    if found.get("format") != TRIAL_FORMAT:
        said = str(found.get("format"))[:20]
        raise Unjudgeable(f"{folder} holds a trial of format {said}, and {TRIAL_FORMAT} is read; run it again.")
    if lacking := {"kind", "sides", "processes"} - set(found):
        raise Unjudgeable(f"{folder} holds a trial without {sorted(lacking)[0]}; run it again.")
    try:
        typed(found, Annotated[dict[str, Any], Holding(trial_file.Trial)], called(folder / TRIAL))
    except ValueError as error:
        raise Unjudgeable(f"{folder} holds no trial ({error}); run it again.") from error
    if why := trial_file.lacking(found):
        raise Unjudgeable(f"{folder} holds no trial that can be judged: {why}; run it again.")
    return found


def judge(trial: dict[str, Any]) -> Judgement:
    """Judge a trial. Raise Unjudgeable where its processes are too few, not on one GPU, or not of the same work."""
    first, second = trial["processes"]
    if len(first) != len(second) or len(first) < FEWEST_PROCESSES:
        raise Unjudgeable(
            f"There are {len(first)} and {len(second)} processes; {FEWEST_PROCESSES} a side at least, as many each."
        )
    for fact, fact_name in SAME_FACTS.items():
        seen = {str(process.get(fact)) for process in (*first, *second)}
        if len(seen) > 1:
            both = " and ".join(one[:80] for one in sorted(seen)[:2])
            raise Unjudgeable(f"Not one {fact_name} in all processes ({both}), so their times are not compared.")
    for side, processes in zip(trial["sides"], (first, second), strict=True):
        if len({(process["git_commit"], process["git_dirty"]) for process in processes}) > 1:
            raise Unjudgeable(f"The code of {side['name']} changed while it was timed; leave it alone, and run again.")
    gate = trial["kind"] == "regression"
    lines = tuple(
        _compare(gate, [p["strategies"][at] for p in first], [p["strategies"][at] for p in second], first[0]["steps"])
        for at in range(len(first[0]["strategies"]))
    )
    return Judgement(lines, tuple(_warnings(trial, lines)))


def _compare(gate: bool, first: list[dict[str, Any]], second: list[dict[str, Any]], steps: int) -> Comparison:
    if len({run["ids_sha256"] for run in (*first, *second)}) > 1:
        raise Unjudgeable("The processes were not given the same tokens, so their times are not compared.")
    pairs = [
        [a["wall_ns"] / b["wall_ns"] for a, b in zip(one["repeats"], other["repeats"], strict=True)]
        for one, other in zip(first, second, strict=True)
    ]
    ratio = geometric_mean(pairs)
    names = dict.fromkeys((first[0]["strategy"], second[0]["strategy"]))
    counters = ((name, _mean(first, name), _mean(second, name)) for name in first[0]["repeats"][0]["counters"])
    return Comparison(
        " over ".join(reversed(names)),
        ratio,
        (_speed(first, steps), _speed(second, steps)),
        _compare_tokens(first, second),
        tuple(row for row in counters if any(row[1:])),
        verdict(ratio) if gate else None,
    )


def verdict(ratio: Interval) -> str:
    """Return REGRESSION only where the whole interval lies below `MIN_RATIO`, PASSED where none of it does."""
    if ratio.high < MIN_RATIO:
        return REGRESSION
    return PASSED if ratio.low >= MIN_RATIO else INCONCLUSIVE


def _repeats(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [repeat for run in runs for repeat in run["repeats"]]


def _speed(runs: Sequence[dict[str, Any]], steps: int) -> float:
    """Return all tokens over all seconds."""
    repeats = _repeats(runs)
    return steps * len(repeats) / (sum(repeat["wall_ns"] for repeat in repeats) / 1e9)


def _mean(runs: Sequence[dict[str, Any]], counter: str) -> float:
    """Return a counter's mean over repeats; not a number where the side does not have it."""
    found = [repeat["counters"].get(counter, nan) for repeat in _repeats(runs)]
    return sum(found) / len(found)


def _compare_tokens(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    for runs in (first, second):
        if any(run["written"] != runs[0]["written"] for run in runs):
            return f"not repeatable under {runs[0]['strategy']}"
    one, other = first[0]["written"], second[0]["written"]
    unlike = sum(a != b for a, b in zip(one, other, strict=True))
    return f"differ at {unlike} of {len(one)} steps" if unlike else "equal"


def _warnings(trial: dict[str, Any], lines: Sequence[Comparison]) -> Iterator[str]:
    for side, processes in zip(trial["sides"], trial["processes"], strict=True):
        if any(process["git_dirty"] for process in processes):
            yield f"{side['name']} has changes that are not committed: nobody can check it out again."
    if trial["kind"] == "regression" and any(line.written != "equal" for line in lines):
        yield "Base and head would not write the same tokens, so they did not do the same work."


def report(trial: dict[str, Any], found: Judgement) -> Report:
    """Return the page of a judged trial, for the screen and for Markdown."""
    one, (first, second) = trial["processes"][0][0], trial["sides"]
    gate = trial["kind"] == "regression"
    head = (
        "strategy",
        f"{first['name']}, tokens/s",
        f"{second['name']}, tokens/s",
        "speed, second over first",
        "tokens",
    )
    speeds = Table(
        "Speed, of decode steps with given tokens",
        (*head, "verdict") if gate else head,
        tuple(_row(line, gate) for line in found.lines),
        f"Ratio with its 95 % interval over {len(trial['processes'][0])} pairs of processes in ABBA order and their "
        f"{one['repeats']} repeats of {one['steps']} steps each."
        + (f" {REGRESSION} only where the whole interval lies below {MIN_RATIO}." if gate else ""),
    )
    counters = tuple(
        Table(
            f"What a repeat counted, {line.name}",
            ("counter", first["name"], second["name"]),
            tuple((name, _number(a), _number(b)) for name, a, b in line.counters),
        )
        for line in found.lines
    )
    layers = f"{one['layers']} layer{'' if one['layers'] == 1 else 's'}"
    facts = [
        ("model", one["model"] or f"{layers} of OLMoE-1B-7B's size, random weights"),
        ("link", one["link"]),
        *_where(trial, one),
        ("processor", str(one["cpu"])),
        ("PyTorch", one["torch"]),
    ]
    facts.insert(0, ("GPU", "none" if one["gpu"] is None else f"{one['gpu']['name']} ({one['gpu']['uuid']})"))
    for side, processes in zip(trial["sides"], trial["processes"], strict=True):
        dirty = " with changes not committed" if processes[0]["git_dirty"] else ""
        facts.append((side["name"], f"commit {processes[0]['git_commit']}{dirty}"))
    alarm = None
    if found.failed:
        slow = ", ".join(line.name for line in found.lines if line.verdict == REGRESSION)
        alarm = f"{REGRESSION}: head is slower than base under {slow}."
    sections = Section("Speed", tables=(speeds,)), Section("Counters", tables=counters)
    return Report(f"{second['name']} against {first['name']}", found.warnings, alarm, sections, tuple(facts))


def _where(trial: dict[str, Any], one: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the scope of the times, and the disk that was read, as far as each is known."""
    if trial.get("scope"):
        yield "scope", trial["scope"]
    if one.get("disk"):
        known = one["disk"]["model"], one["disk"]["source"], one["disk"]["file_system"]
        yield "disk", ", ".join(filter(None, known)) or "unknown"


def _row(line: Comparison, gate: bool) -> tuple[str, ...]:
    shown = (line.name, *(f"{speed:.1f}" for speed in line.tokens_per_s), numbers.ratio(line.ratio), line.written)
    return (*shown, str(line.verdict)) if gate else shown


def _number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
