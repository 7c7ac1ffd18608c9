"""The paper's tasks: asked as lm-eval asks them, from local files; refused in a sentence where a file is missing.

Real files are looked for in the folder that MOBILE_TASK_DATA names, and tests of them are skipped without it. Those of
BIG-Bench-Hard are stood in for by a few items of our own in the public files' layout.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from mobile.errors import Refused
from suites.identity import Model, task_hash
from suites.plan.cells import Cell, Generation
from suites.scoring.lm_eval import LM_EVAL_TASKS, score, task_config
from suites.tasks.catalogue import BBH, GROUPS, PUBLISHED, expand
from suites.tasks.files import items_of, locate, read, remarks, sources

FOLDER = Path(os.environ.get("MOBILE_TASK_DATA", "/nowhere"))
real_data = pytest.mark.skipif(
    not (FOLDER / "gsm8k/test.jsonl").is_file(), reason="MOBILE_TASK_DATA names no folder with GSM8K and HumanEval"
)
PUBLIC_BBH = {
    "boolean_expressions": [("not ( True ) and ( True ) is", "False"), ("True or not False is", "True")],
    "object_counting": [("I have a cat, two dogs, and a plum. How many animals do I have?", "3")],
    "web_of_lies": [("Question: Ada lies. Bo says Ada lies. Does Bo tell the truth?", "Yes")],
}


class Scripted(LM):
    """Keeps what it was asked and answers every prompt with what `answer` makes of it."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def bbh(tmp_path: Path) -> Path:
    (tmp_path / "bbh").mkdir()
    for name, items in PUBLIC_BBH.items():
        examples = [{"input": asked, "target": answer} for asked, answer in items]
        (tmp_path / f"bbh/{name}.json").write_text(json.dumps({"canary": "none", "examples": examples}))
    return tmp_path


def asked_by_lm_eval(task: str, files: dict[str, Path], folder: Path, docs: list[int]) -> list[str]:
    """The prompts of lm-eval's own definition for these items, included in a file as its documentation says."""
    definition = LM_EVAL_TASKS / PUBLISHED[task].definition
    name = yaml.load(definition.read_text(), yaml.BaseLoader)["task"]
    kwargs = {"data_files": {split: str(path) for split, path in files.items()}}
    if files["test"].suffix == ".json":
        kwargs["field"] = "examples"
    own = {"include": str(definition), "task": f"own_{name}", "dataset_path": "json", "dataset_name": None}
    (folder / "own.yaml").write_text(yaml.safe_dump({**own, "dataset_kwargs": kwargs}))
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    built = manager.load([f"own_{name}"])["tasks"][f"own_{name}"]
    built.set_fewshot_seed(seed=1234)
    built.build_all_requests(samples=docs)
    return [instance.args for instance in built.instances]


# --- the same work as lm-eval's own ----------------------------------------------------------------------


@real_data
@pytest.mark.parametrize("task", ["gsm8k", "gsm8k_cot"])
def test_gsm8k_is_asked_as_lm_eval_asks_it(task, tmp_path):
    lm, docs = Scripted(lambda prompt: " #### 18"), [0, 1, 17]
    answers = score(lm, task_config(task, FOLDER), docs)
    theirs = asked_by_lm_eval(task, locate(task, FOLDER), tmp_path, docs)
    assert [prompt for prompt, _ in lm.asked] == [prompt for prompt, _ in theirs]
    for (_, ours), (_, own) in zip(lm.asked, theirs, strict=True):
        assert ours == {"max_gen_toks": 256, **own}, "lm-eval's own model class writes 256 tokens where none are named"
    assert [answer.doc for answer in answers] == docs
    assert len(lm.asked) == len(docs)


@real_data
def test_gsm8k_has_five_shots_of_the_training_file_and_strict_match_scores_it(tmp_path):
    lm = Scripted(lambda prompt: " She has 16 - 3 - 4 = 9 eggs.\n#### 18")
    first, second = score(lm, task_config("gsm8k", FOLDER), [0, 1])
    trained = {item["question"] for item in read(locate("gsm8k", FOLDER)["train"])}
    shots = [part.split("\nAnswer:")[0] for part in lm.asked[0][0].split("Question: ")[1:]]
    assert len(shots) == 6
    assert set(shots[:5]) <= trained
    assert shots[5] == read(FOLDER / "gsm8k/test.jsonl")[0]["question"]
    assert (first.answer, first.correct) == ("18", True)
    assert (second.answer, second.correct) == ("18", False)


@real_data
def test_humaneval_is_its_own_prompt_and_its_own_tests():
    docs = [0, 5, 163]
    items = read(locate("humaneval", FOLDER)["test"])
    solutions = {item["prompt"]: item["canonical_solution"] for item in items}
    lm = Scripted(lambda prompt: solutions[prompt])
    config = task_config("humaneval", FOLDER)
    answers = score(lm, config, docs)
    definition = yaml.load((LM_EVAL_TASKS / "humaneval/humaneval.yaml").read_text(), yaml.BaseLoader)
    assert [prompt for prompt, _ in lm.asked] == [items[doc]["prompt"] for doc in docs]
    assert config["generation_kwargs"]["until"] == definition["generation_kwargs"]["until"]
    assert config["generation_kwargs"]["max_gen_toks"] == 1024
    assert all(answer.correct for answer in answers)
    assert not any(answer.correct for answer in score(Scripted(lambda prompt: "    pass\n"), config, docs))


@real_data
def test_every_solution_of_humaneval_passes_its_tests_in_the_sandbox():
    items = read(locate("humaneval", FOLDER)["test"])
    solutions = {item["prompt"]: item["canonical_solution"] for item in items}
    answers = score(Scripted(lambda prompt: solutions[prompt]), task_config("humaneval", FOLDER), list(range(164)))
    assert [answer.answer for answer in answers] == ["passed"] * 164


@pytest.mark.parametrize("name", PUBLIC_BBH)
def test_bbh_is_asked_as_lm_eval_asks_it(name, bbh, tmp_path):
    task = f"bbh_cot_fewshot_{name}"
    [(_, answer), *_] = PUBLIC_BBH[name]
    lm = Scripted(lambda prompt: f"We count. So the answer is {answer}.")
    [scored] = score(lm, task_config(task, bbh), [0])
    [(prompt, options)] = asked_by_lm_eval(task, locate(task, bbh), tmp_path, [0])
    assert lm.asked == [(prompt, options)]
    assert prompt.count("Let's think step by step.") == 4, "three shots and the question"
    assert (scored.answer, scored.correct) == (answer, True)


@pytest.mark.parametrize("name", PUBLIC_BBH)
def test_public_bbh_items_in_the_shipped_tasks_format(name, bbh):
    """Asked and scored like the generated task of that name."""
    lm = Scripted(lambda prompt: f" One, two. So the answer is {PUBLIC_BBH[name][0][1]}.")
    config = task_config(f"bbh_plain_{name}", bbh)
    [answer] = score(lm, config, [0])
    assert [prompt for prompt, _ in lm.asked] == [f"Q: {PUBLIC_BBH[name][0][0]}\nA:"]
    assert answer.correct
    ours = task_config(name)
    assert config["filter_list"] == ours["filter_list"]
    assert config["generation_kwargs"] == ours["generation_kwargs"]
    shipped = json.loads((locate(name, None)["test"]).read_text().splitlines()[0])["prompt"]
    assert shipped.startswith("Q: ")
    assert shipped.endswith("\nA:")


def test_without_local_files_the_hub_is_asked_for_what_lm_eval_asks_it_for():
    for task, real in PUBLISHED.items():
        config = task_config(task)
        definition = (LM_EVAL_TASKS / real.definition).read_text()
        assert config["dataset_path"] == real.hub
        assert (
            real.hub in definition
            or real.hub in (LM_EVAL_TASKS / "bbh/cot_fewshot/_cot_fewshot_template_yaml").read_text()
        )
        assert "unsafe_code" not in config


# --- files ---------------------------------------------------------------------------------------------


def test_groups_are_taken_apart():
    assert expand(["bbh", "gsm8k"]) == {**dict.fromkeys(GROUPS["bbh"], "bbh"), "gsm8k": "gsm8k"}
    assert len(BBH) == 27
    assert {(LM_EVAL_TASKS / PUBLISHED[task].definition).is_file() for task in GROUPS["bbh"]} == {True}
    assert sum(items_of(task, None) for task in GROUPS["bbh"]) == 6511
    with pytest.raises(Refused, match="Unknown task 'gsm9k'; choose among: arithmetic"):
        expand(["gsm9k"])


@pytest.mark.parametrize(
    ("task", "lacks"),
    [
        ("gsm8k", r"gsm8k/test.jsonl in .*; get it from https://github.com/openai/grade-school-math, or leave"),
        ("humaneval", r"humaneval/HumanEval.jsonl or humaneval/HumanEval.jsonl.gz in "),
        ("bbh_cot_fewshot_navigate", r"bbh/navigate.json in "),
    ],
)
def test_a_missing_file_is_named_with_where_to_get_it(task, lacks, tmp_path):
    with pytest.raises(Refused, match=lacks):
        task_config(task, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"examples": 3}', "not json", "\x00\xff"])
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/navigate.json").write_text(content)
    with pytest.raises(Refused, match=r"navigate.json is not a task's file"):
        items_of("bbh_cot_fewshot_navigate", tmp_path)


def test_a_cut_gzip_file_is_refused(tmp_path):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "def f"}\n' * 50)[:-9])
    with pytest.raises(Refused, match="is not a task's file"):
        items_of("humaneval", tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[]", "item 1 is no object"),
        ("1", "item 1 is no object"),
        ('{"prompt": "def f", "entry_point": "f"}', "item 1 has no text called test"),
        ('{"prompt": "def f", "entry_point": ["f"], "test": ""}', "item 1 has no text called entry_point"),
        ('{"prompt": 1, "entry_point": "f", "test": ""}', "item 1 has no text called prompt"),
        ("[" * 100_000, "line 1 is nested too deep"),
        ('{"prompt": NaN}', "line 1 holds the number NaN"),
        ('{"prompt": "\\ud800"}', "line 1 holds half of a surrogate pair"),
        ("", "it holds no list of items"),
    ],
)
def test_an_item_that_is_none_is_refused(line, says, tmp_path):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl").write_text(f"{line}\n")
    with pytest.raises(Refused) as refused:
        items_of("humaneval", tmp_path)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_or_unpacks_to_too_much_is_refused_before_it_takes_the_memory(tmp_path):
    for folder in ("humaneval", "gsm8k"):
        (tmp_path / folder).mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl.gz").write_bytes(gzip.compress(b" " * (2**26 + 1), compresslevel=1))
    with pytest.raises(Refused, match="it unpacks to more than"):
        items_of("humaneval", tmp_path)
    (tmp_path / "gsm8k/train.jsonl").write_text('{"question": "How?", "answer": "#### 1"}\n')
    with (tmp_path / "gsm8k/test.jsonl").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(Refused, match=r"test.jsonl has .* bytes; more than"):
        items_of("gsm8k", tmp_path)


def test_the_items_that_shots_are_drawn_from_are_held_too(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text('{"question": "How?", "answer": "#### 1"}\n')
    (tmp_path / "gsm8k/train.jsonl").write_text('{"question": "How?"}\n')
    with pytest.raises(Refused, match=r"train.jsonl is not a task's file \(item 1 has no text called answer"):
        items_of("gsm8k", tmp_path)


def test_a_line_ends_where_json_lines_do(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for name in ("test", "train"):
        (tmp_path / f"gsm8k/{name}.jsonl").write_text(
            '{"question": "How\u2028 many\x85?", "answer": "1"}\r\n\r\n', encoding="utf-8", newline=""
        )
    assert items_of("gsm8k", tmp_path) == 1


def test_what_a_result_depends_on_is_what_is_in_the_files_and_not_where_they_lie(bbh, tmp_path_factory):
    model = Model(name="olmoe-tiny", path="models/olmoe-tiny", geometry="olmoe-1b-7b", weights="shipped-tiny")
    copied = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(bbh / "bbh", copied / "bbh")
    task = "bbh_plain_boolean_expressions"
    here, there = (Generation(model, task, "mobile", 0.7, 2, 0, data=str(folder)) for folder in (bbh, copied))
    assert here.id == there.id
    assert here.docs == [0, 1]
    assert sources(task, bbh) == sources(task, copied)
    assert sources(task, bbh)["test"].startswith("boolean_expressions.json sha256:")
    before = task_hash(task, copied)
    path = copied / "bbh/boolean_expressions.json"
    path.write_text(path.read_text().replace("True or", "False or"))
    task_hash.cache_clear()
    assert task_hash(task, copied) != before
    assert sources(task, None) == {"hub": "SaylorTwift/bbh"}


def test_a_part_that_is_timed_is_drawn_and_is_what_other_small_cells_were_asked():
    model = Model(name="olmoe-tiny", path="models/olmoe-tiny", geometry="olmoe-1b-7b", weights="shipped-tiny")
    asked = Generation(model, "arithmetic", "resident", None, 200, 0)
    timed = Cell(asked, "lru", None, "rtx4080-pcie4", "smallest", timed=40).docs
    assert len(timed) == 40
    assert timed == sorted(timed) != asked.docs[:40]
    assert set(timed) < set(replace(asked, items=80).docs) < set(asked.docs)
    assert set(replace(asked, items=32).docs) < set(timed)
    assert timed != Cell(replace(asked, seed=1), "lru", None, "rtx4080-pcie4", "smallest", timed=40).docs
    few = replace(asked, items=10)
    assert Cell(few, "lru", None, "rtx4080-pcie4", "smallest", timed=40).docs == few.docs
    assert Cell(few, "lru", None, "rtx4080-pcie4", "smallest").docs == few.docs


def test_other_shots_than_the_hubs_are_said(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for name in ("test", "train_head64"):
        (tmp_path / f"gsm8k/{name}.jsonl").write_text('{"question": "How?", "answer": "#### 1"}\n')
    assert remarks(["gsm8k", "arithmetic"], tmp_path) == [
        "gsm8k: shots are drawn from train_head64.jsonl, so they differ from those of the hub"
    ]
    (tmp_path / "gsm8k/train.jsonl").write_text('{"question": "How?", "answer": "#### 1"}\n')
    assert remarks(["gsm8k"], tmp_path) == []
    assert sources("gsm8k", tmp_path)["train"].startswith("train.jsonl sha256:")
