"""The bundle: a run folder sealed by a manifest of SHA-256, so that any changed byte is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from reports.data.results import Results, read
from suites.record import Record, RunFolder
from suites.run_files import read_answers, read_plan, read_trace_about
from suites.strict_json import called, parse, read_bytes
from suites.typed_json import Name, typed

ROOMS = ("mobile", "baselines", "suites", "reports")
MANIFEST = "manifest.json"
LOCK = ".lock"  # of the run, in its folder: empty
OUTPUTS = ("report.html", "report.md", "tables.tex", "cells.csv", "timeline.json")  # that every build writes
PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.partial")  # what a run is writing: see `suites.record.write_json`


class NoManifest(ValueError):
    """There is no manifest to verify against, or it cannot be read."""


@dataclass(frozen=True)
class Verified:
    """The differences from a manifest: `changed` files break the bundle, `surroundings` are code and packages here."""

    changed: tuple[str, ...]
    surroundings: tuple[str, ...]
    files: int


@dataclass(frozen=True)
class Sealed:
    """What the records say that were sealed: the first one's commit, which cells have one, and which have none."""

    git_commit: str | None
    git_dirty: bool | None
    cells: tuple[Name, ...]
    absent: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A manifest: SHA-256 of the run's files and of the code by path, and of packages by name."""

    schema: int
    preset: str
    files: dict[str, str]
    config: Sealed
    code: dict[str, str]
    wheels: dict[str, str]


def seal(run: Path, results: Results) -> str:
    """Write the manifest over the run folder, the code and the installed packages; return its SHA-256."""
    made = Manifest(1, results.preset, file_hashes(run), said_of(run, results), code_hashes(), package_hashes())
    path = run / MANIFEST
    path.write_text(json.dumps(asdict(made), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return _hash(path.read_bytes())


def said_of(run: Path, results: Results) -> Sealed:
    """Return what the records of a run say. Raise ValueError for a plan that cannot be read."""
    record = results.all_records[0]
    cells = {one.id for one in results.all_records}
    planned = {cell.id for cell in read_plan(RunFolder(run).plan).cells}
    environment = record.environment
    return Sealed(
        environment["git_commit"], environment["git_dirty"], tuple(sorted(cells)), tuple(sorted(planned - cells))
    )


def verify(run: Path) -> Verified:
    """Compare a run folder with its manifest, and where no byte differs, the manifest with what the records say.

    Raise NoManifest where there is none that can be read; NoResults as `results.read` does.
    """
    sealed = manifest(run)
    changed = [*_odd(run), *_differences(sealed.files, file_hashes(run))]
    if not changed:
        changed = list(_contradictions(run, sealed))
    surroundings = [f"code: {line}" for line in _differences(sealed.code, code_hashes())]
    surroundings += [f"package: {line}" for line in _differences(sealed.wheels, package_hashes())]
    return Verified(tuple(changed), tuple(surroundings), len(sealed.files))


def manifest(run: Path) -> Manifest:
    """Read the manifest of a run. Raise NoManifest where there is none that can be read."""
    path = run / MANIFEST
    try:
        sealed: Manifest = typed(parse(read_bytes(path), called(path)), Manifest, called(path))
    except (OSError, ValueError) as error:
        raise NoManifest(f"{path} cannot be read ({error}); make one with: python -m reports build {run}") from error
    return sealed


def _contradictions(run: Path, sealed: Manifest) -> Iterator[str]:
    """Yield a line wherever the manifest, the plan, the records and the live runs do not say the same."""
    results, folder = read(run), RunFolder(run)
    said = said_of(run, results)
    if sealed.preset != results.preset:
        yield f"the manifest is of preset {sealed.preset!r} and the plan of {results.preset!r}"
    for name, value in asdict(said).items():
        if getattr(sealed.config, name) != value:
            theirs = asdict(sealed.config)
            yield f"{name} of the manifest is not that of the records: {_first_unlike(theirs, said, name)}"
    for name in OUTPUTS:
        if not (run / name).is_file():
            yield f"{name} is neither sealed nor there"
    seen: dict[str, str] = {}
    for name, digest in sealed.files.items():
        if name.startswith(("records/", "generations/")) and (first := seen.setdefault(digest, name)) != name:
            yield f"{name} is a copy of {first}"
    by_generation: dict[str, list[Record]] = {}
    for record in results.all_records:
        if generation := record.config.get("generation"):
            by_generation.setdefault(generation, []).append(record)
    for generation, records in by_generation.items():
        try:
            answers, about = read_answers(folder, generation), read_trace_about(folder, generation)
        except (OSError, ValueError) as error:
            yield f"live run {generation}: {error}"
            continue
        docs, models = [one.doc for one in answers.answers], {record.model for record in records}
        if about.get("docs") != docs or not {about.get("model")} == models <= {answers.model or about.get("model")}:
            yield f"live run {generation}: answers, trace and records are not of the same model and items"
        if {record.task for record in records} != {answers.task or records[0].task}:
            yield f"live run {generation}: answers and records are not of the same task"


def _first_unlike(sealed: dict[str, Any], said: Sealed, name: str) -> str:
    """Return the two values, or of two lists the first name that one of them lacks."""
    theirs, ours = sealed[name], getattr(said, name)
    if isinstance(ours, tuple):
        return f"{sorted(set(theirs) ^ set(ours))[0]!r} is in one of them only" if set(theirs) ^ set(ours) else "order"
    return f"{theirs!r} and {ours!r}"


def file_hashes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the run folder, by its path in it; but for the manifest and the lock.

    What a run is writing is left out; links and what is no file have no hash, and `verify` names them.
    """
    found = {}
    for path in _files(run):
        if path.is_file() and not path.is_symlink() and not PARTIAL.fullmatch(path.name):
            with path.open("rb") as file:
                found[_name(path, run)] = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(sorted(found.items()))


def _odd(run: Path) -> Iterator[str]:
    """Yield a line for each link in the run folder, and for all else that is neither a file nor a folder."""
    for path in _files(run):
        if path.is_symlink():
            yield f"{_name(path, run)} is a link, and what it leads to is not sealed"
        elif not path.is_file():
            yield f"{_name(path, run)} is neither a file nor a folder"


def _files(run: Path) -> Iterator[Path]:
    """Yield whatever lies in the run folder and is no folder, in order; the manifest and the lock left out."""
    for here, folders, files in os.walk(run, followlinks=False):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(here, name))]
        for name in sorted((*files, *linked)):
            path = Path(here, name)
            ours = not path.is_symlink() and path.parent == run and (name == MANIFEST or _is_lock(path))
            if not ours:
                yield path


def _is_lock(path: Path) -> bool:
    """Return whether this is the run's lock, which holds nothing."""
    return path.name == LOCK and path.is_file() and path.stat().st_size == 0


def _name(path: Path, run: Path) -> str:
    return path.relative_to(run).as_posix().encode(errors="backslashreplace").decode()


def code_hashes() -> dict[str, str]:
    """Return the SHA-256 of every source file, preset, task, template and list of a model's weights, by path."""
    root = Path(__file__).parents[2]
    kinds = {".py", ".toml", ".yaml", ".jsonl", ".j2"}
    found = sorted(path for room in ROOMS for path in (root / room).rglob("*") if path.suffix in kinds)
    sums = sorted((root / "suites/models").rglob("SHA256SUMS"))
    return {path.relative_to(root).as_posix(): _hash(path.read_bytes()) for path in (*found, *sums)}


@cache
def package_hashes() -> dict[str, str]:
    """Return version and SHA-256 of every installed package's RECORD (pip's list of its file hashes), by name."""
    found: dict[str, str] = {}
    for package in distributions():
        name = package.metadata["Name"]
        if name:
            found[name.lower()] = f"{package.version} {_hash((package.read_text('RECORD') or '').encode())}"
    return dict(sorted(found.items()))


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        *(f"{name} is missing" for name in sorted(then.keys() - now.keys())),
        *(f"{name} was added" for name in sorted(now.keys() - then.keys())),
        *(f"{name} differs" for name in sorted(then.keys() & now.keys()) if then[name] != now[name]),
    ]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
