"""How far two spans of time overlap: intersection over union, and over the hull, as TVR's evaluator has it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Span = tuple[float, float]
Real = TypeVar("Real", bound=np.floating)


def iou(a: Span, b: Span) -> float:
    """Intersection over union of two spans in seconds; 0 where one of them is empty or reversed."""
    if a[1] <= a[0] or b[1] <= b[0]:
        return 0.0
    overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return overlap / ((a[1] - a[0]) + (b[1] - b[0]) - overlap)


def ious(start: NDArray[Real], end: NDArray[Real], true_start: NDArray[Real], true_end: NDArray[Real]) -> NDArray[Real]:
    """`iou` of many pairs of spans (n,), to the last bit; 0 also where a time is NaN."""
    overlap = _overlap(start, end, true_start, true_end)
    both = (end - start) + (true_end - true_start) - overlap
    whole = (end > start) & (true_end > true_start)
    return np.divide(overlap, both, out=np.zeros_like(overlap), where=whole)


def hull_ious(
    start: NDArray[Real], end: NDArray[Real], true_start: NDArray[Real], true_end: NDArray[Real]
) -> NDArray[Real]:
    """Intersection over hull of many pairs of spans (n,), in their own precision; 0 where the hull is empty."""
    overlap = _overlap(start, end, true_start, true_end)
    hull = np.maximum(end, true_end) - np.minimum(start, true_start)
    return np.divide(overlap, hull, out=np.zeros_like(overlap), where=hull != 0)


def _overlap(
    start: NDArray[Real], end: NDArray[Real], true_start: NDArray[Real], true_end: NDArray[Real]
) -> NDArray[Real]:
    return np.maximum(0, np.minimum(end, true_end) - np.maximum(start, true_start))
