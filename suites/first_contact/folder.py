"""The folder of a first contact: six files, each within a share of 60 MB, whole whenever they are looked at.

`findings.jsonl` and `log.txt` grow while things happen. The page, the profile of the card and the two archives are
replaced, each by one that is complete.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mobile import outputs
from mobile.errors import Refused

MOST_FILES = 8
MOST_NBYTES = 60 * 10**6
RECORDS_NBYTES, TRACES_NBYTES, CARD_NBYTES = 12 * 10**6, 20 * 10**6, 10**6  # findings and log have limits of their own
MOST_TRACE_NBYTES = 400 * 10**6  # that are read to be compressed
FAST = 1  # zlib's level: the card is not to wait for an archive
ENTRY_NBYTES = 1000  # of an archive's headers, a file


@dataclass(frozen=True)
class Folder:
    """The folder, and the paths of its files."""

    path: Path

    @property
    def findings(self) -> Path:
        return self.path / "findings.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def card(self) -> Path:
        """Return the profile of this machine, which --hardware takes."""
        return self.path / "card.json"

    @property
    def records(self) -> Path:
        """Return the archive of a run folder: its plan, records, calibrations, failures and logs."""
        return self.path / "records.zip"

    @property
    def traces(self) -> Path:
        """Return the archive of traces of torch.profiler, which ui.perfetto.dev opens one by one."""
        return self.path / "traces.zip"


def make(path: Path) -> Folder:
    """Make the folder. Raise Refused if it cannot be made, or holds anything: findings are added to no others."""
    outputs.check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise Refused(f"{outputs.printable(path)} holds files, and a first contact overwrites none; name a new folder.")
    return Folder(path)


def pack(files: dict[str, Path], archive: Path, most_nbytes: int) -> list[str]:
    """Write an archive of files by name, the first ones first, as far as they fit; return the names of the others."""
    left_out: list[str] = []
    with (
        outputs.open_atomic(archive) as target,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=FAST) as packed,
    ):
        for name, path in files.items():
            try:
                content = path.read_bytes() if path.stat().st_size <= MOST_TRACE_NBYTES else None
            except OSError:  # a process that is at work there has just renamed it
                continue
            if content is None or target.tell() + len(zlib.compress(content, FAST)) + ENTRY_NBYTES > most_nbytes:
                left_out.append(name)
                continue
            packed.writestr(name, content)
    return left_out


def run_files(run: Path) -> dict[str, Path]:
    """Return the files of a run folder by their names in it: what a report reads first, logs last."""
    return {path.relative_to(run).as_posix(): path for path in _of_run(run)}


def _of_run(run: Path) -> Iterator[Path]:
    for pattern in ("run.json", "records/*.json", "calibration/*.json", "failures/*.json", "logs/*.log"):
        yield from sorted(run.glob(pattern))
