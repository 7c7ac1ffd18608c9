"""Write a shipped checkpoint's model card: how it was trained, how its routers spread, what it scored in a run.

python -m suites.models.card suites/models/olmoe-tiny --run runs/cpu
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobile.live_model.compat import MoeLayer, moe_layers
from suites.families import FAMILIES
from suites.record import Record, RunFolder, load
from suites.tasks.catalogue import SHIPPED
from suites.tasks.files import shipped

SHOWN = {"resident": "full K", "static-half": "static K/2", "mobile": "MoBiLE 0.7"}  # by strategy its gating
ROUTED_ITEMS = 50  # test items of each task whose routing is counted


@torch.inference_mode()
def expert_use(folder: Path) -> list[tuple[float, int, int]]:
    """Return, by MoE layer, the entropy of expert use over its greatest value, how many experts are used, and all.

    Counted over the tokens of test prompts and their worked answers, read and not generated.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers = moe_layers(model)
    uses = [torch.zeros(layer.count) for layer in layers]

    def counting(layer: MoeLayer, use: torch.Tensor) -> Any:
        def hook(_module: Any, inputs: tuple, named: dict[str, Any], _output: Any) -> None:
            use.add_(layer.route(inputs, named).flatten().bincount(minlength=layer.count))

        return hook

    for layer, use in zip(layers, uses, strict=True):
        layer.router.register_forward_hook(counting(layer, use), with_kwargs=True)
    for task in SHIPPED:
        for item in shipped(task)[:ROUTED_ITEMS]:
            model(**tokenizer(item["prompt"] + item["worked"], return_tensors="pt", return_token_type_ids=False))
    spread = []
    for use in uses:
        share = use[use > 0] / use.sum()
        spread.append((float(-(share * share.log()).sum()) / math.log(len(use)), len(share), len(use)))
    return spread


def scores(run: Path, model: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each task and gating shown: items, score, its Wilson interval, and share of whole answers.

    The last is None where a run kept scores and no texts: fresh items, of the preset accuracy.
    """
    records = [load(path) for path in sorted((RunFolder(run).path / "records").glob("*.json"))]
    for task in SHIPPED:
        worked = [item["worked"].strip() for item in shipped(task)]
        fresh = [r.config["right"] for r in records if (r.model, r.task) == (model, task) and "right" in r.config]
        for strategy, gating in SHOWN.items():
            record = next((r for r in records if _shown(r, model, task, strategy)), None)
            whole = None
            if record is not None:
                right, items = sum(item.correct is True for item in record.items), len(record.items)
                whole = 100 * sum(item.output.strip() == worked[item.doc] for item in record.items) / items
            else:
                marks = "".join(right.get(gating, "") for right in fresh)
                right, items = marks.count("1"), len(marks)
            if not items:
                continue
            interval = binomtest(right, items).proportion_ci(method="wilson")
            yield {
                "task": task,
                "gating": gating,
                "items": items,
                "score": 100 * right / items,
                "low": 100 * interval.low,
                "high": 100 * interval.high,
                "whole": whole,
            }


def _shown(record: Record, model: str, task: str, strategy: str) -> bool:
    """Return whether a record is the strategy's answers of all items, and neither a point of a sweep nor a control."""
    named = (record.model, record.task, record.strategy) == (model, task, strategy) and bool(record.items)
    return named and record.budget in ("smallest", "all") and not (record.config["swept"] or record.config["control"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a shipped checkpoint's model card: how it was trained, how its routers spread, its scores."
    )
    parser.add_argument("folder", type=Path, help="a checkpoint that suites.models.train wrote")
    parser.add_argument("--run", type=Path, help="a finished run whose scores to write down")
    options = parser.parse_args()
    recipe = json.loads((options.folder / "recipe.json").read_text(encoding="utf-8"))
    family = FAMILIES[recipe["family"]]
    template = Environment(
        loader=PackageLoader("suites", "models"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("card.md.j2")
    weights = options.folder / "model.safetensors"
    text = template.render(
        name=options.folder.name,
        family=family,
        recipe=recipe,
        model=family.model_class.__name__,
        config=family.config,
        width=getattr(family.config, "moe_intermediate_size", family.config.intermediate_size),
        parameters=sum(p.numel() for p in family.model_class(family.config).parameters()) / 1e6,
        megabytes=weights.stat().st_size / 1e6,
        use=expert_use(options.folder),
        scores=list(scores(options.run, options.folder.name)) if options.run else [],
    )
    (options.folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
