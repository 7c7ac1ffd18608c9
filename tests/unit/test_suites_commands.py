"""The commands of the suites, and those that fit predictors: what is wrong is one sentence, before anything is run."""

from __future__ import annotations

import pytest

from baselines.signals import ridge, sensitivity
from suites import __main__ as suites
from suites.abba import commands

PROFILE = ("profile", "--link", "paced", "--geometry", "olmoe-1b-7b", "--layers", "1")
UNWRITABLE = {
    "/proc/run": "The folder /proc/run cannot be made (No such file or directory); name another one.",
    "/dev/null": "The folder /dev/null cannot be made (File exists); name another one.",
    "/dev/null/run": "The folder /dev/null/run cannot be made (Not a directory); name another one.",
}


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """The sentence that a command line is refused with, in an empty folder that stays empty."""

    def run(main, *argv: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["command", *argv])
        before = sorted(tmp_path.rglob("*"))
        assert main() == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert told.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return told.removeprefix("error: ").strip()

    return run


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "The following arguments are required: VERB; see python -m suites --help."),
        (("pln",), "Unknown command 'pln'; did you mean plan? Choose one of: plan, run, resume, replay, profile, "),
        (
            ("plan", "--prest", "cpu"),
            "Unknown option --prest; did you mean --preset; see python -m suites plan ",
        ),
        (("plan", "cpu"), "'cpu' is one word too many"),
        (("plan", "--link", "cudda"), "Argument --link: 'cudda' is unknown; did you mean cuda? Choose one of: cuda, "),
        (("plan", "--preset", "smok"), "Unknown preset 'smok'; did you mean smoke? Choose one of: accuracy, cpu, "),
        (
            (*PROFILE, "--shrink", "0"),
            "The widths of olmoe-1b-7b cannot be divided by 0; take a power of two, ",
        ),
        ((*PROFILE, "--shrink", "7"), "The widths of olmoe-1b-7b cannot be divided by 7"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(refusal, argv, says):
    assert says in refusal(suites.main, *argv)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("minutes = 1", "\xff"),
        ("minutes = 1", "minutes = ["),
        ("items = 2", 'items = "two"'),
        ('hardware = ["rtx4080-pcie4"]', "hardware = [3]"),
        ('["static-half", "mobile"]', "[3]"),
        ("seeds = [0]", "seeds = 3"),
        ("[[models]]", "[models]"),
        ('path = "models/olmoe-tiny"', "path = 3"),
    ],
)
def test_a_preset_that_is_broken_or_odd_is_refused_with_its_name(refusal, tmp_path, old, new):
    from tiny_run import PRESET

    assert old in PRESET
    (tmp_path / "odd.toml").write_text(PRESET.replace(old, new), encoding="latin-1")
    assert refusal(suites.main, "plan", "--preset", "odd.toml").startswith("Preset odd.toml cannot be read: ")


@pytest.mark.parametrize(("out", "says"), UNWRITABLE.items())
def test_a_folder_that_cannot_be_made_is_known_before_anything_is_run_or_timed(refusal, monkeypatch, out, says):
    for begun in ("suites.__main__.execute", "suites.synthetic.models.make", "suites.abba.commands.trial"):
        monkeypatch.setattr(begun, lambda *_, **__: pytest.fail("it has begun"))
    assert refusal(suites.main, "run", "--preset", "smoke", "--out", out) == says
    assert refusal(suites.main, *PROFILE, "--out", out) == says
    assert refusal(commands.main, "compare", "lru", "mobile", "--out", out) == says


@pytest.mark.parametrize("pairs", ["2", "x", "-3", ""])
def test_fewer_pairs_than_an_interval_needs_are_refused(refusal, pairs):
    told = refusal(commands.main, "compare", "lru", "mobile", f"--pairs={pairs}")
    assert "an interval needs 3 processes a side at least" in told


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (ridge.main, ("fit", "--trace", "absent.npz")),
        (sensitivity.main, ("fit", "--model", "./absent", "--prompts", "absent.txt")),
    ],
)
def test_what_is_fitted_is_fitted_only_if_it_can_be_written(main, argv):
    with pytest.raises(SystemExit, match=r"/proc/fitted cannot be written \(No such file or directory\)"):
        main([*argv, "--out", "/proc/fitted"])
