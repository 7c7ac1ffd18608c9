"""Train one shipped checkpoint, from nothing or on from another: tokenizer, stock Transformers model, log, hashes.

    python -m suites.models.train olmoe --out suites/models/olmoe-tiny

The recipe is the file: every number that shapes the result stands in `RECIPE` or `LONGER` and is written beside the
weights. Nothing here runs during `reproduce`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from suites.families import FAMILIES, VOCABULARY
from suites.models.training_experts import register as register_training_experts
from suites.tasks.catalogue import SHIPPED
from suites.tasks.item import Item, held_out

END, PAD = "<|endoftext|>", "<|pad|>"

RECIPE: dict[str, Any] = {
    "seed": 0,
    "tokens": 20_000_000,
    "batch_tokens": [1024, 4096],  # grows linearly over the first third
    "learning_rate": 4e-3,
    "final_learning_rate": 1e-4,
    "warmup_steps": 100,
    "beta2": 0.98,
    "weight_decay": 0.05,  # on matrices only
    "gradient_clip": 1.0,
    "balance_loss": 0.01,
    "z_loss": 1e-4,
    "task_mix": {
        "arithmetic": 0.3,
        "boolean_expressions": 0.1,
        "object_counting": 0.25,
        "python_functions": 0.12,
        "web_of_lies": 0.23,
    },
    "tokenizer_items": 30_000,
}
LONGER: dict[str, Any] = {  # where a checkpoint is trained on: other items, and more of the tasks it is weak in
    "seed": 100,
    "tokens": 25_000_000,
    "batch_tokens": [4096, 4096],
    "learning_rate": 3e-3,
    "task_mix": {
        "arithmetic": 0.4,
        "boolean_expressions": 0.06,
        "object_counting": 0.34,
        "python_functions": 0.08,
        "web_of_lies": 0.12,
    },
}


def training_items(rng: Random, recipe: dict[str, Any]) -> Iterator[Item]:
    """Yield items of the task mix without end, test-side ones left out."""
    names, shares = zip(*recipe["task_mix"].items(), strict=True)
    while True:
        item = SHIPPED[rng.choices(names, shares)[0]].train(rng)
        if not held_out(item.key):
            yield item


def train_tokenizer(rng: Random, recipe: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on training items; every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    items = islice(training_items(rng, recipe), recipe["tokenizer_items"])
    texts = (f"{item.prompt}{item.worked}" for item in items)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=PAD, padding_side="left", model_max_length=512
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: Random, recipe: dict[str, Any], seen: TokensSeen
) -> Iterator[tuple]:
    """Yield (ids, labels) without end, each (rows, length) int64: rows of like length, labels of answers only."""
    items = training_items(rng, recipe)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    while True:
        chunk = [next(items) for _ in range(1024)]
        prompts = tokenizer([item.prompt for item in chunk])["input_ids"]
        answers = tokenizer([item.worked for item in chunk])["input_ids"]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        groups: list[list] = [[]]
        low, high = recipe["batch_tokens"]
        budget = low + (high - low) * min(1.0, 3 * seen.fraction)
        for row in rows:
            length = len(row[0]) + len(row[1]) + 1
            if groups[-1] and (len(groups[-1]) + 1) * length > budget:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(p) + len(a) + 1 for p, a in group)
            ids = torch.full((len(group), longest), pad)
            labels = torch.full((len(group), longest), -100)
            for i, (prompt, answer) in enumerate(group):
                text = torch.tensor([*prompt, *answer, end])
                ids[i, : len(text)] = text
                labels[i, len(prompt) : len(text)] = text[len(prompt) :]
            yield ids, labels


class TokensSeen:
    """The progress of training, shared by the batch maker, the schedule and the bar."""

    def __init__(self, goal: int) -> None:
        self.goal, self.count = goal, 0

    @property
    def fraction(self) -> float:
        return self.count / self.goal


def learning_rate(step: int, fraction: float, recipe: dict[str, Any]) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to the final rate."""
    high, low = recipe["learning_rate"], recipe["final_learning_rate"]
    cosine = low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
    return cosine * min(1.0, (step + 1) / recipe["warmup_steps"])


def router_losses(router_logits: list[torch.Tensor], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Switch's load-balance loss and ST-MoE's z-loss, summed over layers; logits are (tokens, experts)."""
    balance = z = torch.zeros(())
    for logits in router_logits:
        probs = logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k).indices, 1.0)
        balance = balance + logits.shape[-1] * (chosen.mean(0) / top_k * probs.mean(0)).sum()
        z = z + logits.logsumexp(-1).square().mean()
    return balance, z


def initialise(model: PreTrainedModel) -> None:
    """Initialise the weights for a small model: by fan-in, but wide embeddings and routers that are nearly uniform."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        if name.endswith("embed_tokens.weight"):
            weight.data.normal_(0, 0.5)
        elif name.endswith("gate.weight"):
            weight.data.normal_(0, 0.05)
        else:
            weight.data.normal_(0, weight.shape[-1] ** -0.5)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: dict[str, Any], log: Path) -> dict:
    """Run the recipe on `model` in place; one JSON line per 100 steps goes to `log`; returns what it took."""
    seen = TokensSeen(recipe["tokens"])
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, recipe["beta2"]),
        foreach=True,
    )
    captured: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda _m, _a, out: captured.append(out[0]))
    started, step, means = time.time(), 0, {"loss": 0.0, "balance": 0.0}
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar, log.open("w", encoding="utf-8") as lines:
        task = bar.add_task("training", total=seen.goal, note="")
        source = batches(tokenizer, Random(recipe["seed"] + 1), recipe, seen)
        while seen.count < seen.goal:
            ids, labels = next(source)
            captured.clear()
            kept = labels[:, 1:] != -100
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][kept]
            loss = F.cross_entropy(model.lm_head(hidden), labels[:, 1:][kept])
            balance, z = router_losses(captured, model.config.num_experts_per_tok)
            (loss + recipe["balance_loss"] * balance + recipe["z_loss"] * z).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["gradient_clip"], foreach=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, seen.fraction, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen.count += ids.numel()
            step += 1
            means["loss"] += loss.item() / 100
            means["balance"] += balance.item() / 100
            bar.update(task, completed=seen.count, note=f"{seen.count / (time.time() - started):,.0f} tokens/s")
            if step % 100 == 0:
                row = {"step": step, "tokens": seen.count, **{k: round(v, 5) for k, v in means.items()}}
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                means = dict.fromkeys(means, 0.0)
    return {"steps": step, "tokens_seen": seen.count, "seconds": round(time.time() - started)}


def write_hashes(folder: Path) -> None:
    """Write the SHA-256 of every file of the checkpoint but its card, in the format that `sha256sum -c` reads."""
    names = sorted({path.name for path in folder.iterdir()} - {"SHA256SUMS", "README.md"})
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train one shipped checkpoint from nothing: tokenizer, stock Transformers model, log, card, hashes."
    )
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, help="of weights and order; not of the tokenizer (default: the recipe's)")
    parser.add_argument("--tokens", type=int, help="train on fewer tokens than the recipe says (a trial)")
    parser.add_argument(
        "--longer", type=Path, metavar="FOLDER", help="train this checkpoint on, with its tokenizer, on other items"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads; another number changes rounding")
    options = parser.parse_args()
    recipe = RECIPE if options.longer is None else {**RECIPE, **LONGER, "longer": options.longer.name}
    asked = {"seed": options.seed, "tokens": options.tokens}
    recipe = {**recipe, **{name: value for name, value in asked.items() if value is not None}}
    torch.set_num_threads(options.threads)
    torch.manual_seed(recipe["seed"])
    options.out.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[options.family]
    if options.longer is None:
        model: Any = family.model_class(family.config)
        initialise(model)
        tokenizer = train_tokenizer(Random(0), recipe)  # the same for every family and seed
    else:
        model = family.model_class.from_pretrained(options.longer, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.longer)
    register_training_experts()
    model.set_experts_implementation("training")
    took = train(model, tokenizer, recipe, options.out / "training_log.jsonl")
    model.set_experts_implementation("eager")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    written = {"family": options.family, **recipe, **took, "torch": torch.__version__}
    (options.out / "recipe.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    write_hashes(options.out)


if __name__ == "__main__":
    main()
