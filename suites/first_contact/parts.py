"""The parts of a first contact in order of value, cheap and decisive ones first: a command each, with a time limit.

They are those of a review of the CUDA path on paper. Tests that tell right from wrong come before what tells fast from
slow, and last comes what another part does on its way, too, as `shapes` calibrates. In a rehearsal every part runs on
the processor, with narrow models and over the paced link, to try the command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from suites.first_contact import reading
from suites.first_contact.findings import Finding
from suites.first_contact.process import Ended

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
TESTS = CHECKOUT / "tests" / "gpu"
REHEARSAL = HERE / "rehearsal.toml"
LINK_TESTS = "test_cuda_link.py"
GEOMETRY = "olmoe-1b-7b"
PROFILES = {"on-demand-overlap": (), "mobile": ("--rate", "0.3", "--link-gb-per-s", "25"), "resident": ()}
PASSED, NO_TESTS = 0, 5  # exit codes of pytest

Read = Callable[[Ended, Path], Iterable[Finding]]


@dataclass(frozen=True)
class Part:
    """One command, in words; `most_seconds` is what it may take however much time is left.

    `read` turns what the command left into findings, from its output and the scratch folder. One that `resumes` may be
    called again after it ended badly, and goes on behind what it lost. `good` are exit codes that are no failure.
    """

    name: str
    title: str
    words: tuple[str, ...]
    most_seconds: float
    read: Read = lambda ended, scratch: ()
    needs_gpu: bool = True
    resumes: bool = False
    good: tuple[int, ...] = (0,)


def parts(scratch: Path, findings: Path, *, rehearse: bool) -> list[Part]:
    """Return all parts. They write into `scratch`, and what they learn on their way into the file of findings."""
    python = (sys.executable, "-X", "faulthandler", "-m")
    reports = ("--findings", str(findings), "--part")
    run = scratch / "run"

    def tests(name: str, title: str, most_seconds: float, chosen: Path) -> Part:
        plain = ("-vv", "-p", "no:cacheprovider", "--durations=10", "-o", "faulthandler_timeout=60", "--tb=short")
        plugin = ("-p", "suites.first_contact.outcomes", *reports, name)
        words, good = (*python, "pytest", *plain, *plugin, str(chosen)), (PASSED, NO_TESTS)
        return Part(name, title, words, most_seconds, needs_gpu=not rehearse, resumes=True, good=good)

    def cells(name: str, title: str, most_seconds: float, only: str) -> Part:
        preset = ("--preset", str(REHEARSAL), "--link", "paced") if rehearse else ("--preset", "shapes")
        words = (*python, "suites", "run", *preset, "--out", str(run), "--only", only)
        return Part(name, title, words, most_seconds, needs_gpu=not rehearse)

    def profile(strategy: str, options: tuple[str, ...]) -> Part:
        name = f"profile-{strategy}"
        size: tuple[str, ...] = ("--layers", "4")
        if rehearse:
            options, size = options[:2], ("--layers", "2", "--shrink", "16", "--link", "paced", "--tokens", "3")
        words = (*python, "suites", "profile", "--geometry", GEOMETRY, "--strategy", strategy, *size, *options)
        return Part(
            name,
            f"where a decode step's time goes, {strategy}{' at 25 GB/s' if '25' in options else ''}",
            (*words, "--out", str(scratch / name)),
            60,
            reading.profile(name),
            needs_gpu=not rehearse,
        )

    on_processor = ("--device", "cpu") if rehearse else ()
    return [
        Part(
            "doctor",
            "what this machine is",
            (*python, "mobile", "doctor", "--json", "--store", str(scratch)),
            60,
            reading.doctor,
            needs_gpu=False,
        ),
        Part(
            "link",
            "the link, and what waiting for the card costs",
            (*python, "suites.first_contact.link_probe", *reports, "link"),
            60,
        ),
        tests("tests-link", "tests of the CUDA link", 120, TESTS / LINK_TESTS),
        cells("engine", "what the engine costs a layer", 75, f"{GEOMETRY} native engine against stock"),
        cells("shapes", "the clock held to the native link, and to 25 GB/s", 240, f"{GEOMETRY} [n2]* recorded *"),
        *(profile(strategy, options) for strategy, options in PROFILES.items()),
        Part(
            "calibrate",
            "the numbers of the virtual clock",
            (*python, "mobile", "doctor", "--calibrate", "--json", "--out", str(scratch / "card.json"), *on_processor),
            90,
            reading.calibration,
            needs_gpu=False,
        ),
        tests("tests-rest", "the other tests that need a GPU", 300, TESTS),
    ]
