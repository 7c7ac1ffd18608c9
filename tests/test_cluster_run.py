"""A run over a dask.distributed cluster: the same records, a worker killed in the middle, machines that do not fit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from contextlib import suppress
from itertools import pairwise

import psutil
import pytest
from tiny_run import CELLS, records, run, working

from mobile.errors import Refused
from suites.run.executors import cluster

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def two_workers():
    """Two worker processes, each restarted by its nanny when it dies; one offers a GPU."""
    offers = {"GPU": 1}
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", resources=offers
    ) as local:
        local.wait_for_workers(2)
        yield local


def workers(local) -> list[psutil.Process]:
    return [psutil.Process(worker.process.pid) for worker in local.workers.values() if worker.process]


def test_a_worker_killed_in_the_middle_costs_nothing(two_workers, tiny_preset, answered, undisturbed):
    """The worker that has a job is killed with SIGKILL: its child ends, and the job is done on another."""
    done, killed = [], []

    def go() -> None:
        done.append(run(tiny_preset, answered, "--dask", two_workers.scheduler_address))

    thread = threading.Thread(target=go)
    thread.start()
    deadline = time.monotonic() + 120
    while not killed and thread.is_alive() and time.monotonic() < deadline:
        for worker in workers(two_workers):
            if not killed and (children := working(worker.pid)):
                killed += children
                worker.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    thread.join()
    assert killed, "no worker was seen at work"
    _, alive = psutil.wait_procs(killed, timeout=20)
    assert not alive, "the child of a killed worker goes on"
    assert done[0].returncode == 0, done[0].stdout + done[0].stderr
    assert f"{CELLS} of {CELLS} cells have records" in done[0].stdout
    assert records(answered) == records(undisturbed)


def where_and_when(seconds: float) -> tuple[int, float, float]:
    begun = time.time()
    time.sleep(seconds)
    return os.getpid(), begun, time.time()


def test_what_is_timed_on_the_wall_clock_has_its_machine_to_itself(two_workers, tmp_path):
    """Five jobs, two machines with one GPU each: both work, and no machine ever does two at once."""
    with cluster(two_workers.scheduler_address, tmp_path, alone=True) as pools:
        told = [pools.alone.submit(where_and_when, 0.3) for _ in range(5)]
        spans = [future.result() for future in told]
    assert len({pid for pid, *_ in spans}) == 2
    for machine in {pid for pid, *_ in spans}:
        own = sorted(span[1:] for span in spans if span[0] == machine)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(own))


def test_the_same_job_again_is_done_again(two_workers, tmp_path):
    """A cluster that remembered the answer would leave nothing behind in an emptied folder."""
    with cluster(two_workers.scheduler_address, tmp_path, alone=False) as pools:
        both = [pools.many.submit(where_and_when, 0.01) for _ in range(2)]
        wait(both)
        assert both[0].result() != both[1].result()


def test_machines_that_do_not_fit_are_refused_in_a_sentence(tmp_path, monkeypatch):
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as local:
        address = local.scheduler_address
        with pytest.raises(Refused, match="offers the resource GPU"), cluster(address, tmp_path, alone=True):
            pass
    monkeypatch.setattr("suites.run.executors.PATIENCE_SECONDS", 1)
    monkeypatch.setattr("suites.run.executors.ANSWER_SECONDS", 1)
    with pytest.raises(Refused, match="No dask scheduler answers"), cluster(address, tmp_path, alone=False):
        pass
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as local,
        pytest.raises(Refused, match="has no worker"),
        cluster(local.scheduler_address, tmp_path, alone=False),
    ):
        pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(Refused, match=r"pip install mobile-moe\[dask\]"), cluster(address, tmp_path, alone=False):
        pass


NOWHERE = {
    "a word": "nonsense",
    "nothing": "",
    "another protocol": "http://127.0.0.1:8786",
    "no port": "tcp://127.0.0.1",
    "a port that nobody has": "tcp://127.0.0.1:9",
    "a host that nobody has": "tcp://nowhere.invalid:8786",
    "a port that is none": "tcp://127.0.0.1:99999999",
}


@pytest.mark.parametrize("address", NOWHERE.values(), ids=NOWHERE)
def test_an_address_that_no_scheduler_has_is_one_sentence_and_nothing_comes_after_it(tiny_preset, tmp_path, address):
    done = run(tiny_preset, tmp_path / "run", "--dask", address)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: No dask scheduler answers at {address} (")
    assert done.stderr.endswith("start one with: dask scheduler\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("says", [b"", b"HTTP/1.0 200 OK\r\n\r\n" * 10])
def test_a_port_at_which_something_else_listens_is_refused(tmp_path, monkeypatch, capfd, says):
    monkeypatch.setattr("suites.run.executors.ANSWER_SECONDS", 1)
    threads = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak() -> None:
            with suppress(OSError):
                while True:
                    other.accept()[0].sendall(says)

        speaking = threading.Thread(target=speak, daemon=True)
        speaking.start()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(Refused, match="No dask scheduler answers"), cluster(address, tmp_path, alone=False):
            pass
        other.shutdown(socket.SHUT_RDWR)
    speaking.join()
    assert set(threading.enumerate()) == threads, "nobody goes on trying"
    assert capfd.readouterr() == ("", "")


def test_a_worker_is_not_taken_for_the_scheduler(two_workers, tmp_path):
    worker = next(iter(two_workers.scheduler_info["workers"]))
    with pytest.raises(Refused, match=r"A dask \w+ answers at .*; give the scheduler's address"):
        cluster(worker, tmp_path, alone=False).__enter__()


def test_a_machine_that_does_not_share_the_folder_is_named(tmp_path):
    """A worker in a mount namespace of its own, where something else lies at the folder's name."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no right to make a mount namespace here")
    elsewhere = 'mount -t tmpfs none "$1" && shift && exec "$@"'
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0", protocol="tcp") as local:
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", local.scheduler_address, "--no-dashboard"]
        child = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", elsewhere, "sh", str(tmp_path), *worker, "--no-nanny"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with (
                pytest.raises(Refused, match=f"does not see {tmp_path}; give --out a folder that every machine sees"),
                cluster(local.scheduler_address, tmp_path, alone=False),
            ):
                pass
        finally:
            child.kill()
            child.wait()
    assert not list(tmp_path.iterdir()), "what was put there to be seen is taken away again"
