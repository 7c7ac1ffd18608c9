"""A record of a GPU: what the card tells, None for what it does not, and nothing at all where there is none."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import pytest

from mobile.machine.gpu import gpus_of_driver, nvml
from suites.telemetry import QUESTIONS, watched


class NVMLError(Exception):
    """As pynvml's: the base of every answer that is none."""


def refuses(*_):
    raise NVMLError("Not Supported")


def card(**answers) -> SimpleNamespace:
    """A pynvml whose one card, "GPU-1", answers these questions and supports no other."""
    lib = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, closed=0)
    lib.nvmlShutdown = lambda: setattr(lib, "closed", lib.closed + 1)
    lib.nvmlDeviceGetHandleByUUID = lambda uuid: "handle" if uuid == "GPU-1" else refuses()
    for question, *_ in QUESTIONS.values():
        setattr(lib, f"nvml{question}", refuses)
    lib.nvmlDeviceGetTotalEnergyConsumption = lib.nvmlDeviceGetCurrentClocksEventReasons = refuses
    lib.nvmlClocksThrottleReasonNone, lib.nvmlClocksThrottleReasonAll = 0, 0b1111
    lib.nvmlClocksThrottleReasonApplicationsClocksSetting = lib.nvmlClocksThrottleReasonUserDefinedClocks = 0b0010
    lib.nvmlClocksThrottleReasonSwPowerCap = 0b0100
    vars(lib).update(answers)
    return lib


@pytest.fixture
def with_card(monkeypatch):
    def install(**answers) -> SimpleNamespace:
        lib = card(**answers)
        monkeypatch.setitem(sys.modules, "pynvml", lib)
        return lib

    return install


def test_what_the_card_tells_is_summed_up(with_card):
    energy, power, reasons = iter((5_000, 12_500)), iter((100, 300)), iter((0b0110, 0b0100))
    lib = with_card(
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(energy),
        nvmlDeviceGetPowerUsage=lambda _: next(power, 200),
        nvmlDeviceGetClockInfo=lambda _, clock: {1: 2_500, 2: 10_000}[clock],
        nvmlDeviceGetPcieThroughput=lambda _, counter: {0: 3, 1: 12_000_000}[counter],
        nvmlDeviceGetCurrentClocksEventReasons=lambda _: next(reasons, 0b0100),
        nvmlDeviceGetCurrPcieLinkWidth=lambda _: 16,
    )
    begun = time.monotonic()
    with watched("GPU-1") as telemetry:
        time.sleep(0.35)
    took = time.monotonic() - begun
    told = telemetry()
    assert 0.35 <= told["seconds"] <= took
    assert 2 <= told["samples"] <= 5
    assert told["energy_joules"] == 7.5
    assert (told["power_milliwatts"]["min"], told["power_milliwatts"]["max"]) == (100, 300)
    assert 100 < told["power_milliwatts"]["mean"] < 300
    assert told["sm_clock_mhz"] == {"min": 2_500, "mean": 2_500, "max": 2_500}
    assert told["memory_clock_mhz"]["max"] == 10_000
    assert told["link_received_kb_per_s"]["max"] == 12_000_000
    assert told["link_width"]["min"] == 16
    assert told["clock_limits"] == {"ApplicationsClocksSetting": 1 / told["samples"], "SwPowerCap": 1.0}
    assert lib.closed == 1
    assert threading.active_count() == 1 or "_sample" not in repr(threading.enumerate())


def test_what_the_card_does_not_tell_is_unknown_and_never_zero(with_card):
    with_card()
    with watched("GPU-1") as telemetry:
        pass
    told = telemetry()
    assert told["samples"] == 1
    assert {name for name, value in told.items() if value is None} == {*QUESTIONS, "energy_joules", "clock_limits"}


def test_a_library_without_a_function_is_a_card_that_does_not_tell(with_card):
    lib = with_card(nvmlDeviceGetPowerUsage=lambda _: 5)
    del lib.nvmlDeviceGetPcieThroughput
    with watched("GPU-1") as telemetry:
        pass
    assert telemetry()["link_sent_kb_per_s"] is None
    assert telemetry()["power_milliwatts"]["max"] == 5


def test_a_card_that_runs_free_is_limited_by_nothing(with_card):
    with_card(nvmlDeviceGetCurrentClocksEventReasons=lambda _: 0)
    with watched("GPU-1") as telemetry:
        pass
    assert telemetry()["clock_limits"] == {}


def test_a_card_that_falls_silent_in_the_middle_keeps_what_it_told(with_card):
    power = iter((100,))
    with_card(nvmlDeviceGetPowerUsage=lambda _: next(power, None) or refuses())
    with watched("GPU-1") as telemetry:
        time.sleep(0.25)
    assert telemetry()["samples"] >= 2
    assert telemetry()["power_milliwatts"] == {"min": 100, "mean": 100, "max": 100}


def test_only_what_nvml_refuses_is_caught(with_card):
    def broken(_):
        raise ZeroDivisionError

    with_card(nvmlDeviceGetTotalEnergyConsumption=broken)
    with pytest.raises(ZeroDivisionError), watched("GPU-1"):
        pass


def test_what_is_timed_may_fail_and_the_watch_ends(with_card):
    lib = with_card()
    with pytest.raises(KeyError), watched("GPU-1"):
        raise KeyError
    assert lib.closed == 1
    assert not [thread for thread in threading.enumerate() if "_sample" in thread.name]


def test_another_card_or_a_driver_that_will_not_start_gives_none(with_card):
    with_card()
    with watched("GPU-2") as telemetry:
        pass
    assert telemetry() is None
    with_card(nvmlInit=refuses)
    with watched("GPU-1") as telemetry:
        pass
    assert telemetry() is None
    assert gpus_of_driver() == []


def test_a_cell_without_a_gpu_starts_nothing(monkeypatch):
    """Not even NVML: a virtual cell on a machine with a card has no telemetry either."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    before = threading.active_count()
    with watched(None) as telemetry:
        assert threading.active_count() == before
    assert telemetry() is None


def test_without_the_package_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    with nvml() as lib:
        assert lib is None
    with watched("GPU-1") as telemetry:
        pass
    assert telemetry() is None
    assert gpus_of_driver() == []


def test_the_real_library_tells_of_this_machine_what_there_is():
    """Without a driver the real pynvml raises its own NVMLError, which is None to us."""
    pytest.importorskip("pynvml")
    with nvml() as lib:
        there = lib is not None
    with watched("GPU-00000000-0000-0000-0000-000000000000") as telemetry:
        pass
    assert telemetry() is None
    assert there or gpus_of_driver() == []
