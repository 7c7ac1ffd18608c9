"""Direct reading: a plan to read every expert of a checkpoint from its files into the rows of the host store.

It covers the conversions that only place bytes; `loading` reads other checkpoints through Transformers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from mobile.checkpoints.weights import opened
from mobile.errors import Refused
from mobile.live_model import compat


@dataclass(frozen=True)
class Reading:
    """A tensor of a file and its place in the store: the `weight` of a `layer`.

    It is that of all experts, or of one `expert`, from its row `start` on.
    """

    file: Path
    key: str
    layer: int
    weight: str
    expert: int | None = None
    start: int | None = None


class Renaming:
    """Transformers' own renaming of a checkpoint's keys to a model's weights, and the conversions it used."""

    def __init__(self, model: nn.Module) -> None:
        self._all: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self._renamings = [entry for entry in self._all if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._all if isinstance(entry, WeightConverter)]
        self._converters = converters
        self._prefix = getattr(model, "base_model_prefix", None)
        self.state = model.state_dict()
        self.of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def target(self, key: str) -> tuple[str, str | None]:
        """Return the model's weight that `key` becomes a part of, and the pattern of its converter, if there is one."""
        found, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.state)
        if found not in self.state and key in self.state:
            found, pattern = rename_source_key(key, [], [], self._prefix, self.state)
        return found, pattern

    def targets(self, key: str) -> list[str]:
        """Return all weights that `key` becomes a part of; `target` names the first of a converter's."""
        found, pattern = self.target(key)
        if pattern is None:
            return [found]
        first, *_ = targets = self.of_pattern[pattern].target_patterns
        return [found.replace(first, target) for target in targets]

    def used(self) -> list[Any]:
        """Return the conversions that `target` has used so far, which Transformers keeps for saving the model again."""
        return [conversion for conversion in self._all if conversion.was_used()]


def experts_of(layers: Sequence[compat.MoeLayer]) -> dict[str, tuple[int, str]]:
    """Return, by the name of an experts weight in the model, its layer and its name in the store."""
    return {
        f"{layer.name}.{weight}": (number, weight)
        for number, layer in enumerate(layers)
        for weight in compat.weight_names(layer.experts)
    }


def check_untied(empty: nn.Module, layers: Sequence[compat.MoeLayer]) -> None:
    """Raise Refused if the experts of one layer are those of another."""
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    shared = next((weight for weight in experts_of(layers) if weight in tied), None)
    if shared is not None:
        raise Refused(f"{type(empty).__name__} shares {shared} with another layer, which this version cannot offload.")


def check_names(empty: nn.Module, layers: Sequence[compat.MoeLayer], keys: Iterable[str]) -> None:
    """Raise Refused if an experts weight is made of none of `keys`, which are all that a checkpoint has."""
    renaming = Renaming(empty)
    made = {target for key in keys for target in renaming.targets(key)}
    for weight in experts_of(layers):
        if weight not in made:
            raise Refused(f"The checkpoint lacks weights of {weight}; copy it again.")


def plan_readings(empty: nn.Module, layers: Sequence[compat.MoeLayer], files: Sequence[Path]) -> list[Reading] | None:
    """Return the readings that fill every expert's row, by Transformers' own renaming of checkpoint keys.

    None if the checkpoint needs a conversion other than stacking experts and joining gate with up.
    Raise Refused if an expert's weight is missing.
    """
    renaming, targets = Renaming(empty), experts_of(layers)
    readings: list[Reading] = []
    stacked: dict[tuple[str, str], int] = defaultdict(int)  # experts seen so far, by weight and source pattern
    read: dict[str, int] = defaultdict(int)  # elements, by weight
    shapes = shapes_in(files)
    for key in sorted(shapes, key=dot_natural_key):
        target, pattern = renaming.target(key)
        if target not in targets:  # not an expert
            continue
        number, weight = targets[target]
        file, shape = shapes[key]
        whole = list(renaming.state[target].shape)
        # 1. A key that is the weight of all experts is read as it is.
        if pattern is None:
            if shape != whole:
                return None
            readings.append(Reading(file, key, number, weight))
            read[target] += torch.Size(shape).numel()
            continue
        # 2. A key of one expert is stacked; if gate and up are separate keys, they are joined along its rows.
        kinds = [type(operation) for operation in renaming.of_pattern[pattern].operations]
        parts = renaming.of_pattern[pattern].source_patterns
        joined = [MergeModulelist, Concatenate] if len(parts) > 1 else [MergeModulelist]
        if kinds != joined or not shape or [len(parts) * shape[0], *shape[1:]] != whole[1:]:
            return None
        # 3. Keys come in natural order, so the next one of a pattern is the next expert.
        start = parts.index(pattern) * shape[0]
        readings.append(Reading(file, key, number, weight, stacked[target, pattern], start))
        stacked[target, pattern] += 1
        read[target] += torch.Size(shape).numel()
    # 4. Every element of every experts weight must be read exactly once.
    for target in targets if readings else ():
        if read[target] < renaming.state[target].numel():
            raise Refused(f"The checkpoint lacks weights of {target}; copy it again.")
        if read[target] > renaming.state[target].numel():
            raise Refused(f"The checkpoint has more weights of {target} than its configuration says; copy it again.")
    return readings or None


def shapes_in(files: Sequence[Path]) -> dict[str, tuple[Path, list[int]]]:
    """Return, by key, the file to read it from, which is the last that holds it, and its shape there."""
    found: dict[str, tuple[Path, list[int]]] = {}
    for path in files:
        with opened(path) as file:
            found |= {key: (path, list(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    return found
