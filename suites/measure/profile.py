"""The time of a decode step by kind: torch.profiler around a synthetic model that plays a script.

`python -m suites profile` writes the trace, which ui.perfetto.dev opens, and a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mobile import outputs
from mobile.cli.terminal import show
from mobile.errors import Refused
from mobile.links.registry import LINKS, real_time_link
from suites.synthetic.link_use import covered

SCOPE = "mobile: "
EXPERTS = f"{SCOPE}experts"
KINDS = ("copies", "expert kernels", "other kernels")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace that run on a GPU
EXAMPLES = """
examples:
  python -m suites profile --geometry olmoe-1b-7b --strategy on-demand-overlap --out profile
  python -m suites profile --geometry qwen3-30b-a3b --strategy mobile --rate 0.3 --link-gb-per-s 25 --out profile
  python -m suites profile --geometry olmoe-1b-7b --layers 2 --shrink 16 --link paced --out profile     without a GPU

Profiling slows the host down: look at what takes its time here, and at the suite for how much.
"""


class Span(NamedTuple):
    """Something ran, in microseconds of the trace."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of the decode steps: of each kind while it ran, and of neither, when only the host worked.

    Kinds run beside one another on a GPU, so together they may be more than the wall time.
    """

    tokens: int
    wall_ms: float
    kinds_ms: dict[str, float]
    alone_ms: float


def breakdown(spans: Iterable[Span], window: tuple[float, float], tokens: int) -> Breakdown:
    """Add up what ran inside the window; spans of one kind that overlap count once."""
    inside = [
        Span(kind, max(start, window[0]), min(end, window[1]))
        for kind, start, end in spans
        if end > window[0] and start < window[1]
    ]
    wall = window[1] - window[0]
    by_kind = {kind: covered((span.start, span.end) for span in inside if span.kind == kind) / 1e3 for kind in KINDS}
    return Breakdown(tokens, wall / 1e3, by_kind, (wall - covered((span.start, span.end) for span in inside)) / 1e3)


# --- reading a trace --------------------------------------------------------------------------------


def window_of(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the start of the first decode pass and the end of all that ran. Raise Refused for a trace without one."""
    passes = [e for e in events if _scoped(e) and e["name"].endswith(" pass") and "prefill" not in e["name"]]
    if not passes:
        raise Refused("The trace holds no decode pass; profile at least one token.")
    ran = [e for e in events if e.get("cat") in DEVICE] + passes
    return min(e["ts"] for e in passes), max(e["ts"] + e["dur"] for e in ran)


def _scoped(event: dict[str, Any]) -> bool:
    return event.get("cat") == "user_annotation" and str(event.get("name")).startswith(SCOPE)


def spans_of(events: list[dict[str, Any]]) -> list[Span]:
    """Return the spans that ran on the device, by kind; without a GPU, those of the thread that calls the model.

    A kernel belongs to the experts if it was launched while the expert kernel ran on the host.
    """
    scopes = [(e["ts"], e["ts"] + e["dur"]) for e in events if _scoped(e) and e["name"] == EXPERTS]

    def kind(ts: float) -> str:
        return "expert kernels" if any(start <= ts <= end for start, end in scopes) else "other kernels"

    on_device = [e for e in events if e.get("cat") in DEVICE]
    if not on_device:
        return [Span(kind(e["ts"]), e["ts"], e["ts"] + e["dur"]) for e in _outermost(events)]
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    spans = []
    for e in on_device:
        copies = e["cat"] == "gpu_memcpy" and "HtoD" in e["name"] and "Pageable" not in e["name"]
        began = launched.get(e.get("args", {}).get("correlation"), float("-inf"))
        spans.append(Span("copies" if copies else kind(began), e["ts"], e["ts"] + e["dur"]))
    return spans


def _outermost(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield operators that no other operator of the same thread called."""
    until: dict[Any, float] = {}
    for e in sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"])):
        if e["ts"] >= until.get(e["tid"], float("-inf")):
            until[e["tid"]] = e["ts"] + e["dur"]
            yield e


# --- making one -------------------------------------------------------------------------------------


def profile(options: argparse.Namespace) -> tuple[Breakdown, Path]:
    """Make the model, play a script warm, then again under the profiler. Raise Refused for what this machine lacks."""
    import torch
    from torch.profiler import ProfilerActivity

    from mobile.live_model.compat import check_docstrings

    check_docstrings()  # before the classes are imported
    from mobile.policies.strategy import BigLittle, resolve
    from suites.synthetic import models
    from suites.synthetic.script import ScriptLength, drawn, with_rate
    from suites.synthetic.script_player import play

    link = options.link or real_time_link("cuda" if torch.cuda.is_available() else "cpu")
    if LINKS[link].needs_gpu and not torch.cuda.is_available():
        raise Refused("There is no CUDA device that torch can use here; give --link paced to try the code.")
    if options.tokens < 1:
        raise Refused("Give --tokens a positive number.")
    outputs.check_folder(options.out)
    show.waiting(f"making a model of {options.geometry} ...")
    device = LINKS[link].usual_device
    made = models.make(options.geometry, layers=options.layers, shrink=options.shrink, device=device)
    strategy, geometry = resolve(options.strategy), made.geometry
    script = drawn(
        options.routing,
        ScriptLength(prompt_tokens=8, steps=options.tokens),
        layers=geometry.moe_layers,
        experts=geometry.experts,
        top_k=geometry.top_k,
        seed=0,
    )
    if isinstance(strategy.gating, BigLittle):
        script = with_rate(script, options.rate, 0)
    capacity = {"memory": options.memory} if options.memory else {"slots": strategy.min_slots(geometry)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "trace.json"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with made.attached(strategy, **capacity, link=link, link_gb_per_s=options.link_gb_per_s) as engine:
        play(made, script)
        engine.ledger.clear()
        with named_parts(engine) as begun, torch.profiler.profile(activities=activities) as watched:
            play(made, script)
        watched.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        spans = spans_of(events)
        if device == "cpu":  # another thread copied, and the ledger knows when
            first = min(e["ts"] for e in events if _scoped(e) and e["name"].endswith(" pass"))
            copied = (e for e in engine.ledger.events if e.what in ("load", "prefetch"))
            spans += [Span("copies", *(first + (ns - begun[0]) / 1e3 for ns in (e.start_ns, e.end_ns))) for e in copied]
    return breakdown(spans, window_of(events), options.tokens), path


@contextmanager
def named_parts(engine: Any) -> Iterator[list[int]]:
    """Give passes and the expert kernel names in the trace; yields when each pass began on the link's clock."""
    from torch.profiler import record_function

    begun: list[int] = []

    def kernel_scope() -> AbstractContextManager[Any]:
        return record_function(EXPERTS)

    def pass_scope(running: Any) -> AbstractContextManager[Any]:
        begun.append(engine.link.now)
        return record_function(f"{SCOPE}{running.kind} pass")

    with engine.observed(kernel_scope, pass_scope):
        yield begun


# --- the command ------------------------------------------------------------------------------------


def declare(verbs: Any) -> None:
    """Add the command to the others."""
    help_text = "where the time of a decode step goes, by torch.profiler, on a synthetic model of a real geometry"
    sub = verbs.add_parser(
        "profile",
        help=help_text,
        description=help_text,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--geometry", required=True, metavar="NAME", help="olmoe-1b-7b, qwen3-30b-a3b, ...")
    sub.add_argument("--strategy", default="on-demand-overlap", metavar="NAME", help="(default: %(default)s)")
    sub.add_argument("--out", type=Path, default=Path("profile"), metavar="FOLDER", help="(default: %(default)s)")
    sub.add_argument("--tokens", type=int, default=8, metavar="N", help="decode steps (default: %(default)s)")
    sub.add_argument("--routing", default="uniform", metavar="KIND", help="uniform, or zipf EXPONENT")
    sub.add_argument("--rate", type=float, default=0.2, metavar="R", help="of fallbacks, for mobile (default: 0.2)")
    sub.add_argument("--memory", metavar="SIZE", help="like 16GiB (default: the fewest slots that the strategy needs)")
    sub.add_argument(
        "--link",
        choices=tuple(name for name, kind in LINKS.items() if kind.real_time),
        help="(default: cuda where there is a GPU)",
    )
    sub.add_argument("--link-gb-per-s", type=float, metavar="RATE", help="slow the link down to this")
    sub.add_argument("--layers", type=int, metavar="N", help="MoE layers (default: as many as host memory holds)")
    sub.add_argument("--shrink", type=int, default=1, metavar="N", help="divide every width, to try it on a CPU")


def run(options: argparse.Namespace) -> int:
    """Profile, write the breakdown and print it; return the exit code."""
    found, trace = profile(options)
    (options.out / "breakdown.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    out = show.console()
    table = show.table(f"{options.geometry}, {options.strategy}: decode", "time", "ms/token", "of the wall")
    rows = {**found.kinds_ms, "neither: the host alone": found.alone_ms, "wall": found.wall_ms}
    for name, ms in rows.items():
        table.add_row(name, f"{ms / found.tokens:,.3f}", f"{ms / found.wall_ms:.1%}")
    out.print(table)
    out.print("\nCopies and kernels run beside one another, so shares may add up to more than all of it.")
    out.print(f"{trace}: the trace, for ui.perfetto.dev; {options.out / 'breakdown.json'}: these numbers")
    return 0
