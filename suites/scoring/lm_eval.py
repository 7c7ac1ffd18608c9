"""Accuracy through lm-eval, on the engine that is timed: the only module that imports lm_eval."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
from lm_eval import evaluate as lm_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from mobile.replay.trace import Request
from suites.scoring.agreement import BothPasses, fallback_steps
from suites.scoring.batched import Batch
from suites.scoring.judging import by_check
from suites.scoring.sandbox.tester import PASSED
from suites.tasks.catalogue import PUBLISHED
from suites.tasks.files import FOLDER, locate

DEFAULT_TOKENS = 256  # what lm-eval's own model class writes at most where a task sets no limit
FEWSHOT_SEED = 1234  # lm-eval's default
LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent


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
    """lm-eval's view of an attached model: generation only, in batches; if `traced`, each row's routing is recorded.

    Log-likelihood requests are one prefill each; no strategy acts there, so they are refused.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, traced: bool = True) -> None:
        super().__init__()
        self.traced = traced
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model, self.hf_tokenizer, self._batch_size = model, tokenizer, batch_size
        # By the prompt's SHA-256: the prompt, its routing, the ids of what was written, and by fallback whether the
        # little pass would have written the same token.
        self.prompts: dict[str, str] = {}
        self.traces: dict[str, Request] = {}
        self.written: dict[str, list[int]] = {}
        self.agreed: dict[str, list[bool]] = {}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [request.args[0] for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        outputs = [""] * len(prompts)
        for start in range(0, len(order), self._batch_size):
            chunk = order[start : start + self._batch_size]
            batch = Batch(self.model.mobile.recorder)
            answered, recorded, agreed = self._answer([prompts[i] for i in chunk], requests[0].args[1], batch)
            for i, (text, ids) in zip(chunk, answered, strict=True):
                outputs[i], name = text, sha256(prompts[i])
                self.prompts[name], self.written[name] = prompts[i], ids
            for i, (_, ids), request, alike in zip(chunk, answered, recorded, agreed, strict=self.traced):
                name = sha256(prompts[i])
                self.traces[name] = first_tokens(request, len(ids))
                self.agreed[name] = alike[: len(fallback_steps(self.traces[name]))]
        return outputs

    def _answer(
        self, prompts: list[str], options: dict[str, Any], batch: Batch
    ) -> tuple[list[tuple[str, list[int]]], list[Request], list[list[bool]]]:
        """Return the answers to a batch, and by row its routing and whether both passes agreed; untraced no rows."""
        if not self.traced:
            return generate(self.model, self.hf_tokenizer, prompts, options, batch=batch), [], []
        engine, both = self.model.mobile, BothPasses(batch)
        with engine.recording(ahead=True) as recorded, engine.comparing(both):
            answered = generate(self.model, self.hf_tokenizer, prompts, options, batch=batch)
        return answered, recorded, both.by_row(recorded)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("log-likelihood tasks are all prefill; use a generate_until task")

    loglikelihood_rolling = loglikelihood


class Written(LM):
    """lm-eval's view of texts that are there already, by prompt."""

    def __init__(self, texts: dict[str, str]) -> None:
        super().__init__()
        self.texts = texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.texts[request.args[0]] for request in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("only texts are there")

    loglikelihood_rolling = loglikelihood


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    options: dict[str, Any],
    streamer: Any = None,
    batch: Batch | None = None,
) -> list[tuple[str, list[int]]]:
    """Return greedy continuations of a batch, cut at the first of the `until` strings, and the ids that were written.

    As with lm-eval's own model class, a prompt that leaves no room for `max_gen_toks` loses its beginning. Only a model
    with fewer than twice as many positions, to which that class says no, writes half of its positions at most. With
    `batch` rows that have ended leave it, and no `streamer` is called.
    """
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = min(options["max_gen_toks"], positions // 2) if positions else options["max_gen_toks"]
    room = most - positions if positions else None
    prompt_ids, mask = encoded["input_ids"][:, room:], encoded["attention_mask"][:, room:]
    ending: dict[str, Any] = {"stop_strings": options["until"], "tokenizer": tokenizer, "streamer": streamer}
    if batch is not None:  # Transformers gives such a loop no tokenizer, so that its stop strings are made here
        criteria = [StopStringCriteria(tokenizer, options["until"])] if options["until"] else []
        ending = {"custom_generate": batch, "stopping_criteria": StoppingCriteriaList(criteria)}
    tokens = model.generate(
        input_ids=prompt_ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        **ending,
    )
    written = tokens[:, prompt_ids.shape[1] :].tolist() if batch is None else batch.ids
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    for stop in options["until"]:
        texts = [text.split(stop)[0] for text in texts]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ids = written if batch is not None else [_without_padding(row, tokenizer.pad_token_id, ends) for row in written]
    return list(zip(texts, ids, strict=True))


def _without_padding(row: list[int], pad: int | None, ends: list[int | None]) -> list[int]:
    """Return a row of a batch without its padding: up to its first end token, which padding may look like."""
    for number, token in enumerate(row):
        if token in ends:
            return row[: number + 1]
        if token == pad:
            return row[:number]
    return row


def first_tokens(request: Request, tokens: int) -> Request:
    """Return the steps that wrote the first `tokens` tokens: prefill writes one, each decode token another.

    In a batch a finished row runs on until the others are done; those steps are left out.
    """
    written = 1
    for number, step in enumerate(request):
        if step.kind in ("full", "little"):
            written += 1
            if written > tokens:
                return request[:number]
    return request


def task_config(task: str, folder: Path | None = None) -> dict[str, Any]:
    """Return a task as lm-eval is to run it: its definition, with the data files of `folder` (None: the hub's).

    Paths are absolute (lm-eval would read relative ones from the current folder). Raise Refused for missing files.
    """
    published = PUBLISHED.get(task)
    if published is None:
        return _with_files(load_yaml(FOLDER / f"{task}.yaml"), locate(task, None))
    if published.asked_as is None:
        config = load_yaml(LM_EVAL_TASKS / published.definition, resolve_func=False)
    else:
        asked = {"doc_to_text": "Q: {{input}}\nA:", "doc_to_target": "{{target}}", "dataset_kwargs": {}}
        config = {**load_yaml(FOLDER / f"{published.asked_as}.yaml"), **asked}
        config |= {"dataset_path": published.hub, "dataset_name": published.asked_as}
    config |= {"task": task, "generation_kwargs": {"max_gen_toks": DEFAULT_TOKENS, **config["generation_kwargs"]}}
    if published.runs_code:
        config |= _JUDGED
        del config["unsafe_code"]  # lm-eval's own scorer fetches code from the hub and runs it unconfined
    return _with_files(config, locate(task, folder))


_JUDGED: dict[str, Any] = {
    "doc_to_target": PASSED,
    "filter_list": [
        {"name": "verdict", "filter": [{"function": "custom", "filter_fn": by_check}, {"function": "take_first"}]}
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def _with_files(config: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    if not files:
        return config
    kwargs: dict[str, Any] = {"data_files": {split: str(path) for split, path in files.items()}}
    if files["test"].suffix == ".json":
        kwargs["field"] = "examples"
    config.pop("dataset_name", None)
    return {**config, "dataset_path": "json", "dataset_kwargs": kwargs}


def evaluate(lm: EngineLM, task: str, docs: list[int], folder: Path | None = None) -> list[Answer]:
    """Score the given items of a task, in the order of `docs`."""
    return score(lm, task_config(task, folder), docs)


def score(lm: LM, config: dict[str, Any], docs: list[int]) -> list[Answer]:
    """Score the given items of a configured task by the first of its filters; in the order of `docs`.

    This is lm-eval's simple_evaluate without the 0.6 s in which it asks the machine about itself.
    """
    name, first = config["task"], config["filter_list"][0]["name"]
    loaded = TaskManager(include_defaults=False, include_path=str(FOLDER)).load([config])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    result = lm_evaluate(lm, loaded, samples={name: docs}, bootstrap_iters=0, log_samples=True)
    answers = {}
    for sample in result["samples"][name]:
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
