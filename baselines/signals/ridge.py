"""Predictors of the next layer's experts for `trained-predictor`, one a layer, fitted with numpy.

A token's features at a layer are the next layer's router logits on this layer's input and, one for each expert, whether
this layer chose it; its label is the set of experts the next layer chose.
"""

from __future__ import annotations

import argparse
import json
import time
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobile import outputs
from mobile.errors import Refused
from mobile.inputs import open_regular
from mobile.replay import trace
from mobile.replay.trace import Request

Kind = Literal["ridge", "mlp"]
FORMAT = "mobile-predictor-1"
RIDGE = 30.0  # the penalty's weight beside a token's, for features of unit spread
HIDDEN, EPOCHS, BATCH, RATE = 64, 20, 64, 3e-3


class Examples:
    """Decode tokens to fit on: for each, logits (layers - 1, experts) and the experts each layer chose."""

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts
        self._logits: list[np.ndarray] = []
        self._chosen: list[np.ndarray] = []
        self._label_of: np.ndarray | None = None  # by token, whose labels it gets; None: its own

    def __len__(self) -> int:
        return len(self._logits)

    def add(self, logits: np.ndarray, chosen: Sequence[Sequence[int]]) -> None:
        """Add a token: logits (layers - 1, experts), and the experts that each layer chose."""
        one_hot = np.zeros((self.layers, self.experts), dtype=bool)
        for layer, experts in enumerate(chosen):
            one_hot[layer, list(experts)] = True
        self._logits.append(logits)
        self._chosen.append(one_hot)

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Examples:
        """Return the full-K decode steps of traces. Raise Refused if none carries router logits."""
        found: Examples | None = None
        for step in (step for request in requests for step in request if step.kind == "full"):
            if step.ahead is not None and step.ahead.size:
                found = found or cls(len(step.experts), step.ahead.shape[1])
                found.add(step.ahead, step.experts)
        if found is None:
            raise Refused(
                "No decode step carries router logits; record the trace with model.mobile.recording(ahead=True)."
            )
        return found

    def at(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return features (tokens, 2 x experts) of a layer, and labels (tokens, experts) of the next, float64."""
        logits = np.stack([each[layer] for each in self._logits]).astype(np.float64)
        chosen = np.stack([each[layer : layer + 2] for each in self._chosen]).astype(np.float64)
        labels = chosen[:, 1] if self._label_of is None else chosen[self._label_of, 1]
        return np.concatenate([logits, chosen[:, 0]], axis=1), labels

    def shuffled(self, seed: int = 0) -> Examples:
        """Return the same features under other tokens' labels: a control, which shows only how popular experts are."""
        control = Examples(self.layers, self.experts)
        control._logits, control._chosen = self._logits, self._chosen
        control._label_of = np.random.default_rng(seed).permutation(len(self))
        return control


@dataclass(frozen=True)
class Predictor:
    """A fitted predictor: matrices for every layer but the last, float64, the last row of each being its bias.

    Their numbers are rounded to float16: products of two of those are exact in float64, so that the order in which a
    machine sums does not change a guess. `about` is what the fit took:
    tokens, seconds of processor time, parameters, nbytes.
    """

    kind: Kind
    experts: int
    weights: tuple[tuple[np.ndarray, ...], ...]
    about: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of predicted layers, and of experts of each."""
        return len(self.weights), self.experts

    def scores(self, layer: int, logits: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
        """Return scores (rows, experts) of the next layer's experts, higher is likelier, for logits of that shape.

        All rows share what was `chosen` at `layer`: of a batch only the union of its active experts is known.
        """
        features = np.zeros((len(logits), 2 * self.experts))
        features[:, : self.experts] = logits
        features[:, [self.experts + expert for expert in chosen]] = 1
        return self._apply(layer, features)

    def _apply(self, layer: int, features: np.ndarray) -> np.ndarray:
        """Return scores (tokens, experts) for features (tokens, 2 x experts)."""
        *hidden, last = self.weights[layer]
        for matrix in hidden:
            features = np.maximum(features @ matrix[:-1] + matrix[-1], 0)
        return features @ last[:-1] + last[-1]

    @classmethod
    def fit(cls, examples: Examples, kind: Kind = "ridge", seed: int = 0) -> Predictor:
        """Fit every layer's predictor on the examples."""
        begun = time.process_time()
        rng = np.random.default_rng(seed)
        weights = []
        for layer in range(examples.layers - 1):
            features, labels = examples.at(layer)
            matrices = ridge(features, labels) if kind == "ridge" else mlp(features, labels, rng)
            weights.append(tuple(matrix.astype(np.float16).astype(np.float64) for matrix in matrices))
        parameters = sum(matrix.size for matrices in weights for matrix in matrices)
        about = {
            "tokens": len(examples),
            "seconds": time.process_time() - begun,
            "parameters": parameters,
            "nbytes": 2 * parameters,
        }
        return cls(kind, examples.experts, tuple(weights), about)

    def recall(self, examples: Examples, guesses: int) -> list[float]:
        """Return, by layer, the share of the next layer's experts that are among the predictor's first `guesses`."""
        return [
            recall(self._apply(layer, features), labels, guesses)
            for layer, (features, labels) in ((layer, examples.at(layer)) for layer in range(len(self.weights)))
        ]

    def save(self, path: Path) -> None:
        """Write it as a numpy archive, without a pickle. Raise Refused where it cannot be written."""
        header = {"format": FORMAT, "kind": self.kind, "experts": self.experts, "about": self.about}
        stages = {
            f"stage_{number}": np.stack([matrices[number] for matrices in self.weights]).astype(np.float16)
            for number in range(len(self.weights[0]))
        }
        written = np.frombuffer(json.dumps(header, sort_keys=True).encode(), dtype=np.uint8)
        with outputs.open_atomic(path) as file:
            np.savez_compressed(file, allow_pickle=False, header=written, **stages)

    @classmethod
    def load(cls, path: Path) -> Predictor:
        """Read a file that `save` wrote. Raise Refused for any other file."""
        try:
            with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
                header = json.loads(archive["header"].tobytes())
                stages = [archive[f"stage_{n}"].astype(np.float64) for n in range(len(archive.files) - 1)]
                if header["format"] != FORMAT:
                    raise ValueError(header["format"])
                weights = tuple(zip(*stages, strict=True))
                return cls(header["kind"], header["experts"], weights, header["about"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            EOFError,
            RuntimeError,
            SyntaxError,
            MemoryError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise Refused(
                f"{path} is not a complete {FORMAT} file; fit one with: "
                f"python -m baselines.trained_predictor fit --trace TRACE.npz --out {path}"
            ) from error


def recall(scores: np.ndarray, labels: np.ndarray, guesses: int) -> float:
    """Return the share of the labels (tokens, experts) that are among each row's `guesses` highest scores."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :guesses]
    return float(np.take_along_axis(labels, best, axis=1).sum() / labels.sum())


def _scale(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each feature's mean, and its standard deviation, 1 where that is 0."""
    spread = features.std(axis=0)
    return features.mean(axis=0), np.where(spread > 0, spread, 1)


def _unscaled(matrix: np.ndarray, bias: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return the weights for raw features, given those for features scaled by `_scale`, with the bias as last row."""
    matrix = matrix / spread[:, None]
    return np.vstack([matrix, bias - mean @ matrix])


def ridge(features: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Fit least squares with a penalty on the weights of scaled features, in closed form; return [matrix]."""
    mean, spread = _scale(features)
    x, base = (features - mean) / spread, labels.mean(axis=0)
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += RIDGE
    return [_unscaled(np.linalg.solve(gram, x.T @ (labels - base)), base, mean, spread)]


def mlp(features: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Fit one hidden layer of HIDDEN rectified units to the cross-entropy of each expert; return both matrices.

    By Adam (Kingma and Ba, arXiv 1412.6980) for EPOCHS epochs.
    """
    mean, spread = _scale(features)
    x, y = ((features - mean) / spread).astype(np.float32), labels.astype(np.float32)
    prior = np.clip(y.mean(axis=0), 1e-3, 1 - 1e-3)
    layers = [
        rng.normal(0, np.sqrt(2 / x.shape[1]), (x.shape[1], HIDDEN)),
        np.zeros(HIDDEN),
        rng.normal(0, np.sqrt(1 / HIDDEN), (HIDDEN, y.shape[1])),
        np.log(prior / (1 - prior)),
    ]
    first, bias, second, base = values = [np.asarray(value, dtype=np.float32) for value in layers]
    moments = [(np.zeros_like(value), np.zeros_like(value)) for value in values]
    step = 0
    for _ in range(EPOCHS):
        for rows in np.array_split(rng.permutation(len(x)), max(1, len(x) // BATCH)):
            step += 1
            hidden = np.maximum(x[rows] @ first + bias, 0)
            error = (1 / (1 + np.exp(-(hidden @ second + base))) - y[rows]) / len(rows)
            back = (error @ second.T) * (hidden > 0)
            slopes = (x[rows].T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0))
            for value, slope, (mean_of, square_of) in zip(values, slopes, moments, strict=True):
                mean_of += 0.1 * (slope - mean_of)
                square_of += 0.001 * (slope**2 - square_of)
                value -= RATE * (mean_of / (1 - 0.9**step)) / (np.sqrt(square_of / (1 - 0.999**step)) + 1e-8)
    return [_unscaled(first, bias, mean, spread), np.vstack([second, base])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `fit --trace TRACE.npz ... --out predictor.npz`: fit a predictor, save it, and print what that took."""
    parser = argparse.ArgumentParser(prog="python -m baselines.trained_predictor")
    fit = parser.add_subparsers(required=True).add_parser("fit", help="fit a predictor of next-layer experts on traces")
    fit.add_argument("--trace", type=Path, nargs="+", required=True, help="recorded with recording(ahead=True)")
    fit.add_argument("--out", type=Path, required=True)
    fit.add_argument("--kind", choices=["ridge", "mlp"], default="ridge")
    fit.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        outputs.check_file(given.out)
        predictor = Predictor.fit(
            Examples.of(request for path in given.trace for request in trace.load(path)[0]), given.kind, given.seed
        )
        predictor.save(given.out)
    except Refused as refusal:
        raise SystemExit(str(refusal)) from None
    about = predictor.about
    print(
        f"{given.out}: {predictor.kind}, {about['tokens']:,} tokens, fitted in {about['seconds']:.2f} s, "
        f"{about['parameters']:,} parameters, {about['nbytes']:,} bytes"
    )
