"""Write the shipped test items of every task: `python -m suites.tasks`. The same seed gives the same bytes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from suites.tasks.catalogue import SHIPPED
from suites.tasks.files import DATA
from suites.tasks.fresh import SEED as SEED_OF_FRESH
from suites.tasks.fresh import training_side
from suites.tasks.item import Item, held_out

SEED = 20251014


def parser() -> argparse.ArgumentParser:
    says = (
        f"Write the shipped test items of each task ({', '.join(SHIPPED)}) to NAME.jsonl. They follow from one "
        "seed: what is written is, byte for byte, what is shipped, unless a generator was changed."
    )
    top = argparse.ArgumentParser(prog="python -m suites.tasks", description=says)
    top.add_argument("--out", type=Path, default=DATA, metavar="FOLDER", help="where to (default: %(default)s)")
    commands = top.add_subparsers(metavar="COMMAND", dest="command")
    says = "Write fresh items for `mobile tune --tasks`: as hard as a task's test items, and none of them."
    tune = commands.add_parser("tune-items", help="write fresh items to choose gamma on", description=says)
    tune.add_argument("task", choices=sorted(SHIPPED))
    tune.add_argument("--items", type=int, default=400, metavar="N", help="how many (default: %(default)s)")
    tune.add_argument("--out", dest="file", type=Path, required=True, metavar="FILE", help="the .jsonl to write")
    tune.add_argument("--seed", type=int, default=SEED_OF_FRESH, metavar="N", help="(default: %(default)s)")
    return top


def write_fresh(task: str, count: int, seed: int, file: Path) -> None:
    """Write fresh items, {"prompt", "answer"} a line; without answers where these are tests to be run."""
    items = training_side(task, count, seed)
    answers = [{} if SHIPPED[task].runs_code else {"answer": item.answer} for item in items]
    lines = [json.dumps({"prompt": item.prompt, **answer}) + "\n" for item, answer in zip(items, answers, strict=True)]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines)} items")


def main() -> None:
    given = parser().parse_args()
    if given.command == "tune-items":
        write_fresh(given.task, given.items, given.seed, given.file)
        return
    out = given.out
    out.mkdir(parents=True, exist_ok=True)
    for name, task in SHIPPED.items():
        rng = Random(f"{SEED}:{name}")
        items: dict[str, Item] = {}
        while len(items) < task.items:
            item = task.test(rng)
            if held_out(item.key):
                items.setdefault(item.prompt, item)
        lines = [
            json.dumps({"prompt": item.prompt, "worked": item.worked, "answer": item.answer, "key": item.key}) + "\n"
            for item in items.values()
        ]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(lines)} items")


if __name__ == "__main__":
    main()
