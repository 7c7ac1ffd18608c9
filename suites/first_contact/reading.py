"""Findings in what the commands leave: JSON on standard output, a breakdown, records and notes of failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from suites.first_contact.findings import Finding, Kind
from suites.first_contact.process import Ended
from suites.record import Record, RunFolder, load
from suites.run_files import read_failure

GIB = 2**30
UNITS = {"gb_per_s": "GB/s", "seconds": "us", "tflops": "TFLOP/s", "nbytes": "GiB"}
SCALES = {"us": 1e6, "GiB": 1 / GIB}
CLOCK = "clock's error"  # how the names of its findings begin
FIRST_OF_CARD = ("link_gb_per_s", "link_latency_seconds")


def doctor(ended: Ended, scratch: Path) -> Iterator[Finding]:
    """Yield what the machine is: the card, its rates, the advice."""
    found = json.loads(ended.answer)
    versions = ", ".join(f"{name} {found['software'][name]}" for name in ("python", "torch", "transformers", "triton"))
    yield Finding("doctor", "note", "software", detail=versions)
    for gpu in found["gpus"]:
        yield Finding("doctor", "note", f"card: {gpu['name']}", detail=_about(gpu), first=True)
    yield Finding("doctor", "note", "CUDA" if found["cuda"] else "no CUDA", detail=f"torch says {found['cuda']}")
    rates = found["rates"] or {}
    for name in ("pinned_gb_per_s", "pageable_gb_per_s"):
        if rates.get(name) is not None:
            yield Finding("doctor", "measured", f"{name.partition('_')[0]} copies of 256 MiB", rates[name], "GB/s")
    if rates and not rates["registers"]:
        yield Finding("doctor", "failed", "memory is page-locked where it lies", detail="the driver refuses it")
    if found["usable_nbytes"] is not None:
        yield Finding("doctor", "measured", "host memory free", found["usable_nbytes"] / GIB, "GiB")
    yield from (Finding("doctor", "note", "advice", detail=line) for line in found["advice"])


def _about(gpu: dict[str, Any]) -> str:
    """Return driver, memory and link of a card as the doctor saw it."""
    total, best = gpu["memory_total_nbytes"], gpu["link_max"]
    memory = "memory unknown" if total is None else f"{total / GIB:.2f} GiB"
    return (
        f"driver {gpu['driver']}, {memory}, compute capability {gpu['compute_capability']}, "
        f"PCIe generation {best['generation']} x{best['width']}"
    )


def has_gpu(findings: Iterable[Finding]) -> bool | None:
    """Return whether torch can use a card; None if nothing could be learnt of it."""
    said = [one.name for one in findings if one.part == "doctor" and one.kind == "note"]
    return True if "CUDA" in said else False if "no CUDA" in said else None


def calibration(ended: Ended, scratch: Path) -> Iterator[Finding]:
    """Yield every number of the profile that was fitted to this machine."""
    for name, value in json.loads(ended.answer)["profile"].items():
        unit = next((unit for ending, unit in UNITS.items() if name.endswith(ending)), None)
        if isinstance(value, int | float) and unit is not None:
            words = name.removesuffix("_nbytes").removesuffix("_seconds").replace("_", " ")
            first = name in FIRST_OF_CARD
            yield Finding("calibrate", "measured", words, value * SCALES.get(unit, 1), unit, "fitted", first)


def profile(part: str) -> Callable[[Ended, Path], Iterator[Finding]]:
    """Return what yields the breakdown of that part: milliseconds a token by kind."""

    def findings(ended: Ended, scratch: Path) -> Iterator[Finding]:
        found = json.loads((scratch / part / "breakdown.json").read_text(encoding="utf-8"))
        kinds = {**found["kinds_ms"], "neither, the host alone": found["alone_ms"], "wall": found["wall_ms"]}
        for name, ms in kinds.items():
            yield Finding(part, "measured", name, ms / found["tokens"], "ms/token", f"of {found['wall_ms']:.1f} ms")

    return findings


# --- cells ------------------------------------------------------------------------------------------


def cells(part: str, run: RunFolder, seen: set[str]) -> Iterator[Finding]:
    """Yield what records and notes of failures say that are not among `seen`, and add them there."""
    for path in sorted((run.path / "records").glob("*.json")):
        if path.stem in seen:
            continue
        seen.add(path.stem)
        try:
            yield from of_record(part, load(path))
        except ValueError as error:
            yield Finding(part, "failed", f"record {path.stem}", detail=str(error))
    for path in sorted((run.path / "failures").glob("*.json")):
        if f"failure {path.stem}" in seen:
            continue
        seen.add(f"failure {path.stem}")
        try:
            note = read_failure(run, path.stem)
            kind: Kind = "skipped" if note.left_out else "failed"
            yield Finding(part, kind, note.label, detail=f"{note.log_tail or ''}\n{note.error}".strip())
        except (ValueError, OSError):
            seen.discard(f"failure {path.stem}")  # it is just being written


def of_record(part: str, record: Record) -> Iterator[Finding]:
    """Yield what a cell measured: time a token beside the clock's, or what the engine costs."""
    config, name = record.config, f"{record.model}, {record.strategy}, {record.task}, {record.budget}"
    if config.get("refused"):
        yield Finding(part, "skipped", name, detail=config["refused"])
    if (bare := config.get("bare")) is not None:
        bound = (
            f"{_blocks(bare)}; of it one read a layer, which is the bound on any engine, {_us(bare['bound_seconds'])}"
        )
        beside = "engine's cost a layer beside a bare loop"
        yield Finding(part, "measured", beside, bare["layer_seconds"] * 1e6, "us", bound, first=True)
    for cost in config.get("engine") or ():
        beside = f"engine's cost a layer beside {cost['stock']}"
        yield Finding(part, "measured", beside, cost["layer_seconds"] * 1e6, "us", _blocks(cost), first=True)
        yield Finding(part, "measured", f"a step of {cost['stock']}", cost["stock_seconds"] * 1e3, "ms")
    wrong = [check for check, passed in record.checks.items() if not passed]
    yield from (Finding(part, "failed", name, detail=check) for check in wrong)
    tokens, ns = (sum(getattr(item, field) for item in record.items) for field in ("decode_tokens", "decode_ns"))
    if not tokens or not ns or config["kind"] != "shape":
        return
    said = f"{ns / tokens / 1e6:.3f} ms a token"
    if config.get("link_measured_gb_per_s"):
        said += f", rows came at {config['link_measured_gb_per_s']:.2f} GB/s"
    fallback = "" if config["fallback_asked"] is None else f", fallback {config['fallback_asked']:g}"
    asked = "" if config["link_gb_per_s"] is None else f", {config['link_gb_per_s']:g} GB/s"
    yield Finding(part, "measured", f"{name}{fallback}{asked}", 1e9 * tokens / ns, "tokens/s", said)
    if config.get("predicted"):
        error = sum(config["predicted"]["decode_ns"]) / ns - 1
        title = f"{CLOCK}: {record.strategy}{fallback}{asked}, {record.budget}"
        about = f"predicted over measured, less one; {said}"
        yield Finding(part, "measured", title, 100 * error, "%", about)
    elif config.get("unpredicted"):
        yield Finding(part, "note", f"{name}: not predicted", detail=config["unpredicted"])


def _blocks(cost: dict[str, Any]) -> str:
    """Return over how many blocks a cost is the median, and its quartiles."""
    return f"median of {cost['blocks']} blocks, {_us(cost['low_seconds'])} to {_us(cost['high_seconds'])}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
