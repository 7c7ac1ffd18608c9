"""Reference cells: plain Transformers and llama.cpp on the same sizes, and what the engine itself costs a layer.

No torch: `suites.synthetic.reference` does the timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobile.errors import Refused
from mobile.links.registry import LINKS
from mobile.suggest import offer
from suites.identity import ENGINE, Model, code_hash, digest, model_hash, versions
from suites.record import RunFolder, is_record

ENGINE_COST, RESIDENT, DEVICE_MAP = "engine against stock", "stock, everything resident", "stock, device_map offload"
DISK_OFFLOAD, MEMORY_MAPPED, LLAMA_CPP = "stock, disk offload", "stock, memory-mapped", "llama.cpp, memory-mapped"
MEASUREMENTS = {
    "engine": ENGINE_COST,
    "resident": RESIDENT,
    "device_map": DEVICE_MAP,
    "disk_offload": DISK_OFFLOAD,
    "mmap": MEMORY_MAPPED,
    "llama.cpp": LLAMA_CPP,
}
DISK_PEERS = {MEASUREMENTS[name]: name for name in ("disk_offload", "mmap", "llama.cpp")}  # what reads from disk
FEW_LAYERS = 4  # that tell what one costs; two copies of them lie on the device


@dataclass(frozen=True)
class ReferenceCell:
    """One measurement of a geometry to hold its synthetic cells against; `what` is one of MEASUREMENTS' values.

    `memory` is what `device_map` may fill of the device, and the cap on all memory of one of `DISK_PEERS`. Nothing is
    scripted: weights and routing are random.
    """

    model: Model
    what: str
    link: str
    memory: str
    prompt_tokens: int
    decode_tokens: int
    repeats: int
    seed: int
    layers: int | None = None
    shrink: int = 1

    gamma = None
    hardware = "auto"

    kind = "reference"
    online = False
    shared = ()  # each makes a model of its own

    def needs(self, run: RunFolder) -> None:
        return None

    def output(self, run: RunFolder) -> Path:
        return run.record(self.id)

    def intact(self, run: RunFolder) -> bool:
        return is_record(self.output(run))

    @property
    def id(self) -> str:
        return digest(asdict(self), code_hash(), versions(ENGINE), model_hash(self.model))

    @property
    def task(self) -> str:
        return "llama.cpp" if self.what == LLAMA_CPP else "plain Transformers"

    @property
    def strategy(self) -> str:
        return self.what

    @property
    def budget(self) -> str:
        return self.memory if self.what == DEVICE_MAP or self.what in DISK_PEERS else "all"

    @property
    def scope(self) -> str:
        return LINKS[self.link].scope

    @property
    def label(self) -> str:
        return f"{self.model.name} native {self.what}"


def reference_cell_from(data: dict[str, Any]) -> ReferenceCell:
    """Return the cell whose fields, as JSON, are `data`."""
    return ReferenceCell(**{**data, "model": Model(**data["model"])})


def reference_cells_of(data: dict[str, Any], models: dict[str, Model], link: str) -> Iterator[ReferenceCell]:
    """Yield the measurements that a preset asks for with `beside`; none in virtual time. Raise Refused."""
    asked = data.get("beside", [])
    if unknown := set(asked) - set(MEASUREMENTS):
        first = sorted(unknown)[0]
        raise Refused(f"Nothing beside shapes is called {first!r}; {offer(first, MEASUREMENTS)}.")
    if not LINKS[link].real_time or not data["seeds"]:
        return
    if LINKS[link].store != "disk" and (apart := [name for name in asked if MEASUREMENTS[name] in DISK_PEERS]):
        raise Refused(f'{apart[0]!r} reads from disk, which the link {link} does not; give link = "disk".')
    for row in data["models"]:
        given = {**data, **row}
        for what in asked:
            yield ReferenceCell(
                model=models[row["name"]],
                what=MEASUREMENTS[what],
                link=link,
                memory=given.get("beside_memory", "16GiB"),
                prompt_tokens=data["prompt_tokens"],
                decode_tokens=data.get("beside_tokens", data["decode_tokens"]),
                repeats=data.get("beside_repeats", data["repeats"]),
                seed=data["seeds"][0],
                layers=given.get("layers"),
                shrink=given.get("shrink", 1),
            )
