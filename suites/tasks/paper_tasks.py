"""The paper's tasks, as lm-eval defines them: where their definitions lie, how many items, which local files hold them.

Prompts, shots, stops and filters are those of lm-eval's own files; `suites.scoring.lm_eval` reads them. Data come from
the hub, or from a folder in the layout of the public files:

    gsm8k/test.jsonl, gsm8k/train.jsonl (or train_head64.jsonl: then other shots than the hub's are drawn)
    humaneval/HumanEval.jsonl (or .jsonl.gz)
    bbh/<name>.json, each {"examples": [{"input": ..., "target": ...}, ...]}

No lm-eval and no torch here: plans are made from this.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mobile.errors import Refused
from suites.tasks import FOLDER, GENERATORS

SHIPPED = 250  # test items in each generated task's data
GSM8K_URL = "https://github.com/openai/grade-school-math"
HUMANEVAL_URL = "https://github.com/openai/human-eval"
BBH_URL = "https://github.com/suzgunmirac/BIG-Bench-Hard"
FEWER = {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}  # all other BBH tasks have 250 items
BBH = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
).split()


@dataclass(frozen=True)
class RealTask:
    """`definition` is a path in lm-eval's folder of tasks; `files` names, by split, the files that may hold it.

    `code`: its items are judged by running what the model wrote. `plain`: the shipped task of that name is asked
    instead, so that a model trained on generated items meets the public ones in the form it knows.
    """

    definition: str
    items: int
    hub: str
    url: str
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    code: bool = False
    plain: str | None = None


def _bbh(name: str, plain: str | None = None) -> RealTask:
    return RealTask(
        definition=f"bbh/cot_fewshot/{name}.yaml",
        items=FEWER.get(name, 250),
        hub="SaylorTwift/bbh",
        url=BBH_URL,
        files={"test": (f"bbh/{name}.json",)},
        plain=plain,
    )


REAL: dict[str, RealTask] = {
    "gsm8k": RealTask(
        definition="gsm8k/gsm8k.yaml",
        items=1319,
        hub="openai/gsm8k",
        url=GSM8K_URL,
        files={"test": ("gsm8k/test.jsonl",), "train": ("gsm8k/train.jsonl", "gsm8k/train_head64.jsonl")},
    ),
    "gsm8k_cot": RealTask(
        definition="gsm8k/gsm8k-cot.yaml",
        items=1319,
        hub="openai/gsm8k",
        url=GSM8K_URL,
        files={"test": ("gsm8k/test.jsonl",)},
    ),
    "humaneval": RealTask(
        definition="humaneval/humaneval.yaml",
        items=164,
        hub="openai/openai_humaneval",
        url=HUMANEVAL_URL,
        files={"test": ("humaneval/HumanEval.jsonl", "humaneval/HumanEval.jsonl.gz")},
        code=True,
    ),
    **{f"bbh_cot_fewshot_{name}": _bbh(name) for name in BBH},
    **{f"bbh_plain_{name}": _bbh(name, plain=name) for name in BBH if name in GENERATORS},
}
GROUPS = {
    "bbh": tuple(f"bbh_cot_fewshot_{name}" for name in BBH),
    "bbh_plain": tuple(name for name in REAL if name.startswith("bbh_plain_")),
}


def expand(names: list[str]) -> dict[str, str]:
    """Task by task, the name it was asked for by: groups are taken apart. Raises Refused for an unknown name."""
    found: dict[str, str] = {}
    for name in names:
        if name not in GENERATORS and name not in REAL and name not in GROUPS:
            known = ", ".join([*GENERATORS, *GROUPS, *(task for task in REAL if not task.startswith("bbh_"))])
            raise Refused(f"Unknown task {name!r}; choose among: {known}.")
        found |= dict.fromkeys(GROUPS.get(name, (name,)), name)
    return found


def locate(task: str, folder: Path | None) -> dict[str, Path]:
    """By split, the local files of a task: shipped ones, or a real task's in `folder`; none if that is the hub's.

    Raises Refused naming what was looked for and where to get it.
    """
    if task in GENERATORS:
        return {"test": FOLDER / "data" / f"{task}.jsonl"}
    if folder is None:
        return {}
    real = REAL[task]
    found = {}
    for split, names in real.files.items():
        there = [folder / name for name in names if (folder / name).is_file()]
        if not there:
            raise Refused(
                f"Task {task} needs {' or '.join(names)} in {folder}, and it is not there; get it from {real.url}, "
                "or leave --data-dir out to take the task from the hub."
            )
        found[split] = there[0].absolute()
    return found


def items_of(task: str, folder: Path | None) -> int:
    """How many test items a task has: counted where the file is here, else as published."""
    if task in GENERATORS:
        return SHIPPED
    files = locate(task, folder)
    return len(read(files["test"])) if files else REAL[task].items


def shipped(task: str) -> list[dict]:
    """The items of a generated task, in order."""
    return read(locate(task, None)["test"])


@cache
def read(path: Path) -> list[dict]:
    """The items of a .json (under "examples"), .jsonl or .jsonl.gz file. Raises Refused for any other content."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        if path.suffix == ".json":
            return list(json.loads(text)["examples"])
        return [json.loads(line) for line in text.splitlines() if line]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is not a task's file ({type(error).__name__}: {error}); copy it again.") from error


def sources(task: str, folder: Path | None) -> dict[str, str]:
    """Where the items come from: by split, the file's name and SHA-256; or the hub's repository."""
    files = locate(task, folder)
    if not files:
        return {"hub": REAL[task].hub}
    return {split: f"{path.name} sha256:{_sha256(path)}" for split, path in files.items()}


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remarks(tasks: list[str], folder: Path | None) -> list[str]:
    """What a reader of the plan must know of the data, a sentence each."""
    said = []
    for task in tasks:
        files = locate(task, folder) if task in REAL else {}
        if files.get("train", Path()).name.startswith("train_head"):
            said.append(f"{task}: shots are drawn from {files['train'].name}, so they differ from those of the hub")
    return said
