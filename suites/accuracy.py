"""Accuracy through lm-eval, on the engine that is timed: the only module that imports lm_eval."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerBase

from mobile.trace import Request
from suites.tasks import FOLDER


@dataclass(frozen=True)
class Answer:
    """One scored item: its number in the task's data, the prompt's hash, the text and its score."""

    doc: int
    prompt_sha256: str
    output: str
    answer: str | None
    correct: bool


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class EngineLM(LM):
    """lm-eval's view of an attached model: generation only, in batches, each row's routing recorded.

    Log-likelihood requests are one prefill each; no strategy acts there, so they are refused.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__()
        self.model, self.hf_tokenizer, self._batch_size = model, tokenizer, batch_size
        self.traces: dict[str, Request] = {}  # by the prompt's SHA-256, as is what was written
        self.written: dict[str, list[int]] = {}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [request.args[0] for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        outputs = [""] * len(prompts)
        for start in range(0, len(order), self._batch_size):
            chunk = order[start : start + self._batch_size]
            with self.model.mobile.recording(ahead=True) as recorded:
                answered = generate(self.model, self.hf_tokenizer, [prompts[i] for i in chunk], requests[0].args[1])
            for i, (text, ids), request in zip(chunk, answered, recorded, strict=True):
                outputs[i] = text
                self.traces[sha256(prompts[i])] = first_tokens(request, len(ids))
                self.written[sha256(prompts[i])] = ids
        return outputs

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("log-likelihood tasks are all prefill; use a generate_until task")

    loglikelihood_rolling = loglikelihood


@torch.inference_mode()
def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], options: dict[str, Any]
) -> list[tuple[str, list[int]]]:
    """Greedy continuations of a batch, cut at the first of the `until` strings, and the tokens each took."""
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    tokens = model.generate(
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"],
        max_new_tokens=options["max_gen_toks"], do_sample=False,
        stop_strings=options["until"], tokenizer=tokenizer,
    )  # fmt: skip
    written = tokens[:, encoded["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    for stop in options["until"]:
        texts = [text.split(stop)[0] for text in texts]
    return [(text, ids[ids != tokenizer.pad_token_id].tolist()) for text, ids in zip(texts, written, strict=True)]


def first_tokens(request: Request, tokens: int) -> Request:
    """The steps that wrote the first `tokens` tokens: prefill writes one, each decode token another.

    In a batch a finished row runs on until the others are done; those steps are nobody's.
    """
    written = 1
    for number, step in enumerate(request):
        if step.kind in ("full", "little"):
            written += 1
            if written > tokens:
                return request[:number]
    return request


def task_config(task: str) -> dict[str, Any]:
    """The task's YAML with its data files made absolute (lm-eval would read them from the current folder)."""
    config = load_yaml(FOLDER / f"{task}.yaml")
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(FOLDER / name) for split, name in files.items()}
    return config


def evaluate(lm: EngineLM, task: str, docs: list[int]) -> list[Answer]:
    """Score the given items of a task; in the order of `docs`."""
    return score(lm, task_config(task), docs)


def score(lm: EngineLM, config: dict[str, Any], docs: list[int]) -> list[Answer]:
    """Score the given items of a configured task by the first of its filters; in the order of `docs`."""
    task, first = config["task"], config["filter_list"][0]["name"]
    result = simple_evaluate(
        lm, tasks=[config], task_manager=TaskManager(include_defaults=False, include_path=str(FOLDER)),
        samples={task: docs}, bootstrap_iters=0, log_samples=True, verbosity="ERROR",
    )  # fmt: skip
    answers = {}
    for sample in result["samples"][task]:
        if sample["filter"] != first:
            continue
        found = sample["filtered_resps"][0]
        answers[sample["doc_id"]] = Answer(
            doc=int(sample["doc_id"]),
            prompt_sha256=sha256(sample["arguments"][0][0]),
            output=sample["resps"][0][0],
            answer=None if found == "[invalid]" else str(found),
            correct=bool(sample["exact_match"]),
        )
    return [answers[doc] for doc in docs]


def prompts_of(task: str, docs: list[int]) -> list[str]:
    """The prompts of the given items, read from the task's data."""
    lines = Path(task_config(task)["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    return [json.loads(lines[doc])["prompt"] for doc in docs]
