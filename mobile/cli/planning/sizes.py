"""The model of `mobile plan`: a preset's sizes, or a checkpoint's, and whatever `mobile.load` would refuse in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile.cli.planning.memory import CheckpointPart, WeightsPart
from mobile.costs.geometry import GEOMETRIES, Geometry
from mobile.costs.hardware import HardwareProfile
from mobile.costs.memory import CONTEXT_NBYTES, CONTEXT_TOKENS, Division, KvCache, Reserve, reserve_for
from mobile.errors import Refused
from mobile.policies.limits import refuse_disk, refuse_future, refuse_halving, refuse_slots
from mobile.policies.strategy import Strategy

if TYPE_CHECKING:
    from mobile.checkpoints.examine import Examined
    from mobile.checkpoints.source import Source
    from mobile.runtime.attach_plan import AttachPlan


def find(model: str, dtype: str = "auto", trust_remote_code: bool = False) -> Geometry | Source:
    """Return a preset's sizes, or the checkpoint in a folder or of a hub id. Raise Refused if there is none."""
    if model in GEOMETRIES and not Path(model).is_dir():
        if dtype not in ("auto", "bfloat16"):
            raise Refused(f"The preset {model} is bfloat16; leave --dtype out, or name a checkpoint.")
        return GEOMETRIES[model]
    from mobile.checkpoints import examine

    return examine.find(model, trust_remote_code=trust_remote_code, patterns=examine.CONFIGURATION)


@dataclass(frozen=True)
class Sizes:
    """A model's sizes, with rows in memory and, `paged`, on a disk, where each takes whole pages.

    `weights` are the files that are still to be fetched, None if there are none, and `weights_shortage` says why the
    disk has no room for them. `rows_path` gives the file of its experts in a folder, None for a preset. `checkpoint`
    are the files of a quantised one, `examined` all that is known of one, None for a preset.
    """

    geometry: Geometry
    paged: Geometry
    weights: WeightsPart | None = None
    weights_shortage: str | None = None
    rows_path: Callable[[Path], Path] | None = None
    checkpoint: CheckpointPart | None = None
    examined: Examined | None = None


def sizes(model: Geometry | Source, dtype: str = "auto", trust_remote_code: bool = False, rows: str = "as-is") -> Sizes:
    """Return the model's sizes with its experts in a row format; it is built without weights.

    Raise Refused as `mobile.load` does before it has them.
    """
    if isinstance(model, Geometry):
        return Sizes(model.with_rows(rows), model.with_rows(rows))
    from mobile.checkpoints.examine import examine
    from mobile.checkpoints.loading import rows_path
    from mobile.live_model import compat

    checkpoint = examine(model, dtype=dtype, trust_remote_code=trust_remote_code, bare=True, rows=rows)
    layout = compat.packed_layout(checkpoint.layout, checkpoint.layers, rows)
    layouts = layout, layout.page_aligned()
    in_memory, paged = (compat.geometry_of(checkpoint.empty, checkpoint.layers, layout) for layout in layouts)
    path = partial(rows_path, checkpoint, rows=layout.rows)
    return Sizes(
        in_memory, paged, _missing(checkpoint), checkpoint.disk_shortage(), path, _quantised(checkpoint), checkpoint
    )


def _missing(checkpoint: Examined) -> WeightsPart | None:
    """Return the files of the weights that are not in the hub's cache yet, None if all are here."""
    from mobile.checkpoints.source import cache_folder
    from mobile.machine.host import free_disk_nbytes

    missing = 0 if checkpoint.weights is None else checkpoint.source.missing_nbytes(checkpoint.weights.files)
    return WeightsPart(missing, free_disk_nbytes(cache_folder())) if missing else None


def _quantised(checkpoint: Examined) -> CheckpointPart | None:
    """Return what a plan says of a quantised checkpoint's files, None for others."""
    if checkpoint.weights is None or checkpoint.quantiser is None:
        return None
    source, files = checkpoint.source, checkpoint.weights.files
    method = checkpoint.quantiser.quantization_config.quant_method
    return CheckpointPart(source.nbytes(files), source.missing_nbytes(files), method.value, checkpoint.unkept)


# --- what a load would refuse of a strategy ---------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """The options of a load that its refusals depend on: device memory in bytes, or slots; the card; the disk.

    `hardware` is a stated card's profile, None for this machine's own card, whose `device` is "cuda"; else it is "cpu".
    `on_card` says that the plan is for a card, this machine's or a stated one. `folder` is where the experts' file
    goes, on a disk. `context_tokens` as in a load.
    """

    memory_nbytes: int | None
    slots: int | None
    context_tokens: int | None
    hardware: HardwareProfile | None
    rows: str
    device: str
    on_card: bool
    on_disk: bool
    folder: Path | None


def reserve(of: Sizes, geometry: Geometry, hardware: HardwareProfile, asked: Asked) -> Reserve:
    """Return what a load keeps back of a budget: a profile's, or on this machine's card and for stated tokens counted.

    Raise Refused for a number of tokens that is none.
    """
    tokens = asked.context_tokens
    if tokens is None and asked.hardware is not None:
        return Reserve.of_profile(hardware.reserve_nbytes)
    if of.examined is None:
        tokens, cache = CONTEXT_TOKENS if tokens is None else tokens, KvCache.of(geometry)
    else:
        from mobile.runtime.kv_cache import default_tokens, kv_cache

        model = of.examined.empty
        tokens = default_tokens(model.config) if tokens is None else tokens
        cache = kv_cache(model, of.examined.layers)
    return reserve_for(geometry, cache, tokens, 0 if asked.on_disk else CONTEXT_NBYTES)


def division_here(of: Examined, asked: Asked) -> Division | None:
    """Return the division that a load on this machine's card makes, None where slots are given. Raise Refused."""
    return _attach_plan("on-demand-overlap", of, asked).division


def why_refused(strategy: Strategy, of: Sizes, asked: Asked, divided_slots: int) -> str | None:
    """Return the sentence by which `mobile.load` would refuse the strategy, None if it would not.

    `divided_slots` are those that the memory holds. A strategy that keeps all experts is refused where a card does not
    hold them; a load that is given neither memory nor slots finds that out only when it puts them there.
    """
    try:
        if of.examined is None:
            _refuse_preset(strategy, of.geometry, asked, divided_slots)
        else:
            _attach_plan(strategy, of.examined, asked)
        if asked.on_card:
            refuse_slots(strategy, of.geometry, divided_slots)
    except Refused as refused:
        return str(refused)
    return None


def _refuse_preset(strategy: Strategy, geometry: Geometry, asked: Asked, divided_slots: int) -> None:
    """Raise Refused for a strategy that cannot run a model of these sizes. Imports no torch."""
    refuse_future(strategy)
    keeps_all = strategy.retain == "everything" and asked.memory_nbytes is None and asked.slots is None
    refuse_slots(strategy, geometry, geometry.total_experts if keeps_all else divided_slots)
    refuse_halving(strategy, geometry)
    if asked.on_disk:
        refuse_disk(strategy)


def _attach_plan(strategy: str | Strategy, checkpoint: Examined, asked: Asked) -> AttachPlan:
    """Return the plan of an attach. Raise Refused as it does."""
    import torch

    from mobile.runtime.attach_plan import AttachOptions, plan_attach

    options = AttachOptions(
        strategy=strategy,
        memory=asked.memory_nbytes,
        slots=asked.slots,
        context_tokens=asked.context_tokens,
        hardware="auto" if asked.hardware is None else asked.hardware,
        link="disk" if asked.on_disk else "auto",
        store=asked.folder,
        rows=asked.rows,
    )
    return plan_attach(checkpoint.empty, checkpoint.layers, checkpoint.layout, torch.device(asked.device), options)


def all_refused(strategies: Sequence[Strategy], of: Sizes, asked: Asked, divided_slots: int) -> dict[str, str]:
    """Return the sentence by name for each of the strategies that a load would refuse."""
    reasons: dict[str, Any] = {each.name: why_refused(each, of, asked, divided_slots) for each in strategies}
    return {name: reason for name, reason in reasons.items() if reason is not None}
