"""The fields of a record's free objects that reports read, by what the record is of; any others are for the reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from suites.typed_json import Amount, Count, Holding, Matching, Name, Rate, Some

# Lower edges of the bins of 1 - confidence: a quarter of a decade each, the first from 0.
DOUBT_EDGES = (0.0, *(float(f"{10 ** (quarter / 4):.4g}") for quarter in range(-24, 0)))


@dataclass(frozen=True)
class Spread:
    """One quantity of a GPU over the samples of a cell."""

    min: float
    mean: float
    max: float


@dataclass(frozen=True)
class Telemetry:
    """The summary of `suites.telemetry.watched`; null where the card, driver or library does not tell."""

    energy_joules: float | None
    clock_limits: dict[str, Amount] | None
    power_milliwatts: Spread | None = None
    temperature_celsius: Spread | None = None
    sm_clock_mhz: Spread | None = None
    link_generation: Spread | None = None
    link_width: Spread | None = None
    link_received_kb_per_s: Spread | None = None


@dataclass(frozen=True)
class Training:
    """What it took to fit a trained predictor."""

    seconds: Amount
    tokens: Count
    fits: Count
    parameters: Count
    online: bool


@dataclass(frozen=True)
class Environment:
    """Where a record was made."""

    cpu: str | None
    cores: Count | None
    gpu: dict[str, Any] | None
    packages: dict[str, str | None]
    git_commit: str | None
    git_dirty: bool | None
    python: str | None = None
    platform: str | None = None
    fingerprint: str | None = None
    date: Annotated[str, Matching(r"\d{4}-\d\d-\d\d", "a day as 2026-01-31")] | None = None
    telemetry: Annotated[dict[str, Any], Holding(Telemetry)] | None = None
    training: Annotated[dict[str, Any], Holding(Training)] | None = None


@dataclass(frozen=True)
class Counters:
    """What a scored cell counted, as far as tables divide by it or add it up."""

    tokens: Count
    fallbacks: Count
    bytes_loaded: Count
    decode_bytes: Count
    prefetch_loads: Count
    prefetch_useful: Count
    decode_seconds: Amount
    decode_stall_seconds: Amount
    prompt_tokens: Count = 0
    hits: Count = 0
    demand_loads: Count = 0
    late_prefetches: Count = 0
    cpu_experts: Count = 0
    seconds: Amount | None = None
    prefill_seconds: Amount | None = None
    decode_dense_seconds: Amount | None = None


@dataclass(frozen=True)
class DecodeParts:
    """The parts of the decode time, which are known all together or not at all."""

    decode_dense_seconds: Amount
    decode_expert_seconds: Amount
    decode_cpu_stall_seconds: Amount


@dataclass(frozen=True)
class Resolved:
    """What every record says of how its cell was set."""

    swept: bool
    profile_sources: tuple[str, ...]
    moe_layers: Count
    link_gb_per_s: Rate | None
    kind: str | None = None
    control: str | None = None
    family: str | None = None
    training_seed: int | None = None
    generation: Name | None = None
    timing: str | None = None
    dtype: str | None = None
    strategy_source: str | None = None
    rows: str | None = None
    answers_of: str | None = None
    needs_future: bool | None = None
    items: Count | None = None
    timed_items: Count | None = None
    task_items: Count | None = None
    processes: Count | None = None
    link_page_locked: bool | None = None
    link_measured_gb_per_s: Amount | None = None
    confidence_histogram: tuple[tuple[Amount, Count], ...] | None = None
    # Lower edge of 1 - confidence, tokens, those of them that fell back, those of these on which the passes disagree.
    doubt_histogram: tuple[tuple[Amount, Count, Count, Count | None], ...] | None = None


@dataclass(frozen=True)
class Scored:
    """What the record of a scored cell says besides what every record does."""

    moe_layers: Some
    experts: Some
    top_k: Some
    expert_nbytes: Some


@dataclass(frozen=True)
class Profile:
    """The fitted numbers of a hardware profile."""

    sources: tuple[str, ...]
    link_gb_per_s: Rate
    link_latency_seconds: Amount
    memory_gb_per_s: Rate
    launch_seconds: Amount
    layer_seconds: Amount
    step_seconds: Amount
    tflops: Rate
    host_launch_seconds: Amount = 0.0
    host_copy_seconds: Amount = 0.0
    host_read_seconds: Amount = 0.0
    host_layer_seconds: Amount = 0.0
    host_step_seconds: Amount = 0.0


@dataclass(frozen=True)
class Prediction:
    """What the virtual clock says of each repeat, on a profile."""

    profile: Annotated[dict[str, Any], Holding(Profile)]
    ttft_ns: tuple[Count, ...]
    decode_ns: tuple[Count, ...]
    decode_bytes: tuple[Count, ...]


@dataclass(frozen=True)
class FallbackUse:
    """How fallbacks used the link."""

    passes: Count
    ns: Count
    nbytes: Count


@dataclass(frozen=True)
class LinkBound:
    """The largest shares of the time in which a copy could be under way; null where nobody can say."""

    decode: Amount | None
    fallback: Amount | None
    layer_ns: Count


@dataclass(frozen=True)
class Shape:
    """What the record of a synthetic cell says besides what every record does."""

    real_moe_layers: Count
    experts: Some
    top_k: Some
    expert_nbytes: Some
    dtype: str
    shrink: Some
    repeats: Count
    prompt_tokens: Count
    warmup_tokens: Count
    decode_tokens: Count
    fallback_asked: Amount | None
    fallback_use: Annotated[dict[str, Any], Holding(FallbackUse)] | None
    link_measured_gb_per_s: Amount | None
    link_bound: Annotated[dict[str, Any], Holding(LinkBound)] | None = None
    predicted: Annotated[dict[str, Any], Holding(Prediction)] | None = None
    predicted_at_own_rates: Annotated[dict[str, Any], Holding(Prediction)] | None = None
    unpredicted: str | None = None
    disk_gb_per_s: tuple[Rate, ...] = ()
    link_throttled: bool | None = None
    link_native_gb_per_s: Rate | None = None
    memory_nbytes: Count | None = None
    memory_asked_nbytes: Count | None = None


@dataclass(frozen=True)
class OverDisk:
    """How the rows of a synthetic cell were read."""

    link_direct: bool | None
    link_depth: tuple[Count, ...]


@dataclass(frozen=True)
class SignalAlone:
    """How a signal did by itself, at the fallback rate of the paper's on other items."""

    signal: str
    gamma: Amount
    tokens: Count
    fallbacks: Count
    lost: Count
    gained: Count


@dataclass(frozen=True)
class Signals:
    """What the record of a signal cell says besides what every record does.

    By item and decode token, `agree` says whether both passes write the same token (1) or not (0), and `doubts` gives
    1 - confidence by signal.
    """

    items: Some
    docs: tuple[Count, ...]
    agree: tuple[tuple[Count, ...], ...]
    doubts: dict[str, tuple[tuple[Amount, ...], ...]]
    live: tuple[Annotated[dict[str, Any], Holding(SignalAlone)], ...]


@dataclass(frozen=True)
class Gating:
    """How one gating answered the items of an accuracy cell; `outputs` is the SHA-256 of all texts."""

    gating: str
    outputs: Annotated[str, Matching(r"[0-9a-f]{64}", "a SHA-256")]
    tokens: Count
    fallbacks: Count


@dataclass(frozen=True)
class Ended:
    """After which round the verdict of the family was settled, and how."""

    after: Some
    verdict: Literal["yes", "no"]


@dataclass(frozen=True)
class Accuracy:
    """What the record of an accuracy cell says besides what every record does.

    By gating, `right` has a 1 or a 0 for each item; `keys` has what names the item's substance. A cell that came after
    the verdict was settled has no items, and says so in `ended`.
    """

    items: Some
    round: Some
    rounds: Some
    margin_points: Rate
    ended: Annotated[dict[str, Any], Holding(Ended)] | None
    prompts: Annotated[str, Matching(r"[0-9a-f]{64}", "a SHA-256")]
    keys: tuple[Annotated[str, Matching(r"[0-9a-f]{8}", "8 hexadecimal digits")], ...]
    right: dict[str, Annotated[str, Matching(r"[01]*", "a 1 or a 0 for each item")]]
    gatings: tuple[Annotated[dict[str, Any], Holding(Gating)], ...]


@dataclass(frozen=True)
class EngineCost:
    """A step of the engine beside one of plain Transformers."""

    stock: str
    layers: Count
    blocks: Count
    stock_seconds: Amount
    ours_seconds: Amount
    layer_seconds: float
    low_seconds: float
    high_seconds: float


@dataclass(frozen=True)
class BareCost:
    """The engine's `run_experts` beside a bare loop of its kernel; differences may be below nothing."""

    layers: Count
    blocks: Count
    bare_seconds: Amount
    read_seconds: Amount
    ours_seconds: Amount
    layer_seconds: float
    low_seconds: float
    high_seconds: float
    bound_seconds: float


@dataclass(frozen=True)
class Beside:
    """What the record of a reference says besides what every record does."""

    real_moe_layers: Count
    refused: str | None
    stock: str | None
    engine: tuple[Annotated[dict[str, Any], Holding(EngineCost)], ...] | None
    bare: Annotated[dict[str, Any], Holding(BareCost)] | None = None


@dataclass(frozen=True)
class ReadFromDisk:
    """What the record of a program that reads from a disk says of its memory."""

    memory_cap: str | None
