"""LaTeX tables (booktabs): methods down, models and tasks across, scope in the caption."""

from __future__ import annotations

from reports.data import groups
from reports.data.compare import accuracy, count, share, speedup, strategy_name, total, worst_task
from reports.data.groups import Group
from reports.data.results import Results
from reports.elements.escapes import latex as escape
from reports.elements.escapes import on_one_line
from reports.verdict import stamp_of


def tables(results: Results, alarm: str | None) -> str:
    """Return the tables of accuracy by task and speed by model as LaTeX, for the input command."""
    warning = f"% {on_one_line(alarm)}\n" if alarm else ""
    return (
        f"{warning}% Made by python -m reports build. Needs: \\usepackage{{booktabs,graphicx}}\n"
        f"{_accuracy(results)}\n{_speed(results)}"
    )


def _accuracy(results: Results) -> str:
    """Return scores in percent: a row a method that can change an answer, a column a model and task."""
    columns = [(model, task) for model in results.models for task in results.tasks(model)]
    methods = dict.fromkeys(strategy_name(g[0]) for model in results.models for g in _scored(results, model))
    rows = []
    for method in methods:
        cells = []
        for model, task in columns:
            group = next((g for g in _scored(results, model, task=task) if strategy_name(g[0]) == method), None)
            cells.append(f"{100 * total(group, 'correct') / count(group):.1f}" if group else "--")
        rows.append([escape("full K" if method == "resident" else method), *cells])
    heads = [("", 1), *((model, len(results.tasks(model))) for model in results.models)]
    second = ["Method", *(escape(task.replace("_", " ")) for _, task in columns)]
    scope = escape(str(stamp_of(results.records)))
    caption = f"Accuracy (\\%), greedy decoding, the same items for every method ({scope})."
    return _table(caption, "tab:accuracy", heads, second, rows)


def _scored(results: Results, model: str, **wanted: str) -> list[Group]:
    """Return full K and every lossy strategy, over the items that all of them were asked."""
    found = groups.unswept(results, "smallest", model, **wanted)
    scored = [group for group in found if group[0].strategy == "resident" or not group[0].lossless]
    return [group for group in groups.on_common_items(scored) if count(group)]


def _speed(results: Results) -> str:
    """Return speedup, loss, worst task and fallbacks: a row a strategy, four columns a model."""
    methods = dict.fromkeys(
        strategy_name(g[0])
        for model in results.models
        for g in groups.unswept(results, "smallest", model)
        if g[0].strategy != "resident"
    )
    rows = []
    for method in methods:
        cells: list[str] = []
        for model in results.models:
            found = (g for g in groups.unswept(results, "smallest", model) if strategy_name(g[0]) == method)
            cells += _speed_cells(results, model, next(found, None))
        rows.append([escape(method), *cells])
    heads = [("", 1), *((model, 4) for model in results.models)]
    second = ["Method", *(["Speedup", "$\\Delta$acc.", "Worst", "Fallb."] * len(results.models))]
    caption = (
        "Decode speedup over on-demand-overlap with the fewest slots each method needs, change of accuracy in points, "
        "over all tasks and on the task with the lowest, "
        f"and fallback rate in \\% ({escape(str(stamp_of(results.records)))}; published: on a real GPU, "
        "1.60 to 1.72)."
    )
    return _table(caption, "tab:speed", heads, second, rows)


def _speed_cells(results: Results, model: str, group: Group | None) -> list[str]:
    base = groups.baselines(results, "smallest", model).get("on-demand-overlap")
    if group is None or base is None:
        return ["--"] * 4
    speed_up, first = speedup(group, base), group[0]
    loss, lowest = ("0", "0") if first.lossless else _lost(_scored(results, model), strategy_name(first))
    fallbacks = share(group, "fallbacks", "tokens")
    rate = "--" if first.gamma is None or fallbacks is None else f"{100 * fallbacks:.1f}"
    return [f"{speed_up.value:.2f}$\\times$" if speed_up else "--", loss, lowest, rate]


def _lost(scored: list[Group], method: str) -> tuple[str, str]:
    """Return a method's change of accuracy in points, over all tasks and on the task with the lowest."""
    named = {strategy_name(group[0]): group for group in scored}
    if method not in named or "resident" not in named:
        return "--", "--"
    loss, worst = accuracy(named[method], named["resident"]), worst_task(named[method], named["resident"])
    lowest = worst.loss if worst else loss
    return f"${loss.difference.value:+.1f}$", f"${lowest.difference.value:+.1f}$"


def _table(caption: str, label: str, heads: list[tuple[str, int]], second: list[str], rows: list[list[str]]) -> str:
    """Return one table, scaled to the text's width; `heads` are (text, columns spanned), `rows` LaTeX already."""
    spans, rules, column = [], [], 1
    for text, width in heads:
        spans.append(f"\\multicolumn{{{width}}}{{c}}{{{escape(text)}}}" if width > 1 or text else "")
        if text:
            rules.append(f"\\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    lines = [
        "\\begin{table*}[t]",
        "\\centering",
        f"\\caption{{{caption}}}",
        f"\\label{{{label}}}",
        "\\resizebox{\\textwidth}{!}{%",
        f"\\begin{{tabular}}{{l{'r' * (len(second) - 1)}}}",
        "\\toprule",
        f"{' & '.join(spans)} \\\\",
        " ".join(rules),
        f"{' & '.join(second)} \\\\",
        "\\midrule",
        *(f"{' & '.join(row)} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}}",
        "\\end{table*}",
    ]
    return "\n".join(lines) + "\n"
