"""`FlatIP` beside `faiss.IndexFlatIP`: the same calls give the same answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vsr1.corpus.faiss_like import FlatIP

faiss = pytest.importorskip("faiss")

D = 5
LOWEST = np.finfo(np.float32).min


def vectors(count: int, seed: int, levels: int = 4) -> np.ndarray:
    """Small whole numbers: inner products are exact in any order of summation, and ties are common."""
    return np.random.default_rng(seed).integers(-levels, levels + 1, (count, D)).astype(np.float32)


def assert_same_search(ours: FlatIP, theirs: Any, query: np.ndarray, k: int) -> None:
    scores, ids = ours.search(query, k)
    expected_scores, expected_ids = theirs.search(query, k)
    assert (scores.dtype, ids.dtype, scores.shape) == (np.float32, np.int64, (len(query), k))
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(ids < 0, expected_ids < 0)
    stored = theirs.reconstruct_n(0, theirs.ntotal)
    for row, (found, values) in enumerate(zip(ids, scores, strict=True)):
        kept = found >= 0
        assert (values[~kept] == LOWEST).all()
        np.testing.assert_array_equal(stored[found[kept]] @ query[row], values[kept])  # ids that earn their score
        assert len(set(found[kept])) == kept.sum()
        for first, second, same in zip(found, found[1:], values[:-1] == values[1:], strict=False):
            assert first < second or not same or second < 0  # FAISS leaves the order of ties open, we do not


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9)),
        st.tuples(st.just("remove"), st.lists(st.integers(-2, 40), max_size=6)),
        st.tuples(st.just("search"), st.integers(1, 30)),
        st.tuples(st.just("range"), st.integers(0, 20)),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(operations)
def test_any_sequence_of_calls_equals_faiss(changes: list[tuple[str, Any]]) -> None:
    ours, theirs = FlatIP(D), faiss.IndexFlatIP(D)
    for step, (what, value) in enumerate(changes):
        if what == "add":
            ours.add(vectors(value, step))
            theirs.add(vectors(value, step))
        elif what == "remove":
            ids = np.array(value, dtype=np.int64)
            assert ours.remove_ids(ids) == theirs.remove_ids(ids)
        elif what == "range":
            selector = faiss.IDSelectorRange(value, value + 3)
            assert ours.remove_ids(selector) == theirs.remove_ids(selector)
        elif what == "reset":
            ours.reset()
            theirs.reset()
        else:
            assert_same_search(ours, theirs, vectors(3, step + 100), value)
        assert ours.ntotal == theirs.ntotal
        np.testing.assert_array_equal(ours.reconstruct_n(), theirs.reconstruct_n())
    assert (ours.d, ours.is_trained, ours.metric_type) == (theirs.d, theirs.is_trained, theirs.metric_type)


def test_unusual_numbers_as_in_faiss() -> None:
    ours, theirs = FlatIP(D), faiss.IndexFlatIP(D)
    rows = vectors(6, 1)
    rows[1, 0], rows[2, 1], rows[3, 2] = np.nan, np.inf, -np.inf
    query = np.abs(vectors(3, 2)) + 1
    query[2, 3] = np.nan
    for index in (ours, theirs):
        index.add(rows)
    scores, ids = ours.search(query, 6)
    expected_scores, expected_ids = theirs.search(query, 6)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(ids, expected_ids)
    assert ids[2].tolist() == [-1] * 6
    assert (
        ours.search(np.empty((0, D), np.float32), 2)[1].shape == theirs.search(np.empty((0, D), np.float32), 2)[1].shape
    )


def test_growth_copies_little_and_searches_see_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    index, copied = FlatIP(D), 0
    for step in range(200):
        before = index._rows.data_ptr()
        total = index.ntotal
        index.add(vectors(3, step))
        copied += total if index._rows.data_ptr() != before else 0
        _, ids = index.search(vectors(1, step), 1)
        assert 0 <= ids[0, 0] < index.ntotal
    assert index.ntotal == 600
    assert copied < 3 * index.ntotal
    room = len(index._rows)
    index.add(np.empty((0, D), np.float32))
    assert len(index._rows) == room
    index.reset()
    assert len(index._rows) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_what_is_stored(dtype: str) -> None:
    rows, query = torch.randn(50, 64), torch.randn(4, 64)
    index = FlatIP(64, dtype)
    index.add(rows.numpy())
    rounded = rows.to(getattr(torch, dtype)).float()
    np.testing.assert_array_equal(index.reconstruct_n(), rounded.numpy())
    np.testing.assert_array_equal(index.reconstruct(7), rounded[7].numpy())
    scores, ids = index.search(query.numpy(), 50)
    expected = (query.double() @ rounded.double().T).numpy()
    np.testing.assert_allclose(scores, np.take_along_axis(expected, ids, axis=1), rtol=1e-5, atol=1e-4)


def test_what_is_handed_in_and_out_is_a_copy() -> None:
    index, rows = FlatIP(D), vectors(3, 0)
    rows.flags.writeable = False  # such as a memory map
    index.add(rows)
    index.reconstruct_n()[:] = 9
    index.reconstruct(0)[:] = 9
    np.testing.assert_array_equal(index.reconstruct_n(), rows)
    index.add(rows.astype(np.float64).tolist())
    assert index.ntotal == 6


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda i: i.add(np.ones((2, D + 1))), ValueError, r"shape \(n, 5\), got \(2, 6\)"),
        (lambda i: i.add(np.ones(D)), ValueError, r"shape \(n, 5\), got \(5,\)"),
        (lambda i: i.search(np.ones((1, 2)), 1), ValueError, r"shape \(n, 5\), got \(1, 2\)"),
        (lambda i: i.search(np.ones((1, D)), 0), ValueError, "k must be at least 1, got 0"),
        (lambda i: i.search(np.ones((1, D)), 2049), ValueError, "k is 2049; expected 0 <= k <= 2048"),
        (lambda i: i.reconstruct(3), IndexError, "vectors 3 to 4 were asked for, the index holds 3"),
        (lambda i: i.reconstruct(-1), IndexError, "vectors -1 to 0"),
        (lambda i: i.reconstruct_n(1, 3), IndexError, "vectors 1 to 4"),
        (lambda i: i.reconstruct_n(0, -2), IndexError, "vectors 0 to -2"),
        (lambda i: i.remove_ids(np.ones((1, 1), np.int64)), ValueError, r"whole numbers of shape \(n,\)"),
        (lambda i: i.remove_ids(np.ones(2)), ValueError, "float64"),
        (lambda i: FlatIP(0), ValueError, "d must be at least 1, got 0"),
        (lambda i: FlatIP(3, "int8"), ValueError, "'int8'"),
    ],
)
def test_wrong_arguments(call: Any, kind: type, message: str) -> None:
    index = FlatIP(D)
    index.add(vectors(3, 0))
    with pytest.raises(kind, match=message):
        call(index)
    np.testing.assert_array_equal(index.reconstruct_n(), vectors(3, 0))
