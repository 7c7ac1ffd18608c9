"""The record: one immutable JSON file per cell, and where it lies. Standard library only; reports need no torch for it.

format history
    1  first
    2  guesses
    3  prompts and the spans that fell back; families, seeds and controls in config
    4  a first line with the SHA-256 of what follows; fingerprint, host and telemetry in environment
    5  correct is null where nothing was to be answered

Unknown is null, never 0; an error is never a result; times are integer nanoseconds.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

SCHEMA = 5
VIRTUAL = "cpu+virtual"
FIRST = b'{\n "sha256": "%s",\n'  # of the bytes after it; how every JSON file of a run begins
LATEST = Path("runs/latest")  # names the folder of the last run started from here
LATEST_TRIAL = Path("runs/latest-trial")  # and that of the last comparison of two variants
TRIAL = "trial.json"
TRIAL_FORMAT = 1
FEWEST_PROCESSES = 3  # a side; an interval of two is none


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the paths of its files, which are named by the id of their content."""

    path: Path

    @property
    def plan(self) -> Path:
        """Return the file of the plan: the cells that a report expects."""
        return self.path / "run.json"

    def answers(self, generation: str) -> Path:
        """Return the file of a live run's text and scores; written last, so that it proves the live run done."""
        return self.path / "generations" / f"{generation}.json"

    def trace(self, generation: str) -> Path:
        return self.path / "generations" / f"{generation}.npz"

    def record(self, cell: str) -> Path:
        return self.path / "records" / f"{cell}.json"

    def calibration(self, settings: str) -> Path:
        """Return the file of what was measured of the machine, under settings with that hash."""
        return self.path / "calibration" / f"{settings}.json"

    def turn(self, cell: str, repeat: int) -> Path:
        """Return the file of one repeat of a cell that is timed in turn with others."""
        return self.path / "turns" / f"{cell}-{repeat}.json"

    def failure(self, piece: str) -> Path:
        """Return the file that says why a piece of work left nothing behind."""
        return self.path / "failures" / f"{piece}.json"

    def log(self, job: str) -> Path:
        return self.path / "logs" / f"{job}.log"


@dataclass(frozen=True)
class Finished:
    """The end of one live run or one cell; `error` is why it left nothing behind, `log_tail` how its log ended."""

    id: str
    label: str
    seconds: float
    error: str | None = None
    log_tail: str | None = None


@dataclass(frozen=True)
class Item:
    """One test item of a cell: what was asked, what came out, whether it was right, and what it took.

    `ttft_ns` is prefill, `decode_ns` all decode steps, of `decode_tokens` tokens (the first output token is
    prefill's), `decode_bytes` what the link copied during them. `answer` is null where none could be found.
    `prompt` is null where it is long or not ours to print. `fallback_spans` are the ranges of characters of `output`
    that a big pass wrote. Where a script was played and nothing asked (preset shapes), `output` is empty, `correct` is
    null, and the hash is the script's.
    """

    doc: int
    prompt_sha256: str
    prompt: str | None
    output: str
    fallback_spans: tuple[tuple[int, int], ...]
    answer: str | None
    correct: bool | None
    prompt_tokens: int
    decode_tokens: int
    fallbacks: int
    ttft_ns: int
    decode_ns: int
    decode_bytes: int


@dataclass(frozen=True)
class Record:
    """Everything one cell did, and everything needed to do it again."""

    id: str
    scope: str  # "cpu+virtual", "cpu+paced", "cpu+disk", "gpu+pcie", "gpu+throttled"
    weights: str  # "shipped-tiny", "synthetic", "real"
    model: str
    geometry: str
    task: str
    strategy: str
    gamma: float | None
    lossless: bool
    hardware: str
    budget: str
    slots: int | None
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    items: tuple[Item, ...] = ()
    counters: dict[str, Any] = field(default_factory=dict)
    ceiling_tokens_per_s: float | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    timeline: tuple[tuple[str, int, int, str], ...] = ()  # what, start and end in ns, name
    guesses: tuple[tuple[int, int, int, int], ...] = ()  # MoE layer; experts foreseen of it, of them right, and needed
    wall_seconds: float | None = None
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """Write the record whole or not at all."""
        write_json(path, asdict(self))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON with its checksum. A killed process leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = json.dumps(data, indent=1, sort_keys=True).removeprefix("{\n").encode() + b"\n"
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")  # a name of its own: two may write the same record
    try:
        partial.write_bytes(FIRST % hashlib.sha256(body).hexdigest().encode() + body)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sound(path: Path) -> bool:
    """Return whether the file is there and has the bytes that were written."""
    try:
        _checked(path)
    except (OSError, ValueError):
        return False
    return True


def intact_zip(path: Path) -> bool:
    """Return whether the file is a zip file, every member of which has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raise ValueError if a byte of it has changed."""
    data = json.loads(_checked(path))
    del data["sha256"]
    return data


def _checked(path: Path) -> bytes:
    whole = path.read_bytes()
    body = whole[len(FIRST) + 62 :]  # 64 digits stand where the template has two characters
    if whole != FIRST % hashlib.sha256(body).hexdigest().encode() + body:
        raise ValueError(f"{path} is damaged: it is not what its checksum says")
    return whole


def load(path: Path) -> Record:
    """Read a record. Raise ValueError for a damaged one, one of another schema, or missing or unknown fields."""
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path} has record schema {data.get('schema')}; this version reads {SCHEMA}")
    known = {f.name for f in fields(Record)}
    if set(data) != known:
        raise ValueError(f"{path} is not a record: fields {sorted(set(data) ^ known)} are missing or unknown")
    for item in data["items"]:
        item["fallback_spans"] = tuple(tuple(span) for span in item["fallback_spans"])
    data["items"] = tuple(Item(**item) for item in data["items"])
    data["timeline"] = tuple(tuple(event) for event in data["timeline"])
    data["guesses"] = tuple(tuple(layer) for layer in data["guesses"])
    return Record(**data)
