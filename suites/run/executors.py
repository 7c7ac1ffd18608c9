"""Executors of jobs: on this machine's processors, or on a dask.distributed cluster."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile.errors import Refused, one_line
from mobile.machine.host import host

PATIENCE_SECONDS = 30  # for workers, which may still be starting
ANSWER_SECONDS = 10  # of a scheduler, which is there or is not
RESOURCE = "GPU"  # what a worker offers once, and a job that is timed on the wall clock takes


@dataclass(frozen=True)
class Workers:
    """Any two `concurrent.futures` executors.

    `alone` runs one job at a time on each machine; it is given work only while `many` has none. Jobs are functions of
    this package and dataclasses, so they travel to other processes.
    """

    many: Executor
    alone: Executor


@contextmanager
def here() -> Iterator[Workers]:
    """Yield workers on this machine: as many jobs at once as this process may use processors, or one.

    Each job is a process of its own, so threads wait for them.
    """
    with ThreadPoolExecutor(host().cpus_allowed or 1) as many, ThreadPoolExecutor(1) as alone:
        yield Workers(many, alone)


@contextmanager
def cluster(address: str, folder: Path, alone: bool) -> Iterator[Workers]:
    """Yield the workers of the dask scheduler at `address`, which must see `folder` under the same name.

    `alone` says whether there will be jobs that want their machine to themselves. Raise Refused if the package, the
    scheduler, the workers, the resource such jobs take, or the shared folder is missing.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise Refused("--dask needs the package distributed; install it with: pip install mobile-moe[dask]") from error
    _refuse_unless_scheduler(address)
    with Client(address, timeout=PATIENCE_SECONDS, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE_SECONDS)
        except TimeoutError as error:
            raise Refused(f"The scheduler at {address} has no worker; start some: dask worker {address}") from error
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if alone and not any(worker["resources"].get(RESOURCE) for worker in workers):
            raise Refused(
                f"No worker at {address} offers the resource {RESOURCE}, which a cell timed on the wall clock takes; "
                f"start one on each machine: dask worker {address} --resources {RESOURCE}=1"
            )
        _refuse_unshared(client, folder)
        # pure=False: a job is done for what it leaves behind, so a result of the same job before does not do
        yield Workers(client.get_executor(pure=False), client.get_executor(pure=False, resources={RESOURCE: 1}))


def _refuse_unless_scheduler(address: str) -> None:
    """Raise Refused unless a scheduler answers at the address.

    A Client that finds none goes on trying in threads of its own, and logs errors long after it was given up.
    """
    from distributed.comm import get_address_host_port, parse_address

    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)  # it prints what it cannot read
    try:
        if parse_address(address)[0] in ("tcp", "tls"):  # one that refuses a connection is not asked again and again
            socket.create_connection(get_address_host_port(address), timeout=ANSWER_SECONDS).close()
        found = asyncio.run(_identity(address))
    except Exception as error:  # whatever comes of talking to something else, in a protocol that it does not know
        raise Refused(
            f"No dask scheduler answers at {address} ({one_line(error)}); start one with: dask scheduler"
        ) from error
    finally:
        log.setLevel(level)
    if "workers" not in found:
        raise Refused(f"A dask {found.get('type')} answers at {address}; give the scheduler's address.")


async def _identity(address: str) -> dict[str, Any]:
    """Return what a dask process answers when it is asked who it is."""
    from distributed import rpc
    from distributed.security import Security

    async with (
        asyncio.timeout(ANSWER_SECONDS),
        rpc(address, timeout=ANSWER_SECONDS, connection_args=Security().get_connection_args("client")) as asked,
    ):
        answered: dict[str, Any] = await asked.identity()
        return answered


def _refuse_unshared(client: Any, folder: Path) -> None:
    """Raise Refused, naming a worker, unless each of them sees a new file in the folder."""
    token = folder / f"shared-{secrets.token_hex(8)}"
    token.touch()
    try:
        blind = sorted(worker for worker, sees in client.run(token.is_file).items() if not sees)
    finally:
        token.unlink()
    if blind:
        raise Refused(
            f"The worker at {blind[0]} does not see {folder}; give --out a folder that every machine sees under that "
            "name, and start the workers as users who may write there."
        )
