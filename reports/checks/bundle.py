"""The bundle: a run folder sealed by a manifest of SHA-256, so that any changed byte is found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from reports.data.results import Results

ROOMS = ("mobile", "baselines", "suites", "reports")
MANIFEST = "manifest.json"
TEMPORARY = (".partial", ".lock")  # suffixes of files that exist only while a run goes on


class NoManifest(ValueError):
    """There is no manifest to verify against, or it cannot be read."""


@dataclass(frozen=True)
class Verified:
    """The differences from a manifest: `changed` files break the bundle, `surroundings` are code and packages here."""

    changed: tuple[str, ...]
    surroundings: tuple[str, ...]
    files: int


def seal(run: Path, results: Results) -> str:
    """Write the manifest over the run folder, the code and the installed packages; return its SHA-256."""
    record = results.all_records[0]
    manifest = {
        "schema": 1,
        "preset": results.preset,
        "files": file_hashes(run),
        "config": {
            "git_commit": record.environment["git_commit"],
            "git_dirty": record.environment["git_dirty"],
            "cells": sorted(r.id for r in results.all_records),
        },
        "code": code_hashes(),
        "wheels": package_hashes(),
    }
    path = run / MANIFEST
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return _hash(path.read_bytes())


def verify(run: Path) -> Verified:
    """Compare a run folder with its manifest. Raise NoManifest if it has none."""
    path = run / MANIFEST
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: sealed[name] for name in ("files", "code", "wheels")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoManifest(f"{path} cannot be read ({error}); make one with: python -m reports build {run}") from error
    now = file_hashes(run)
    changed = _differences(kept["files"], now)
    surroundings = [f"code: {line}" for line in _differences(kept["code"], code_hashes())]
    surroundings += [f"package: {line}" for line in _differences(kept["wheels"], package_hashes())]
    return Verified(tuple(changed), tuple(surroundings), len(kept["files"]))


def file_hashes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the run folder, the manifest left out, by its path in it."""
    found = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix not in TEMPORARY)
    return {
        name: _hash(path.read_bytes())
        for path in found
        if (name := path.relative_to(run).as_posix()) != MANIFEST and not path.name.startswith(".")
    }


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
