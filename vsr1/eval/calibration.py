"""How far the probability that the policy puts on "matched" can be believed, and the line that makes it believable.

The log-odds read off the answer token are those of saying "matched", not of being right. On held-out pairs two numbers, a
scale and an offset, are fitted so that they become the log-odds of the shown video being the right one (Platt 1999).
"""

from __future__ import annotations

from collections.abc import Sequence

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


def errors(trajectories: Sequence[Trajectory], bins: int = 10) -> dict[str, float | None]:
    """brier: mean squared error of the probabilities; ece: expected calibration error over equal-width bins; None where no
    turn gave a probability."""
    odds, right = pairs(trajectories)
    if not len(odds):
        return {"brier": None, "ece": None}
    chance = 1 / (1 + np.exp(-odds))
    place = np.minimum((chance * bins).astype(int), bins - 1)
    gaps = [abs(float((chance - right)[place == one].sum())) for one in range(bins)]
    return {"brier": float(((chance - right) ** 2).mean()), "ece": sum(gaps) / len(chance)}
