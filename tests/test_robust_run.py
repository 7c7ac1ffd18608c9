"""A run that is killed, starved, damaged or run twice loses nothing, and says in a sentence what is wrong."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from tiny_run import CELLS, ROOT, command, records, run, working

from suites.plan.preset import read_preset
from suites.record import RunFolder, load, read_json, sound, write_json
from suites.run.executors import Workers
from suites.run.jobs import Job, do, jobs
from suites.run.runner import execute

KILLS = 50  # one of them while a model answers, which takes many times longer than all else


def start(preset: Path, out: Path, *more: str, **options) -> subprocess.Popen:
    """A run whose processes can be killed together."""
    return subprocess.Popen(
        command(preset, out, *more),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )


# --- killed -----------------------------------------------------------------------------------------


def gone(group: int, seconds: float = 20) -> bool:
    """Whether every process of the group is gone, or is soon; one that only waits to be buried is gone."""
    deadline = time.monotonic() + seconds
    while any(map(partial(lives_in, group), psutil.process_iter())):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def lives_in(group: int, process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def kill(child: subprocess.Popen, whom: str, rng: random.Random) -> bool:
    """Kill the run's process group, its parent, or one of its children once it has some; whether it was still there."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if whom == "group":
            os.killpg(child.pid, signal.SIGKILL)
        elif whom == "parent":
            child.kill()
        else:
            while not (children := working(child.pid)):
                if child.poll() is not None:
                    return False
                time.sleep(0.01)
            rng.choice(children).kill()
        return child.poll() is None or child.returncode == -signal.SIGKILL
    return False


@pytest.mark.slow
def test_fifty_kills_at_random_moments_leave_the_records_of_an_undisturbed_run(
    tiny_preset, undisturbed, answered, tmp_path
):
    """Kill at a random moment and start again in the same folder, over and over. Whenever all records are there, they
    are thrown away, so that there is something to do again."""
    rng = random.Random(20)
    half = tmp_path / "half.toml"  # one live run and its cells, since the test is to end
    half.write_text(tiny_preset.read_text().replace('["static-half", "mobile"]', '["static-half"]'))
    expected = {name: told for name, told in records(undisturbed).items() if told["strategy"] == "static-half"}
    begun = time.monotonic()
    assert run(half, answered).returncode == 0
    typical = time.monotonic() - begun
    shutil.rmtree(answered / "records")
    killed: Counter[str] = Counter()
    ended, interrupted = 0, 0

    def one(folder: Path, whom: str, after: float = 0) -> bool:
        """Start, kill after a while, and see what is left; whether the kill hit."""
        nonlocal interrupted, typical
        begun = time.monotonic()
        child = start(half, folder)
        try:
            child.wait(after + rng.uniform(0, typical))
            hit = False
        except subprocess.TimeoutExpired:
            hit = kill(child, whom, rng)
        code = child.wait()
        if code in (0, 1):  # it ended by itself, which tells how fast the machine is at present
            typical = time.monotonic() - begun
        assert gone(child.pid), "a process of a killed run goes on"
        if whom == "child":
            assert code in (0, 1), "a killed child must not bring the run down"
        left = records(folder)  # each is whole, or loading it raises
        assert left.items() <= expected.items()
        interrupted += 0 < len(left) < len(expected)
        return hit

    while killed.total() < KILLS - 1:
        whom = rng.choice(("group", "group", "parent", "parent", "child"))
        killed[whom] += one(answered, whom)
        if len(records(answered)) == len(expected):
            ended += 1
            shutil.rmtree(answered / "records")
    fresh = tmp_path / "fresh"
    killed["parent"] += one(fresh, "parent", after=typical)
    for folder in (answered, fresh):
        done = run(half, folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert records(folder) == expected
        assert not list(folder.glob("*/*.partial")), "what a killed process was writing is thrown away"
        assert not list(folder.glob("*/*.damaged")), "no kill leaves half a file under its final name"
        assert not list(folder.glob("failures/*")), "what failed before and is done now is no failure"
    print(f"kills that hit: {dict(killed)}; with some of the records: {interrupted}; whole runs: {ended}")
    assert killed.total() == KILLS
    assert min(killed[whom] for whom in ("group", "parent", "child")) >= 3


def test_children_of_a_killed_parent_stop_writing(tiny_preset, answered):
    """The parent alone is killed while its children work; they end, and nothing appears any more."""
    child = start(tiny_preset, answered)
    deadline = time.monotonic() + 60
    while not (children := working(child.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children
    child.kill()
    child.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert gone(child.pid)
    assert len(records(answered)) < CELLS
    assert run(tiny_preset, answered).returncode == 0
    assert len(records(answered)) == CELLS


def test_a_cell_whose_process_is_killed_fails_with_the_signal_and_the_others_go_on(tiny_preset, answered):
    """The first process that does a job is killed as it appears."""
    child = start(tiny_preset, answered)
    while not (children := working(child.pid)) and child.poll() is None:
        time.sleep(0.005)
    children[0].kill()
    assert child.wait() == 1
    notes = [read_json(path) for path in (answered / "failures").glob("*.json")]
    assert notes
    assert all("killed by SIGKILL" in note["error"] for note in notes)
    assert len(records(answered)) == CELLS - len(notes)


# --- damaged ----------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    """In a digit of a number, so that it still reads as JSON."""
    whole = bytearray(path.read_bytes())
    at = next(i for i in range(len(whole) // 2, len(whole)) if chr(whole[i]) in "2468")
    whole[at] ^= 1
    path.write_bytes(whole)
    json.loads(path.read_text())


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut_short, flip_a_bit, empty])
def test_a_damaged_record_is_put_aside_and_its_cell_done_again(tiny_preset, undisturbed, tmp_path, harm):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    victim = min((out / "records").glob("*.json"))
    harm(victim)
    with pytest.raises(ValueError, match=r"damaged"):
        load(victim)
    done = run(tiny_preset, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("put aside") == 1
    assert victim.with_suffix(".damaged").is_file()
    assert done.stdout.count("done   ") == 1, "only that cell is done again"
    assert records(out) == records(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["answers", "trace"])
def test_a_damaged_live_run_is_done_again(tiny_preset, undisturbed, tmp_path, which):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    generation = next(c.generation for c in read_preset(str(tiny_preset)).cells if c.strategy == "static-half")
    folder = RunFolder(out)
    victim = {"answers": folder.answers, "trace": folder.trace}[which](generation.id)
    whole = bytearray(victim.read_bytes())
    whole[len(whole) // 2] ^= 1
    victim.write_bytes(whole)
    shutil.rmtree(out / "records")
    done = run(tiny_preset, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("put aside") == 1
    assert records(out) == records(undisturbed)


def test_a_failed_cell_carries_the_end_of_its_log(tiny_preset, answered):
    """The answers of a live run are fewer than its trace: nothing on disk is damaged, and the cell cannot be made."""
    generation = next(c.generation for c in read_preset(str(tiny_preset)).cells if c.strategy == "static-half")
    path = RunFolder(answered).answers(generation.id)
    told = read_json(path)
    write_json(path, {**told, "answers": told["answers"][:1]})
    done = run(tiny_preset, answered)
    assert done.returncode == 1
    notes = [read_json(path) for path in (answered / "failures").glob("*.json")]
    assert len(notes) == 3
    for note in notes:
        assert note["error"].startswith("ValueError: zip()")
        assert "Traceback (most recent call last)" in note["log_tail"]
        assert note["log_tail"].rstrip().endswith(note["error"])
        assert "static-half" in note["label"]
        assert Path(note["log"]).is_file()


def test_code_that_changes_under_a_run_makes_no_record(tiny_preset, answered):
    """A child whose code, packages or data are others than the plan's finds another id, and refuses."""
    cells = [cell for cell in read_preset(str(tiny_preset)).cells if cell.strategy == "static-half"]
    job = next(
        job for job in jobs(read_preset(str(tiny_preset)).cells, RunFolder(answered)) if cells[0].id in job.labels
    )
    strange = {f"{name[:-1]}x": label for name, label in job.labels.items()}
    job.spec["ids"] = list(strange)
    told = do(Job(job.spec, strange, job.log, job.needs))
    assert len(told) == 3
    assert all("not those that the run was planned with" in (one.error or "") for one in told)
    assert not records(answered)


# --- no room, no lock, no clock ---------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, nbytes: int):
    """A file system of that size at `folder`; skips where one may not be mounted."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_in_a_sentence_and_nothing_is_lost(tiny_preset, undisturbed, answered, tmp_path):
    half = sum(path.stat().st_size for path in (undisturbed / "records").iterdir()) // 2
    with small_disk(tmp_path / "disk", 8 * 2**20):
        out, filler = tmp_path / "disk" / "run", tmp_path / "disk" / "filler"
        shutil.copytree(answered, out)
        filler.write_bytes(bytes(shutil.disk_usage(out).free - half))
        done = run(tiny_preset, out)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "is full; free some space and run the same command again" in done.stderr
        assert "Traceback" not in done.stderr
        kept = records(out)
        assert 0 < len(kept) < CELLS
        assert not list(out.glob("*/*.partial")), "half a record would take the room that is missing"
        filler.unlink()
        again = run(tiny_preset, out)
        assert again.returncode == 0, again.stdout + again.stderr
        assert again.stdout.count("done   ") == CELLS - len(kept)
        assert records(out) == records(undisturbed)


def test_a_disk_that_refuses_every_file_is_said_in_a_sentence(tiny_preset, undisturbed, answered):
    """Where no file may grow (a limit that needs no rights to set), cells fail one by one and say why."""
    limit = min(path.stat().st_size for path in (undisturbed / "records").iterdir()) // 2
    done = run(tiny_preset, answered, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("File too large") == CELLS
    assert not list(answered.glob("*/*.partial"))
    assert run(tiny_preset, answered).returncode == 0
    assert records(answered) == records(undisturbed)


def test_a_second_run_on_a_folder_is_told_so_and_disturbs_nothing(tiny_preset, answered, undisturbed):
    first = start(tiny_preset, answered)
    deadline = time.monotonic() + 60
    while not working(first.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it is surely still there
    second = run(tiny_preset, answered)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert second.stderr.startswith("error: Another run is at work in")
    assert second.stderr.count("\n") == 1
    assert first.wait() == 0
    assert records(answered) == records(undisturbed)
    assert run(tiny_preset, answered).returncode == 0, "the lock goes with the process that held it"


def test_a_clock_that_jumps_changes_nothing(tiny_preset, answered, undisturbed, tmp_path):
    """Each reading of the wall clock, in every process, is off by up to ten years either way."""
    (tmp_path / "sitecustomize.py").write_text(
        "import random, time\n"
        "real = time.time\n"
        "time.time = lambda: real() + random.uniform(-3e8, 3e8)\n"
        "time.time_ns = lambda: int(time.time() * 1e9)\n"
    )
    begun = time.monotonic()
    done = run(tiny_preset, answered, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    took = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    assert records(answered) == records(undisturbed)
    for path in (answered / "records").iterdir():
        assert 0 < load(path).wall_seconds < took
    said = float(done.stdout.split("; took ")[1].split(" s ")[0])
    assert 0 <= said <= took + 1
    assert "cells a minute" in done.stdout


# --- any executor -----------------------------------------------------------------------------------


def test_any_executor_will_do_and_one_that_gives_a_job_up_fails_only_that(tiny_preset, answered, tmp_path):
    class Tired(ThreadPoolExecutor):
        """Loses the first job it is given, as a cluster does whose workers die."""

        lost = 0

        def submit(self, fn, *args, **kwargs):
            if self.lost:
                return super().submit(fn, *args, **kwargs)
            self.lost = 1
            future: Future = Future()
            future.set_exception(RuntimeError("the worker died"))
            return future

    with Tired(1) as pool, (tmp_path / "said").open("w") as said:
        folder = RunFolder(answered)
        missing = execute(read_preset(str(tiny_preset)), folder, Console(file=said, width=200), Workers(pool, pool))
        assert missing == 3
        notes = [read_json(path) for path in (answered / "failures").glob("*.json")]
        assert [note["error"] for note in notes] == ["no worker finished it (RuntimeError: the worker died)"] * 3
        assert execute(read_preset(str(tiny_preset)), folder, Console(file=said), Workers(pool, pool)) == 0
    assert len(records(answered)) == CELLS


def test_brackets_in_an_error_are_printed_as_they_are(tiny_preset, answered, tmp_path):
    """They are markup to the library that prints, which drops some and raises on others."""

    class Broken(ThreadPoolExecutor):
        def submit(self, fn, *args, **kwargs):
            future: Future = Future()
            future.set_exception(RuntimeError("lost [red] in [/tmp/x]"))
            return future

    with Broken(1) as pool, (tmp_path / "said").open("w") as said:
        execute(read_preset(str(tiny_preset)), RunFolder(answered), Console(file=said, width=200), Workers(pool, pool))
    assert "(RuntimeError: lost [red] in [/tmp/x])" in (tmp_path / "said").read_text()


def test_a_worker_that_cannot_see_the_folder_says_so(tiny_preset, answered, tmp_path):
    first = jobs(read_preset(str(tiny_preset)).cells, RunFolder(answered))[0]
    shutil.move(answered, tmp_path / "elsewhere")
    for told in do(first):
        assert "sees no folder" in told.error
        assert "put the run where every machine can see it" in told.error
    assert not answered.exists()


def test_records_name_their_machine(undisturbed):
    for path in (undisturbed / "records").iterdir():
        assert sound(path)
        where = load(path).environment
        assert where["host"] == os.uname().nodename
        assert len(where["fingerprint"]) == 16
        assert where["telemetry"] is None
