"""The figures that VideoSearch-R1 publishes (arXiv 2607.00446, and the page of its code), to set beside a run's own.

They are percentages without intervals, each over the whole test split of its benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SOURCE = "VideoSearch-R1, arXiv 2607.00446"
ZERO_SHOT, ONE_SHOT, EMBEDDER, METHOD = "zero-shot", "fine-tuned one-shot", "first query, no loop", "VideoSearch-R1"


@dataclass(frozen=True)
class Row:
    """One published row in percent: `vcmr` by IoU threshold, `ver`, `recall` by depth; what is not published is absent."""

    vcmr: Mapping[str, float] = field(default_factory=dict)
    ver: float | None = None
    recall: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's published rows, the names of the split that they are over, and its size where that is known."""

    title: str
    rows: Mapping[str, Row]
    splits: tuple[str, ...] = ("test",)
    queries: int | None = None
    videos: int | None = None


def _loop(vcmr: Sequence[float], ver: float, recall: Sequence[float] = ()) -> Row:
    return Row(dict(zip(("0.3", "0.5", "0.7"), vcmr, strict=True)), ver, _recall(recall) if recall else {})


def _recall(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("R@1", "R@5", "R@10", "R@100"), values, strict=True))


BENCHMARKS = {
    "charades": Benchmark(
        "Charades-FIG",
        {
            ZERO_SHOT: _loop((12.2, 7.2, 2.9), 30.0),
            ONE_SHOT: _loop((12.9, 10.4, 7.2), 74.7),
            EMBEDDER: Row(recall=_recall((21.6, 41.8, 51.5, 84.2))),
            METHOD: _loop((16.5, 13.4, 8.2), 75.7, (24.6, 42.9, 52.2, 84.7)),
        },
        queries=3720,
        videos=1334,
    ),
    "didemo": Benchmark(
        "DiDeMo-FIG",
        {
            ZERO_SHOT: _loop((22.0, 10.6, 4.0), 62.8),
            ONE_SHOT: _loop((23.6, 22.1, 16.7), 73.1),
            EMBEDDER: Row(recall=_recall((54.8, 79.3, 85.6, 97.0))),
            METHOD: _loop((33.3, 30.2, 19.7), 74.6, (59.0, 82.0, 87.8, 97.5)),
        },
        queries=4013,
        videos=1002,
    ),
    "activitynet": Benchmark(
        "ActivityNet-FIG",
        {
            ZERO_SHOT: _loop((17.2, 10.1, 5.8), 63.0),
            ONE_SHOT: _loop((29.1, 19.2, 11.4), 83.1),
            EMBEDDER: Row(recall=_recall((55.1, 78.8, 86.7, 98.1))),
            METHOD: _loop((33.8, 22.3, 12.3), 83.3, (61.1, 81.7, 88.5, 98.4)),
        },
        splits=("val_2", "test"),
    ),
}
