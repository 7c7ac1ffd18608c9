"""The confidence signals that a little pass can be judged by: their names, and which of them ask the routers again.

`mobile.runtime.confidence` computes them. Each is from 0 to 1, and a token falls back where it is below gamma.
"""

from __future__ import annotations

from dataclasses import dataclass

PROBABILITY = "probability"  # the paper's


@dataclass(frozen=True)
class Signal:
    """One signal; `replays_routers` says that it asks every router, on every token, for its choice at K.

    That costs what the prediction before a fallback costs, which it then serves as well.
    """

    summary: str
    replays_routers: bool = False


SIGNALS: dict[str, Signal] = {
    PROBABILITY: Signal("the highest softmax probability (MoBiLE's)"),
    "margin": Signal("the highest softmax probability less the second highest"),
    "entropy": Signal("1 less the softmax's entropy over that of a uniform one, log V"),
    "coverage": Signal("the share of the K experts' router weight that the heaviest K/2 carry, mean of layers", True),
    "product": Signal("probability times coverage", True),
    "random": Signal("a number that knows nothing of the token, for control; gamma is then the fallback rate"),
}
