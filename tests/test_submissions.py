"""Someone else's numbers: what `submit` packs, what `collect` believes, and what stands beside what."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from reports.checks import bundle, expected, plain_zip, submission
from reports.checks.submission import ABOUT, Unsubmittable, pack, unpacked
from reports.data.results import read
from reports.pages import collected, content, write
from reports.pages.submitted import alike, unlike
from suites.record import RunFolder, load, read_json, write_json
from tests import report_runs
from tests.report_runs import Rule

ROOT = Path(__file__).parent.parent
RULE = Rule(tasks=("arithmetic",))
Files = dict[str, bytes]


def sealed(rule: Rule, folder: Path) -> Path:
    """Return a run folder with its page and manifest."""
    return seal(report_runs.write(rule, folder))


def seal(folder: Path) -> Path:
    found = read(folder)
    write.write(content.build(found), found, folder)
    bundle.seal(folder, found)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return sealed(RULE, tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="module")
def archive(run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "tiny.zip"
    pack(run, path, as_it_is=True)
    return path


@pytest.fixture
def expecting(run, tmp_path, monkeypatch) -> Path:
    """Return where an expectation of that run is kept, and found."""
    monkeypatch.setattr(expected, "FOLDER", tmp_path / "expected")
    expected.save(read(run), "a page", tmp_path / "expected" / "tiny")
    return tmp_path / "expected" / "tiny"


def one_sentence(error: pytest.ExceptionInfo) -> str:
    told = str(error.value)
    assert "\n" not in told
    assert len(told) < 500
    return told


# --- submit --------------------------------------------------------------------------------------------


def test_a_run_that_holds_is_packed_whole_and_always_into_the_same_bytes(run, expecting, tmp_path):
    about = pack(run, tmp_path / "one.zip", by="J. Doe")
    assert about.missing == ()
    assert pack(run, tmp_path / "two.zip", by="J. Doe") == about
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    names = {path.relative_to(run).as_posix() for path in (run / "records").glob("*.json")}
    names |= {"run.json", "manifest.json", "report.html", "report.md", "cells.csv"}
    with zipfile.ZipFile(tmp_path / "one.zip") as packed:
        assert set(packed.namelist()) == names | {ABOUT}
        assert all(packed.read(name) == (run / name).read_bytes() for name in names)
    found = unpacked(tmp_path / "one.zip")
    assert found.results == read(run)
    assert (found.by, found.same_code, found.gate, found.missing) == ("J. Doe", True, submission.AS_EXPECTED, ())


def test_an_unfinished_run_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    next((folder / "records").glob("*.json")).unlink()
    with pytest.raises(Unsubmittable, match="is not finished, 1 of its cells") as error:
        pack(folder, tmp_path / "no.zip", as_it_is=True)
    one_sentence(error)
    assert not (tmp_path / "no.zip").exists()


def test_a_run_that_changed_since_its_page_was_built_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    with (folder / "report.md").open("a") as file:
        file.write("and much faster")
    with pytest.raises(Unsubmittable, match=r"not as it was sealed \(report\.md differs\)"):
        pack(folder, tmp_path / "no.zip", as_it_is=True)


def test_a_broken_control_is_refused(tmp_path):
    folder = sealed(replace(RULE, canary_correct=report_runs.ITEMS), tmp_path / "run")
    with pytest.raises(Unsubmittable, match="cannot be trusted: canary"):
        pack(folder, tmp_path / "no.zip", as_it_is=True)


def test_a_failing_check_or_gate_is_refused_or_said(run, expecting, tmp_path):
    facts = json.loads((expecting / "cells.json").read_text())
    next(iter(facts["cells"].values()))["counters"]["tokens"] += 1
    (expecting / "cells.json").write_text(json.dumps(facts))
    with pytest.raises(Unsubmittable, match="fails: gate: 1 facts are not as expected") as error:
        pack(run, tmp_path / "a.zip")
    one_sentence(error)
    pack(run, tmp_path / "a.zip", as_it_is=True)
    assert unpacked(tmp_path / "a.zip").gate.startswith("1 facts are not as expected")
    (expecting / "cells.json").unlink()
    with pytest.raises(Unsubmittable, match="check misses line 32"):
        pack(run, tmp_path / "a.zip")
    pack(run, tmp_path / "a.zip", as_it_is=True)
    [missing] = unpacked(tmp_path / "a.zip").missing
    assert missing.startswith("32: ")
    page = collected.report([unpacked(tmp_path / "a.zip")])
    assert page.sections[0].tables[1].rows == (("A", "32", missing.removeprefix("32: ")),)


def test_the_home_folder_stays_at_home(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    victim = next((folder / "records").glob("*.json"))
    record = load(victim)
    replace(record, config={**record.config, "data": {"train": "/house/jane/secret.jsonl"}}).save(victim)
    seal(folder)
    monkeypatch.setattr(Path, "home", lambda: Path("/house/jan"))
    pack(folder, tmp_path / "a.zip", as_it_is=True)  # a longer name is another folder
    monkeypatch.setattr(Path, "home", lambda: Path("/house/jane"))
    with pytest.raises(Unsubmittable, match=f"{victim.name} names your home folder"):
        pack(folder, tmp_path / "a.zip", as_it_is=True)


# --- what is believed ----------------------------------------------------------------------------------


def files_of(archive: Path) -> Files:
    with zipfile.ZipFile(archive) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def listed(files: Files) -> Files:
    """Return the files with their sizes and hashes as `submission.json` is to have them."""
    about = json.loads(files[ABOUT])
    about["files"] = {
        name: {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
        if name != ABOUT
    }
    return {**files, ABOUT: json.dumps(about).encode()}


def resealed(files: Files) -> Files:
    """Return the files with their hashes in the run's manifest, too: all that a careful forger would do."""
    manifest = json.loads(files[bundle.MANIFEST])
    for name, data in files.items():
        if name not in (ABOUT, bundle.MANIFEST):
            manifest["files"][name] = hashlib.sha256(data).hexdigest()
    return listed({**files, bundle.MANIFEST: json.dumps(manifest).encode()})


def edited(files: Files, **changes: object) -> Files:
    """Return the files with MoBiLE's first record changed as its own checksum allows."""
    for name in sorted(files):
        if not name.startswith("records/") or json.loads(files[name])["strategy"] != "mobile":
            continue
        data = json.loads(files[name])
        del data["sha256"]
        body = json.dumps({**data, **changes}, indent=1, sort_keys=True).removeprefix("{\n").encode() + b"\n"
        return {**files, name: b'{\n "sha256": "%s",\n' % hashlib.sha256(body).hexdigest().encode() + body}
    raise AssertionError


def faster(files: Files) -> Files:
    name = next(n for n in sorted(files) if n.startswith("records/") and b'"strategy": "mobile"' in files[n])
    items = json.loads(files[name])["items"]
    return edited(files, items=[{**item, "decode_ns": item["decode_ns"] // 2} for item in items])


def without(files: Files, name: str) -> Files:
    return {key: value for key, value in files.items() if key != name}


FORGERIES: dict[str, tuple[Callable[[Files], Files], str]] = {
    "a record was edited": (faster, "is not the file that was packed"),
    "and listed again": (lambda files: listed(faster(files)), "is not the file that the run's manifest seals"),
    "and sealed again": (lambda files: resealed(faster(files)), "decode_seconds is"),
    "a record is missing": (lambda f: without(f, sorted(n for n in f if "records/" in n)[0]), "listed and not there"),
    "and unlisted": (
        lambda f: listed(without(f, sorted(n for n in f if "records/" in n)[0])),
        "does not hold the files that its manifest seals",
    ),
    "a file was added": (lambda f: {**f, "turns/more.json": b"{}"}, "is there and not listed"),
    "and sealed": (lambda f: resealed({**f, "records/more.json": b"{}"}), "is of no cell of its plan"),
    "a note on a cell that is not planned": (
        lambda f: resealed({**f, "failures/more.json": b'{"id": "more", "label": "a cell", "error": "too small"}'}),
        "does not hold the files that its manifest seals",
    ),
    "of another schema": (lambda f: resealed(edited(f, schema=4)), "record schema 4"),
    "of another preset": (
        lambda f: {**f, ABOUT: f[ABOUT].replace(b'"preset": "tiny"', b'"preset": "cpu"')},
        "manifest is of preset 'tiny', not of 'cpu'",
    ),
    "of other code": (
        lambda f: {**f, ABOUT: json.dumps({**json.loads(f[ABOUT]), "code": "0" * 64}).encode()},
        "names other code than its manifest",
    ),
    "of a later format": (
        lambda f: {**f, ABOUT: f[ABOUT].replace(b"submission-1", b"submission-2")},
        "and this version reads mobile-submission-1",
    ),
    "of no format": (lambda f: {**f, ABOUT: b"[]"}, "must be an object"),
    "without a list": (lambda f: without(f, ABOUT), "it has no submission.json"),
    "without a plan": (lambda f: listed(without(f, "run.json")), "does not hold the files"),
}


def test_a_cell_that_the_machine_was_too_small_for_is_sent_as_such_and_one_that_failed_is_not(tmp_path):
    folder = report_runs.write(RULE, tmp_path / "run")
    plan, note = RunFolder(folder).plan, RunFolder(folder).failure("large")
    told = read_json(plan)
    write_json(plan, {**told, "cells": [*told["cells"], {"id": "large", "label": "a large cell"}]})
    write_json(note, {"id": "large", "label": "a large cell", "error": "This card is too small.", "left_out": True})
    stale = {"id": "gone", "label": "of an older plan", "error": "It broke.", "log": f"{Path.home()}/run/logs/gone.log"}
    write_json(RunFolder(folder).failure("gone"), stale)
    pack(seal(folder), tmp_path / "run.zip", as_it_is=True)
    notes = [name for name in files_of(tmp_path / "run.zip") if name.startswith("failures/")]
    assert notes == ["failures/large.json"]
    assert unpacked(tmp_path / "run.zip").results.left_out == (("a large cell", "This card is too small."),)
    write_json(note, {"id": "large", "label": "a large cell", "error": "It broke."})
    with pytest.raises(Unsubmittable, match="is not finished, 1 of its cells have no record"):
        pack(seal(folder), tmp_path / "run.zip", as_it_is=True)


@pytest.mark.parametrize("forged", FORGERIES)
def test_what_was_forged_is_refused_in_one_sentence(archive, tmp_path, forged):
    change, says = FORGERIES[forged]
    plain_zip.pack(tmp_path / "forged.zip", change(files_of(archive)))
    with pytest.raises(Unsubmittable, match="cannot be counted: ") as error:
        unpacked(tmp_path / "forged.zip")
    assert says in one_sentence(error)


def test_any_damaged_byte_is_found_or_changes_nothing(archive, tmp_path):
    sound, whole, random = unpacked(archive), archive.read_bytes(), Random(0)
    refused = 0
    for _ in range(150):
        at = random.randrange(len(whole))
        (tmp_path / "tiny.zip").write_bytes(
            whole[:at] + bytes([whole[at] ^ random.randrange(1, 256)]) + whole[at + 1 :]
        )
        try:
            found = unpacked(tmp_path / "tiny.zip")
        except Unsubmittable:
            refused += 1
        else:
            assert found == sound
    assert refused > 100
    for length in (0, 10, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "short.zip").write_bytes(whole[:length])
        with pytest.raises(Unsubmittable):
            unpacked(tmp_path / "short.zip")


def entry(name: str, mode: int = plain_zip.MODE) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name, plain_zip.EPOCH)
    made.create_system, made.external_attr, made.compress_type = 3, mode << 16, zipfile.ZIP_DEFLATED
    return made


OUTSIDE = (
    *("../out.json", "/tmp/out.json", "records/../../out.json", "records\\..\\out.json", "C:out.json", "x"),
    *("records/a/b.json", "records/", "recórds/x.json", "logs/x.log", "__init__.py", "records/.json"),
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr(entry(name), b"{}")
    with pytest.raises(Unsubmittable, match="which no submission has"):
        unpacked(tmp_path / "a.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_links_and_files_that_are_there_twice_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as packed:
        packed.writestr(entry("run.json", stat.S_IFLNK | 0o777), b"/etc/passwd")
    with pytest.raises(Unsubmittable, match=r"run\.json is a link"):
        unpacked(tmp_path / "link.zip")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as packed:
        packed.writestr(entry("run.json"), b"{}")
        with pytest.warns(UserWarning, match="Duplicate"):
            packed.writestr(entry("run.json"), b"[]")
    with pytest.raises(Unsubmittable, match=r"holds run\.json twice"):
        unpacked(tmp_path / "twice.zip")


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_zip, "_copy", lambda *_: pytest.fail("unpacked"))
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as packed:
        packed.writestr(entry("run.json"), bytes(65 * 2**20))
    with pytest.raises(Unsubmittable, match="68,157,440 bytes, which is too much"):
        unpacked(tmp_path / "large.zip")
    monkeypatch.setattr(plain_zip, "MOST_ALL_NBYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as packed:
        for number in range(11):
            packed.writestr(entry(f"records/{number}.json"), os.urandom(100) * 1000)
    with pytest.raises(Unsubmittable, match="more than 1,000,000 are not read"):
        unpacked(tmp_path / "many.zip")
    monkeypatch.setattr(plain_zip, "MOST_FILES", 10)
    with pytest.raises(Unsubmittable, match="list of 11 files is too long"):
        unpacked(tmp_path / "many.zip")


def test_a_size_that_is_not_true_is_refused(archive, tmp_path):
    whole = bytearray(archive.read_bytes())
    at = whole.index(b"PK\x01\x02")  # the first entry of the list; its size stands 24 bytes on
    (nbytes,) = struct.unpack_from("<L", whole, at + 24)
    for wrong in (nbytes - 1, nbytes + 1):
        struct.pack_into("<L", whole, at + 24, wrong)
        (tmp_path / "a.zip").write_bytes(whole)
        with pytest.raises(Unsubmittable):
            unpacked(tmp_path / "a.zip")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(Unsubmittable, match="no regular file"):
            unpacked(path)


# --- side by side --------------------------------------------------------------------------------------


def submitted(rule: Rule, folder: Path, **environment: object):
    """Return a run of this rule out of its archive, made on a machine with such an environment."""
    made = sealed(replace(rule, **environment), folder / "run")
    pack(made, folder / "a.zip", as_it_is=True)
    return unpacked(folder / "a.zip")


def test_like_runs_stand_side_by_side_and_unlike_ones_apart(archive, tmp_path):
    ours = unpacked(archive)
    other = report_runs.record(RULE, RULE.models[0], "arithmetic", "lru", None, "smallest").environment
    theirs = submitted(RULE, tmp_path / "b", overrides={"environment": {**other, "cpu": "another", "fingerprint": "b"}})
    on_gpu = submitted(RULE, tmp_path / "c", scope="gpu+pcie")
    more = submitted(replace(RULE, tasks=("arithmetic", "web_of_lies")), tmp_path / "d")
    code = replace(ours, sha256="e" * 64, code="f" * 64)
    assert unlike(ours, theirs) == []
    assert "scope gpu+pcie" in unlike(ours, on_gpu)[0]
    assert unlike(ours, more) == ["other cells: 12 more, 0 fewer"]
    assert unlike(ours, code) == [f"code {'f' * 12}, not {ours.code[:12]}"]
    assert unlike(ours, replace(ours, results=replace(ours.results, preset="cpu"))) == ["preset cpu, not tiny"]
    assert [len(group) for group in alike([ours, on_gpu, theirs, more, code])] == [2, 1, 1, 1]
    report = collected.report([ours, on_gpu, theirs, more, code])
    headings = [section.heading for section in report.sections]
    assert headings == [
        "Submissions",
        "Group 1: tiny, A and C",
        "Group 2: tiny, B",
        "Group 3: tiny, D",
        "Group 4: tiny, E",
    ]
    apart = report.sections[0].tables[1]
    assert (apart.head[1], apart.rows[0]) == ("differs from A by", ("B", "; ".join(unlike(ours, on_gpu))))
    speeds = report.sections[1].tables[0]
    assert speeds.head[-2:] == ("A", "C")
    assert {row[:4]: row[4:] for row in speeds.rows}["olmoe-tiny", "cpu+virtual", "smallest", "on-demand-overlap"] == (
        "1.60x [1.60, 1.60]",
        "1.60x [1.60, 1.60]",
    )
    losses = next(table for table in report.sections[1].tables if "accuracy" in table.caption)
    assert losses.rows[0][:3] == ("olmoe-tiny", "all tasks", "40")
    assert losses.rows[0][3].startswith("-5.0 [")
    assert "another, 2 cores" in write.markdown(report)


def test_a_value_that_one_machine_lacks_is_a_dash(archive):
    ours = unpacked(archive)
    fewer = tuple(r for r in ours.results.records if r.strategy != "lru")
    theirs = replace(ours, sha256="0" * 64, results=replace(ours.results, records=fewer))
    table = collected._side_by_side("", [ours, theirs], {ours.sha256: "A", theirs.sha256: "B"}, collected._speedups)
    assert {row[-1] == "-" for row in table.rows if row[3] == "lru"} == {True}
    assert {row[-1] == "-" for row in table.rows if row[3] != "lru"} == {False}


# --- from the shell ------------------------------------------------------------------------------------


def reports(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "reports", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_real_run_goes_from_machine_to_page(undisturbed, tmp_path):
    """Two items of a shipped model, live: submitted, sent twice under other names, collected once."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    assert reports("build", run, cwd=tmp_path).returncode == 0
    refused = reports("submit", run, cwd=tmp_path)
    assert refused.returncode == 2
    assert "check misses line" in refused.stderr
    done = reports("submit", run, "--as-it-is", "--by", "someone", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "names this machine as" in done.stdout
    [packed] = tmp_path.glob("tiny-*.zip")
    shutil.copy(packed, tmp_path / "again.zip")
    page = reports("collect", packed, "again.zip", "--out", "page", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    assert "the same run as" in page.stdout
    html, text = ((tmp_path / "page" / name).read_text() for name in ("report.html", "report.md"))
    assert "someone" in html
    assert "Counted once, since another archive holds the same records: again.zip" in text
    record = next(r for r in read(undisturbed).records if r.strategy == "mobile")
    rate = record.counters["fallbacks"] / record.counters["tokens"]
    assert f"| olmoe-tiny | 0.7 | {100 * rate:.1f} % |" in text
    (tmp_path / "again.zip").write_bytes(packed.read_bytes()[:-100])
    broken = reports("collect", packed, "again.zip", "--out", "other", cwd=tmp_path)
    assert broken.returncode == 2
    assert broken.stderr.startswith("error: again.zip cannot be counted: ")
    assert broken.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("verb", "says"), [("submit", "--as-it-is"), ("collect", "nothing is pooled")])
def test_help_says_what_it_takes_and_refuses(verb, says):
    told = " ".join(reports(verb, "--help", cwd=ROOT).stdout.split())
    assert says in told
    assert "refused" in told.lower()


def test_a_plan_of_another_run_is_found(archive, tmp_path):
    """A plan that asks for less than the records hold would hide what was lost."""
    files = files_of(archive)
    folder = RunFolder(tmp_path / "run")
    plan = json.loads(files["run.json"])
    write_json(folder.plan, {"preset": "tiny", "minutes": 2, "cells": plan["cells"][:-1]})
    plain_zip.pack(tmp_path / "a.zip", resealed({**files, "run.json": folder.plan.read_bytes()}))
    with pytest.raises(Unsubmittable, match="manifest does not say what its records say"):
        unpacked(tmp_path / "a.zip")
