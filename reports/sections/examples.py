"""Items on which MoBiLE and full K disagree, with the tokens that fell back."""

from __future__ import annotations

from itertools import pairwise

from reports.data import groups
from reports.data.compare import paired_items
from reports.data.results import Results
from reports.elements.page import Example, Span
from suites.record import Item

SHOWN = 3


def disagreements(results: Results, model: str, task: str) -> tuple[Example, ...]:
    """Return at most three examples a task: two answers lost, one gained, then any others that differ.

    Within each kind the items come in the order of the data, so that none is picked by hand.
    """
    mobile, full_k = groups.mobile(results, model, task=task), groups.full_k(results, model, task=task)
    pairs = [pair for group in paired_items(mobile, full_k) for pair in group if pair[0].output != pair[1].output]
    lost = [p for p in pairs if p[1].correct and not p[0].correct]
    gained = [p for p in pairs if p[0].correct and not p[1].correct]
    same = [p for p in pairs if p[0].correct == p[1].correct]
    picked = [*lost[:2], *gained[:1]]
    picked += [pair for pair in (*lost, *gained, *same) if pair not in picked][: SHOWN - len(picked)]
    return tuple(_example(task, item, full_k_item) for item, full_k_item in picked)


def _example(task: str, item: Item, full_k_item: Item) -> Example:
    prompt = getattr(item, "prompt", None) or f"(not kept; its SHA-256 is {item.prompt_sha256})"
    verdict = (
        "lost"
        if full_k_item.correct and not item.correct
        else "gained"
        if item.correct and not full_k_item.correct
        else "same score"
    )
    title = f"{task} {item.doc}: {verdict}, {item.fallbacks} of {item.decode_tokens} tokens fell back"
    spans = getattr(item, "fallback_spans", None) or ()
    return Example(
        title,
        prompt,
        full_k_item.output,
        full_k_item.correct is True,
        cut_at_spans(item.output, spans),
        item.correct is True,
    )


def cut_at_spans(text: str, spans: tuple[tuple[int, int], ...]) -> tuple[Span, ...]:
    """Cut a text at the ends of (start, end) spans, which may touch or overlap; the parts joined are the text."""
    fell_back = [False] * len(text)
    for start, end in spans:
        fell_back[start:end] = [True] * len(fell_back[start:end])
    edges = [0, *(i for i in range(1, len(text)) if fell_back[i] != fell_back[i - 1]), len(text)]
    return tuple(Span(text[a:b], fell_back[a]) for a, b in pairwise(edges) if b > a)
