"""Predictors trained on traces name the next layer's experts (nearest kin: ProMoE, Song et al., arXiv 2410.22134).

One predictor a layer, from this layer's input and routing to the next layer's experts: `ridge`, a closed form,
or `mlp`, one hidden layer as in ProMoE. Cache and guess slots are next-gate's, so that only the guess differs.
Lossless: a wrong guess is only a wasted load, unlike SiDA (2310.18859), which executes it. Changed: the input is seen
through the next layer's router (its logits on this layer's input, as many numbers as experts) and through the experts
chosen here, not whole; one layer ahead (ProMoE: a stride); no predictor's own time is charged. ProMoE claims 2.20x
in prefill and 2.07x in decode on average. MoBiLE criticises their training cost, so a file states it:

    python -m baselines.trained_predictor fit --trace TRACE.npz ... --out predictor.npz

with traces recorded under `model.mobile.recording(ahead=True)`; then `trained_predictor("predictor.npz")` is the
Strategy. The registered `trained-predictor` has no file and learns during the run, from decode tokens of batch 1: it
guesses as next-gate does up to the first number of tokens in FITTED_AT, fits a ridge on them, and again at the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from baselines.next_gate import GUESS_SLOTS, NEXT_GATE
from baselines.signals.ridge import Examples, Kind, Predictor
from mobile.errors import Refused
from mobile.policies import Key, NextLayerLogits, PolicyContext, Strategy, Training, predicting_layer, top_experts

FITTED_AT = (512, 1024, 2048, 4096)  # tokens seen; with fewer a ridge guesses worse than next-gate


class Trained:
    """A lookahead that guesses the next layer's top-k experts with a given predictor, or with one that it fits.

    Where several layers are charged with one recorded layer's routing, a layer and the next may share it. A guess is
    therefore made from the recorded layer before the next one's, so that it never knows what it is to guess.
    """

    def __init__(self, context: PolicyContext, predictor: Predictor | None = None, kind: Kind = "ridge") -> None:
        geometry = context.geometry
        layer_map = context.layer_map
        self._layers, self._experts, self._guesses = len(layer_map), geometry.experts, geometry.top_k
        self._recorded = {each: (mine, each == layers[-1]) for mine, layers in enumerate(layer_map) for each in layers}
        self._chosen: list[Sequence[int]] = [()] * self._layers  # by recorded layer, in the step that runs
        self._logits: list[np.ndarray | None] = [None] * self._layers
        self._kind = kind
        self.predictor = predictor
        self._examples = None if predictor is not None else Examples(self._layers, self._experts)
        self._fits, self._seconds = 0, 0.0
        if predictor is not None and predictor.shape != (self._layers - 1, self._experts):
            raise Refused(
                f"This predictor was fitted for {predictor.shape[0] + 1} layers of {predictor.shape[1]} experts, and "
                f"the model has {self._layers} of {self._experts}; fit one on the model's own traces."
            )

    def routed(self, layer: int, experts: Sequence[int], ahead: NextLayerLogits | None) -> Sequence[Key]:
        """Return the next layer's likeliest experts by the predictor; before the first fit, by its router."""
        mine, last = self._recorded[layer]
        self._chosen[mine] = experts
        source = predicting_layer(mine, last, self._layers)
        if source is None or ahead is None:
            if mine == self._layers - 1 and self._examples is not None:
                self._learn(self._examples)
            return ()
        self._logits[source] = logits = ahead.logits
        if self.predictor is None:
            best = ahead.likeliest(self._guesses)
        else:
            scores = self.predictor.scores(source, logits, self._chosen[source])
            (best,) = top_experts(scores.max(axis=0, keepdims=True), self._guesses)
        return [(layer + 1, expert) for expert in best]

    @property
    def training(self) -> Training | None:
        """Return what fitting took, of the predictor in use and of those before it; None up to the first fit."""
        if self.predictor is None:
            return None
        about, online = self.predictor.about, self._fits > 0
        return Training(
            tokens=about["tokens"],
            fits=self._fits or 1,
            seconds=self._seconds if online else about["seconds"],
            parameters=about["parameters"],
            nbytes=about["nbytes"],
            online=online,
        )

    def _learn(self, examples: Examples) -> None:
        """Add a step that is at its last layer, if it is of one token, to the examples; fit when they are enough."""
        rows = [logits[0] for logits in self._logits[:-1] if logits is not None and len(logits) == 1]
        if not rows or len(rows) < self._layers - 1:
            return
        examples.add(np.stack(rows), self._chosen)
        if len(examples) in FITTED_AT:
            self.predictor = Predictor.fit(examples, self._kind)
            self._fits += 1
            self._seconds += self.predictor.about["seconds"]
        if len(examples) == FITTED_AT[-1]:
            self._examples = None


def trained_predictor(source: str | PathLike[str] | Predictor | None = None, kind: Kind | None = None) -> Strategy:
    """Return the strategy with this predictor, or with that of a file; None: with one fitted during the run.

    Raise Refused if the file is not a predictor's, or its predictor is not of `kind`.
    """
    predictor = source if source is None or isinstance(source, Predictor) else Predictor.load(Path(source))
    if predictor is not None and kind not in (None, predictor.kind):
        raise Refused(f"The predictor is of the kind {predictor.kind}, not {kind}; fit another, or leave the kind out.")
    chosen: Kind = kind or "ridge" if predictor is None else predictor.kind
    return Strategy(
        name="trained-predictor",
        summary="next-gate with a predictor trained on traces; without a file, a ridge fitted as it goes",
        source="after ProMoE, arXiv 2410.22134 (2024)",
        lossless=True,
        retain="some",
        lookahead=partial(Trained, predictor=predictor, kind=chosen),
        guess_slots=GUESS_SLOTS,
        min_slots=NEXT_GATE.min_slots,
    )


TRAINED_PREDICTOR = trained_predictor()


if __name__ == "__main__":
    from baselines.signals.ridge import main

    main()
