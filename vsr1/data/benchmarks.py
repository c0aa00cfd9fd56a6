"""The paper's three benchmarks in numbers: videos, queries and lengths of the splits that recipes train and test on.

For Charades-FIG and the test split of DiDeMo-FIG these were counted in the public annotation files. `published` marks what
was not: those are the numbers of the underlying data sets' papers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Videos and annotated queries of a split; mean seconds of a video; published: taken from literature, not counted."""

    videos: int
    queries: int
    seconds: float
    published: bool = False


@dataclass(frozen=True)
class Benchmark:
    """A data set: what is trained on, what is tested on, and seconds of the longest video that memory must hold."""

    title: str
    train: Split
    test: Split
    longest: float


BENCHMARKS = {
    "charades": Benchmark("Charades-FIG", Split(5338, 12408, 31.4), Split(1334, 3720, 29.95), 194.0),
    "didemo": Benchmark("DiDeMo-FIG", Split(8395, 33005, 46.7, published=True), Split(1002, 4013, 50.0), 180.0),
    "activitynet": Benchmark(
        "ActivityNet-FIG",
        Split(10009, 37421, 118.0, published=True),
        Split(4885, 17031, 118.0, published=True),
        755.0,
    ),
}
