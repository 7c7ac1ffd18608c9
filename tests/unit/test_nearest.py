"""A word that is none of the choices: what was meant, and all choices, wherever such a word is refused."""

from __future__ import annotations

import pytest
import torch

from mobile.costs.geometry import GEOMETRIES, Geometry, project
from mobile.costs.hardware import profile
from mobile.errors import Refused
from mobile.kernels import KERNELS, kernel_named
from mobile.links.registry import CHOICES
from mobile.policies.strategy import resolve, strategies
from mobile.suggest import nearest, offer
from suites.plan.preset import presets, read_preset

CPU = torch.device("cpu")
OWN = Geometry("own", 1, 8, 2, 1, 1, 1, 1, 1, 2)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("mobil", "mobile"),
        ("MOBILE", "mobile"),
        ("mobile ", "mobile"),
        ("on_demand", "on-demand"),
        ("lur", "lru"),
        ("speculating", "speculating-experts"),
        ("magic", None),
        ("", None),
        ("x" * 10_000, None),
    ],
)
def test_what_is_most_alike_was_meant_and_nothing_where_nothing_is(word, meant):
    names = [name for name in strategies() if name != "speculating-experts-verify"]
    assert nearest(word, names) == meant


def test_the_beginning_of_one_choice_stands_for_it_and_that_of_two_for_none():
    names = ("qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "olmoe-1b-7b")
    assert nearest("qwen3", names) == "qwen3-30b-a3b"
    assert nearest("qwen", names) is None
    assert nearest("o", names) is None


def test_all_choices_are_listed_whether_one_was_meant_or_not():
    assert offer("lur", ("lfu", "lru")) == "did you mean lru? Choose one of: lfu, lru"
    assert offer("magic", ("lfu", "lru")) == "choose one of: lfu, lru"
    assert offer("magic", ()) == "there is none to choose"


@pytest.mark.parametrize(
    ("refused", "meant", "choices"),
    [
        (lambda: resolve("mobil"), "mobile", strategies()),
        (lambda: profile("rtx4080-pcie"), "rtx4080-pcie4", ["auto", "rtx4080-pcie4"]),
        (lambda: project(OWN, "olmoe-1b"), "olmoe-1b-7b", GEOMETRIES),
        (lambda: kernel_named("tritn", CPU, torch.float32), "triton", KERNELS),
        (lambda: read_preset("smok"), "smoke", presets()),
    ],
)
def test_every_word_that_is_refused_is_answered_with_what_was_meant(refused, meant, choices):
    with pytest.raises(Refused) as caught:
        refused()
    told = str(caught.value)
    assert f"did you mean {meant}? Choose " in told
    assert all(choice in told for choice in choices)
    assert told.endswith(".")
    assert "\n" not in told


def test_the_links_that_are_listed_are_those_there_are(tiny_moe):
    import mobile

    with pytest.raises(Refused, match=r"Link 'virtul' is not available; did you mean virtual\? Choose auto, cuda, "):
        mobile.attach(tiny_moe, "lru", slots=8, link="virtul")
    assert CHOICES == ("auto", "cuda", "disk", "virtual", "paced")


@pytest.fixture
def tiny_moe():
    from conftest import tiny

    return tiny("olmoe")
