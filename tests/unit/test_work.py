"""Pieces of work: each finds its row, survives the way to a worker as JSON, and is in one job."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import groupby

import pytest

from suites.plan.preset import read_preset
from suites.plan.signal_cells import SignalCell
from suites.record import VIRTUAL, RunFolder, write_json
from suites.run.jobs import jobs
from suites.run.work import KINDS
from suites.run.worker import measuring


@pytest.fixture(scope="module")
def pieces() -> list:
    smoke, shapes = read_preset("smoke"), read_preset("shapes", link="paced")
    live = [replace(cell, link="virtual") for cell in smoke.replayed]
    signals = [SignalCell(cell.model, cell.task, ("probability", "margin"), 2, 0) for cell in smoke.replayed[:1]]
    rounds = read_preset("accuracy").cells
    return [*smoke.generations, *smoke.cells, *live, *shapes.cells, *read_preset("measured").cells, *signals, *rounds]


def test_a_piece_is_the_same_after_its_way_to_a_worker(pieces):
    assert {piece.kind for piece in pieces} == set(KINDS)
    for piece in pieces:
        received = KINDS[piece.kind].read(json.loads(json.dumps(asdict(piece))))
        assert received == piece
        assert (received.id, received.label, received.scope) == (piece.id, piece.label, piece.scope)


def test_each_piece_without_an_output_is_in_one_job_with_pieces_that_share_what_is_loaded(pieces, tmp_path):
    run = RunFolder(tmp_path)
    done = pieces[0]
    write_json(done.output(run), {})
    by_id = {piece.id: piece for piece in pieces}
    found = jobs(pieces, run)
    counts = Counter(name for job in found for name in job.labels)
    assert counts == Counter(name for name in by_id if name != done.id)
    for job in found:
        together = [by_id[name] for name in job.labels]
        kinds, shared = {piece.kind for piece in together}, [piece.shared for piece in together]
        assert len(kinds) == 1
        assert len(set(shared)) == 1 or KINDS[kinds.pop()].mixed
        assert len([*groupby(shared)]) == len(set(shared)), "something is loaded twice"
        assert len(together) <= (KINDS[together[0].kind].most or len(pieces))
        assert job.needs is None or len(set(shared)) == 1, "pieces without their input stand in others' way"
        assert job.alone == (together[0].scope != VIRTUAL)


def test_a_job_loads_one_trace_after_another_and_one_that_cannot_be_read_fails_its_own_cells(tmp_path, monkeypatch):
    loads: list[list[str]] = []

    class Measurer:
        @staticmethod
        def load(alike, _run):
            loads.append([piece.label for piece in alike])
            if alike[0].task == "arithmetic":
                raise ValueError("no trace")
            return alike[0].shared

        @staticmethod
        def measure(piece, loaded, _run):
            assert loaded == piece.shared

    cells = sorted(read_preset("cpu").replayed[:40:5], key=lambda cell: cell.shared)
    cells += sorted((c for c in read_preset("cpu").replayed if c.task == "web_of_lies"), key=lambda cell: cell.shared)[
        :3
    ]
    monkeypatch.setitem(KINDS, "replay", replace(KINDS["replay"], measurer=lambda: Measurer, forked=False))
    measure = measuring(cells, RunFolder(tmp_path))
    done = {cell: measure(cell) for cell in cells}
    assert len(loads) == len({cell.shared for cell in cells}) > 2
    assert {cell.task for cell, one in done.items() if one.error is not None} == {"arithmetic"}
    assert {cell.task for cell, one in done.items() if one.error is None} >= {"web_of_lies"}
