"""Benchmarks say which GPU made them, and are compared with no other's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from mobile.machine.gpu import cuda_uuid, gpus
from reports.checks.benchmarks import UnlikeMachines, same


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Name, UUID, driver and link of the GPU that torch uses; None without one."""
    found = {gpu.uuid: gpu for gpu in gpus()}
    gpu = found.get(cuda_uuid(), next(iter(found.values()), None)) if found else None
    told = ("name", "uuid", "driver", "link_now", "link_max")
    machine_info["gpu"] = None if gpu is None else {name: asdict(gpu)[name] for name in told}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    """With --benchmark-compare: stop before anything is compared that cannot be."""
    try:
        same(compared_benchmark["machine_info"], machine_info)
    except UnlikeMachines as unlike:
        raise pytest.UsageError(str(unlike)) from unlike
