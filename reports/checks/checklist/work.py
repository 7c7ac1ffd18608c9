"""Tests of lines 6 to 11: the same work for every strategy."""

from __future__ import annotations

from reports.checks.checklist import recomputed
from reports.checks.checklist.evidence import Evidence, Missing, NeedsReader
from reports.data.results import rows_of
from suites.record import Record


def same_prompts(evidence: Evidence) -> str:
    """Raise Missing where cells of the same work differ in prompts or precision, or slots are not recorded."""
    groups = list(evidence.same_work())
    for cells in groups:
        prompts: dict[int, set[str]] = {}
        for item in (item for cell in cells for item in cell.items):
            prompts.setdefault(item.doc, set()).add(item.prompt_sha256)
        if any(len(hashes) > 1 for hashes in prompts.values()):
            raise Missing(f"{cells[0].model} on {cells[0].task}: one number stands for several prompts")
        if len({cell.config.get("dtype") for cell in cells}) > 1:
            raise Missing(f"{cells[0].model} on {cells[0].task}: cells differ in precision")
    if any(r.slots is None and r.strategy != "resident" for r in evidence.results.scored):
        raise Missing("some records do not say how many slots they had")
    return f"{len(groups)} groups of cells, items paired by number and prompt hash; slots in every record"


def lengths_are_equal(evidence: Evidence) -> str:
    """Raise Missing where lossless cells on one row format decode different numbers of tokens for one item."""
    for cells in evidence.same_work():
        lengths: dict[tuple[str, int], set[int]] = {}
        for cell in (c for c in cells if c.lossless):
            for item in cell.items:
                lengths.setdefault((rows_of(cell), item.doc), set()).add(item.decode_tokens)
        if uneven := [doc for (_, doc), found in lengths.items() if len(found) > 1]:
            raise Missing(f"{cells[0].model} on {cells[0].task}: items {uneven[:3]} differ in length between cells")
    return "lossless cells decode the same tokens; others are compared by time per token"


def timing_modes_are_stated(evidence: Evidence) -> str:
    """List the ways in which records were timed. Raise Missing where a record does not say."""
    modes = {_mode(record) for record in evidence.results.scored}
    return " and ".join(sorted(modes))


def _mode(record: Record) -> str:
    if mode := record.config.get("timing"):
        return str(mode)
    if record.config.get("generation"):
        return "replay of recorded routing"
    raise Missing(f"record {record.id} does not say how it was timed")


def scored_runs_are_timed(evidence: Evidence) -> str:
    """Raise Missing unless every item holds the live run's answer and a time, and live runs equal their replays."""
    loose = [
        r.id
        for r in evidence.results.scored
        for item in r.items
        if item.decode_tokens is None or not item.prompt_sha256
    ]
    if loose:
        raise Missing(f"{len(loose)} items have a score and no time, or a time and no prompt")
    results, run = evidence.results, evidence.run
    if wrong := next(recomputed.unlike_answers(results.all_records, run), None):
        raise Missing(wrong)
    turned = ((r.id, recomputed.wrong_turns(r, run)) for r in results.scripted)
    if wrong := next((f"record {name}: {why}" for name, why in turned if why), None):
        raise Missing(wrong)
    live = [name for r in evidence.results.scored for name in r.checks if "live ledger equals replay" in name]
    if not live and not evidence.measured:
        raise Missing("no live run was held against its replay")
    return "each item holds its score and its time; live runs equal their replays"


def baselines_are_sourced(evidence: Evidence) -> str:
    """Raise Missing unless every record names the paper of its strategy."""
    evidence.require_config("strategy_source")
    return "strategy_source in every record; no baseline has a knob tuned to these items"


def cache_state_is_stated(evidence: Evidence) -> str:
    """Raise NeedsReader unless the page says in what state the caches start."""
    if "cache starts cold" not in evidence.page:
        raise NeedsReader("the page does not say in what state the caches start")
    return "the page says it, beside the speeds"
