"""The README's table of what runs learn: every run is printed, and the means are means."""

from __future__ import annotations

from typing import Any

from bench import learning


def share(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": (value or 0) - 0.02, "high": (value or 0) + 0.02}


def run(seed: int, base: float, iou: float | None = 0.9) -> dict[str, Any]:
    names = ("refinement + exclusion", "exclusion only", "refinement in words", "random soft tokens", "blank video")
    stage = {
        "before": {"R@1": share(base), "R@10": share(base)},
        "after": {"R@1": share(base), "R@10": share(base)},
        "vcmr_one_turn": {"0.5": share(base)},
        "vcmr": {"0.5": share(base)},
        "answered": {"0.5": share(base)},
        "ablations": {
            name: {"R@1": share(base), "R@1 wrong": share(base), "vcmr": {"0.5": share(base)}} for name in names
        },
        "tokens": {"soft": share(8.0), "hard": share(9.5)},
        "ver": share(base),
        "mean_iou": share(iou),
        "refinement_gain": {name: share(0.1 * seed) for name in names[1:]},
    }
    return {
        "seed": seed,
        "queries": 500,
        "corpus_size": 400,
        "sft": stage,
        "grpo": stage,
        "difference": {"vcmr 0.5": share(-0.012), "R@1 excluded": share(0.05), "ver": share(0.004)},
    }


def test_every_run_and_their_mean() -> None:
    text = learning.table([run(1, 0.2), run(2, 0.3, iou=None)])
    assert "seeds 1 and 2: 500 queries about 400 test videos. Percent" in text
    assert "| VR R@1, first query | 25.0 (20.0, 30.0) | 25.0 (20.0, 30.0) |" in text
    assert "| mean IoU on accepted right videos | 90.0 (90.0, -) |" in text  # a run that accepted nothing is no zero
    # the mean of two seeds is half again as sure: 2 / sqrt(2) = 1.4
    assert "only, right video second: +15.0 [13.6, 16.4] (+10.0 [8.0, 12.0]; +20.0 [18.0, 22.0])" in text
    assert "GRPO over SFT, VCMR IoU ≥ 0.5: -1.2 [-2.6, 0.2] (-1.2 [-3.2, 0.8]; -1.2 [-3.2, 0.8])" in text
    assert "takes 8 soft tokens; in words it takes 9.5" in text
