"""A run as one archive that others can check: plan, records, page and the manifest that seals them, and no more.

Traces, answers of live runs and logs stay behind: they are large, or name folders of the machine. Each file's size and
SHA-256 stands in `submission.json`, and again in the run's own manifest. That finds damage and careless edits. Whoever
edits records, manifest and archive so that all agree is found by running the suite again, and by nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from reports.checks import bundle, expected, plain_zip
from reports.checks.checklist import evidence, lines, recomputed
from reports.data.results import Results, read
from reports.elements.slug import slug
from reports.pages.submitted import Submitted, machine_in_words
from reports.sections import controls
from suites.strict_json import parse, read_bytes
from suites.typed_json import Count, Sha256, typed

ABOUT, FORMAT = "submission.json", "mobile-submission-1"
PAGES = ("report.html", "report.md", "cells.csv")
PATHS = re.compile(
    r"(run|manifest)\.json|report\.(html|md)|cells\.csv|(records|calibration|turns|failures)/[\w-]{1,100}\.json", re.A
)
NAMES = re.compile(rf"submission\.json|{PATHS.pattern}", re.A)  # nothing of it leads out of a folder
AS_EXPECTED, UNKNOWN = "as expected", "nothing is expected of this preset here"


class Unsubmittable(ValueError):
    """A run that cannot be submitted, or an archive that is none; the message is one sentence."""


@dataclass(frozen=True)
class Packed:
    """One file of an archive."""

    nbytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class About:
    """What an archive says of itself: who sends it, the code that built its page, and the checklist's missing lines."""

    format: str
    by: str
    preset: str
    code: Sha256
    missing: tuple[str, ...]
    files: dict[str, Packed]


def pack(run: Path, path: Path, by: str = "", as_it_is: bool = False) -> About:
    """Write the archive of a finished run and return what it says of itself; `as_it_is` also where check or gate fails.

    `by` says who sends it, and may be empty.

    Raise Unsubmittable for an unfinished run, one that changed since its page was built, one with a broken control, one
    that names the user's home folder, or one whose check or gate fails; NoResults, NoManifest and OSError.
    """
    results = read(run)
    if results.absent:
        raise Unsubmittable(
            f"{run} is not finished, {len(results.absent)} of its cells have no record; run the suite again, which "
            "keeps what is done."
        )
    if broken := controls.broken(results):
        raise Unsubmittable(f"{run} cannot be trusted: {_first(broken)}.")
    if changed := bundle.verify(run).changed:
        raise Unsubmittable(
            f"{run} is not as it was sealed ({_first(changed)}); python -m reports build seals it anew."
        )
    answers = lines.run_tests(evidence.gather(run))
    missing = tuple(f"{number}: {why}" for number, _, result, why in answers if result == lines.MISSING)
    held = against_expectation(results)
    fails = [f"check misses line {_first(missing)}"] if missing else []
    fails += [f"gate: {held}"] if held not in (AS_EXPECTED, UNKNOWN) else []
    if fails and not as_it_is:
        raise Unsubmittable(f"{run} fails: {'; '.join(fails)}. With --as-it-is it is packed, and its page says so.")
    sealed = bundle.manifest(run)
    files = {name: (run / name).read_bytes() for name in (*_chosen(sealed), bundle.MANIFEST)}
    packed = {name: Packed(len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    about = About(FORMAT, by, results.preset, _of_code(sealed), missing, packed)
    files[ABOUT] = (json.dumps(asdict(about), indent=1, sort_keys=True) + "\n").encode()
    _refuse_home(files)
    plain_zip.pack(path, files)
    return about


def default_path(run: Path) -> Path:
    """Return a name for a run's archive, in the current folder: its preset and a part of its records' hash."""
    sealed = bundle.manifest(run)
    return Path(f"{slug(sealed.preset)}-{_of_records(sealed)[:12]}.zip")


def environments(results: Results) -> list[str]:
    """Return what the records say of the machines they were made on: host name, machine and system, each once."""
    found = (
        (r.environment.get("host"), machine_in_words(r), r.environment.get("platform")) for r in results.all_records
    )
    return list(dict.fromkeys(", ".join(str(fact) for fact in facts if fact) for facts in found))


def against_expectation(results: Results) -> str:
    """Return how a run compares with what is expected of its preset here, in a few words."""
    try:
        found = expected.gate(results, expected.folder_of(results.preset))
    except expected.NoExpectation:
        return UNKNOWN
    unlike = (*found.t0, *found.t1)
    return f"{len(unlike)} facts are not as expected, first {unlike[0]}" if unlike else AS_EXPECTED


def unpacked(path: Path) -> Submitted:
    """Return what an archive holds, after every check that its files allow. Raise Unsubmittable; OSError.

    Checked are names, sizes and hashes, the run's manifest, that every planned cell has its record, or a note that its
    machine was too small for it, and no other, and each record by what it says itself: types, counters against items,
    scores of shipped tasks, turns, controls.
    """
    with TemporaryDirectory() as folder:
        try:
            plain_zip.unpack(path, Path(folder), NAMES)
            return _checked(path.name, Path(folder))
        except ValueError as error:
            told = str(error).replace(f"{folder}/", "")
            raise Unsubmittable(f"{path} cannot be counted: {told}") from error


def _checked(name: str, run: Path) -> Submitted:
    """Return what lies in an unpacked folder. Raise ValueError of any kind for the first thing that does not hold."""
    about = _about(run)
    sealed = bundle.manifest(run)
    _hold(sealed.preset == about.preset, f"its manifest is of preset {sealed.preset!r}, not of {about.preset!r}")
    _hold(_of_code(sealed) == about.code, "it names other code than its manifest")
    chosen = _chosen(sealed)
    _hold({*chosen, bundle.MANIFEST} == about.files.keys(), "it does not hold the files that its manifest seals")
    for each in chosen:
        _hold(sealed.files[each] == about.files[each].sha256, f"{each} is not the file that the run's manifest seals")
    results = read(run)
    if results.absent:
        cell, why = results.absent[0]
        raise Unsubmittable(f"{len(results.absent)} of its cells have no record that can be used, first {cell}: {why}")
    said = bundle.said_of(run, results)
    _hold(said == sealed.config, "its manifest does not say what its records say")
    _hold(results.preset == about.preset, f"its plan is of preset {results.preset!r}, not of {about.preset!r}")
    extra = {each for each in chosen if each.startswith("records/")} - {f"records/{cell}.json" for cell in said.cells}
    _hold(not extra, f"{min(extra, default='')} is of no cell of its plan")
    if wrong := next(_wrong(results, run), None):
        raise Unsubmittable(wrong)
    code, here = _of_code(sealed), _hash_of(bundle.code_hashes())
    held = against_expectation(results)
    return Submitted(name, about.by, _of_records(sealed), results, code, code == here, about.missing, held)


def _about(run: Path) -> About:
    """Return what the archive says of itself, after holding each file to it. Raise ValueError."""
    about: About = typed(parse(_content(run / ABOUT), ABOUT), About, ABOUT)
    _hold(about.format == FORMAT, f"it is of the format {about.format[:40]!r}, and this version reads {FORMAT}")
    there = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} - {ABOUT}
    odd = sorted(there ^ about.files.keys())
    _hold(not odd, f"{ascii(odd[0][:60]) if odd else ''} is there and not listed, or listed and not there")
    for name, packed in about.files.items():
        content = _content(run / name)
        same = (len(content), hashlib.sha256(content).hexdigest()) == (packed.nbytes, packed.sha256)
        _hold(same, f"{name} is not the file that was packed")
    return about


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise Unsubmittable(f"it has no {path.name}")
    return read_bytes(path)


def _wrong(results: Results, run: Path) -> Iterator[str]:
    """Yield a clause for each record that contradicts itself, and for each broken control."""
    for record in (*results.scored, *results.controls):
        for why in (recomputed.wrong_sums(record), recomputed.wrong_scores(record)):
            if why:
                yield f"record {record.id}: {why}"
    for record in (*results.scripted, *results.references):
        for why in (recomputed.longer_than_it_took(record), recomputed.wrong_turns(record, run)):
            if why:
                yield f"record {record.id}: {why}"
    yield from controls.broken(results)


def _chosen(sealed: bundle.Manifest) -> list[str]:
    """Return the names of the sealed files that belong into an archive; of notes, those on cells without a record."""
    notes = {f"failures/{cell}.json" for cell in sealed.config.absent}
    named = [name for name in sealed.files if PATHS.fullmatch(name)]
    return [name for name in named if name in notes or not name.startswith("failures/")]


def _refuse_home(files: dict[str, bytes]) -> None:
    """Raise Unsubmittable where a file names the user's home folder, which is no one else's business."""
    home = Path.home()
    if home == Path(home.anchor):
        return
    for name, content in files.items():
        if re.search(rb"(?<![\w/.-])" + re.escape(f"{home}".encode()) + rb"(?![\w.-])", content):
            raise Unsubmittable(
                f"{name} names your home folder {home}; run the suite again on files and folders that lie elsewhere."
            )


def _of_code(sealed: bundle.Manifest) -> str:
    """Return the SHA-256 of the code that built the page: of its files' names and hashes."""
    return _hash_of(sealed.code)


def _of_records(sealed: bundle.Manifest) -> str:
    """Return the SHA-256 of plan and records: of their names and hashes. The same run has the same in any archive."""
    kept = {name: digest for name, digest in sealed.files.items() if name == "run.json" or name.startswith("records/")}
    return _hash_of(kept)


def _hash_of(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _hold(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Unsubmittable(otherwise)


def _first(found: Sequence[str]) -> str:
    return found[0] if len(found) == 1 else f"{found[0]}, and {len(found) - 1} more"
