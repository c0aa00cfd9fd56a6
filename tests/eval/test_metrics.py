"""Metrics against their definitions written out literally, one trajectory and one turn at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vsr1.eval import metrics
from vsr1.records import Moment, Reply, Trajectory, Turn

VECTOR = torch.zeros(4)
CALM = settings(max_examples=40, deadline=None)


def turn(
    video: str, rank: int | None, answer: Any, span: Any = (None, None), text: int = 3, soft: int | None = None
) -> Turn:
    reply = Reply(answer, span[0], span[1], "think", answer != "matched")
    latents = None if soft is None else torch.zeros(soft, 4)
    return Turn(video, 0.5, rank, reply, "", tuple(range(text)), torch.zeros(text), VECTOR, latents, latents)


def trajectory(
    turns: list[Turn], final_rank: int | None, stop: Any, *, query: str = "q", truth: Any = ("v0", 2.0, 8.0)
) -> Trajectory:
    numbered = tuple(replace(one, number=place) for place, one in enumerate(turns, 1))
    return Trajectory(Moment(query, "text", *truth, 10.0), numbered, VECTOR, final_rank, stop)


seconds = st.integers(0, 20).map(lambda n: n / 2)
spans = st.tuples(st.none() | seconds, st.none() | seconds)
videos = st.sampled_from(["v0", "v1", "v2"])
ranks = st.integers(1, 130)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    def one(answer: Any) -> Turn:
        soft = None if answer == "matched" else draw(st.none() | st.integers(1, 8))
        return turn(draw(videos), draw(ranks), answer, draw(spans), draw(st.integers(0, 30)), soft)

    before = draw(st.lists(st.sampled_from(["not_matched", None]), max_size=2))
    stop = draw(st.sampled_from(["matched", "turns", "limit", "failed"]))
    last = "matched" if stop == "matched" else draw(st.sampled_from(["not_matched", None]))
    truth = ("v0", *draw(st.tuples(seconds, seconds)))
    return trajectory([one(a) for a in [*before, last]], draw(ranks), stop, truth=truth)


# At least one of the list did not fail: an all-failed list is an error, tested apart.
lists = st.lists(trajectories(), min_size=1, max_size=12).filter(lambda ts: any(t.stop != "failed" for t in ts))


def slow_iou(a: Any, b: Any) -> float:
    """Counted on a grid of half seconds, on which all generated spans lie."""
    cells_a, cells_b = ({i for i in range(40) if s <= i / 2 < e} for s, e in (a, b))
    return len(cells_a & cells_b) / len(cells_a | cells_b) if cells_a and cells_b else 0.0


def slow_vcmr(ts: list[Trajectory], threshold: float, turns: int) -> float:
    points = []
    for t in ts:
        if t.stop == "failed":
            continue
        point = 0
        for index, shown in enumerate(t.turns):
            if index >= turns or shown.reply.answer != "matched":
                continue
            if shown.video_id == t.moment.video_id and shown.reply.start is not None and shown.reply.end is not None:
                truth = (t.moment.start, t.moment.end)
                point = int(slow_iou((shown.reply.start, shown.reply.end), truth) >= threshold)
        points.append(point)
    return sum(points) / len(points)


@CALM
@given(lists, st.sampled_from([1, 2, 3, None]))
def test_vcmr_is_its_definition(ts: list[Trajectory], turns: int | None) -> None:
    found = metrics.vcmr(ts, turns=turns)
    for threshold in (0.3, 0.5, 0.7):
        assert found[str(threshold)] == pytest.approx(slow_vcmr(ts, threshold, turns or 99), abs=1e-12)


@CALM
@given(lists, st.sampled_from(["before", "after"]))
def test_retrieval_is_its_definition(ts: list[Trajectory], when: Any) -> None:
    kept = [t for t in ts if t.stop != "failed"]
    where = [t.turns[0].rank if when == "before" else t.final_rank for t in kept]
    slow = {f"R@{k}": sum(rank <= k for rank in where) / len(where) for k in (1, 5, 10, 100)}
    slow["MRR"] = sum(1 / rank for rank in where) / len(where)
    assert metrics.retrieval(ts, when) == pytest.approx(slow, abs=1e-12)


@CALM
@given(lists)
def test_verification_and_tokens_are_their_definitions(ts: list[Trajectory]) -> None:
    right, first, final, unparsable, text, soft = [], [], [], [], [], []
    for t in ts:
        if t.stop == "failed":
            continue
        for index, shown in enumerate(t.turns):
            label = "matched" if shown.video_id == t.moment.video_id else "not_matched"
            point = int(shown.reply.answer == label)
            right.append(point)
            unparsable.append(int(shown.reply.answer is None))
            text.append(len(shown.token_ids))
            if index == 0:
                first.append(point)
            if index == len(t.turns) - 1:
                final.append(point)
            if shown.actions is not None:
                soft.append(shown.actions.shape[0])
    slow = {"ver": right, "ver_turn1": first, "ver_final": final, "unparsable": unparsable}
    assert metrics.verification(ts) == pytest.approx({k: sum(v) / len(v) for k, v in slow.items()}, abs=1e-12)
    mean = [sum(text) / len(text), sum(soft) / len(soft) if soft else math.nan]
    assert list(metrics.tokens(ts).values()) == pytest.approx(mean, abs=1e-9, nan_ok=True)


@CALM
@given(lists)
def test_mean_iou_is_over_right_videos_accepted(ts: list[Trajectory]) -> None:
    overlaps = []
    for t in ts:
        last = t.turns[-1]
        if t.stop == "matched" and last.video_id == t.moment.video_id:
            span = (last.reply.start, last.reply.end)
            overlaps.append(0.0 if None in span else slow_iou(span, (t.moment.start, t.moment.end)))
    expected = sum(overlaps) / len(overlaps) if overlaps else math.nan
    assert metrics.mean_iou_accepted(ts) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_vcmr_of_each_way_to_end() -> None:
    good, wrong = (2.0, 8.0), (0.0, 3.0)
    reject = turn("v1", 4, "not_matched", soft=8)
    cases = {
        "at once": (trajectory([turn("v0", 1, "matched", good)], 1, "matched"), 1, 1),
        "at turn 2": (trajectory([reject, turn("v0", 1, "matched", good)], 1, "matched"), 1, 0),
        "wrong video": (trajectory([turn("v1", 2, "matched", good)], 2, "matched"), 0, 0),
        "wrong span": (trajectory([turn("v0", 1, "matched", wrong)], 1, "matched"), 0, 0),
        "half": (trajectory([turn("v0", 1, "matched", (2.0, 5.0))], 1, "matched"), 1, 1),
        "no span": (trajectory([turn("v0", 1, "matched")], 1, "matched"), 0, 0),
        "never": (trajectory([reject] * 3, 2, "turns"), 0, 0),
    }
    for name, (one, long, short) in cases.items():
        assert metrics.vcmr([one])["0.5"] == long, name
        assert metrics.vcmr([one], turns=1)["0.5"] == short, name
    everything = [one for one, _, _ in cases.values()]
    failed = trajectory([], None, "failed")
    assert metrics.vcmr([*everything, failed, failed])["0.5"] == pytest.approx(3 / 7)
    found = metrics.summary([*everything, failed])
    assert (found["queries"], found["failed"]) == (8, 1)
    assert [row["vcmr"]["0.5"]["value"] for row in found["by_turns"]] == pytest.approx([2 / 7, 3 / 7, 3 / 7])
    assert found["mean_iou"]["value"] == pytest.approx((1 + 1 + 1 / 8 + 1 / 2 + 0) / 5)
    assert found["tokens"]["soft"]["value"] == 8


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (trajectory([], 1, "limit"), "no turn"),
        (trajectory([turn("v0", None, "matched")], 1, "matched"), "no rank"),
        (trajectory([turn("v0", 1, "matched")], 1, "matched", truth=(None, None, None)), "no true video"),
        (trajectory([turn("v0", 1, "matched")], 1, "matched", truth=("v0", None, None)), "no true span"),
        (trajectory([], None, "failed"), "all of them failed"),
    ],
    ids=["turns", "rank", "video", "span", "failed"],
)
def test_what_cannot_be_measured_is_refused(broken: Trajectory, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.vcmr([broken])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 4), (2, 6), 1 / 3),
        ((1, 5), (1, 5), 1),
        ((0, 10), (2, 4), 0.2),
        ((0, 1), (2, 3), 0),
        ((0, 2), (2, 4), 0),
        ((5, 2), (0, 10), 0),
        ((3, 3), (3, 3), 0),
    ],
    ids=["part", "same", "inside", "apart", "touching", "reversed", "empty"],
)
def test_iou(a: Any, b: Any, expected: float) -> None:
    assert metrics.iou(a, b) == pytest.approx(expected)
    assert metrics.iou(b, a) == pytest.approx(expected)


def test_bootstrap_interval_is_the_normal_one_for_many_queries() -> None:
    values = (np.random.default_rng(1).random(2000) < 0.3).astype(float)
    found = metrics.bootstrap(values, seed=2)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == values.mean()
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=0.003)
    assert metrics.bootstrap(values, seed=2) == found
    assert metrics.bootstrap(np.ones(5)) == metrics.Interval(1, 1, 1)
    assert metrics.bootstrap([0.0, 1.0, math.nan]).value == 0.5
    assert math.isnan(metrics.bootstrap([math.nan]).value)
    assert metrics.bootstrap([math.nan]).as_dict() == {"value": None, "low": None, "high": None}


def test_bootstrap_draws_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(30.0)
    whole = metrics.bootstrap(values, n=100)
    monkeypatch.setattr(metrics, "_BOOTSTRAP_CELLS", 30 * 7)
    assert metrics.bootstrap(values, n=100) == whole


def test_weighted_bootstrap_resamples_queries_and_not_turns() -> None:
    generator = np.random.default_rng(3)
    rights = [[float(generator.random() < 0.5)] * 3 for _ in range(300)]  # all turns of a query agree
    by_query = metrics.bootstrap([np.mean(r) for r in rights], weights=[3.0] * 300)
    by_turn = metrics.bootstrap(np.concatenate(rights))
    assert by_query.value == pytest.approx(by_turn.value)
    assert by_query.high - by_query.low > 1.5 * (by_turn.high - by_turn.low)
    uneven = metrics.bootstrap([1.0, 0.0], weights=[3.0, 1.0])
    assert uneven.value == 0.75


def test_paired_difference_is_tighter_than_two_intervals() -> None:
    generator = np.random.default_rng(4)
    before = (generator.random(400) < 0.4).astype(float)
    after = np.maximum(before, generator.random(400) < 0.05)
    found = metrics.paired(after, before)
    assert found.value == pytest.approx(after.mean() - before.mean())
    assert found.low > 0
    assert found.high - found.low < metrics.bootstrap(after).high - metrics.bootstrap(after).low
    assert metrics.paired(after, after) == metrics.Interval(0, 0, 0)
    with pytest.raises(ValueError, match="same queries"):
        metrics.paired(before, after[:-1])
    with pytest.raises(ValueError, match="shape"):
        metrics.bootstrap(np.ones((2, 2)))


def test_difference_pairs_by_query_and_drops_what_failed_in_either() -> None:
    miss = [turn("v1", 3, "not_matched")]
    hit = [turn("v0", 1, "matched", (2.0, 8.0))]
    first = [
        trajectory(miss, 3, "turns", query="a"),
        trajectory(hit, 1, "matched", query="b"),
        trajectory(miss, 3, "turns", query="c"),
    ]
    second = [
        trajectory([], None, "failed", query="b"),
        trajectory(hit, 1, "matched", query="a"),
        trajectory(miss, 3, "turns", query="c"),
    ]
    found = metrics.difference(first, second)
    assert found["after R@1"].value == 0.5
    assert found["vcmr 0.5"].value == 0.5
    assert "turns" not in found
    with pytest.raises(ValueError, match=r"1 queries are in one run only.*'b'"):
        metrics.difference(first, second[1:])


@CALM
@given(
    st.lists(st.tuples(videos, seconds, seconds), max_size=130),
    st.tuples(seconds, seconds),
    st.sampled_from(["hull", "true"]),
)
def test_tvr_recall_is_its_definition(guesses: list[Any], span: Any, union: Any) -> None:
    truths = [Moment("a", "", "v0", *span), Moment("b", "", "v1", 1.0, 2.0)]
    predictions = {"a": guesses, "b": [("v1", 1.0, 2.0)]}
    found = metrics.tvr_recall(predictions, truths, union=union)
    for threshold in (0.5, 0.7):
        for k in (1, 5, 10, 100):
            right = [v == "v0" and slow_iou((s, e), span) >= threshold for v, s, e in guesses[:100]]
            assert found[f"{threshold}-r{k}"] == (any(right[:k]) + 1) / 2


def test_tvr_recall_reads_a_hundred_predictions_and_accepts_the_threshold_itself() -> None:
    truth = [Moment("a", "", "v", 0.0, 10.0)]
    misses = [("w", 0.0, 10.0)] * 99
    assert metrics.tvr_recall({"a": [*misses, ("v", 0.0, 7.0)]}, truth, ks=(99, 200)) == {
        "0.5-r99": 0, "0.5-r200": 1, "0.7-r99": 0, "0.7-r200": 1
    }  # fmt: skip
    assert metrics.tvr_recall({"a": [*misses, misses[0], ("v", 0.0, 10.0)]}, truth, ks=(200,), thresholds=(0.5,)) == {
        "0.5-r200": 0
    }


def test_tvr_recall_refuses_other_queries() -> None:
    with pytest.raises(ValueError, match=r"must be the same: \['a', 'b'\]"):
        metrics.tvr_recall({"a": []}, [Moment("b", "", "v", 0.0, 1.0)])


def test_what_refining_earned_at_each_turn() -> None:
    found = [
        trajectory([turn("a", 4, "not_matched", soft=8), turn("b", 2, "not_matched", soft=8)], 1, "turns"),
        trajectory([turn("a", 5, "not_matched", soft=8), turn("v0", 1, "matched")], 1, "matched"),
        trajectory([turn("a", 3, "not_matched"), turn("b", 3, None)], 3, "turns"),
        trajectory([turn("a", 9, "not_matched", soft=8)], 1, "failed"),
    ]
    # two videos verified in one turn: the refinement is measured against the next turn, not against its neighbour
    both = [turn("a", 8, "not_matched", soft=8), turn("b", 8, "not_matched")]
    found.append(Trajectory(found[0].moment, tuple(both), VECTOR, 2, "turns"))
    first, second = (1 / 2 - 1 / 4 + 1 - 1 / 5 + 1 / 2 - 1 / 8) / 3, 1 - 1 / 2
    assert metrics.refine_gains(found) == {1: (pytest.approx(first), 3), 2: (pytest.approx(second), 1)}


def test_an_answer_fallen_back_on_counts_where_nothing_was_accepted() -> None:
    rejected = [turn("v1", 2, "not_matched"), turn("v0", 1, "not_matched")]
    right = replace(turn("v0", 1, "matched", (2.0, 8.0)), number=2)
    wrong = replace(turn("v1", 1, "matched", (2.0, 8.0)), number=1)
    found = [
        trajectory(rejected, 1, "turns"),
        replace(trajectory(rejected, 1, "turns"), fallback=right),
        replace(trajectory(rejected, 1, "turns"), fallback=wrong),
        trajectory([turn("v0", 1, "matched", (2.0, 8.0))], 1, "matched"),
    ]
    values = metrics.per_query(found)
    assert values["vcmr 0.5"].tolist() == [0, 0, 0, 1]
    assert values["answered 0.5"].tolist() == [0, 1, 0, 1]


def test_tokens_of_a_refinement_in_words() -> None:
    told = [replace(turn("v1", 2, "not_matched", soft=8), rewriting=(1,) * 9), turn("v0", 1, "matched")]
    values = metrics.per_query([trajectory(told, 1, "matched"), trajectory([turn("v0", 1, "matched")], 1, "matched")])
    assert values["hard"][0] == 9 and math.isnan(values["hard"][1])
