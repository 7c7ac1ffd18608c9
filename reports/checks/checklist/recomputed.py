"""What a record says, computed again from what it was made of: answers of live runs, items, and the shipped tasks.

Whoever edits records, answers, traces and counters so that they agree is not found here, but by running the suite
again: `python -m reports gate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from reports.data.fingerprint import DISK, VIRTUAL
from suites.record import Record, RunFolder
from suites.run_files import Answers, read_answers, read_turn_times
from suites.tasks import scores

SUMS = {"tokens": "decode_tokens", "fallbacks": "fallbacks", "prompt_tokens": "prompt_tokens"}
TIMES = {"decode_seconds": "decode_ns", "prefill_seconds": "ttft_ns"}
PARTS = ("decode_dense_seconds", "decode_expert_seconds", "decode_stall_seconds")
ANSWERED = ("prompt_sha256", "prompt", "output", "fallback_spans", "answer", "correct")


def unlike_answers(records: Sequence[Record], run: Path) -> Iterator[str]:
    """Yield a line for each record that holds other answers than the live run it is replayed from, or other checks."""
    kept: dict[str, Answers | str] = {}
    for record in records:
        generation = record.config.get("generation")
        if generation is None:
            continue
        if generation not in kept:
            try:
                kept[generation] = read_answers(RunFolder(run), generation)
            except (OSError, ValueError) as error:
                kept[generation] = f"the answers of live run {generation} cannot be read ({error})"
        live = kept[generation]
        if isinstance(live, str):
            yield live
        elif (why := _unlike(record, live)) is not None:
            yield f"record {record.id} is not of live run {generation}: {why}"


def _unlike(record: Record, live: Answers) -> str | None:
    by_doc = {answer.doc: answer for answer in live.answers}
    for item in record.items:
        answer = by_doc.get(item.doc)
        if answer is None:
            return f"that has no item {item.doc}"
        if names := [name for name in ANSWERED if getattr(item, name) != getattr(answer, name)]:
            return f"item {item.doc} has another {names[0]}"
    return None if record.checks == live.checks else "its checks are others"


def wrong_sums(record: Record) -> str | None:
    """Return in what a scored record's counters are not the sums of its items; None where all are.

    Times are held to them on the virtual clock, where they are whole nanoseconds; elsewhere to what the cell took.
    """
    counters = record.counters

    def total(field: str) -> int:
        return sum(getattr(item, field) for item in record.items)

    for name, field in {**SUMS, "decode_bytes": "decode_bytes"}.items():
        if name in counters and counters[name] != total(field):
            return f"{name} is {counters[name]}, and its items' {field} add up to {total(field)}"
    if record.scope != VIRTUAL:
        return longer_than_it_took(record)
    for name, field in TIMES.items():
        if name in counters and _ns(counters[name]) != total(field):
            return f"{name} is {counters[name]}, and its items' {field} add up to {total(field)}"
    parts = [counters.get(name) for name in PARTS]
    if None not in parts and sum(map(_ns, parts)) != _ns(counters["decode_seconds"]):
        return "the parts of its decode time do not add up to it"
    if counters.get("seconds") is not None and _ns(counters["seconds"]) != total("ttft_ns") + total("decode_ns"):
        return f"seconds is {counters['seconds']}, which is not all of its items' time"
    return None


def _ns(seconds: float | None) -> int:
    return round((seconds or 0) * 1e9)


def longer_than_it_took(record: Record) -> str | None:
    """Return why a measured record's items cannot be right: they took longer than the whole cell. None if they may."""
    seconds = sum(item.ttft_ns + item.decode_ns for item in record.items) / 1e9
    if record.wall_seconds is None or seconds <= record.wall_seconds:
        return None
    return f"its items took {seconds:.3f} s, and the whole cell {record.wall_seconds:.3f} s"


def wrong_scores(record: Record) -> str | None:
    """Return the first item of a shipped task that is not asked or scored as the task's own files say; None if all are.

    A record of another version of the task's items is not judged, unless its prompts are those of this one.
    """
    if record.task in scores.RUN:
        other = (item.doc for item in record.items if (item.answer == scores.PASSED) is not item.correct)
        return next((f"item {doc} is scored otherwise than its verdict" for doc in other), None)
    key = scores.key(record.task)
    if key is None or (is_of_other_items(record) is not False and not _asked_as_shipped(record, key)):
        return None
    for item in record.items:
        if item.doc >= len(key.answers) or item.prompt_sha256 != key.prompts[item.doc]:
            return f"item {item.doc} was not asked what the task asks"
        found = key.found(item.output)
        if found != item.answer or (found == key.answers[item.doc]) is not item.correct:
            right = "right" if found == key.answers[item.doc] else "wrong"
            return f"item {item.doc} answers {found!r}, which is {right}, and the record says otherwise"
    return None


def _asked_as_shipped(record: Record, key: scores.Key) -> bool:
    """Return whether the prompts are those of the items shipped here, whatever the record says of their source."""
    return all(item.doc < len(key.prompts) and item.prompt_sha256 == key.prompts[item.doc] for item in record.items)


def is_of_other_items(record: Record) -> bool | None:
    """Return whether the record's items are another version's than those shipped here; None where it does not say."""
    key, data = scores.key(record.task), record.config.get("data")
    if key is None or not isinstance(data, dict) or "test" not in data:
        return None
    return bool(data["test"] != key.source)


def wrong_turns(record: Record, run: Path) -> str | None:
    """Return in what a synthetic record that was timed in turn is not what its turns took; None where it is."""
    if record.config.get("kind") != "shape" or record.scope != DISK:
        return None
    for number, item in enumerate(record.items):
        try:
            played = read_turn_times(RunFolder(run), record.id, number)
        except (OSError, ValueError) as error:
            return f"its turn {number} cannot be read ({error})"
        if played != (item.ttft_ns, item.decode_ns, item.decode_bytes):
            return f"item {number} is not what its turn took"
    return None
