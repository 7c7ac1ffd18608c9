"""The parts in turn within a deadline: each a process, each survived, its findings, records and page kept at once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from mobile import outputs
from suites.first_contact import folder as files
from suites.first_contact import reading
from suites.first_contact.findings import Finding, append, read
from suites.first_contact.folder import Folder
from suites.first_contact.page import is_test, page, state
from suites.first_contact.parts import CHECKOUT, Part
from suites.first_contact.process import GRACE_SECONDS, Ended, Log, run
from suites.record import RunFolder

TITLE = "First contact"
CLOSING_SECONDS = 2 * GRACE_SECONDS  # for ending a part that is late, and for the last page
LEAST_SECONDS = 5.0  # with which a part is begun
POLL_SECONDS = 1.0  # between two looks at what a part has left so far


class Session:
    """A first contact under way."""

    def __init__(
        self, parts: Sequence[Part], folder: Folder, scratch: Path, show: Callable[[str], None], title: str = TITLE
    ) -> None:
        """Write into `folder`; parts write into `scratch`. `show` prints a line of what is found."""
        self.parts, self.folder, self.scratch, self.show, self.title = parts, folder, scratch, show, title
        self.run_folder = RunFolder(scratch / "run")
        self._shown = self._packed = 0
        self._seen: set[str] = set()  # records, and notes of failures
        self._traced: set[str] = set()
        self._looked = 0.0
        self._stopping = False
        self._current = parts[0].name  # the part that is under way, whose records new ones are

    def stop(self) -> None:
        """Have `go` raise KeyboardInterrupt soon: what the handler of a signal raises may be lost on its way."""
        self._stopping = True

    def findings(self) -> list[Finding]:
        return read(self.folder.findings)

    def say(self, finding: Finding) -> None:
        append(self.folder.findings, finding)

    def go(self, seconds: float) -> bool:
        """Do every part that can be done in so many seconds; return whether none failed or was left out for time.

        Raise KeyboardInterrupt after `stop`, OSError and Refused where the folder takes no more.
        """
        deadline = time.monotonic() + seconds - CLOSING_SECONDS
        log = Log(self.folder.log)
        try:
            for part in self.parts:
                self._do(part, log, deadline)
        finally:
            self.close()
            log.close()
        return all(state(self.findings(), part.name) in ("done", "skipped") for part in self.parts)

    def close(self) -> None:
        """Bring everything in the folder up to date."""
        self._look()
        self._keep()

    # --- one part ---------------------------------------------------------------------------------

    def _do(self, part: Part, log: Log, deadline: float) -> None:
        left, self._current = deadline - time.monotonic(), part.name
        if part.needs_gpu and reading.has_gpu(self.findings()) is False:
            self.say(Finding(part.name, "skipped", part.name, detail="needs a GPU, and torch finds none here"))
        elif left < LEAST_SECONDS:
            self.say(Finding(part.name, "failed", part.name, detail="no time was left for it; give more --minutes"))
        else:
            self.say(Finding(part.name, "began", part.name, detail=part.title))
            self.show(f"{part.name}: {part.title}, for at most {min(left, part.most_seconds):.0f} s")
            begun = time.monotonic()
            try:
                self._run(part, log, begun + min(left, part.most_seconds))
            except KeyboardInterrupt:
                self.say(Finding(part.name, "failed", part.name, detail="stopped by hand"))
                raise
            except Exception as error:  # nothing that a part does or leaves may end the others
                self.say(Finding(part.name, "failed", part.name, detail=f"{type(error).__name__}: {error}"))
            self.say(Finding(part.name, "ended", part.name, time.monotonic() - begun, "s", part.title))
        self._look()
        self._keep()

    def _run(self, part: Part, log: Log, until: float) -> None:
        """Run the part's command, and again where it goes on behind what it lost; say how it ended."""
        before = -1
        while True:
            log.begin(f"{part.name}: {' '.join(part.words)}")
            try:
                ended = run(
                    part.words,
                    log,
                    seconds=until - time.monotonic(),
                    folder=self.scratch,
                    environment=environment(),
                    meanwhile=self._meanwhile,
                )
            finally:
                log.end()
            begun = sum(one.part == part.name and one.kind == "began" for one in self.findings())
            lost = part.resumes and not ended.late and ended.code not in (*part.good, 1)
            if not lost or begun == before or time.monotonic() > until - LEAST_SECONDS:
                break
            before = begun
        if ended.late:
            about = f"not over after {ended.seconds:.0f} s, so it was ended"
        elif ended.code not in part.good:
            about = f"exit code {ended.code}"
        else:
            for finding in part.read(ended, self.scratch):
                self.say(finding)
            return
        self.say(Finding(part.name, "failed", part.name, detail=_why(ended, about)))

    def _meanwhile(self) -> None:
        if self._stopping:
            raise KeyboardInterrupt
        if time.monotonic() - self._looked >= POLL_SECONDS:
            self._look()

    # --- what is kept -----------------------------------------------------------------------------

    def _look(self) -> None:
        """Print what was found since the last look, and take in new records."""
        for finding in reading.cells(self._current, self.run_folder, self._seen):
            self.say(finding)
        findings = self.findings()
        for finding in findings[self._shown :]:
            if finding.kind in ("measured", "failed", "note") or (finding.kind == "skipped" and not is_test(finding)):
                self.show(f"  {finding}")
        self._shown = len(findings)
        if len(self._seen) != self._packed:
            self._keep()
        self._looked = time.monotonic()

    def _keep(self) -> None:
        """Write page, archives and profile anew, each whole or not at all."""
        self._packed = len(self._seen)
        if self.run_folder.plan.is_file():
            files.pack(files.run_files(self.run_folder.path), self.folder.records, files.RECORDS_NBYTES)
        self._keep_traces()
        card = self.scratch / self.folder.card.name
        if card.is_file() and not self.folder.card.exists() and card.stat().st_size <= files.CARD_NBYTES:
            shutil.copyfile(card, self.folder.card)
        names = [part.name for part in self.parts]
        title = f"{self.title}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {machine(self.findings())}"
        with outputs.open_atomic(self.folder.page) as file:
            file.write(page(self.findings(), names, title).encode("utf-8", "backslashreplace"))

    def _keep_traces(self) -> None:
        """Pack the traces of parts that are over, if there is a new one."""
        findings = self.findings()
        over = [part.name for part in self.parts if state(findings, part.name) != "running"]
        traces = {name: self.scratch / name / "trace.json" for name in over}
        traces = {name: path for name, path in traces.items() if path.is_file()}
        new = traces.keys() - self._traced
        if not new:
            return
        self._traced.update(new)
        packed = {f"{name}.json": path for name, path in traces.items()}
        left_out = files.pack(packed, self.folder.traces, files.TRACES_NBYTES)
        for name in sorted(new & {each.removesuffix(".json") for each in left_out}):
            megabytes = traces[name].stat().st_size / 1e6
            self.say(Finding(name, "note", "its trace was dropped", megabytes, "MB", "no room in traces.zip"))


def machine(findings: Sequence[Finding]) -> str:
    """Return the name of the card, or that there is none, or that it is not known yet."""
    cards = [one.name.removeprefix("card: ") for one in findings if one.name.startswith("card: ")]
    return cards[0] if cards else "no card" if reading.has_gpu(findings) is False else "a machine not known yet"


def environment() -> dict[str, str]:
    """Return the variables of every part: this checkout's modules come first, and output comes as it is made."""
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}


def _why(ended: Ended, about: str) -> str:
    return f"{ended.last_lines.strip()}\n{about}".strip()
