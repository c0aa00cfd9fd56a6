"""How far the probability that the policy puts on "matched" can be believed, and the line that makes it believable.

The log-odds read off the answer token are those of saying "matched", not of being right. On held-out pairs two numbers, a
scale and an offset, are fitted so that they become the log-odds of the shown video being the right one (Platt 1999).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vsr1.records import Trajectory

_LEAST = 8  # pairs of each kind, below which two numbers are not fitted
_RIDGE = 1e-2  # keeps the scale finite where the two kinds separate perfectly


def pairs(trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, np.ndarray]:
    """Of every turn that gave a probability: its log-odds (n,) and whether the video was the right one (n,)."""
    seen = [
        (turn.probability, turn.video_id == one.moment.video_id)
        for one in trajectories
        for turn in one.turns
        if turn.probability is not None and one.moment.video_id is not None
    ]
    chance = np.clip(np.array([chance for chance, _ in seen]), 1e-9, 1 - 1e-9)
    return np.log(chance / (1 - chance)), np.array([right for _, right in seen], dtype=np.float64)


def fit(odds: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Scale and offset of the logistic regression of `right` on `odds`; (1, 0) where either kind is too rare to tell."""
    if min(right.sum(), len(right) - right.sum()) < _LEAST:
        return 1.0, 0.0
    weights, inputs = np.array([1.0, 0.0]), np.stack([odds, np.ones_like(odds)], 1)
    prior = np.array([1.0, 0.0])  # the ridge pulls to what the policy says itself
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ weights, -40, 40)))
        gradient = inputs.T @ (chance - right) + _RIDGE * (weights - prior)
        curvature = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-8:
            break
    return float(weights[0]), float(weights[1])


@dataclass(frozen=True)
class Bin:
    """The answers whose probability lies in one of equally wide bins: the bin's middle, how many they are, their mean
    probability, and the share of them whose video was the right one."""

    centre: float
    count: int
    chance: float
    right: float

    def interval(self, normal: float = 1.96) -> tuple[float, float]:
        """Wilson's interval of `right`, as if the answers were independent."""
        spread = normal**2 / self.count
        middle = (self.right + spread / 2) / (1 + spread)
        half = math.sqrt(spread * self.right * (1 - self.right) + spread**2 / 4) / (1 + spread)
        return max(middle - half, 0.0), min(middle + half, 1.0)


def reliability(chance: np.ndarray, right: np.ndarray, bins: int = 10) -> list[Bin]:
    """The bins that hold an answer, of probabilities `chance` (n,) and whether the video was the right one (n,)."""
    place = np.minimum((chance * bins).astype(int), bins - 1)
    found = [(one, place == one) for one in np.unique(place)]
    return [
        Bin((one + 0.5) / bins, int(inside.sum()), float(chance[inside].mean()), float(right[inside].mean()))
        for one, inside in found
    ]


def expected_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: how far share and probability lie apart, weighted by the answers of each bin."""
    return sum(one.count * abs(one.chance - one.right) for one in bins) / sum(one.count for one in bins)


def errors(trajectories: Sequence[Trajectory], bins: int = 10) -> dict[str, float | None]:
    """brier: mean squared error of the probabilities; ece: expected calibration error over equal-width bins; None where no
    turn gave a probability."""
    odds, right = pairs(trajectories)
    if not len(odds):
        return {"brier": None, "ece": None}
    chance = 1 / (1 + np.exp(-odds))
    return {"brier": float(((chance - right) ** 2).mean()), "ece": expected_error(reliability(chance, right, bins))}
