"""The first screen says what the records say: speed, worst loss, best lossless rival, when and where."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from reports.pages import content, write
from reports.sections.accuracy import LACKS
from reports.sections.first_screen import NO_VERDICT, command, first_screen
from tests.report_runs import ITEMS, Rule, record, results

MODEL = ("olmoe-tiny", "olmoe", 0)
TWO = (MODEL, ("qwen3-moe-tiny", "qwen3-moe", 0))
PAPER = tomllib.loads(content.PAPER.read_text())


def first(found, trusted=True):
    return first_screen(found, PAPER, trusted)


def tiles(found):
    return {tile.name: tile.lines for tile in first(found).tiles}


def with_strategy(found, name, faster, budget="smallest", **config):
    """Return the run with one more strategy, which is `lru` made so many times as fast."""
    like = [r for r in found.records if (r.strategy, r.budget) == ("lru", budget)]
    made = [
        replace(
            r,
            id=f"{name}{r.id}"[:16],
            strategy=name,
            config={**r.config, **config},
            items=tuple(replace(i, decode_ns=round(i.decode_ns / faster)) for i in r.items),
        )
        for r in like
    ]
    return replace(found, records=(*found.records, *made))


def test_three_tiles_hold_speed_worst_loss_and_the_best_lossless_rival():
    shown = tiles(results(Rule()))
    assert list(shown) == [
        "Speed over plain offloading",
        "Worst loss of accuracy",
        "Best lossless rival, over the same",
    ]
    speed, published = shown["Speed over plain offloading"]
    assert speed[0].startswith("1.60x")
    assert speed[1] == "projected, olmoe-tiny, fewest slots"
    assert published[0] == "1.60x to 1.72x"
    rival = shown["Best lossless rival, over the same"]
    assert rival[0][0].startswith("1.14x")
    assert rival[0][1].startswith("lru; MoBiLE 1.60x")


def test_the_worst_loss_names_its_model_and_task_and_stands_beside_the_pooled_one():
    found = results(Rule(models=TWO, lost=()))
    lost = record(replace(Rule(), lost=(2, 7, 8)), TWO[1], "web_of_lies", "mobile", 0.7, "smallest")
    spoilt = replace(found, records=tuple(lost if r.id == lost.id else r for r in found.records))
    worst, pooled = tiles(spoilt)["Worst loss of accuracy"]
    assert worst[0].startswith(f"{-100 * 3 / ITEMS:.1f} [")
    assert worst[1] == f"qwen3-moe-tiny on web_of_lies, n = {ITEMS}"
    assert pooled[0].startswith(f"{-100 * 3 / (2 * ITEMS):.1f} [")
    assert pooled[1] == f"qwen3-moe-tiny, all tasks together, n = {2 * ITEMS}"


@pytest.mark.parametrize(
    ("name", "config"), [("clairvoyant", {"needs_future": True}), ("belady", {}), ("oracle-prefetch", {})]
)
def test_no_rival_knows_the_future(name, config):
    found = with_strategy(results(Rule()), name, 9, **config)
    assert tiles(found)["Best lossless rival, over the same"][0][1].startswith("lru;")


def test_a_faster_lossless_strategy_is_the_rival_and_the_sentence_says_that_it_is_faster():
    found = with_strategy(results(Rule()), "cache-of-mine", 2)
    assert tiles(found)["Best lossless rival, over the same"][0][1].startswith("cache-of-mine; MoBiLE 1.60x")
    assert "cache-of-mine, which is lossless, is faster there" in first(found).verdict
    assert "lru, which is lossless, is not shown to be faster there" in first(results(Rule())).verdict


def test_the_verdict_is_one_sentence_and_calls_a_projection_so():
    said = first(results(Rule(models=TWO, weights="real"))).verdict
    assert said.startswith("Projected onto rtx4080-pcie4, with the fewest slots, MoBiLE decodes 1.60x as fast")
    assert "at most 1 point for 0 of 2 families" in said
    assert ". " not in said
    assert said.endswith(".")
    measured = first(results(Rule(scope="gpu+pcie", weights="real"))).verdict
    assert measured.startswith("Measured (gpu+pcie, real weights)")
    assert "the published speed is REPRODUCED 1x" in measured
    assert "REPRODUCED" not in first(results(Rule(scope="gpu+pcie", weights="shipped-tiny"))).verdict


def test_a_broken_control_leaves_no_verdict():
    found = results(Rule())
    assert first(found, trusted=False).verdict == NO_VERDICT
    broken = results(Rule(canary_correct=ITEMS))
    assert content.build(broken).first.verdict == NO_VERDICT


def test_a_run_without_mobile_has_no_tile_and_says_so():
    found = results(Rule())
    without = replace(found, records=tuple(r for r in found.records if r.strategy != "mobile"))
    shown = first(without)
    assert (shown.tiles, shown.verdict) == ((), LACKS)
    write.markdown(content.build(without))


def test_synthetic_cells_are_measured_and_say_nothing_of_accuracy():
    rule = Rule(tasks=("recorded routing",), scope="cpu+disk", weights="synthetic")
    cells = [record(rule, MODEL, "recorded routing", name, None, "smallest") for name in ("on-demand-overlap", "lru")]
    cells.append(record(rule, MODEL, "recorded routing", "mobile", 0.7, "smallest"))
    cells = tuple(replace(r, config={**r.config, "link_gb_per_s": None}) for r in cells)
    found = replace(results(Rule()), records=(), controls=(), synthetic=cells)
    shown = first(found)
    assert [tile.name for tile in shown.tiles] == ["Speed over plain offloading", "Best lossless rival, over the same"]
    assert shown.tiles[0].lines[0][1] == "measured over a disk, olmoe-tiny, fewest slots"
    assert "nothing is said of accuracy" in shown.verdict
    both = first(replace(results(Rule()), synthetic=cells))
    assert [about.split(",")[0] for _, about in both.tiles[0].lines] == [
        "projected",
        "measured over a disk",
        "published",
    ]


def test_the_day_is_that_of_the_records_and_the_page_does_not_change_when_it_is_built_again():
    def on(*days):
        found = results(Rule())
        dated = tuple(
            replace(r, environment={**r.environment, "date": day})
            for r, day in zip(found.records, days * len(found.records), strict=False)
        )
        return replace(found, records=dated, controls=())

    assert first(on("2026-01-02")).made == "Recorded 2026-01-02 on a processor, 2 cores, no GPU."
    assert first(on("2026-01-02", "2026-01-04")).made.startswith("Recorded 2026-01-02 to 2026-01-04 on")
    assert "(day not kept)" in first(results(Rule())).made
    again = (write.markdown(content.build(on("2026-01-02"))) for _ in range(2))
    assert len(set(again)) == 1


def test_the_command_names_a_shipped_preset_or_a_file():
    assert command("cpu") == "python -m suites run --preset cpu && python -m reports build"
    assert command("x; y").startswith("python -m suites run --preset 'x; y.toml' &&")


def test_html_and_markdown_hold_the_same_first_screen(tmp_path):
    found = results(Rule())
    report = content.build(found)
    write.write(report, found, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for page in (html, text):
        assert report.first.verdict in page
        assert PAPER["url"] in page
        at = [page.index(part) for part in (report.first.verdict, *(t.name for t in report.first.tiles))]
        assert at == sorted(at)
        assert max(at) < page.index(report.opening[0][:60])
    assert html.count('class="tile"') == 3
