"""The chapter of confidence signals: whether any tells better than the highest probability what K/2 gets wrong."""

from __future__ import annotations

from collections.abc import Sequence

from reports.data.results import Results
from reports.elements.numbers import span
from reports.elements.page import Section
from reports.plots import confidence
from reports.tables import signals as tables

METHOD = (
    "Every decode token of full K's own answers was run both ways. Where the little pass would write another token "
    "than full K, that is a disagreement; a signal is good if the tokens that it is least sure of are those. The area "
    "is that under the share of disagreements caught against the share of tokens that fall back: 1/2 for chance, 1 for "
    "a signal that names them all first. Intervals are 95 %, from a bootstrap over items, and differences are paired. "
    '"Better" means that both intervals of the difference lie above 0; with so many rows one or two in part may be '
    "luck. Coverage and product ask every router again on every token, which costs time that this table does not show."
)
CONTROL = (
    "Random is the control: as many fallbacks, wherever chance puts them. At the rate of gamma {gamma:g} it caught "
    "{random} of the disagreements, the paper's signal {paper}."
)
ALONE = (
    "The gamma of each signal was taken on other items, of the training side, so that as many tokens fall back there "
    "as with the paper's signal and gamma. A wrong token need not make a wrong answer, so this tells less."
)


def sections(results: Results) -> list[Section]:
    """Return the chapter; nothing for a run without signal cells."""
    if not results.signals:
        return []
    found = tables.rows(results.signals)
    drawn = (confidence.by_signal_cells(group) for group in tables.by_family(results.signals).values())
    return [
        Section(
            "Better than the highest probability?",
            tuple(text for text in (METHOD, in_words(found), control_in_words(found)) if text),
            (tables.caught_table(found),),
        ),
        Section(
            "Where the little pass is wrong, by its confidence",
            (),
            (),
            tuple(filter(None, drawn)),
            level=3,
            folded=True,
        ),
        Section(
            "Answers at equal fallback rate", (ALONE,), (tables.alone_table(results.signals),), level=3, folded=True
        ),
    ]


def control_in_words(found: Sequence[tables.Row]) -> str:
    """Return what fallbacks at random caught beside the paper's signal, at equal rate; empty where none were tried."""
    caught = {
        name: [100 * row.caught[0].value for row in found if row.signal == name] for name in ("random", tables.PAPERS)
    }
    if not all(caught.values()):
        return ""
    random, paper = (span(shares, ".0f", " %") for shares in caught.values())
    return CONTROL.format(gamma=tables.GAMMAS[0], random=random, paper=paper)


def in_words(found: Sequence[tables.Row]) -> str:
    """Return in a sentence or two whether any signal beats the paper's."""
    if not found:
        return "Both passes agreed on every token, so that there was nothing to catch."
    others = dict.fromkeys(row.signal for row in found if row.signal != tables.PAPERS)
    families = dict.fromkeys(row.family for row in found)
    verdicts = {signal: [row.verdict for row in found if row.signal == signal] for signal in others}
    best = [signal for signal, given in verdicts.items() if given and all(each == "better" for each in given)]
    partly = [
        f"{signal} on {', '.join(row.family for row in found if row.signal == signal and 'better' in row.verdict)}"
        for signal, given in verdicts.items()
        if signal not in best and any("better" in each for each in given)
    ]
    count = f"{len(families)} {'family' if len(families) == 1 else 'families'}"
    if best:
        return f"Better than the highest probability on all of {count}: {', '.join(best)}."
    nothing = f"Nothing beats the highest probability on all of {count}"
    return f"{nothing}; better, at least in part: {'; '.join(partly)}." if partly else f"{nothing}, or on any."
