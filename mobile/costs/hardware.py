"""Hardware profiles: the numbers that virtual time is computed from. The shipped ones lie in profiles.toml."""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

from mobile import outputs
from mobile.errors import Refused, one_line
from mobile.inputs import read_json
from mobile.suggest import offer

GIB = 2**30
MOST_NBYTES = 2**63 - 1
MOST_FILE_NBYTES = 2**20  # of a profile
# The least and the most of a field, by how its name ends; of a rate, a byte or an operation a second and far too many.
BOUNDS = {"reserve_nbytes": (0, MOST_NBYTES), "_nbytes": (1, MOST_NBYTES), "_seconds": (0, 1e6)}
RATE_BOUNDS = (1e-12, 1e12)


@dataclass(frozen=True)
class HardwareProfile:
    """A GPU, the link that feeds it, and the processor at the link's other end.

    `link_gb_per_s` and `memory_gb_per_s` are decimal gigabytes per second that copies and kernels reach,
    `tflops` is dense bf16 with fp32 accumulation, `launch_seconds` the cost of one kernel launch on the device in an
    eager decode step, `reserve_nbytes` what the context, the workspace and the KV cache take. The processor
    reads its memory at `cpu_gb_per_s` while it computes an expert, and reaches `cpu_tflops` where that is no limit.

    Two numbers are 0 unless they were measured: `layer_seconds`, the time of a layer beyond its bytes and launches
    (the engine's and the model's own code), and `step_seconds`, that of a forward pass beyond its layers.
    The `host_` numbers are of a host that runs ahead of its device: to launch one kernel, to begin one copy, to read a
    small result once the device has it, and to run the code of a layer and of a pass. All are 0 where one processor
    does both in turn, whose launches and code are the device's. `mobile.machine.fit_profile` fits all of it to a
    machine.
    """

    name: str
    vram_nbytes: int
    memory_gb_per_s: float
    tflops: float
    link_gb_per_s: float
    link_latency_seconds: float
    launch_seconds: float
    reserve_nbytes: int
    cpu_gb_per_s: float
    cpu_tflops: float
    sources: tuple[str, ...]
    layer_seconds: float = 0.0
    step_seconds: float = 0.0
    host_launch_seconds: float = 0.0
    host_copy_seconds: float = 0.0
    host_read_seconds: float = 0.0
    host_layer_seconds: float = 0.0
    host_step_seconds: float = 0.0


def profile(name: str) -> HardwareProfile:
    """Return the profile `name`, or the one in a file (a path that ends in .json); "auto" is the paper's probable card.

    Raise Refused for a name that is not in `PROFILES`, or a file that holds no profile.
    """
    if name == "auto":
        return PROFILES["rtx4080-pcie4"]
    if name.endswith(".json"):
        return read_profile(Path(name))
    if name not in PROFILES:
        raise Refused(
            f"Unknown hardware {name!r}; {offer(name, ('auto', *sorted(PROFILES)))}, or give a .json file that "
            "`mobile doctor --calibrate --out` wrote."
        )
    return PROFILES[name]


def write_profile(card: HardwareProfile, path: Path) -> None:
    """Write the profile as JSON, for `profile` to read. Raise Refused where it cannot be written."""
    with outputs.open_atomic(path) as file:
        file.write(f"{json.dumps(asdict(card), indent=1)}\n".encode())


def read_profile(path: Path) -> HardwareProfile:
    """Read the profile in a file. Raise Refused unless it holds all fields of one, no others, and sound numbers."""
    try:
        return profile_from(read_json(path, MOST_FILE_NBYTES))
    except Refused as refused:
        raise Refused(f"{path} is no hardware profile: {refused}") from refused
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            f"Cannot read the hardware profile {path} ({one_line(error)}); make one with: mobile doctor --calibrate "
            f"--out {path}"
        ) from error


def profile_from(data: object) -> HardwareProfile:
    """Return the profile of which `asdict` made `data`; one of before the host's times were told has none of them.

    Raise Refused for anything else.
    """
    named = {field.name: field for field in fields(HardwareProfile)}
    if isinstance(data, dict):
        data = {name: 0.0 for name in named if name.startswith("host_")} | data
    if not isinstance(data, dict) or set(data) != set(named):
        unlike = sorted(set(data) ^ set(named)) if isinstance(data, dict) else ["all of it"]
        few = ", ".join(name if re.fullmatch(r"[\w ]{1,60}", name, re.ASCII) else shown(name) for name in unlike[:3])
        raise Refused(f"{few} missing or unknown; it has exactly: {', '.join(named)}.")
    for name, value in data.items():
        if name == "name" and isinstance(value, str) and value:
            continue
        if name == "sources" and isinstance(value, list) and all(isinstance(line, str) for line in value):
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (isinstance(value, float) and not name.endswith("nbytes"))
        least, most = next((bounds for end, bounds in BOUNDS.items() if name.endswith(end)), RATE_BOUNDS)
        if name in ("name", "sources") or not number or not least <= value <= most:
            raise Refused(f"{name} cannot be {shown(value)}.")
    return HardwareProfile(**{**data, "sources": tuple(data["sources"])})


def shown(value: object) -> str:
    """Return a wrong value as a refusal shows it, cut where it is long."""
    text = repr(value if not isinstance(value, int) or abs(value) <= MOST_NBYTES else float("inf"))
    return text if len(text) <= 80 else f"{text[:80]}..."


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    name: 2 ** (10 * power) for power, letter in enumerate("KMGT", 1) for name in (letter, f"{letter}IB")
}
MOST_GIB, FEWEST_NBYTES = 1024, 2**20  # a number without a unit is GiB up to the one, and bytes from the other on
MOST_GB_PER_S = 100  # a rate without a unit is GB/s up to it


def parse_nbytes(memory: int | str) -> int:
    """Return the bytes of "8GiB", "8 GB" (decimal), "8G" or "512M" (binary); an int is bytes.

    Of a text without a unit, "8" is 8 GiB and "8589934592" bytes; what lies between could be either. Raise Refused for
    that, for anything else, and for a size that is not positive.
    """
    if isinstance(memory, str):
        nbytes = _written(memory)
    elif (
        isinstance(memory, Real) and not isinstance(memory, bool) and (isinstance(memory, int) or math.isfinite(memory))
    ):
        nbytes = int(memory)
    else:
        nbytes = None
    if nbytes is None:
        raise Refused(f"Cannot read the memory size {memory!r}; write it like 8GiB or 8589934592.")
    if not 0 < nbytes <= MOST_NBYTES:
        raise Refused(f"No memory is of the size {shown(memory)}; write it like 8GiB or 8589934592.")
    return nbytes


def parse_gb_per_s(rate: str) -> float:
    """Return the decimal GB/s of "3.5GB/s", "900 MB/s" or "3GiB/s"; without a unit it is GB/s.

    Raise Refused for anything else: bits (Gb/s), a rate that is not positive, and a number too large to be in GB/s.
    """
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})\s*(?:([KMGT]i?B)/s)?\s*", rate, re.ASCII)
    if match is None or not float(match[1]) > 0:
        raise Refused(f"Cannot read the rate {rate!r}; write it like 3.5GB/s or 900MB/s.")
    if match[2] is None and float(match[1]) > MOST_GB_PER_S:
        raise Refused(f"The rate {rate!r} lacks its unit; write it like {match[1]}MB/s or {match[1]}GB/s.")
    return float(Fraction(match[1]) * UNITS[(match[2] or "GB").upper()] / 10**9)


def _written(memory: str) -> int | None:
    """Return the bytes, or None where it cannot be read. Raise Refused for a number that lacks its unit."""
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})\s*([A-Za-z]*)\s*", memory, re.ASCII)
    if match is None:
        return None
    number, unit = Fraction(match[1]), match[2].upper()
    if unit:
        return int(number * UNITS[unit]) if unit in UNITS else None
    if MOST_GIB < number < FEWEST_NBYTES:
        raise Refused(f"The memory size {memory!r} lacks its unit; write it like {match[1]}MiB or {match[1]}GiB.")
    return int(number * (GIB if number <= MOST_GIB else 1))


def _shipped() -> dict[str, HardwareProfile]:
    """Return the shipped profiles by name, in the order of their file."""
    listed = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text("utf-8"))["profiles"]
    return {
        each["name"]: HardwareProfile(**{name: _field(name, value) for name, value in each.items()}) for each in listed
    }


def _field(name: str, value: Any) -> Any:
    """Return a profile's field as it is kept, from how profiles.toml writes it."""
    return parse_nbytes(value) if name.endswith("_nbytes") else tuple(value) if name == "sources" else value


PROFILES = _shipped()
