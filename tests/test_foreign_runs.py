"""Run folders from strangers: files are held to their names, manifests and records to what they are made of."""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import yaml

from reports.checks import bundle
from reports.checks.checklist import evidence, lines, recomputed
from reports.data.results import read
from reports.pages import content, write
from suites.plan.preset import read_preset
from suites.record import RunFolder, load, read_json, write_json
from suites.run.jobs import put_damaged_aside
from suites.tasks import scores
from tests import absurd, report_runs
from tests.report_runs import Rule, live_run

TRIES = 1000


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Return a run folder with its page and manifest; it is copied, never changed."""
    folder = report_runs.write(Rule(tasks=("arithmetic",)), tmp_path_factory.mktemp("run") / "tiny")
    build(folder)
    return folder


@pytest.fixture
def run(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "run")


def build(folder: Path) -> None:
    found = read(folder)
    write.write(content.build(found), found, folder)
    bundle.seal(folder, found)


def reseal(folder: Path, **config: object) -> None:
    """Write the manifest of a folder as it is now, without building the page or asking the records."""
    sealed = json.loads((folder / bundle.MANIFEST).read_text())
    sealed |= {"files": bundle.file_hashes(folder), "config": {**sealed["config"], **config}}
    (folder / bundle.MANIFEST).write_text(json.dumps(sealed))


def missing(folder: Path) -> dict[int, str]:
    return {n: why for n, _, result, why in lines.run_tests(evidence.gather(folder)) if result == lines.MISSING}


def test_a_sound_copy_holds(run):
    (run / ".lock").touch()
    assert bundle.verify(run).changed == ()
    assert set(missing(run)) == {32}


# --- what lies in the folder -----------------------------------------------------------------------


def test_links_dotfiles_and_what_is_no_file_are_seen(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "table.csv").write_text("1")
    (run / "more").symlink_to(tmp_path / "elsewhere")
    (run / "records" / "link.json").symlink_to(run / "run.json")
    (run / "figures" / ".hidden").write_text("1")
    (run / ".lock").write_text("not a lock")
    (run / "more.partial").write_text("1")
    (run / "records" / f"x.json.{'0' * 32}.partial").write_text("left by a run that was killed")
    os.mkfifo(run / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(run / "socket"))
    assert set(bundle.verify(run).changed) == {
        "more is a link, and what it leads to is not sealed",
        "records/link.json is a link, and what it leads to is not sealed",
        "figures/.hidden was added",
        ".lock was added",
        "more.partial was added",
        "pipe is neither a file nor a folder",
        "socket is neither a file nor a folder",
    }
    assert 22 in missing(run)


# --- files and their names --------------------------------------------------------------------------


def two(run: Path) -> list[Path]:
    records = sorted((run / "records").glob("*.json"))
    return [path for path in records if load(path).strategy == "lru"][:2]


def test_a_record_over_another_is_a_gap_and_found(run):
    first, second = two(run)
    shutil.copy(first, second)
    reseal(run)
    [(_, why)] = read(run).absent
    assert why.startswith(f"FAILED: records/{second.name} is the record of another cell")
    assert bundle.verify(run).changed
    assert {22, 25} <= set(missing(run))


@pytest.mark.parametrize("kind", ["json", "npz"])
def test_a_live_runs_file_over_another_is_found(run, kind):
    first, second = (run / "generations" / f"{path.stem}.{kind}" for path in two(run))
    shutil.copy(first, second)
    reseal(run)
    names = sorted(path.name for path in (first, second))
    copied, line = bundle.verify(run).changed
    assert copied == f"generations/{names[1]} is a copy of generations/{names[0]}"
    assert f"is of '{first.stem}', not of what its name says" in line
    assert ({9, 22} if kind == "json" else {22}) <= set(missing(run))


def test_a_live_run_of_another_model_or_of_other_items_is_found(run):
    folder = RunFolder(run)
    named = two(run)[0].stem
    record = load(folder.record(named))
    live_run(replace(record, model="another"), folder)
    reseal(run)
    assert bundle.verify(run).changed == (
        f"live run {named}: answers, trace and records are not of the same model and items",
    )
    live_run(record, folder)
    told = read_json(folder.answers(named))
    write_json(folder.answers(named), {**told, "answers": told["answers"][1:]})
    reseal(run)
    assert "not of the same model and items" in bundle.verify(run).changed[0]


def test_a_run_that_is_resumed_puts_files_of_others_aside(tmp_path):
    pieces = read_preset("smoke")
    run, (first, second, *_), generation = RunFolder(tmp_path), pieces.cells, pieces.generations[0]
    made = report_runs.records(Rule(tasks=("arithmetic",)))[0]
    for cell in (first, second):
        replace(made, id=cell.id).save(cell.output(run))
    live = replace(made, config={**made.config, "generation": generation.id})
    live_run(live, run)
    assert list(put_damaged_aside([first, second, generation], run)) == []
    shutil.copy(first.output(run), second.output(run))
    other = replace(made, config={**made.config, "generation": "another"})
    live_run(other, run)
    shutil.copy(run.trace("another"), run.trace(generation.id))
    assert len(list(put_damaged_aside([first, second, generation], run))) == 2
    assert first.output(run).is_file()
    assert not second.output(run).exists()
    live_run(live, run)
    shutil.copy(run.answers("another"), run.answers(generation.id))
    assert len(list(put_damaged_aside([generation], run))) == 1
    absurd.put(first.output(run), {**read_json(first.output(run)), "seed": -0.5})
    assert len(list(put_damaged_aside([first], run))) == 1
    live_run(live, run)
    run.trace(generation.id).unlink()
    os.mkfifo(run.trace(generation.id))
    assert len(list(put_damaged_aside([generation], run))) == 1
    first.output(run).mkdir()
    assert len(list(put_damaged_aside([first], run))) == 1


# --- manifests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["schema", "preset", "files", "config", "code", "wheels"])
def test_a_manifest_without_a_section_is_none(run, section):
    sealed = json.loads((run / bundle.MANIFEST).read_text())
    for wrong in ({k: v for k, v in sealed.items() if k != section}, {**sealed, section: []}):
        (run / bundle.MANIFEST).write_text(json.dumps(wrong))
        with pytest.raises(bundle.NoManifest, match=f"{section} ") as refused:
            bundle.verify(run)
        assert "\n" not in str(refused.value)
        assert 22 in missing(run)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"git_commit": "1" * 40}, "git_commit of the manifest is not that of the records"),
        ({"git_dirty": True}, "git_dirty of the manifest is not that of the records"),
        ({"cells": []}, "cells of the manifest is not that of the records"),
        ({"absent": ["x"]}, "absent of the manifest is not that of the records: 'x' is in one of them only"),
    ],
)
def test_a_manifest_that_says_otherwise_than_the_records_is_found(run, change, says):
    reseal(run, **change)
    [line] = bundle.verify(run).changed
    assert line.startswith(says)
    assert 22 in missing(run)


@pytest.mark.parametrize("gone", ["record", "answers", "trace", "report.html", "cells.csv"])
def test_a_manifest_that_leaves_out_what_is_gone_is_found(run, gone):
    folder, named = RunFolder(run), two(run)[0].stem
    (run / gone if "." in gone else getattr(folder, gone)(named)).unlink()
    reseal(run)
    assert bundle.verify(run).changed
    if gone == "record":  # nor does it help to take it out of the list of cells
        cells = [one.id for one in read(run).all_records]
        reseal(run, cells=sorted(cells))
        assert bundle.verify(run).changed == (
            f"absent of the manifest is not that of the records: '{named}' is in one of them only",
        )


def test_cells_that_have_no_record_are_listed_and_hold(run):
    two(run)[0].unlink()
    build(run)
    assert bundle.verify(run).changed == ()
    assert 25 in missing(run)


def test_absurd_manifests_are_refused_or_found(run):
    path, random, refused = run / bundle.MANIFEST, Random(6), []
    whole = json.loads(path.read_text())
    small = {**whole, **{name: dict(list(whole[name].items())[:3]) for name in ("files", "code", "wheels")}}
    for number in range(TRIES):
        data = absurd.text(absurd.changed(small, random))
        path.write_bytes(data if number % 4 else absurd.spoiled(data, random))
        try:
            bundle.manifest(run)
        except bundle.NoManifest as none:
            refused.append(str(none))
    assert len(refused) > TRIES / 3
    assert all("reports build" in told and told.isprintable() for told in refused)
    for wrong in ({**small, "files": [1]}, {**small, "files": {"x": 1}}, [], None):
        path.write_text(json.dumps(wrong))
        with pytest.raises(bundle.NoManifest):
            bundle.verify(run)


# --- edited results, and the page built again ---------------------------------------------------------


def edited(run: Path, change) -> set[int]:
    """Change every record of a run, build its page again, and return the lines of the checklist that then miss."""
    for path in sorted((run / "records").glob("*.json")):
        record = load(path)
        change(record).save(path)
    build(run)
    return set(missing(run))


def test_better_scores_are_found(run):
    assert 9 in edited(run, lambda r: replace(r, items=tuple(replace(i, correct=True) for i in r.items)))


def test_other_outputs_are_found(run):
    assert 9 in edited(run, lambda r: replace(r, items=tuple(replace(i, output=f" {i.output}") for i in r.items)))


@pytest.mark.parametrize("field", ["decode_ns", "decode_bytes", "decode_tokens", "fallbacks"])
def test_smaller_numbers_are_found(run, field):
    def halve(record):
        return replace(record, items=tuple(replace(i, **{field: (getattr(i, field) + 1) // 3}) for i in record.items))

    assert 15 in edited(run, halve)


def test_wall_times_longer_than_the_cell_are_found(run):
    assert 15 in edited(run, lambda r: replace(r, scope="cpu+disk", wall_seconds=1.0))


def test_a_shipped_tasks_scores_are_given_again(run):
    """Records of a shipped task's own items, and a live run edited with them: only the task's files tell."""
    key = scores.key("arithmetic")

    def of_the_task(record, right):
        items = tuple(
            replace(
                i, prompt_sha256=key.prompts[i.doc], output=f" #### {key.answers[i.doc]}", answer=key.answers[i.doc]
            )
            for i in record.items
        )
        items = tuple(replace(i, correct=right, fallback_spans=()) for i in items)
        made = replace(record, items=items, config={**record.config, "data": {"test": key.source}})
        live_run(made, RunFolder(run))
        return made

    assert edited(run, lambda r: of_the_task(r, True)) & {9, 18} == set()
    assert edited(run, lambda r: of_the_task(r, False)) & {9, 18} == {18}
    [record] = [load(two(run)[0])]
    for data in ({}, {"data": {"test": "another"}}):  # to say otherwise of the items does not help: the prompts tell
        config = {name: value for name, value in record.config.items() if name != "data"} | data
        assert "item 0 answers" in recomputed.wrong_scores(replace(record, config=config))
    assert "item 0 answers" in recomputed.wrong_scores(record)
    asked = replace(record, items=tuple(replace(i, prompt_sha256="0" * 64) for i in record.items))
    assert "was not asked what the task asks" in recomputed.wrong_scores(asked)
    code = replace(
        record, task="humaneval", items=tuple(replace(i, answer="broke", correct=True) for i in record.items)
    )
    assert "scored otherwise than its verdict" in recomputed.wrong_scores(code)


@pytest.mark.parametrize("task", ["arithmetic", "boolean_expressions", "object_counting", "web_of_lies"])
def test_the_pattern_of_a_task_is_what_its_yaml_says(task):
    key = scores.key(task)
    said = yaml.safe_load((scores.FOLDER / f"{task}.yaml").read_text())
    [regex, first] = said["filter_list"][0]["filter"]
    assert (key.pattern.pattern, first["function"]) == (regex["regex_pattern"], "take_first")
    for line, answer in zip(
        (scores.FOLDER / "data" / f"{task}.jsonl").read_text().splitlines(), key.answers, strict=True
    ):
        assert key.found(json.loads(line)["worked"]) == answer
    assert scores.key("python_functions") is scores.key("gsm8k") is scores.key("../x") is None
