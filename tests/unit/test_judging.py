"""Functions that a model wrote, scored inside lm-eval by running their tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from suites.scoring.lm_eval import score, task_config

DOCS = [
    {
        "prompt": 'def add_three(x):\n    """Return x plus three."""\n',
        "worked": "    return x + 3\n",
        "answer": "assert add_three(1) == 4\nassert add_three(-3) == 0\n",
        "key": "add:3",
    },
    {
        "prompt": 'def evens(xs):\n    """Return the even numbers of xs, in order."""\n',
        "worked": "    out = []\n    for x in xs:\n        if x % 2 == 0:\n            out += [x]\n    return out\n",
        "answer": "assert evens([1, 2, 4]) == [2, 4]\nassert evens([]) == []\n",
        "key": "filter:even",
    },
    {
        "prompt": 'def shout(text):\n    """Return text in capitals with a full stop."""\n',
        "worked": "    return text.upper() + '.'\n",
        "answer": "assert shout('a') == 'A.'\n",
        "key": "text:upper+stop",
    },
]


class Scripted(LM):
    """A model that answers a prompt with what it was given for it."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def config(tmp_path: Path) -> dict:
    path = tmp_path / "python_functions.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    config = task_config("python_functions")
    config["dataset_kwargs"]["data_files"]["test"] = str(path)
    return config


def test_worked_bodies_pass(config):
    answers = score(Scripted({doc["prompt"]: doc["worked"] for doc in DOCS}), config, [0, 1, 2])
    assert [(answer.doc, answer.correct, answer.answer) for answer in answers] == [
        (0, True, "passed"),
        (1, True, "passed"),
        (2, True, "passed"),
    ]


def test_each_item_is_judged_by_its_own_tests_and_the_reason_is_kept(config):
    lm = Scripted({DOCS[0]["prompt"]: "    return x + 2\n", DOCS[2]["prompt"]: "passed"})
    first, third = score(lm, config, [0, 2])
    assert not first.correct
    assert first.answer == "tests failed: AssertionError at 'assert add_three(1) == 4'"
    assert not third.correct
    assert third.output == "passed"
    assert third.answer.startswith("program failed: NameError")


def test_no_worked_body_would_be_cut_by_the_stops(config):
    for stop in config["generation_kwargs"]["until"]:
        for doc in DOCS:
            assert stop not in doc["worked"]
