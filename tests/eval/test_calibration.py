"""Probabilities that mean what they say: the fit against data of known odds, and the errors against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vsr1.eval import calibration
from vsr1.records import Moment, Reply, Trajectory, Turn


def shown(probability: float | None, right: bool) -> Trajectory:
    reply = Reply("matched", None, None, "", True)
    video, vector = "v0" if right else "v1", torch.zeros(2)
    turn = Turn(video, 0.5, 1, reply, "", (), vector, vector, probability=probability)
    return Trajectory(Moment("q", "text", "v0"), (turn,), vector, 1, "matched")


def test_a_known_scale_and_offset_are_found() -> None:
    generator = np.random.default_rng(0)
    odds = generator.normal(0, 4, 20_000)
    right = generator.random(20_000) < 1 / (1 + np.exp(-(0.4 * odds - 0.8)))
    assert calibration.fit(odds, right.astype(float)) == pytest.approx((0.4, -0.8), abs=0.06)


def test_perfect_separation_stays_finite_and_too_little_is_left_alone() -> None:
    odds = np.concatenate([np.full(20, -3.0), np.full(20, 3.0)])
    scale, offset = calibration.fit(odds, (odds > 0).astype(float))
    assert math.isfinite(scale) and 1 < scale < 50 and abs(offset) < 0.1
    assert calibration.fit(odds[:25], (odds[:25] > 0).astype(float)) == (1.0, 0.0)


def test_errors_by_their_definitions() -> None:
    found = [shown(0.9, True), shown(0.92, False), shown(0.3, False), shown(None, True)]
    errors = calibration.errors(found)
    assert errors["brier"] == pytest.approx((0.1**2 + 0.92**2 + 0.3**2) / 3)
    assert errors["ece"] == pytest.approx((abs(0.9 + 0.92 - 1) + 0.3) / 3)
    assert calibration.errors([shown(None, True)]) == {"brier": None, "ece": None}


def test_fitting_mends_the_error() -> None:
    generator = np.random.default_rng(1)
    sure = 1 / (1 + np.exp(-generator.normal(0, 6, 2000)))
    found = [shown(float(one), bool(generator.random() < 0.5 + 0.3 * (one - 0.5))) for one in sure]
    odds, right = calibration.pairs(found)
    scale, offset = calibration.fit(odds, right)
    mended = 1 / (1 + np.exp(-(scale * odds + offset)))
    after = calibration.errors([shown(float(one), bool(hit)) for one, hit in zip(mended, right, strict=True)])
    before = calibration.errors(found)
    assert after["ece"] < 0.5 * before["ece"] and after["brier"] < before["brier"]
