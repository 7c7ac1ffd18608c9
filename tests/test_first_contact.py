"""First contact with a card: it starts on a bare machine, and whatever befalls its parts, what was found is kept."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from fake_cuda import card  # noqa: F401

from mobile.costs.hardware import profile
from mobile.errors import Refused
from suites.__main__ import parser
from suites.first_contact import command, findings, folder, link_probe, parts, reading
from suites.first_contact.findings import Finding, append, interrupted, read
from suites.first_contact.page import answer, page, state
from suites.first_contact.parts import Part
from suites.first_contact.process import Log, run
from suites.first_contact.session import Session
from suites.record import RunFolder, load
from tests.bare_machine import QUICK, ROOT, bare, python

# --- the whole command, rehearsed --------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> dict[str, str]:
    return bare(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def rehearsed(bare_python, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("first") / "contact"
    return out, python("suites", "first-contact", "--rehearse", "--out", str(out), environment=bare_python)


def test_a_rehearsal_does_every_part_on_a_bare_machine(rehearsed):
    out, done = rehearsed
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(out / "findings.jsonl")
    if not torch.cuda.is_available():
        assert state(found, "link") == "skipped"
        assert "Skipped, since they need a GPU and torch finds none here: link." in done.stdout
    for name in set(command._names()) - {"link"}:
        assert state(found, name) == "done", name
    measured = {one.part for one in found if one.kind == "measured"}
    assert {"doctor", "calibrate", "engine", "shapes", *(f"profile-{name}" for name in parts.PROFILES)} <= measured
    assert any(one.name == "engine's cost a layer beside eager" and one.first for one in found)
    assert any(
        one.name == "engine's cost a layer beside a bare loop" and one.first and "bound" in one.detail for one in found
    )


def test_its_folder_holds_few_files_within_the_limit_and_its_records_are_those_of_a_run(rehearsed, tmp_path):
    out, _ = rehearsed
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert len(files) <= folder.MOST_FILES
    assert set(files) == {"findings.jsonl", "log.txt", "report.html", "card.json", "records.zip", "traces.zip"}
    assert sum(files.values()) < folder.MOST_NBYTES
    assert profile(str(out / "card.json")).link_gb_per_s > 0
    zipfile.ZipFile(out / "records.zip").extractall(tmp_path / "run")
    records = [load(path) for path in (tmp_path / "run" / "records").glob("*.json")]
    assert {record.config["kind"] for record in records} == {"shape", "beside"}
    assert {record.config["link_gb_per_s"] for record in records} == {None, 25}
    built = python("reports", "build", str(tmp_path / "run"), environment=dict(os.environ), cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    traces = zipfile.ZipFile(out / "traces.zip")
    assert set(traces.namelist()) == {f"profile-{name}.json" for name in parts.PROFILES}
    assert json.loads(traces.read("profile-mobile.json"))["traceEvents"]


def test_its_page_answers_first_and_says_that_it_is_a_rehearsal(rehearsed):
    out, done = rehearsed
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.index("parts are done; failed or not reached: none.") < text.index("<h2>")
    assert "Rehearsal on a processor, which measures nothing of worth" in text
    assert "the page; details lie beside it" in done.stdout
    assert "http" not in text
    assert "<script" not in text


def test_a_folder_that_holds_something_is_refused_and_nothing_in_it_changed(rehearsed):
    out, _ = rehearsed
    before = (out / "findings.jsonl").read_bytes()
    again = python("suites", "first-contact", "--out", str(out), environment=dict(os.environ))
    assert again.returncode == 2
    assert "holds files, and a first contact overwrites none; name a new folder" in again.stderr
    assert (out / "findings.jsonl").read_bytes() == before


# --- what befalls a part -----------------------------------------------------------------------------


def part(name: str, code: str, seconds: float = 20, **more) -> Part:
    return Part(name, f"a part named {name}", (sys.executable, "-c", code), seconds, **{"needs_gpu": False, **more})


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Make a session of such parts in a new folder; its printed lines are in `said`."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def made(*todo: Part) -> Session:
        session = Session(todo, folder.make(tmp_path / "out"), scratch, lambda line: session.said.append(line))
        session.said = []
        return session

    return made


def test_parts_that_fail_crash_hang_or_leave_nonsense_are_findings_and_the_next_one_goes_on(session, monkeypatch):
    monkeypatch.setattr("suites.first_contact.process.GRACE_SECONDS", 0.3)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    made = session(
        part("fails", "import sys; sys.exit('a reason')"),
        part("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        part("hangs", deaf, 0.5),
        part("unreadable", "print('no JSON')", read=reading.doctor),
        part("sound", "print('well')"),
    )
    assert made.go(60) is False
    found = made.findings()
    states = {name: state(found, name) for name in ("fails", "crashes", "hangs", "unreadable", "sound")}
    assert states == {**dict.fromkeys(states, "failed"), "sound": "done"}
    why = {one.part: one.detail for one in found if one.kind == "failed"}
    assert why["fails"].splitlines()[-2:] == ["a reason", "exit code 1"]
    assert why["crashes"] == f"exit code {-signal.SIGSEGV}"
    assert "not over after" in why["hangs"]
    assert why["unreadable"].startswith("JSONDecodeError")
    assert "1 of 5 parts are done" in (made.folder.page).read_text()
    assert b"well" in made.folder.log.read_bytes()


def test_a_part_has_no_more_than_the_time_that_is_left_and_those_behind_it_are_told_so(session):
    made = session(part("slow", "import time; time.sleep(60)", 60), part("late", "print('never')"))
    begun = time.monotonic()
    assert made.go(12) is False
    assert time.monotonic() - begun < 12
    (told,) = (one for one in made.findings() if one.part == "late")
    assert (told.kind, told.detail) == ("failed", "no time was left for it; give more --minutes")


def test_what_a_part_started_is_ended_with_it(session, tmp_path):
    beating = tmp_path / "beats"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{deaf}\nwhile True: open({str(beating)!r}, 'a').write('x'); time.sleep(0.02)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    session(part("parent", code, 1.5)).go(60)
    before = beating.stat().st_size
    assert before
    time.sleep(0.3)
    assert beating.stat().st_size == before


def gone(pid: int) -> bool:
    """Return whether the process is over, whether or not anyone has asked what became of it."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the processes of a parent that was killed")
def test_a_part_is_ended_when_the_command_is_killed(tmp_path):
    child = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    words = f"[sys.executable, '-c', {child!r}], Log(Path('log')), seconds=60, folder=Path(), environment=os.environ"
    code = f"import os, sys\nfrom pathlib import Path\nfrom suites.first_contact.process import Log, run\nrun({words})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    until = time.monotonic() + 30
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    command.kill()
    command.wait()
    until = time.monotonic() + 5
    while not gone(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_without_a_card_parts_that_need_one_are_skipped_and_without_an_answer_they_are_tried(session):
    software = dict.fromkeys(("python", "torch", "transformers", "triton"))
    nothing = {"gpus": [], "cuda": False, "rates": None, "usable_nbytes": None, "advice": []}
    said = json.dumps({"software": software, **nothing})
    made = session(
        part("doctor", f"print({said!r})", read=reading.doctor), part("needs", "print('tried')", needs_gpu=True)
    )
    assert made.go(60) is True
    assert state(made.findings(), "needs") == "skipped"
    assert b"tried" not in made.folder.log.read_bytes()
    assert answer(made.findings(), ["doctor", "needs"])[1].endswith("finds none here: needs.")
    assert reading.has_gpu([]) is None


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_at_any_moment_leaves_what_it_found(how, tmp_path, bare_python):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "suites", "first-contact", "--rehearse", "--out", str(out), "--parts", "shapes"]
    environment = {**bare_python, **QUICK, "TMPDIR": str(tmp_path)}
    running = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not any(one.part == "shapes" for one in read(out / "findings.jsonl")) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(how)
    _, said = running.communicate(timeout=30)
    found = read(out / "findings.jsonl")
    assert state(found, "doctor") == "done"
    assert len(list(out.iterdir())) <= folder.MOST_FILES
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.endswith("</html>\n")
    if how == signal.SIGKILL:
        assert state(found, "shapes") == "running"
        return
    assert running.returncode == 130, said
    assert b"stopped; what was found until now is in" in said
    assert state(found, "shapes") == "failed"
    assert "stopped by hand" in text
    assert not list(tmp_path.glob("first-contact-*")), "scratch is gone"


# --- limits ------------------------------------------------------------------------------------------


def test_a_log_keeps_the_beginning_and_the_end_of_what_a_part_says_and_never_more_than_its_limit(session, tmp_path):
    made = session(part("talks", "print('first'); print('x' * 79 + '\\n', end='') if 0 else None\n"
                                 "for n in range(20000): print(n, 'y' * 50)\nprint('last')"))  # fmt: skip
    assert made.go(60) is True
    kept = made.folder.log.read_text()
    assert "first\n" in kept
    assert kept.endswith("last\n")
    assert re.search(r"\[\.\.\. \d+ bytes are left out here \.\.\.\]", kept)
    assert len(kept) < 400_000
    log = Log(tmp_path / "log")
    for number in range(60):
        log.begin(str(number))
        for _ in range(20):
            log.say(b"z" * 2**16)
        log.end()
    log.close()
    assert (tmp_path / "log").stat().st_size < 4 * 10**6


def test_findings_have_a_limit_each_and_together(tmp_path, monkeypatch):
    path = tmp_path / "findings.jsonl"
    append(path, Finding("a", "failed", "n" * 10_000, detail="first " + "d" * 10_000 + " last"))
    (one,) = read(path)
    assert len(one.name) == findings.MOST_NAME
    assert one.detail.endswith(" last")
    assert len(one.detail) == findings.MOST_DETAIL
    monkeypatch.setattr(findings, "MOST_NBYTES", path.stat().st_size + 10)
    append(path, Finding("a", "note", "too much"))
    assert read(path) == [one]


def test_a_line_that_was_not_finished_is_not_read_and_does_no_harm(tmp_path):
    path = tmp_path / "findings.jsonl"
    append(path, Finding("a", "measured", "whole", float("inf"), "us"))
    with path.open("ab") as file:
        file.write(b'{"part": "a", "ki')
    assert [one.name for one in read(path)] == ["whole"]
    assert read(tmp_path / "absent") == []


def test_what_does_not_fit_into_an_archive_is_left_out_and_said(session, monkeypatch, tmp_path):
    noise = "import os; os.mkdir('profile-a'); open('profile-a/trace.json', 'wb').write(os.urandom(50000))"
    monkeypatch.setattr(folder, "TRACES_NBYTES", 20_000)
    made = session(part("profile-a", noise))
    assert made.go(60) is True
    assert zipfile.ZipFile(made.folder.traces).namelist() == []
    (dropped,) = (one for one in made.findings() if one.name == "its trace was dropped")
    assert (dropped.value, dropped.unit) == (0.05, "MB")


def test_all_files_at_their_limits_are_below_the_limit_of_the_folder():
    escaped = 5  # `&` of a finding takes five characters in the page
    together = findings.MOST_NBYTES * (1 + escaped) + 4 * 10**6 + folder.RECORDS_NBYTES + folder.TRACES_NBYTES
    assert together + folder.CARD_NBYTES <= folder.MOST_NBYTES + 10**6


# --- tests on a card ---------------------------------------------------------------------------------


@pytest.fixture
def outcomes(tmp_path):
    """Run tests of this text with the plugin, as a first contact does, and return the exit code and the findings."""
    path, file = tmp_path / "findings.jsonl", tmp_path / "test_some.py"

    def run_tests(text: str) -> tuple[int, list[Finding]]:
        file.write_text(text)
        plugin = ("-p", "suites.first_contact.outcomes", "--findings", str(path), "--part", "tests")
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *plugin,
            "--rootdir",
            str(tmp_path),
            str(file),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, read(path)

    return run_tests


NAMES = ("test_a", "test_b", "test_c", "test_d", "test_e")
SOME = """
import os, pytest
def test_a(): pass
def test_b(): assert 1 == 2, "one is not two"
def test_c(): pytest.skip("no reason")
def test_d(): {lost}
def test_e(): pass
"""


def kinds(found: list[Finding]) -> dict[str, str]:
    return {one.name.partition("::")[2]: one.kind for one in found if one.kind != "began"}


def test_each_test_is_a_finding(outcomes):
    code, found = outcomes(SOME.format(lost="pass"))
    assert code == 1
    assert kinds(found) == dict(zip(NAMES, ("passed", "failed", "skipped", "passed", "passed"), strict=True))
    assert "one is not two" in next(one.detail for one in found if one.kind == "failed")
    assert interrupted(found) == []


@pytest.mark.parametrize(
    ("lost", "code", "last"),
    [
        ("raise RuntimeError('CUDA error: an illegal memory access was encountered')", 70, "failed"),
        ("os.abort()", -signal.SIGABRT, None),
    ],
)
def test_tests_go_on_in_another_process_behind_the_one_that_lost_the_card(outcomes, lost, code, last):
    first, found = outcomes(SOME.format(lost=lost))
    assert first == code
    assert "test_e" not in kinds(found)
    second, found = outcomes(SOME.format(lost=lost))
    assert second == 0
    assert kinds(found)["test_e"] == "passed"
    assert kinds(found).get("test_d") == last
    assert [one.name.partition("::")[2] for one in interrupted(found)] == ([] if last else ["test_d"])
    began = [one.name for one in found if one.kind == "began"]
    assert len(began) == len(set(began)) == 5, "no test ran twice"


def test_a_part_of_tests_is_called_again_until_all_have_begun(session, tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import os, pytest\n"
        + "".join(f"def test_{n}(): {'os.abort()' if n in (1, 3) else 'pass'}\n" for n in range(5))
    )
    plugin = (
        "-p",
        "suites.first_contact.outcomes",
        "--findings",
        str(tmp_path / "out/findings.jsonl"),
        "--part",
        "tests",
    )
    words = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *plugin, str(file))
    made = session(Part("tests", "some tests", words, 60, needs_gpu=False, resumes=True, good=(0, 5)))
    assert made.go(90) is False
    found = made.findings()
    assert [kinds(found).get(f"test_{n}") for n in range(5)] == ["passed", None, "passed", None, "passed"]
    assert "Tests on this card: 3 passed, 0 failed, 0 skipped, 2 began and did not end." in made.folder.page.read_text()
    assert state(found, "tests") == "failed"


# --- the link ----------------------------------------------------------------------------------------


def test_the_link_is_probed_in_an_order_that_a_runtime_takes(card):  # noqa: F811
    """On a runtime whose link carries 25 GB/s: the card's clock gives that rate, and nothing stays registered."""
    said: list[Finding] = []
    sizes = link_probe.ProbeSizes(2**20, (4096, 2**16, 2**18), 2**16, repeats=5, warm_up_seconds=0)
    link_probe.Probe(torch.device("cpu"), sizes, "link", said.append).all()
    measured = {one.name: one for one in said if one.kind == "measured"}
    for name in ("4 KiB", "64 KiB", "256 KiB"):
        assert measured[f"copies of {name}, one after another"].value == pytest.approx(25)
    assert measured["a copy of 64 KiB, on the link"].value == pytest.approx(2**16 / 25e9 * 1e6)
    first = {one.name for one in said if one.first}
    assert {"cudaHostRegister, a GB", "copies of 64 KiB, one after another", ".tolist() of 64 numbers, idle"} <= first
    assert card.registered == {}
    assert card.races == []


def test_a_driver_that_page_locks_nothing_is_a_finding_and_the_rest_is_probed(card):  # noqa: F811
    card.refuses = 801
    said: list[Finding] = []
    sizes = link_probe.ProbeSizes(2**18, (4096, 2**16), 2**16, repeats=3, warm_up_seconds=0)
    link_probe.Probe(torch.device("cpu"), sizes, "link", said.append).all()
    assert [one.name for one in said if one.kind == "failed"] == ["cudaHostRegister"]
    assert any(one.name == ".tolist() of 64 numbers, idle" for one in said)


# --- words -------------------------------------------------------------------------------------------


class Words(HTMLParser):
    """All text of a page, and the names of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = "", set()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)


def test_a_driver_s_message_is_shown_and_obeyed_by_no_browser():
    evil = "<script>alert(1)</script> \x1b[2J \u202e & more"
    shown = Words()
    shown.feed(
        page(
            [Finding("link", "failed", evil, 1.0, evil, evil), Finding("a", "note", evil, detail=evil)], ["link"], evil
        )
    )
    assert "script" not in shown.tags
    assert "<script>alert(1)</script> \\x1b[2J \\u202e & more" in shown.text


def test_the_clock_is_held_to_every_timed_cell_in_the_first_lines():
    error = [Finding("shapes", "measured", f"clock's error: {name}", value, "%") for name, value in
             (("lru", 3.0), ("mobile", -12.5), ("resident", 1.0))]  # fmt: skip
    (line,) = answer([*error, Finding("shapes", "ended", "shapes", 3.0, "s")], ["shapes"])[1:]
    assert line == "The virtual clock beside 3 timed cells: median error 3.0 %, worst -12.5 % (mobile)."


def test_the_commands_of_the_readme_can_be_read():
    text = (ROOT / "suites" / "README.md").read_text(encoding="utf-8")
    written = re.findall(r"^python -m suites (first-contact[^#\n]*)", text, re.MULTILINE)
    written += re.findall(r"^ *python -m suites (first-contact.*?)(?:   .*)?$", command.EXAMPLES, re.MULTILINE)
    assert len(written) >= 3
    for line in written:
        options = parser().read(shlex.split(line))
        command._chosen(options.parts)
        assert options.verb == "first-contact"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--minutes", "0"), "Give --minutes a positive number"),
        (("--minutes", "nan"), "Give --minutes a positive number"),
        (("--parts", "links"), "Unknown part 'links'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(words, says, tmp_path):
    options = parser().read(["first-contact", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(Refused, match=re.escape(says)):
        command.run(options)
    assert not (tmp_path / "out").exists()


def test_on_a_card_the_parts_are_those_of_the_review_and_name_what_there_is():
    """The commands are read by the parsers that will read them, and what they pick of the preset is there."""
    from mobile.cli import build
    from suites.plan.preset import read_preset

    todo = {each.name: each for each in parts.parts(Path("scratch"), Path("findings"), rehearse=False)}
    assert list(todo)[:3] == ["doctor", "link", "tests-link"]
    for each in todo.values():
        module, words = each.words[4], list(each.words[5:])
        if module == "suites":
            options = parser().read(words)
            if options.verb == "run":
                assert read_preset(options.preset).only(options.only).cells
        elif module == "mobile":
            build().read(words)
    cells = read_preset("shapes").only("olmoe-1b-7b [n2]* recorded *").synthetic
    assert {cell.link_gb_per_s for cell in cells} == {None, 25}
    assert (parts.TESTS / parts.LINK_TESTS).is_file()


def test_a_command_is_ended_when_what_watches_it_fails(tmp_path):
    def watch() -> None:
        raise OSError("the disk is full")

    log = Log(tmp_path / "log")
    begun = time.monotonic()
    with pytest.raises(OSError, match="the disk is full"):
        run(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            log,
            seconds=60,
            folder=tmp_path,
            environment=os.environ,
            meanwhile=watch,
        )
    assert time.monotonic() - begun < 20


def test_records_are_taken_in_once_and_failures_of_cells_are_findings(rehearsed, tmp_path):
    out, _ = rehearsed
    zipfile.ZipFile(out / "records.zip").extractall(tmp_path)
    (tmp_path / "failures").mkdir()
    (tmp_path / "records" / "damaged.json").write_text("{}")
    seen: set[str] = set()
    found = list(reading.cells("shapes", RunFolder(tmp_path), seen))
    assert any(one.kind == "failed" and "damaged" in one.detail for one in found)
    assert sum(one.unit == "tokens/s" for one in found) == 4
    assert list(reading.cells("shapes", RunFolder(tmp_path), seen)) == []
