"""The plan by which every expert goes straight from a checkpoint's files into its row of the host store.

It follows Transformers' own renaming of keys, so that the weights are those that Transformers would load. Read in
this way, no expert is held twice.
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

from mobile.checkpoints.headers import Stored, read_header
from mobile.errors import Refused, one_line
from mobile.live_model import compat


@dataclass(frozen=True)
class Reading:
    """One tensor of a file, and its place in the host store.

    It is `weight` of all experts of a layer, stacked; or, where `expert` is given, that expert's rows from `start` on.
    `part` is the tensor of a packed weight that it belongs to, None for a weight that is not packed.
    """

    stored: Stored
    layer: int
    weight: str
    expert: int | None = None
    start: int | None = None
    part: str | None = None


class Renaming:
    """Transformers' own renaming of a checkpoint's keys to the weights of a model (meta is enough).

    `quantiser` is Transformers' own for a quantised checkpoint, whose keys are others. Raise Refused if it has none for
    the model's configuration.
    """

    def __init__(self, model: nn.Module, quantiser: Any = None) -> None:
        try:
            self._conversions: Any = get_model_conversion_mapping(model, hf_quantizer=quantiser)  # type: ignore[arg-type]
        except Exception as error:  # such as a part of the configuration whose model_type is no text
            raise Refused(f"The configuration of {type(model).__name__} is not sound: {one_line(error)}") from error
        self._renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        self._converters = converters
        self._prefix = getattr(model, "base_model_prefix", None)
        self.state = model.state_dict()
        self.converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def target(self, key: str) -> tuple[str, str | None]:
        """Return the weight this key becomes or is a part of, and the pattern of the converter, if there is one."""
        weight, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.state)
        if weight not in self.state and key in self.state:
            weight, pattern = rename_source_key(key, [], [], self._prefix, self.state)
        return weight, pattern

    def targets(self, key: str) -> list[str]:
        """Return all weights that this key has a part in: a converter that makes several is named after its first."""
        weight, pattern = self.target(key)
        if pattern is None:
            return [weight]
        first, *_ = patterns = self.converter_of[pattern].target_patterns
        return [weight.replace(first, target) for target in patterns]

    def used_conversions(self) -> list[Any]:
        """Return the conversions that changed a key so far, as Transformers keeps them for saving the model again."""
        return [conversion for conversion in self._conversions if conversion.was_used()]


def store_places(layers: Sequence[compat.MoeLayer]) -> dict[str, tuple[int, str]]:
    """Return, by the name of an experts weight in the model, its layer and its name in the store."""
    return {
        f"{layer.name}.{weight}": (number, weight)
        for number, layer in enumerate(layers)
        for weight in compat.weight_names(layer.experts)
    }


def check_untied(empty: nn.Module, layers: Sequence[compat.MoeLayer]) -> None:
    """Raise Refused if the experts of one layer are those of another."""
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    shared = next((weight for weight in store_places(layers) if weight in tied), None)
    if shared is not None:
        raise Refused(f"{type(empty).__name__} shares {shared} with another layer, which this version cannot offload.")


def check_names(empty: nn.Module, layers: Sequence[compat.MoeLayer], keys: Iterable[str]) -> None:
    """Raise Refused if an experts weight is made of none of these keys, which are all that a checkpoint has."""
    renaming = Renaming(empty)
    targets = {target for key in keys for target in renaming.targets(key)}
    for weight in store_places(layers):
        if weight not in targets:
            raise Refused(f"The checkpoint lacks weights of {weight}; copy it again.")


def plan_readings(empty: nn.Module, layers: Sequence[compat.MoeLayer], files: Sequence[Path]) -> list[Reading] | None:
    """Return how to read every expert, following Transformers' own renaming of checkpoint keys.

    None if the checkpoint needs a conversion other than stacking experts and joining gate with up. Raise Refused if it
    has fewer or more weights of an expert than its configuration says.
    """
    renaming, places = Renaming(empty), store_places(layers)
    readings: list[Reading] = []
    stacked: dict[tuple[str, str], int] = defaultdict(int)  # experts so far, by weight and converter pattern
    numels: dict[str, int] = defaultdict(int)  # elements so far, by weight
    stored = stored_in(files)
    for key in in_natural_order(stored):
        # 1. Take the keys that become a part of some experts weight; the others are Transformers' to load.
        target, pattern = renaming.target(key)
        if target not in places:
            continue
        layer, weight = places[target]
        tensor, shape = stored[key], list(stored[key].shape)
        target_shape = list(renaming.state[target].shape)  # (experts, rows, columns)
        numels[target] += torch.Size(shape).numel()
        # 2. A key that is only renamed holds all experts of the layer, stacked.
        if pattern is None:
            if shape != target_shape:
                return None
            readings.append(Reading(tensor, layer, weight))
            continue
        # 3. Any other is one expert's matrix (rows / parts, columns): the converter stacks such matrices, and where it
        #    has several source patterns (gate, up) it joins theirs along the rows, in the order of the patterns.
        operations = [type(operation) for operation in renaming.converter_of[pattern].operations]
        parts = renaming.converter_of[pattern].source_patterns
        stacking = [MergeModulelist, Concatenate] if len(parts) > 1 else [MergeModulelist]
        if operations != stacking or not shape or [len(parts) * shape[0], *shape[1:]] != target_shape[1:]:
            return None
        start = parts.index(pattern) * shape[0]
        readings.append(Reading(tensor, layer, weight, stacked[target, pattern], start))
        stacked[target, pattern] += 1
    # 4. Every element of every experts weight must come from exactly one tensor.
    for target in places if readings else ():
        if numels[target] < renaming.state[target].numel():
            raise Refused(f"The checkpoint lacks weights of {target}; copy it again.")
        if numels[target] > renaming.state[target].numel():
            raise Refused(f"The checkpoint has more weights of {target} than its configuration says; copy it again.")
    return readings or None


def stored_in(files: Sequence[Path]) -> dict[str, Stored]:
    """Return all tensors by key, from the last file that holds each. Raise Refused for a file that is damaged."""
    stored: dict[str, Stored] = {}
    for path in files:
        stored |= read_header(path)
    return stored


def in_natural_order(keys: Iterable[str]) -> list[str]:
    """Return the keys with expert 2 before 10, in which order Transformers stacks a layer's. Raise Refused."""
    try:
        return sorted(keys, key=dot_natural_key)
    except ValueError as error:  # digits that are no number
        raise Refused(
            f"A weight of the checkpoint has a name that is none ({one_line(error)}); copy it again."
        ) from error
