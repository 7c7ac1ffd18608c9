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
from typing import Annotated, Any, Literal
from uuid import uuid4

from suites import record_fields
from suites.strict_json import called, parse, read_bytes
from suites.typed_json import Amount, Count, Each, Holding, Matching, Name, Rate, typed

SCHEMA = 5
VIRTUAL = "cpu+virtual"
FIRST = b'{\n "sha256": "%s",\n'  # of the bytes after it; how every JSON file of a run begins
LATEST = Path("runs/latest")  # names the folder of the last run started from here
LATEST_TRIAL = Path("runs/latest-trial")  # and that of the last comparison of two variants
TRIAL = "trial.json"
TRIAL_FORMAT = 1
FEWEST_PROCESSES = 3  # a side; an interval of two is none


What = Literal["load", "prefetch", "compute", "stall", "cpu"]  # of a timeline: as the ledger's events


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
    """The end of one live run or one cell; `error` is why it left nothing behind, `log_tail` how its log ended.

    It was `left_out` if it asks for more than its machine has.
    """

    id: str
    label: str
    seconds: float
    error: str | None = None
    log_tail: str | None = None
    left_out: bool = False

    @property
    def failed(self) -> bool:
        """Whether it left nothing behind, and should have."""
        return self.error is not None and not self.left_out


@dataclass(frozen=True)
class Item:
    """One test item of a cell: what was asked, what came out, whether it was right, and what it took.

    `ttft_ns` is prefill, `decode_ns` all decode steps, of `decode_tokens` tokens (the first output token is
    prefill's), `decode_bytes` what the link copied during them. `answer` is null where none could be found.
    `prompt` is null where it is long or not ours to print. `fallback_spans` are the ranges of characters of `output`
    that a big pass wrote. Where a script was played and nothing asked (preset shapes), `output` is empty, `correct` is
    null, and the hash is the script's.
    """

    doc: Count
    prompt_sha256: Annotated[str, Matching(r"[0-9a-f]{0,64}", "a SHA-256 or empty")]
    prompt: str | None
    output: str
    fallback_spans: tuple[tuple[Count, Count], ...]
    answer: str | None
    correct: bool | None
    prompt_tokens: Count
    decode_tokens: Count
    fallbacks: Count
    ttft_ns: Count
    decode_ns: Count
    decode_bytes: Count


@dataclass(frozen=True)
class Record:
    """Everything one cell did, and everything needed to do it again."""

    id: Name
    scope: str  # "cpu+virtual", "cpu+paced", "cpu+disk", "gpu+pcie", "gpu+throttled"
    weights: str  # "shipped-tiny", "synthetic", "real"
    model: str
    geometry: str
    task: str
    strategy: str
    gamma: Amount | None
    lossless: bool
    hardware: str
    budget: str
    slots: Count | None
    seed: int
    config: Annotated[dict[str, Any], Holding(record_fields.Resolved)]
    environment: Annotated[dict[str, Any], Holding(record_fields.Environment)]
    items: tuple[Item, ...] = ()
    counters: Annotated[dict[str, Any], Each(Amount | None)] = field(default_factory=dict)
    ceiling_tokens_per_s: Rate | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    timeline: tuple[tuple[What, int, int, str], ...] = ()  # what, start and end in ns, name
    guesses: tuple[tuple[Count, Count, Count, Count], ...] = ()  # MoE layer; experts foreseen, of them right, needed
    wall_seconds: Amount | None = None
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


def sound(path: Path, **named: Any) -> bool:
    """Return whether the file is there, has the bytes that were written, and says of itself what is `named`."""
    try:
        if not named:
            return bool(_checked(path))
        said = read_json(path)
    except (OSError, ValueError):
        return False
    return all(said.get(name) == value for name, value in named.items())


def is_record(path: Path) -> bool:
    """Return whether the file is there and is the record that its name says."""
    try:
        load(path)
    except (OSError, ValueError):
        return False
    return True


def intact_zip(path: Path) -> bool:
    """Return whether the file is a zip file, every member of which has its checksum."""
    try:
        if not path.is_file():
            return False
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raise ValueError if a byte of it has changed, or it is no strict JSON; OSError."""
    data: dict[str, Any] = parse(_checked(path), called(path))
    del data["sha256"]
    return data


def _checked(path: Path) -> bytes:
    whole = read_bytes(path)
    body = whole[len(FIRST) + 62 :]  # 64 digits stand where the template has two characters
    if whole != FIRST % hashlib.sha256(body).hexdigest().encode() + body:
        raise ValueError(f"{path} is damaged: it is not what its checksum says")
    return whole


def load(path: Path) -> Record:
    """Read a record. Raise ValueError for a damaged one, one of another schema or cell, or a wrong field; OSError."""
    data, name = read_json(path), called(path)
    schema = data.get("schema")
    if schema != SCHEMA:
        schema = schema if isinstance(schema, int | None) else repr(str(schema)[:20])
        raise ValueError(f"{path} has record schema {schema}; this version reads {SCHEMA}")
    known = {f.name for f in fields(Record)}
    if set(data) != known:
        few = [field[:60] for field in sorted(set(data) ^ known)[:5]]
        raise ValueError(f"{path} is not a record: fields {few} are missing or unknown")
    record: Record = typed(data, Record, name)
    if record.id != path.stem:
        raise ValueError(f"{name} is the record of another cell, {record.id}; put the right file in its place")
    _check_kind(record, name)
    _check_items(record, name)
    return record


def _check_kind(record: Record, name: str) -> None:
    """Raise ValueError unless a record has what reports read of its kind of cell."""

    def hold(what: str, value: dict[str, Any], shape: type) -> None:
        typed({what: value}, dict[str, Annotated[dict[str, Any], Holding(shape)]], name)

    config, kind, on_disk = record.config, record.config.get("kind"), record.scope == "cpu+disk"
    if kind == "shape":
        hold("config", config, record_fields.Shape)
        if on_disk:
            hold("config", config, record_fields.OverDisk)
        if not record.items or record.slots is None:
            raise ValueError(f"{name}: a synthetic cell has items, and slots")
        if config.get("link_throttled") is False and config.get("link_native_gb_per_s") is None:
            raise ValueError(f"{name}: config.link_native_gb_per_s must be a number where link_throttled is false")
    elif kind == "beside":
        hold("config", config, record_fields.Beside)
        if on_disk and record.strategy != "engine against stock":
            hold("config", config, record_fields.ReadFromDisk)
    elif kind == "signals":
        hold("config", config, record_fields.Signals)
        lengths = [len(item) for item in config["agree"]]
        if any([len(item) for item in by_item] != lengths for by_item in config["doubts"].values()):
            raise ValueError(f"{name}: config.doubts must have a number for every token of config.agree")
        if "probability" not in config["doubts"] or len(config["docs"]) != len(lengths):
            raise ValueError(f"{name}: config.doubts must be of each of config.docs, the probability's among them")
    elif kind == "accuracy":
        hold("config", config, record_fields.Accuracy)
        asked = 0 if config["ended"] else config["items"]
        if {len(config["keys"]), *map(len, config["right"].values())} != {asked}:
            raise ValueError(f"{name}: config.right and config.keys must have {asked} items")
        named = {gating["gating"] for gating in config["gatings"]}
        if named != set(config["right"]) or (asked and "full K" not in named):
            raise ValueError(f"{name}: config.right and config.gatings must name the same gatings, full K among them")
    else:
        hold("config", config, record_fields.Scored)
        hold("counters", record.counters, record_fields.Counters)
        if record.counters.get("decode_dense_seconds") is not None:
            hold("counters", record.counters, record_fields.DecodeParts)


def _check_items(record: Record, name: str) -> None:
    """Raise ValueError where items repeat a number, spans leave their text, or layers hold more than there is."""
    docs: set[int] = set()
    for at, item in enumerate(record.items):
        if item.doc in docs:
            raise ValueError(f"{name}: items[{at}].doc is {item.doc} again; each item has a number of its own")
        docs.add(item.doc)
        ends = [end for span in item.fallback_spans for end in span]
        if ends != sorted(ends) or (ends and ends[-1] > len(item.output)):
            raise ValueError(f"{name}: items[{at}].fallback_spans must ascend within the output's {len(item.output)}")
    if any(end < start for _, start, end, _ in record.timeline):
        raise ValueError(f"{name}: timeline must not have an event that ends before it starts")
    if any(right > min(foreseen, needed) for _, foreseen, right, needed in record.guesses):
        raise ValueError(f"{name}: guesses must not have more experts right than foreseen, or than needed")
