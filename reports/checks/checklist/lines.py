"""All 32 lines in order, and the table of what each of them found."""

from __future__ import annotations

from collections.abc import Callable

from reports.checks.checklist import answers, claim, integrity, measurement, use, work
from reports.checks.checklist.evidence import ByReader, Evidence, Missing
from reports.data.compare import UnlikePrompts
from reports.elements.page import Table

HELD, MISSING, READER = "held", "MISSING", "for a reader"

LINES: tuple[Callable[[Evidence], str], ...] = (
    claim.claims_are_data,
    claim.verdict_for_each_claim,
    claim.rule_is_printed,
    claim.deviations_are_listed,
    claim.every_record_is_stamped,
    work.same_prompts,
    work.fixed_length,
    work.modes_are_told,
    work.one_path,
    work.baselines_are_sourced,
    work.state_of_caches,
    measurement.warm_up_is_apart,
    measurement.interleaved,
    measurement.ratio_of_prompts,
    measurement.phases_apart,
    measurement.device_watched,
    measurement.link_is_checked,
    answers.answers_are_kept,
    answers.margin_came_first,
    answers.drawn_not_taken,
    integrity.everything_is_hashed,
    integrity.bundle_is_sealed,
    integrity.oracle_agrees,
    integrity.canary_died,
    integrity.failures_are_shown,
    integrity.no_favours,
    use.cost_is_told,
    use.smoke_is_quick,
    use.licences,
    use.one_command,
    use.limits_are_said,
    use.expected_is_kept,
)


def answered(seen: Evidence) -> list[tuple[int, str, str, str]]:
    """Number, line, result and what it rests on, for every line."""
    return [(number, (line.__doc__ or "").strip(), *_ask(line, seen)) for number, line in enumerate(LINES, 1)]


def _ask(line: Callable[[Evidence], str], seen: Evidence) -> tuple[str, str]:
    try:
        return HELD, line(seen)
    except (Missing, UnlikePrompts) as missing:
        return MISSING, str(missing)
    except ByReader as reader:
        return READER, str(reader)


def table(seen: Evidence) -> Table:
    rows = tuple((str(number), line, result, why) for number, line, result, why in answered(seen))
    return Table("Checklist", ("", "line", "result", "why"), rows)
