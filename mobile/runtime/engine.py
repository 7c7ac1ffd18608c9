"""The engine: the slots, the clock and the trace behind one attached model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, NoReturn

import torch

from mobile.costs.cost_model import CostModel
from mobile.costs.geometry import Geometry
from mobile.costs.hardware import HardwareProfile
from mobile.errors import Refused
from mobile.kernels import Kernel, group
from mobile.ledger import Key, Ledger
from mobile.links.base import Link
from mobile.live_model import compat
from mobile.live_model.guards import COPYING
from mobile.policies.next_logits import NextLayerLogits, of_one_layer, predicting_layer
from mobile.policies.protocols import PolicyContext
from mobile.policies.strategy import CustomRouting, Strategy
from mobile.replay.trace import Request
from mobile.residency.residency import PREFILL_BUFFERS, Residency
from mobile.runtime.forward_pass import ForwardPass, RouterInput, Selection
from mobile.runtime.quasi_hidden_state import QuasiHiddenState
from mobile.store.memory import HostStore

MakeLink = Callable[["Engine", CostModel], Link]
_stepping: ContextVar[tuple[Engine, ...]] = ContextVar("mobile_engines_stepping", default=())


class Engine:
    """Everything `attach` adds to a model, reachable as `model.mobile`.

    Forward passes of several threads take turns (`lock`), so each thread's tokens are what it would get alone.
    `recording` follows one caller only.
    """

    def __init__(
        self,
        strategy: Strategy,
        layers: Sequence[compat.MoeLayer],
        little_k: int,
        charged: Geometry,
        layer_map: tuple[tuple[int, ...], ...],
        slots: int,
        hardware: HardwareProfile,
        store: HostStore,
        kernel: Kernel,
        poison: bool,
    ) -> None:
        self.strategy, self.layers, self.geometry, self.slots = strategy, layers, charged, slots
        self.hardware, self.layer_map, self.store = hardware, layer_map, store
        self.little = little_k
        self.ledger = Ledger()
        self.running: ForwardPass | None = None
        self.undoable: frozenset[type] = frozenset()  # cache types in which the self-test undid a step
        self.recorded: list[Request] | None = None
        self.heard: dict[int, RouterInput] = {}  # by layer, what its router was last given, where it is foreseen
        self.quasi: QuasiHiddenState | None = None  # set by attach, for a strategy that foresees from it
        self._records_ahead = False
        self._foreseen: dict[int, Selection] = {}  # by layer, its router's word on the layer before's input
        self.lock = threading.RLock()
        self._kernel, self._poison = kernel, poison
        self._top_k = [layer.top_k for layer in layers]
        self._owner = [mine for mine, covered in enumerate(layer_map) for _ in covered]
        self._batch: list[Request] = []
        self._broken = False  # a step was broken off and the slots hold nobody knows what
        self.leave: Callable[[], None] = lambda: None  # set by attach: how to undo it
        self.leaving = False  # a detach has begun, and experts may be anywhere
        self.device = compat.device_of(layers)
        self.slot_rows = torch.empty(0, store.layout.numel, dtype=store.layout.dtype, device=self.device)
        self._views = store.layout.views(self.slot_rows)
        self._told_alone = False

    @property
    def experts(self) -> int:
        return self.layers[0].count

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """Raise Refused: a copy of any part of an attached model would be without its experts."""
        raise Refused(COPYING)

    def stats(self) -> dict[str, Any]:
        """What happened since attach, as plain numbers (see `mobile.ledger.Counters` for their meaning)."""
        return self.ledger.stats()

    # --- coming and going ---------------------------------------------------------------------------

    def allocate(self) -> None:
        """Take the slots' memory. Raises Refused, with nothing taken, if the device has too little."""
        rows, layout = self.slots + PREFILL_BUFFERS, self.store.layout
        try:
            taken = torch.zeros(rows, layout.numel, dtype=layout.dtype, device=self.device)
        except RuntimeError as error:  # out of memory, on any device
            raise Refused(
                f"{rows * layout.nbytes / 2**30:.1f} GiB for {self.slots} slots could not be taken on {self.device}; "
                "give fewer slots or less memory."
            ) from error
        self.slot_rows, self._views = taken, layout.views(taken)

    def connect(self, make: MakeLink) -> None:
        """Make the link and start with cold slots."""
        self._cost = CostModel(self.hardware, self.geometry)
        self.link = make(self, self._cost)
        self.restart()

    def restart(self) -> None:
        """Cold slots, an empty ledger and a clock at zero."""
        self.ledger.clear()
        self._cold()
        self.link.rewind()

    def close(self) -> None:
        """Let go of the link, if it was made, of the routers, and of the slots; may be called again."""
        self._all_k()
        if hasattr(self, "link"):
            self.link.close()
        self.slot_rows, self._views = self.slot_rows.new_empty(0), {}

    def _cold(self) -> None:
        """Empty slots, whatever was in them or on its way; the clock and the counters go on."""
        self.link.reset()
        self._all_k()
        self.running = None
        self.residency = Residency(
            self.strategy,
            PolicyContext.of(self._cost, self.slots, layer_map=self.layer_map),
            self.link,
            self._cost,
            self.ledger,
            self._emptied,
        )
        if self._poison:
            self.slot_rows.fill_(float("nan"))
        for key, slot in self.residency.preload_all():
            self.fill(key, slot)
        self.link.join()  # no copy overtakes what has just been written
        self._broken = False

    # --- bytes --------------------------------------------------------------------------------------

    def row(self, key: Key) -> torch.Tensor:
        """The expert's row in host memory, (row elements,)."""
        return self.store.rows[self._owner[key[0]]][key[1]]

    def fill(self, key: Key, slot: int) -> None:
        """Put the expert's bytes into the slot, now."""
        self.slot_rows[slot].copy_(self.row(key))

    def arrived(self, key: Key, slot: int) -> None:
        """The link's word that the expert's bytes are in the slot."""
        self.residency.arrived(key, slot)

    def _emptied(self, slot: int) -> None:
        if self._poison:
            self.slot_rows[slot].fill_(float("nan"))
            self.link.used([slot])  # the next copy into it comes after

    # --- one forward pass ---------------------------------------------------------------------------

    @contextmanager
    def little_k(self) -> Iterator[None]:
        """A context in which every router chooses K/2 experts."""
        for layer in self.layers:
            setattr(*layer.top_k_attribute, self.little)
        yield
        self._all_k()

    def _all_k(self) -> None:
        for layer, top_k in zip(self.layers, self._top_k, strict=True):
            setattr(*layer.top_k_attribute, top_k)

    def step(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """Run all that one call of the model does, alone on the engine, and without gradients.

        What is called inside is part of it. (That it is inside is known by its context, which ends with the call
        whatever ends that.)
        """
        if self in _stepping.get():
            return run(*arguments)
        gradients = torch.is_grad_enabled()
        try:
            return copy_context().run(self._step_alone, run, arguments)
        except BaseException:
            torch.set_grad_enabled(gradients)  # where Ctrl-C came on the line that does it below
            raise

    def _step_alone(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Do that. Whatever breaks it off anywhere (a failing copy, Ctrl-C) leaves slots that nobody trusts.

        The next step starts cold. What it had opened is closed here alone: Ctrl-C may come between a context and the
        knowledge of it.
        """
        _stepping.set((*_stepping.get(), self))
        with self.lock:
            if self._broken:
                self._cold()
            self._broken = True
            gradients = torch.is_grad_enabled()
            try:
                torch.set_grad_enabled(False)  # slots are written to again and again, so none could be computed
                result = run(*arguments)
            except BaseException:
                broken_off, self.running = self.running, None
                self._all_k()
                if broken_off is not None:
                    self.residency.abandon()
                raise
            finally:
                torch.set_grad_enabled(gradients)
            self._broken = False
            return result

    @contextmanager
    def passing(self, running: ForwardPass) -> Iterator[None]:
        """One forward pass: opens and closes it on the clock."""
        self.running = running
        self.residency.begin(running.kind, running.tokens, running.counted)
        yield
        self.residency.finish()
        self.running = None

    def run_experts(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """One layer's routed experts: hidden (tokens, H), index and weights (tokens, K) -> (tokens, H)."""
        return self.step(self._run_routed, layer, hidden, index, weights)

    def _run_routed(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.running is None:
            return self._run_alone(layer, hidden, index, weights)
        chosen = self._reroute(layer, index, weights) if self.running.kind == "full" else (index, weights)
        return self._run_experts(layer, hidden, *self.running.select(layer, *chosen, self.experts))

    def _reroute(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> Selection:
        """What the gating makes of the router's choice; an expert of weight 0 becomes nobody's."""
        gating = self.strategy.gating
        if not isinstance(gating, CustomRouting):
            return index, weights
        index, weights = gating.choose(layer, (index, weights), self._foreseen.pop(layer, None))
        return index.masked_fill(weights == 0, self.experts), weights

    def _run_alone(self, layer: int, hidden: torch.Tensor, *selection: torch.Tensor) -> torch.Tensor:
        """A layer was called by itself, outside of any model's forward: prefill, if anything."""
        if self.strategy.acts_on_decode and not self._told_alone:
            self._told_alone = True
            warnings.warn(
                "Layers of the attached model are called without its forward, so every call runs as a prompt does, "
                f"with all experts and no cache of them: the strategy {self.strategy.name} does not act.",
                stacklevel=2,
            )
        if layer == 0:
            self.residency.begin("prefill", hidden.shape[0])
        return self._run_experts(layer, hidden, *selection)

    def _run_experts(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        groups = group(index, self.experts)
        if self.foresees and self.running is not None and self.running.kind != "prefill":
            self._look_ahead(layer, self.running, index, weights)
        *others, last = self.layer_map[layer]
        for other in others:
            for _ in self.residency.layer(other, groups.experts, groups.counts, self._signal(layer, last=False)):
                pass
        waves = self.residency.layer(last, groups.experts, groups.counts, self._signal(layer, last=True))
        host = () if self.strategy.on_cpu is None else (self.store.views(layer),)
        return self._kernel(self.layers[layer].experts, hidden, weights, groups, waves, self._views, *host)

    @property
    def foresees(self) -> bool:
        """Whether the next layer's router is asked at every layer: to look or route ahead, or for a trace."""
        return self._signals or self._routes_ahead

    @property
    def _signals(self) -> bool:
        return self.strategy.lookahead is not None or self._records_ahead

    @property
    def _routes_ahead(self) -> bool:
        return isinstance(self.strategy.gating, CustomRouting) and self.strategy.gating.foresees

    def _look_ahead(self, layer: int, running: ForwardPass, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Ask the next layer's router about this layer's input, where it is known what else to give it."""
        if layer + 1 == len(self.layers):
            return
        (hidden, *_), _ = running.router_inputs[layer]
        beside = self._beside(layer, running, hidden)
        if self.quasi is not None:
            hidden = self.quasi.after(layer, index, weights).view_as(hidden)
        if beside is None:
            return
        following, given, named = self.layers[layer + 1], (hidden, *beside[0]), beside[1]
        if self._signals:
            running.ahead[layer] = following.logits(given, named).to(torch.float16).cpu().numpy()
        if self._routes_ahead:
            self._foreseen[layer + 1] = following.choice(given, named)

    def _beside(self, layer: int, running: ForwardPass, hidden: torch.Tensor) -> RouterInput | None:
        """Return what the next layer's router is probably given beside hidden states; None if that is not known.

        A router of this layer's class is given what this one is where that belongs to the tokens, and the rest as the
        last time; another is given all as the last time, which must have been as many tokens.
        """
        (_, *here), named_here = running.router_inputs[layer]
        alike = type(self.layers[layer].router) is type(self.layers[layer + 1].router)
        if layer + 1 not in self.heard:
            return (tuple(here), named_here) if alike else ((), {})
        (then, *others), named = self.heard[layer + 1]

        def of_tokens(part: Any) -> bool:
            return torch.is_tensor(part) and part.shape[: then.ndim - 1] == then.shape[:-1]

        if alike and len(here) == len(others) and named_here.keys() == named.keys():
            others = [mine if of_tokens(last) else last for last, mine in zip(others, here, strict=True)]
            return tuple(others), {key: named_here[key] if of_tokens(last) else last for key, last in named.items()}
        if then.shape[:-1] != hidden.shape[:-1] and any(map(of_tokens, (*others, *named.values()))):
            return None
        return tuple(others), named

    def _signal(self, layer: int, *, last: bool) -> NextLayerLogits | None:
        source = predicting_layer(layer, last, len(self.layers))
        logits = self.running.ahead.get(source) if self.running is not None and source is not None else None
        return None if logits is None else of_one_layer(logits)

    def predict(self, little: ForwardPass) -> list[torch.Tensor]:
        """Per layer the K experts (tokens, K) that the little pass's recorded router inputs name."""
        return [layer.route(*little.router_inputs[number]) for number, layer in enumerate(self.layers)]

    def fall_back(self, predicted: list[torch.Tensor], unsure: torch.Tensor) -> None:
        """Tell the clock that rows were unsure, and what their big pass will probably need, in layer order."""
        wanted = [layer[unsure].unique().tolist() for layer in predicted]
        keys = [(layer, e) for mine, covered in enumerate(self.layer_map) for layer in covered for e in wanted[mine]]
        self.residency.fallback(keys, int(unsure.sum()))

    def remember(
        self,
        done: ForwardPass,
        live: torch.Tensor | None = None,
        confidence: torch.Tensor | None = None,
        predicted: list[torch.Tensor] | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        """Append the pass to the trace of each live row, if a recording is on; `fresh` begins new requests."""
        if self.recorded is None:
            return
        rows = done.valid.shape[0]
        if fresh or len(self._batch) != rows:
            self._batch = [[] for _ in range(rows)]
            self.recorded.extend(self._batch)
        written = [True] * rows if live is None else live.tolist()
        sure = [None] * rows if confidence is None else confidence.tolist()
        foreseen = [layer.tolist() for layer in predicted or ()]
        for row in range(rows):
            if written[row]:
                self._batch[row].append(done.row_step(row, sure[row], foreseen))

    @contextmanager
    def recording(self, *, ahead: bool = False) -> Iterator[list[Request]]:
        """Inside the block every sequence's routing is recorded; yields the growing list of requests.

        With `ahead`, and what next-layer predictors need, see `trace.Step`.
        """
        self.recorded, self._batch, self._records_ahead = [], [], ahead
        try:
            yield self.recorded
        finally:
            self.recorded, self._records_ahead = None, False
