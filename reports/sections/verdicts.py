"""The chapter of verdicts: a row for what can be judged, one sentence for what cannot."""

from __future__ import annotations

from dataclasses import replace

from reports.elements.page import Section, Table
from reports.verdict import RULE

REFUSED = "NOT COMPARABLE"
TAKES = (
    "a verdict takes a measurement on one GPU over its own link with the real weights (the preset paper), and the "
    "values stand in the tables of speed and accuracy"
)


def section(heading: str, table: Table, level: int = 2, folded: bool = False, rule: bool = True) -> Section:
    """Return the chapter of a table of verdicts, whose rows that may not be judged are one sentence.

    It prints the rule, unless it is `rule=False` and has no row: another chapter prints it.
    """
    kept, sentence = collapsed(table)
    paragraphs = (sentence, RULE if rule or kept.rows else "")
    return Section(heading, tuple(each for each in paragraphs if each), (kept,), level=level, folded=folded)


def collapsed(table: Table) -> tuple[Table, str]:
    """Return the table with the rows that have a verdict, and a sentence on all others, empty if there are none.

    The sentence has each reason why a row may not be judged, with the scopes and weights it holds for.
    """
    verdict, scope = table.head.index("verdict"), table.head.index("scope")
    refused = [row for row in table.rows if row[verdict].startswith(REFUSED)]
    if not refused:
        return table, ""
    kept = replace(table, rows=tuple(row for row in table.rows if row not in refused))
    scopes = {row[verdict]: dict.fromkeys(r[scope] for r in refused if r[verdict] == row[verdict]) for row in refused}
    reasons = " and ".join(f"{reason}, {'; '.join(found)}" for reason, found in scopes.items())
    number = (
        f"{len(refused)} of the {len(table.rows)} comparisons with the paper are not judged"
        if kept.rows
        else f"None of the {len(refused)} comparisons with the paper is judged"
    )
    return kept, f"{number} ({reasons}): {TAKES}."
