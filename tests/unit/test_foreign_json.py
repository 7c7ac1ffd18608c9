"""The door for JSON that people pass around: records, plans, answers, notes. It names file and field."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from random import Random
from typing import Any, Literal

import pytest

from reports.data.results import NoResults, read
from suites.record import RunFolder, load, read_json, sound, write_json
from suites.run_files import read_answers, read_failure, read_plan, read_turn_times
from suites.strict_json import MOST_NBYTES, parse
from suites.typed_json import WrongField, typed
from tests import absurd
from tests.report_runs import Rule, live_run, record

TRIES = 1000
CELL = record(Rule(timed=4), ("olmoe-tiny", "olmoe", 0), "arithmetic", "lru", None, "smallest")


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """Return a run folder with one cell, its record and its live run."""
    run = RunFolder(tmp_path / "run")
    cell = {"id": CELL.id, "label": "olmoe-tiny arithmetic lru smallest"}
    told = {"model": CELL.model, "task": CELL.task, "strategy": "lru", "gamma": None, "budget": "smallest"}
    write_json(run.plan, {"preset": "tiny", "minutes": 2, "cells": [{**cell, **told}]})
    CELL.save(run.record(CELL.id))
    live_run(CELL, run)
    return run


def one_sentence(error: BaseException) -> str:
    told = str(error)
    assert told
    assert "\n" not in told
    assert told.isprintable()
    assert len(told) < 500
    return told


# --- sentences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "value", "says"),
    [
        (("items", 3, "decode_ns"), -1, "items[3].decode_ns must be a whole number of at least 0, not -1"),
        (("items", 0, "correct"), 1, "items[0].correct must be true or false or null, not 1"),
        (("items", 1, "doc"), True, "items[1].doc must be a whole number of at least 0, not true"),
        (("items", 1, "doc"), 0, "items[1].doc is 0 again; each item has a number of its own"),
        (("items", 0, "fallback_spans"), [[0, 10**6]], "items[0].fallback_spans must ascend within the output's 31"),
        (
            ("items", 0, "fallback_spans"),
            [[3, 5], [4, 6]],
            "items[0].fallback_spans must ascend within the output's 31",
        ),
        (("items", 0, "fallback_spans"), [[3]], "items[0].fallback_spans[0] must be a list of 2, not of 1"),
        (("items", 0, "output"), None, "items[0].output must be text, not null"),
        (("items",), {}, "items must be a list, not an object of 0"),
        (("timeline",), [["nap", 0, 1, "x"]], 'timeline[0][0] must be "load" or "prefetch"'),
        (("timeline",), [["load", 2, 1, "x"]], "timeline must not have an event that ends before it starts"),
        (("guesses",), [[0, 1, 2, 3]], "guesses must not have more experts right than foreseen, or than needed"),
        (("counters", "tokens"), None, "counters.tokens must be a whole number of at least 0, not null"),
        (("counters", "hits"), "many", 'counters.hits must be a number of at least 0 or null, not "many"'),
        (("checks", "it held"), 1, "checks.it held must be true or false, not 1"),
        (("environment", "packages"), [], "environment.packages must be an object, not a list of 0"),
        (("environment", "git_dirty"), "no", 'environment.git_dirty must be true or false or null, not "no"'),
        (("environment", "telemetry"), {"energy_joules": 1}, "environment.telemetry.clock_limits is missing"),
        (("config", "swept"), 0, "config.swept must be true or false, not 0"),
        (("config", "experts"), 0, "config.experts must be a whole number of at least 1, not 0"),
        (("config", "profile_sources"), [1], "config.profile_sources[0] must be text, not 1"),
        (("config", "kind"), "shape", "config.real_moe_layers is missing"),
        (("config", "more"), [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]], "config.more must have at most 16 levels"),
        (("gamma",), -0.5, "gamma must be a number of at least 0 or null, not -0.5"),
        (("gamma",), float("nan"), "holds the number NaN, which no measurement gives"),
        (("wall_seconds",), 1e300, "holds the number 1e+300, which no measurement gives"),
        (("seed",), 10**30, "which is beyond 64 bits"),
        (("model",), "\ud800", "holds half of a surrogate pair, which is no text"),
        (("id",), "../../x", 'id must be a name of letters, digits, - and _, not "../../x"'),
        (("id",), "another", "is the record of another cell, another; put the right file in its place"),
    ],
)
def test_a_wrong_field_of_a_record_is_named(folder, way, value, says):
    data = json.loads(json.dumps(asdict(CELL)))
    holder = data
    for step in way[:-1]:
        holder = holder[step]
    holder[way[-1]] = value
    absurd.put(folder.record(CELL.id), data)
    with pytest.raises(ValueError, match=r"^records/") as refused:
        load(folder.record(CELL.id))
    told = one_sentence(refused.value)
    assert told.startswith(f"records/{CELL.id}.json")
    assert says in told
    with pytest.raises(NoResults):  # it is the only cell; where there are others, it is a gap
        read(folder.path)


def test_what_reads_a_run_says_why_a_cell_is_a_gap(folder):
    whole = read_json(folder.plan)
    write_json(folder.plan, {**whole, "cells": [*whole["cells"], {"id": "2", "label": "second"}]})
    for data, why in (
        ({**asdict(CELL), "id": "2", "slots": -1}, "slots must be a whole number of at least 0 or null, not -1"),
        (asdict(CELL), "is the record of another cell"),
    ):
        write_json(folder.record("2"), data)
        [(label, told)] = read(folder.path).absent
        assert label == "second"
        assert told.startswith("FAILED: records/2.json")
        assert why in told


def test_a_record_is_held_to_the_plan(folder):
    whole = read_json(folder.plan)
    [cell] = whole["cells"]
    write_json(folder.plan, {**whole, "cells": [{**cell, "budget": "16GiB"}, {"id": "2", "label": "second"}]})
    CELL.__class__(**{**vars(CELL), "id": "2"}).save(folder.record("2"))
    assert read(folder.path).absent == (
        (cell["label"], f"FAILED: record {CELL.id} has the budget 'smallest', and '16GiB' was planned"),
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1, "a": 2}', 'holds an object with "a" twice'),
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON (Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "is not UTF-8 from byte 7 on"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"a": 1e999}', "holds the number 1e999"),
        (b'{"a": -Infinity}', "holds the number -Infinity"),
        (b'{"a": ' + b"9" * 5000 + b"}", "beyond 64 bits"),
        (b"", "is not JSON"),
    ],
)
def test_json_that_is_not_strict_is_refused(content, says):
    with pytest.raises(ValueError, match=r"^file ") as refused:
        parse(content, "file")
    assert says in one_sentence(refused.value)


def test_what_is_no_file_in_a_files_place_is_refused_at_once(folder, tmp_path):
    path = folder.record(CELL.id)
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: _huge(path)):
        make()
        with pytest.raises((OSError, ValueError)) as refused:
            load(path)
        one_sentence(refused.value)
        assert not sound(path)
        with pytest.raises(NoResults):
            read(folder.path)
        path.rmdir() if path.is_dir() else path.unlink()


def _huge(path) -> None:
    with path.open("wb") as file:
        file.truncate(MOST_NBYTES + 1)


# --- anything at all ---------------------------------------------------------------------------------


def _refused_or_without_effect(read_it, path, data: Any, seed: int) -> dict[str, int]:
    """Change a file a thousand times, half of them in its text; count what was refused and what was read."""
    random, counts = Random(seed), {"refused": 0, "read": 0}
    whole = absurd.text(data) + b"\n"
    for number in range(TRIES):
        body = absurd.text(absurd.changed(data, random)) if number % 4 else absurd.spoiled(whole, random)
        path.write_bytes(absurd.sealed(body))
        try:
            read_it()
            counts["read"] += 1
        except (ValueError, OSError) as error:
            one_sentence(error)
            counts["refused"] += 1
    return counts


def test_absurd_records_are_refused_or_give_a_record(folder):
    data = {
        **json.loads(json.dumps(asdict(CELL))),
        "items": json.loads(json.dumps([asdict(i) for i in CELL.items[:3]])),
    }
    path = folder.record(CELL.id)

    def read_it() -> None:
        read_back = load(path)
        for item in read_back.items:
            assert min(item.doc, item.decode_ns, item.ttft_ns, item.decode_bytes, item.decode_tokens) >= 0
            assert all(0 <= start <= end <= len(item.output) for start, end in item.fallback_spans)
        assert read_back.counters["tokens"] + read_back.counters["decode_seconds"] >= 0
        assert read_back.config["experts"] * read_back.config["moe_layers"] * read_back.config["expert_nbytes"] > 0

    counts = _refused_or_without_effect(read_it, path, data, seed=1)
    assert counts["refused"] > TRIES / 2
    assert counts["read"] > 10


def test_absurd_plans_are_refused_or_read(folder):
    data = read_json(folder.plan)

    def read_it() -> None:
        read_plan(folder.plan)
        try:
            read(folder.path)
        except NoResults as none:
            one_sentence(none)

    assert _refused_or_without_effect(read_it, folder.plan, data, seed=2)["refused"] > TRIES / 3


def test_absurd_answers_notes_and_turns_are_refused_or_read(folder):
    named = CELL.config["generation"]
    data = {**read_json(folder.answers(named)), "answers": read_json(folder.answers(named))["answers"][:2]}
    counts = _refused_or_without_effect(lambda: read_answers(folder, named), folder.answers(named), data, seed=3)
    assert counts["refused"] > TRIES / 2
    note = {"id": "1", "label": "a cell", "error": "it broke", "log": "x", "log_tail": None}
    write_json(folder.failure("1"), note)
    assert _refused_or_without_effect(lambda: read_failure(folder, "1"), folder.failure("1"), note, seed=4)["refused"]
    turn = {"cell": "1", "repeat": 0, "played": {"prefill_ns": 3, "decode_ns": 4, "decode_bytes": 5, "more": {}}}
    write_json(folder.turn("1", 0), turn)
    assert read_turn_times(folder, "1", 0) == (3, 4, 5)
    counts = _refused_or_without_effect(lambda: read_turn_times(folder, "1", 0), folder.turn("1", 0), turn, seed=5)
    assert counts["refused"] > TRIES / 3


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["idle", 0, 1, "a"], "[0] must be"),
        (["load", True, 1, "a"], "[1] must be a whole number"),
        (["load", 0, 1.5, "a"], "[2] must be a whole number"),
        (["load", 0, 1, None], "[3] must be text"),
        (["load", 0, 1], "must be a list of 4, not of 3"),
        ("load", "must be a list"),
    ],
)
def test_one_wrong_value_among_many_rows_is_named_where_it_stands(rows, wrong, says):
    """Sound rows are taken a column at a time; that changes neither what is refused nor how."""
    kind = tuple[tuple[Literal["load", "stall"], int, int, str], ...]
    sound = [["stall", 0, 1, "a"]] * rows
    assert typed(sound, kind, "f") == (("stall", 0, 1, "a"),) * rows
    assert typed([], kind, "f") == ()
    with pytest.raises(WrongField, match=re.escape(f"[{rows}]")) as refused:
        typed([*sound, wrong], kind, "f")
    assert says in str(refused.value)


def test_a_number_beyond_64_bits_is_refused_and_a_long_row_of_digits_in_a_text_is_none():
    assert parse(b'{"a": 9223372036854775807, "b": "99999999999999999999"}', "f")["a"] == 2**63 - 1
    for digits in ("9223372036854775808", "-99999999999999999999"):
        with pytest.raises(ValueError, match="beyond 64 bits"):
            parse(b'{"a": %s}' % digits.encode(), "f")
