"""`mobile tune`: its bounds are exact, its choice holds, and --gamma and gamma= read the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import greedy, prompt, tiny
from scipy.stats import binomtest

import mobile
from mobile.cli import main
from mobile.errors import Refused
from mobile.policies import tuned
from mobile.policies.strategy import BigLittle, resolve
from mobile.tuning import choice
from mobile.tuning.choice import Measured, Setting
from mobile.tuning.exact import fewest_items, highest_share, lowest_share
from mobile.tuning.items import Item, is_right, outcomes, read_items

SHIPPED = str(Path(__file__).parent.parent / "suites/models/olmoe-tiny")
ITEMS = [
    {
        "prompt": "Question: Ben has 20 marbles. Ben finds 5 more. How many marbles does Ben have now?\nAnswer:",
        "answer": 25,
    },
    {"prompt": "Q: not ( True and False ) is\nA:", "answer": "True"},
    {"prompt": "Q: I have a cat, two dogs, and a plum. How many animals do I have?\nA:"},
]


@pytest.mark.parametrize(("count", "of"), [(0, 1), (0, 368), (3, 50), (12, 12), (499, 1000)])
def test_the_bounds_are_clopper_and_pearsons(count, of):
    exact = binomtest(count, of).proportion_ci(confidence_level=0.9, method="exact")
    assert highest_share(count, of, 0.05) == pytest.approx(exact.high, abs=1e-9)
    assert lowest_share(count, of, 0.05) == pytest.approx(exact.low, abs=1e-9)


def test_the_fewest_items_are_those_that_first_suffice():
    needed = fewest_items(0.01, 0.05)
    assert needed == 299  # log 0.05 / log 0.99, rounded up
    assert highest_share(0, needed, 0.05) <= 0.01 < highest_share(0, needed - 1, 0.05)


def test_so_many_items_as_are_said_to_be_needed_would_do():
    few = Measured(Setting("probability", 0.9), 400, 1000, 10, tuple(range(4)), tuple(range(2)))
    assert few.high(0.05) > 1.0
    needed = choice.items_needed([few], 1.0)
    more = Measured(few.setting, needed, 1000, 10, tuple(range(needed // 100)), tuple(range(needed // 200)))
    assert more.high(0.05) == pytest.approx(1.0, abs=0.05)
    losing = Measured(few.setting, 400, 1000, 10, tuple(range(9)), tuple(range(5)))
    assert choice.items_needed([losing], 1.0) is None


@pytest.mark.parametrize(
    ("output", "answer", "right"),
    [
        (" 20+5=25. #### 25", "25", True),
        (" 25 of 26", "25", False),
        ("It is 1,025.0.", "1025", True),
        ("-3", "3", False),
        (" not False = True. So the answer is True.", "True", True),
        ("So it is untrue", "true", False),
        ("The capital is\nNew  York!", "new york", True),
        ("", "25", False),
    ],
)
def test_an_answer_is_the_last_number_or_the_last_words(output, answer, right):
    assert is_right(output, answer) is right


def test_without_an_answer_another_text_is_a_loss():
    items = [Item("a", "1"), Item("b", "1"), Item("c"), Item("d"), Item("e", "1")]
    lost, gained = outcomes(items, ["1", "2", "x", "y", "2"], ["3", "1", "x", "z", "3"])
    assert (lost, gained) == ([0, 3], [1])


def measured(gamma: float, lost: int, gained: int = 0, fallbacks: int = 10, signal: str = "probability") -> Measured:
    return Measured(Setting(signal, gamma), 2000, 1000, fallbacks, tuple(range(lost)), tuple(range(500, 500 + gained)))


def test_the_choice_is_the_cheapest_before_the_first_that_fails():
    curve = [measured(0.99, 2, fallbacks=300), measured(0.9, 4, fallbacks=200), measured(0.7, 40, fallbacks=100)]
    luck = measured(0.5, 0, fallbacks=50)  # cheaper, and good on these items: not tested after one that failed
    passed = choice.certified([*curve, luck], 1.0)
    assert [each.setting.gamma for each in passed] == [0.99, 0.9]
    assert choice.cheapest(passed).setting.gamma == 0.9
    assert choice.certified([measured(0.9, 25)], 1.0) == []
    assert choice.cheapest([]) is None


def test_several_signals_share_the_error():
    one, other = measured(0.9, 11), measured(0.9, 11, signal="margin")
    assert choice.certified([one], 1.0)
    assert not choice.certified([one, other], 1.0)


def test_what_is_gained_lowers_the_bound_and_where_nothing_can_be_the_test_is_one_sided():
    assert measured(0.9, 30, gained=30).high(0.05) < measured(0.9, 30).high(0.05)
    without = Measured(Setting("probability", 0.9), 299, 10, 1, (), (), can_gain=False)
    assert without.high(0.05) <= 1.0 < Measured(Setting("probability", 0.9), 299, 10, 1, (), ()).high(0.05)


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    path.write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS))
    return path


@pytest.fixture(scope="module")
def written(items, tmp_path_factory) -> Path:
    """The file of a choice that three items cannot make certain."""
    out = tmp_path_factory.mktemp("tuned") / "gamma.json"
    words = ["tune", SHIPPED, "--tasks", str(items), "--out", str(out), "--anyway", "--signals", "margin"]
    assert main([*words, "--max-new-tokens", "30", "--dtype", "float32"]) == 0
    return out


def test_the_file_says_what_was_measured_and_on_what(written):
    found = tuned.read(written)
    assert (found.signal, found.items, found.answered, found.certified) == ("margin", 3, 2, False)
    assert found.low <= found.loss <= found.high
    assert found.architecture["top_k"] == 8
    assert list(found.tasks) == ["items.jsonl"]


def test_gamma_reads_the_file_in_python_and_from_a_shell(written, capsys):
    found = tuned.read(written)
    assert resolve("mobile", written).gating == BigLittle(found.gamma, "margin")
    for given in (written, str(written)):
        model = mobile.load(SHIPPED, gamma=given, slots=72)
        assert model.mobile.strategy.gating == BigLittle(found.gamma, "margin")
    assert main(["generate", SHIPPED, "Q: not True is\nA:", "--gamma", str(written), "--max-new-tokens", "3"]) == 0


def test_another_architecture_refuses_the_file_and_stays_as_it_was(written):
    model = tiny("olmoe")
    with pytest.raises(Refused, match=r"tuned for .*64 experts, 8 a token.*this model is"):
        mobile.attach(model, gamma=written, slots=8)
    assert not hasattr(model, "mobile")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gamma": -1}, "negative"),
        ({"gamma": True}, "gamma"),
        ({"signal": "margn"}, "did you mean margin"),
        ({"format": "mobile-gamma-2"}, "no mobile-gamma-1 file"),
        ({"more": 1}, "'more'"),
        ({"items": "3"}, "items"),
        ({"architecture": {"name": 3}}, "architecture"),
    ],
)
def test_a_bad_file_gets_one_sentence(written, tmp_path, change, says):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({**json.loads(written.read_text()), **change}))
    with pytest.raises(Refused, match=says) as refused:
        resolve("mobile", bad)
    assert "\n" not in str(refused.value)
    bad.write_text('{"gamma": NaN')
    with pytest.raises(Refused, match="give a number"):
        resolve("mobile", bad)
    with pytest.raises(Refused, match="give a number"):
        resolve("mobile", tmp_path / "none.json")


def test_no_file_without_a_certain_choice_and_the_items_that_would_do_are_said(items, tmp_path, capsys):
    out = tmp_path / "gamma.json"
    words = ["tune", SHIPPED, "--tasks", str(items), "--gammas", "1.1", "0.9", "--max-new-tokens", "12"]
    assert main([*words, "--out", str(out), "--json"]) == 1
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    assert not out.exists()
    assert shown["chosen"] is None
    assert shown["items_needed"] == 368  # log 0.025 / log 0.99: nothing is lost where everything falls back
    assert "368" in printed.err
    always, _ = shown["curve"]
    assert (always["gamma"], always["fallback_rate"], always["lost"], always["gained"]) == (1.1, 1.0, 0, 0)


def test_a_choice_is_certain_where_the_budget_is_wide(items, tmp_path, capsys):
    out = tmp_path / "gamma.json"
    words = ["tune", SHIPPED, "--tasks", str(items), "--gammas", "1.1", "--max-loss", "99", "--out", str(out)]
    assert main([*words, "--max-new-tokens", "12"]) == 0
    assert tuned.read(out).certified
    assert "within" in capsys.readouterr().out
    assert main([*words, "--max-new-tokens", "12"]) == 2  # it is there
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", "Line 2"),
        ('{"answer": 3}', '"prompt"'),
        ('{"prompt": "a", "answer": [1]}', "neither a text nor a number"),
        ('{"prompt": ""}', '"prompt"'),
    ],
)
def test_a_wrong_line_of_items_is_named(tmp_path, line, says):
    path = tmp_path / "items.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(Refused, match=says):
        read_items(path)


@pytest.mark.parametrize(
    "wrong",
    [["--signals", "mood"], ["--max-loss", "0"], ["--gammas", "-1"], ["--strategy", "lru"], ["--batch", "0"]],
)
def test_what_cannot_be_tuned_is_refused_before_a_weight_is_read(items, wrong, capsys, monkeypatch):
    monkeypatch.setattr(mobile, "load", None)
    assert main(["tune", SHIPPED, "--tasks", str(items), *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_engine_is_judged_otherwise_inside_a_block_only():
    model, ids = tiny("olmoe"), prompt()
    mobile.attach(model, "mobile", slots=8, gamma=0.0)
    before = greedy(model, ids)[0].tolist()
    engine = model.mobile
    with engine.gated(BigLittle(1.1, "margin")):
        greedy(model, ids)
        assert engine.stats()["fallbacks"] == 9
    assert greedy(model, ids)[0].tolist() == before
    assert engine.stats()["fallbacks"] == 0
    mobile.detach(model)
    mobile.attach(model, "lru", slots=8)
    with pytest.raises(Refused, match="no gamma"), model.mobile.gated(BigLittle()):
        pass
