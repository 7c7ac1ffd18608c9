"""Write the shipped test items of every task: `python -m suites.tasks`. The same seed gives the same bytes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from suites.tasks.catalogue import SHIPPED
from suites.tasks.files import DATA
from suites.tasks.item import Item, held_out

SEED = 20251014


def parser() -> argparse.ArgumentParser:
    says = (
        f"Write the shipped test items of each task ({', '.join(SHIPPED)}) to NAME.jsonl. They follow from one "
        "seed: what is written is, byte for byte, what is shipped, unless a generator was changed."
    )
    top = argparse.ArgumentParser(prog="python -m suites.tasks", description=says)
    top.add_argument("--out", type=Path, default=DATA, metavar="FOLDER", help="where to (default: %(default)s)")
    return top


def main() -> None:
    out = parser().parse_args().out
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
