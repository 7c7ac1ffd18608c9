"""All 32 lines in order, each with its test, and the table of their results.

A test returns the evidence for its line, or raises Missing or NeedsReader with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

from reports.checks.checklist import accuracy, claim, integrity, measurement, use, work
from reports.checks.checklist.evidence import Evidence, Missing, NeedsReader
from reports.data.compare import UnlikePrompts
from reports.elements.page import Table

HELD, MISSING, READER = "held", "MISSING", "for a reader"

LINES: tuple[tuple[str, Callable[[Evidence], str]], ...] = (
    ("What was published is held as data, each claim with its source", claim.claims_are_data),
    (
        "Every claim has, for every family, what was published, our value with its interval, and a verdict",
        claim.verdict_for_each_claim,
    ),
    ("The rule for verdicts was fixed before the run and stands on the page", claim.rule_is_printed),
    ("The page says what is ours and not the paper's, and what is unknown", claim.deviations_are_listed),
    ("Every record and the page carry the scope and the kind of weights", claim.every_record_is_stamped),
    ("Every strategy was given the same prompts, precision and memory", work.same_prompts),
    ("Times that are compared are of the same number of tokens", work.lengths_are_equal),
    ("Replayed and free timing are told apart", work.timing_modes_are_stated),
    ("What is scored is what is timed", work.scored_runs_are_timed),
    ("Every baseline names its paper, and tuning was equal", work.baselines_are_sourced),
    ("Cold or warm, and where the experts lie, is said", work.cache_state_is_stated),
    ("Warm-up is stored, and averaged into nothing", measurement.warm_up_is_stored),
    (
        "Enough prompts, and on a GPU strategies interleaved over three processes",
        measurement.prompts_and_processes_suffice,
    ),
    (
        "Speedups are geometric means of ratios with a two-level interval, total tokens over total time beside them",
        measurement.averaging_is_stated,
    ),
    ("Prefill and decode are timed each by itself", measurement.phases_are_timed_apart),
    (
        "Clocks, throttling, temperature and the link's generation and width were sampled while it ran",
        measurement.device_is_monitored,
    ),
    ("The link's bandwidth was measured, and the ledger's bytes held against it", measurement.link_is_checked),
    (
        "Every answer is stored, and differences are paired with an interval and an exact test",
        accuracy.answers_are_kept,
    ),
    ("The margin was fixed before the run, and the page says what so many items can show", accuracy.margin_is_stated),
    ("Items are the whole set or a seeded random part of it, never the first ones", accuracy.items_are_sampled),
    (
        "Weights, data, code and packages are hashed, and changes not committed are flagged",
        integrity.everything_is_hashed,
    ),
    ("A manifest of SHA-256 holds for every file", integrity.bundle_is_sealed),
    ("Offloaded full K gave the resident model's tokens", integrity.offloading_keeps_tokens),
    ("With a scrambled router accuracy falls and time stays", integrity.canary_fails),
    ("What failed or is missing stands on the page, with the reason", integrity.failures_are_shown),
    ("Nothing detects the benchmark or is tuned to its inputs", integrity.no_benchmark_is_detected),
    ("The cost of a run is said before it starts", use.cost_is_stated),
    ("There is a run of two minutes that needs no network and no GPU", use.smoke_is_short),
    ("Code, weights and data are under a licence, and running generated code is safe or asked for", use.licences),
    ("The raw records and one command give every table and figure again", use.one_command),
    ("The page says what it does not show", use.limits_are_stated),
    ("What a shipped preset should give is committed", use.expected_is_kept),
)


def run_tests(evidence: Evidence) -> list[tuple[int, str, str, str]]:
    """Return (number, line, result, reason) of every line."""
    return [(number, line, *_run(test, evidence)) for number, (line, test) in enumerate(LINES, 1)]


def _run(test: Callable[[Evidence], str], evidence: Evidence) -> tuple[str, str]:
    try:
        return HELD, test(evidence)
    except (Missing, UnlikePrompts) as missing:
        return MISSING, str(missing)
    except NeedsReader as reader:
        return READER, str(reader)


def table(evidence: Evidence) -> Table:
    """Return one row a line."""
    rows = tuple((str(number), line, result, why) for number, line, result, why in run_tests(evidence))
    return Table("Checklist", ("", "line", "result", "why"), rows)
