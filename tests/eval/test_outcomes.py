"""The table of outcomes: what its queries keep when some are taken, and resampling beyond single draws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.eval import shared
from vsr1.eval import metrics, outcomes, resampling
from vsr1.eval.spans import hull_ious, iou, ious

CELLS = 1 << 22


def test_queries_taken_keep_their_turns() -> None:
    found = shared.trajectories(60, seed=1, failures=0.2, together=True)
    chosen = np.random.default_rng(2).permutation(60)[:25]
    taken, expected = outcomes.of(found).take(chosen), outcomes.of([found[i] for i in chosen])
    for name, column in vars(expected).items():
        np.testing.assert_array_equal(getattr(taken, name), column, err_msg=name)
    none = taken.take(np.zeros(0, np.int64))
    assert len(none) == 0 and len(none.rank) == 0 and none.first.tolist() == [0]
    assert len(outcomes.of([])) == 0


def test_a_table_of_many_batches_is_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shared.trajectories(20, seed=8, failures=0.2)
    whole = outcomes.of(found)
    monkeypatch.setattr(outcomes, "_BATCH", 7)
    for name, column in vars(outcomes.of(found)).items():
        assert column.dtype == getattr(whole, name).dtype
        np.testing.assert_array_equal(column, getattr(whole, name), err_msg=name)


def test_a_table_is_measured_as_its_trajectories_are() -> None:
    found = shared.trajectories(80, seed=3, failures=0.1)
    assert metrics.summary(outcomes.of(found), n=20) == metrics.summary(found, n=20)
    assert metrics.refine_gains(outcomes.of(found)) == metrics.refine_gains(found)


def test_shared_queries_are_those_of_both_that_did_not_fail() -> None:
    first = shared.trajectories(6, seed=4)
    second = [*first[:0:-1], replace(first[0], moment=replace(first[0].moment, query_id="other"))]
    second[0] = replace(second[0], stop="failed")  # q5
    one, other = outcomes.shared(outcomes.of(first), outcomes.of(second))
    assert one.query_ids.tolist() == other.query_ids.tolist() == ["q1", "q2", "q3", "q4"]
    for moment in (replace(first[2].moment, video_id="v9"), replace(first[2].moment, end=99.0)):
        changed = [replace(trajectory, moment=moment) if trajectory is first[2] else trajectory for trajectory in first]
        with pytest.raises(ValueError, match=r"query 'q2' is about v0 .* in one and about v"):
            outcomes.shared(outcomes.of(first), outcomes.of(changed))


def test_many_overlaps_are_the_overlaps_of_each() -> None:
    generator = np.random.default_rng(5)
    spans = generator.integers(0, 12, size=(400, 4)) / 3
    one_by_one = [iou((a, b), (c, d)) for a, b, c, d in spans]
    np.testing.assert_array_equal(ious(*spans.T), one_by_one)
    over = np.array(one_by_one) > 0
    np.testing.assert_allclose(hull_ious(*spans.T)[over], np.array(one_by_one)[over], rtol=1e-12)
    assert ious(*np.array([[math.nan], [2.0], [0.0], [3.0]])).tolist() == [0]


def quantiles(sums: np.ndarray) -> np.ndarray:
    return np.quantile(sums, [0.025, 0.16, 0.5, 0.84, 0.975])


@pytest.mark.parametrize("kind", ["share", "turns", "reciprocal", "iou"])
def test_many_queries_are_resampled_as_if_drawn_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(6)
    n, draws = 3000, 1500
    turns = generator.integers(1, 4, size=n).astype(float)
    top, bottom = {
        "share": ((generator.random(n) < 0.3).astype(float), np.ones(n)),
        "turns": (np.minimum(turns, generator.integers(0, 4, size=n)), turns),
        "reciprocal": (1 / generator.integers(1, 2000, size=n), np.ones(n)),
        "iou": (np.where(turns > 2, generator.random(n), 0), (turns > 2).astype(float)),
    }[kind]
    drawn = resampling.sums([[top, bottom]], draws, 1, CELLS)[0]
    monkeypatch.setattr(resampling, "DRAWN", 100)
    other = resampling.sums([[top, bottom]], draws, 2, CELLS)[0]
    for one, counted, column in zip(drawn, other, (top, bottom), strict=True):
        spread = math.sqrt(n * column.var())
        assert counted.shape == (draws,)
        assert counted.mean() == pytest.approx(column.sum(), abs=4 * spread / math.sqrt(draws) + 1e-9)
        assert counted.std() == pytest.approx(spread, rel=0.08, abs=1e-9)
        np.testing.assert_allclose(quantiles(counted), quantiles(one), atol=0.2 * spread + 1e-9)
    # numerator and denominator of one resample belong together
    correlation = [np.corrcoef(pair)[0, 1] if pair[1].std() else 0 for pair in (drawn, other)]
    assert correlation[0] == pytest.approx(correlation[1], abs=0.1)


def test_both_ways_of_counting_are_the_multinomial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indicators of disjoint sets of queries: their sums add up to the number of queries in every resample."""
    monkeypatch.setattr(resampling, "DRAWN", 10)
    sets = np.arange(500) % 3
    parts = [(sets == one).astype(float) for one in range(3)]
    for few in (256, 1):  # by kinds, and by draws
        monkeypatch.setattr(resampling, "_FEW", few)
        found = np.stack(resampling.sums([parts], 400, 0, CELLS)[0])
        assert (found.sum(axis=0) == 500).all()
        assert np.corrcoef(found)[0, 1] == pytest.approx(-0.5, abs=0.15)


def test_intervals_of_many_queries_are_those_of_their_size() -> None:
    """Beyond the size up to which draws are made one by one, as below it: the normal interval, and pairs that cancel."""
    generator = np.random.default_rng(7)
    values = (generator.random(20_000) < 0.2).astype(float)
    better = np.maximum(values, generator.random(20_000) < 0.01)
    found = metrics.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(20_000)
    assert found.value == values.mean()
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=half / 8)
    pair = metrics.paired(better, values)
    assert 0 < pair.low < pair.value < pair.high
    assert pair.high - pair.low < (found.high - found.low) / 2
    assert metrics.paired(values, values) == metrics.Interval(0, 0, 0)
    assert metrics.bootstrap(np.ones(20_000)) == metrics.Interval(1, 1, 1)
    both = metrics.intervals({"a": values, "b": 1 / (1 + generator.integers(0, 5000, size=20_000))}, n=50)
    assert both["a"] == metrics.bootstrap(values, n=50)
