"""Measurements for AdapMoE: the sensitivity of a model's loss to each layer, and how often a guess is right.

Sensitivity (Zhong et al., arXiv 2408.10284): the trace of the empirical Fisher information of a layer's output,

    w_l = mean over tokens of |dL / dy_l|^2,

y_l (H,) being what the layer's routed experts give a token and L the negative log likelihood of its sequence's tokens,
each given those before it, with all K experts. Ours: the w_l are divided by their geometric mean, so that the paper's
T = 0.005 means the same for models whose gradients have another scale; the two that it gives for Mixtral (46.7 for the
first layer, 0.02 for the last) have a geometric mean of 0.97. Accuracy: the share of a layer's experts that are among
the top-k of its router on the previous layer's input, over decode steps; 0 for the first layer, which is never
guessed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mobile import outputs
from mobile.cli.terminal import prompts
from mobile.errors import Refused
from mobile.policies import top_experts
from mobile.replay.trace import Request
from mobile.replay.trace import load as load_trace

FORMAT = "mobile-adapmoe-1"
LONGEST = 512  # tokens of a text that are used
SHOWN = 0.005  # the tolerance at which `fit` prints thresholds


@dataclass(frozen=True)
class Measured:
    """A model's measurements: by MoE layer, sensitivity (geometric mean 1) and accuracy of guesses (None: not taken).

    `raw` are the Fisher traces before they were divided, over `tokens` of `texts`, which took `seconds`.
    """

    model: str
    sensitivities: tuple[float, ...]
    accuracy: tuple[float, ...] | None
    raw: tuple[float, ...]
    texts: int
    tokens: int
    seconds: float

    def save(self, path: Path) -> None:
        """Write it as JSON. Raise Refused where it cannot be written."""
        with outputs.open_atomic(path) as file:
            file.write(f"{json.dumps({'format': FORMAT, **asdict(self)}, indent=1)}\n".encode())

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read a file that `save` wrote. Raise Refused for any other file."""
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            read = cls(**data)
            read = replace(
                read,
                sensitivities=tuple(read.sensitivities),
                raw=tuple(read.raw),
                accuracy=None if read.accuracy is None else tuple(read.accuracy),
            )
            if not read.sensitivities or not all(value > 0 for value in read.sensitivities):
                raise ValueError("a sensitivity is not positive")
            if read.accuracy is not None and len(read.accuracy) != len(read.sensitivities):
                raise ValueError("layers differ")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(
                f"{path} is not a complete {FORMAT} file; measure one with: "
                f"python -m baselines.adapmoe fit --model FOLDER --prompts FILE --out {path}"
            ) from error
        return read


def fisher_traces(model: Any, sequences: Iterable[Any]) -> tuple[list[float], int]:
    """Return, by MoE layer, the mean of |dL / dy_l|^2 over the tokens of `sequences`, and the number of tokens.

    `sequences` are token ids, (1, length) each; those of one token are left out. The model's weights and gradients are
    not changed. Raise Refused if no sequence is longer.
    """
    import torch

    from mobile.live_model.compat import moe_layers

    layers = moe_layers(model)
    totals, tokens = [0.0] * len(layers), 0

    def hook_of(number: int) -> Any:
        def add_slopes(_module: Any, _args: Any, output: Any) -> None:
            def add(slope: Any) -> None:
                totals[number] += float(slope.double().square().sum())

            output.register_hook(add)

        return add_slopes

    hooks = [layer.experts.register_forward_hook(hook_of(number)) for number, layer in enumerate(layers)]
    needed = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        for weight, _ in needed:
            weight.requires_grad_(False)
        for ids in (ids for ids in sequences if ids.shape[1] > 1):
            with torch.enable_grad():
                embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
                logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
                torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
            tokens += ids.shape[1]
    finally:
        for hook in hooks:
            hook.remove()
        for weight, wanted in needed:
            weight.requires_grad_(wanted)
    if not tokens:
        raise Refused("No text has two tokens, so there is no loss to feel anything; give longer prompts.")
    return [total / tokens for total in totals], tokens


def relative(raw: Sequence[float]) -> list[float]:
    """Return the values divided by their geometric mean. Raise Refused if one is not positive."""
    if not all(value > 0 for value in raw):
        raise Refused("A layer's output does not touch the loss at all, so its sensitivity has no logarithm.")
    mean = exp(sum(map(log, raw)) / len(raw))
    return [value / mean for value in raw]


def guess_accuracy(requests: Iterable[Request]) -> list[float] | None:
    """Return, by recorded layer, the share of its experts that its router guesses from the previous layer's input.

    Over the full-K decode steps that carry next-layer logits, with as many guesses as experts chosen; None if there is
    no such step.
    """
    right: np.ndarray | None = None
    needed = np.zeros(0)
    for step in (step for request in requests for step in request if step.kind == "full" and step.ahead is not None):
        if right is None:
            right, needed = np.zeros(len(step.experts)), np.zeros(len(step.experts))
        guesses = top_experts(np.asarray(step.ahead, dtype=np.float32), max(map(len, step.experts)))
        for layer, (guessed, chosen) in enumerate(zip(guesses, step.experts[1:], strict=True), start=1):
            right[layer] += len(set(guessed[: len(chosen)]).intersection(chosen))
            needed[layer] += len(chosen)
    return None if right is None else (right / np.maximum(needed, 1)).tolist()


def measure(folder: str, texts: Sequence[str], traces: Sequence[Path] = ()) -> Measured:
    """Measure a checkpoint on calibration texts, in float32, and its guesses on traces of it if there are any.

    Raise Refused for traces that are of another model or carry no router logits.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mobile.checkpoints.examine import download

    where = download(folder)
    model = AutoModelForCausalLM.from_pretrained(where, dtype="float32", use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(where)
    begun = time.process_time()
    encoded = (tokenizer(text, return_tensors="pt").input_ids[:, :LONGEST] for text in texts)
    raw, tokens = fisher_traces(model, encoded)
    seconds = time.process_time() - begun
    accuracy = guess_accuracy(request for path in traces for request in load_trace(path)[0])
    if traces and accuracy is None:
        raise Refused("No full-K decode step of these traces carries router logits; record them with `mobile trace`.")
    if accuracy is not None and len(accuracy) != len(raw):
        raise Refused(f"The traces are of {len(accuracy)} MoE layers and the model has {len(raw)}; record its own.")
    sure = None if accuracy is None else tuple(accuracy)
    return Measured(str(folder), tuple(relative(raw)), sure, tuple(raw), len(texts), tokens, seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `fit --model FOLDER --prompts FILE --out FILE`: measure, write, and print the thresholds that follow."""
    parser = argparse.ArgumentParser(prog="python -m baselines.adapmoe")
    fit = parser.add_subparsers(required=True).add_parser("fit", help="measure AdapMoE's layer sensitivities")
    fit.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint, run in float32 on the CPU")
    fit.add_argument(
        "--prompts", required=True, type=Path, metavar="FILE", help='calibration texts: lines, or "prompt"s'
    )
    fit.add_argument("--trace", type=Path, nargs="+", default=[], help="of the model: measures its guesses too")
    fit.add_argument("--out", required=True, type=Path, metavar="FILE", help="the JSON to write")
    given = parser.parse_args(arguments)
    try:
        outputs.check_file(given.out)
        found = measure(given.model, prompts.of_file(str(given.prompts)), given.trace)
        found.save(given.out)
    except (Refused, OSError) as refusal:
        raise SystemExit(str(refusal)) from None
    print(f"{given.out}: {found.texts} texts, {found.tokens:,} tokens, {found.seconds:.1f} s of processor time")
    print(f"layer  sensitivity  threshold at T = {SHOWN:g} (equal ones: {sqrt(SHOWN):.3f})  guesses right")
    for layer, value in enumerate(found.sensitivities):
        sure = "-" if found.accuracy is None else f"{found.accuracy[layer]:.3f}"
        print(f"{layer:5}  {value:11.4g}  {sqrt(SHOWN / value):9.3f}  {sure:>13}")
