"""Every reward on hand-made trajectories, the sum by weight, and the errors a wrong use must raise."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from vsr1.errors import ConfigError
from vsr1.records import Moment, Reply, Trajectory, Turn
from vsr1.train.rewards import (
    REWARDS,
    RewardContext,
    following_query,
    progress,
    retrieval_probability,
    reward_function,
    total,
)

MOMENT = Moment("q1", "a dog jumps", video_id="right", start=10.0, end=20.0, duration=60.0)


def turn(video="right", answer="matched", start=None, end=None, think="it jumps", refine=True, query=0.0, actions=None):
    return Turn(
        video_id=video,
        score=0.5,
        rank=1,
        reply=Reply(answer, start, end, think, refine),
        text="",
        token_ids=(1,),
        token_logps=torch.zeros(1),
        query=torch.full((3,), query),
        actions=actions,
    )


def trajectory(*turns, moment=MOMENT, stop="turns", final=9.0, failure=None):
    query = None if final is None else torch.full((3,), final)
    return Trajectory(moment, turns, query, 1, stop, failure)


def value(name, *turns, context=None, **kwargs):
    return REWARDS[name](trajectory(*turns, **kwargs), context or RewardContext())


@pytest.mark.parametrize(
    ("video", "answer", "expected"),
    [
        ("right", "matched", 1),
        ("right", "not_matched", -1),
        ("wrong", "matched", -1),
        ("wrong", "not_matched", 1),
        ("right", None, -1),
        ("wrong", None, -1),
    ],
)
def test_answer(video, answer, expected):
    assert value("answer", turn(video, answer)) == expected


def test_only_the_final_turn_counts():
    assert value("answer", turn("right", "not_matched"), turn("right", "matched")) == 1
    assert value("time_iou", turn("right", "matched", 10, 20), turn("wrong", "not_matched")) == 0.5


@pytest.mark.parametrize(("think", "expected"), [("because", 1), ("", 0), (" \n", 0)])
def test_think_format(think, expected):
    assert value("think_format", turn(think=think)) == expected


@pytest.mark.parametrize(
    ("answer", "start", "end", "expected"),
    [
        ("matched", 1.0, 2.0, 1),
        ("matched", 1.0, None, 0),
        ("matched", None, None, 0),
        ("not_matched", None, None, 1),
        ("not_matched", 1.0, 2.0, 0),
        ("not_matched", 0.0, None, 0),
        (None, 1.0, 2.0, 0),
        (None, None, None, 0),
    ],
)
def test_time_format(answer, start, end, expected):
    assert value("time_format", turn(answer=answer, start=start, end=end)) == expected


@pytest.mark.parametrize(
    ("video", "answer", "start", "end", "expected"),
    [
        ("right", "matched", 10.0, 20.0, 1.0),
        ("right", "matched", 15.0, 25.0, 1 / 3),
        ("right", "matched", 12.0, 14.0, 0.2),
        ("right", "matched", 0.0, 40.0, 0.25),
        ("right", "matched", 30.0, 40.0, 0.0),
        ("right", "matched", 20.0, 10.0, 0.0),
        ("right", "matched", 15.0, 15.0, 0.0),
        ("right", "matched", 10.0, None, 0.0),
        ("wrong", "matched", 10.0, 20.0, 0.0),
        ("wrong", "not_matched", None, None, 0.5),
        ("wrong", "not_matched", 10.0, 20.0, 0.0),
        ("right", "not_matched", None, None, 0.0),
        ("right", None, 10.0, 20.0, 0.0),
    ],
)
def test_time_iou(video, answer, start, end, expected):
    assert value("time_iou", turn(video, answer, start, end)) == pytest.approx(expected)


def test_time_iou_needs_the_true_span_only_for_a_right_match():
    open_end = Moment("q1", "a dog", video_id="right")
    with pytest.raises(ValueError, match="no true span"):
        value("time_iou", turn("right", "matched", 1, 2), moment=open_end)
    assert value("time_iou", turn("wrong", "not_matched"), moment=open_end) == 0.5


def test_refine_presence():
    assert [value("refine_presence", turn(refine=refine)) for refine in (True, False)] == [1, 0]


def test_retrieval_is_the_probability_in_the_context():
    assert value("retrieval", turn(), context=RewardContext(0.25)) == 0.25
    assert value("retrieval", turn(), context=RewardContext(1 + 1e-6)) == 1
    for wrong in (None, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"q1.*retrieval_probability"):
            value("retrieval", turn(), context=RewardContext(wrong))


def test_probability_from_a_scan():
    scores = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.3, 0.2]], dtype=torch.float64)
    probability = retrieval_probability(scores[:, 2], (scores / 0.1).logsumexp(1))
    torch.testing.assert_close(probability, (scores / 0.1).softmax(1)[:, 2])
    assert retrieval_probability(torch.tensor([1.0]), torch.tensor([9.9999])).item() == 1


def test_total_is_the_weighted_sum():
    weights = {"answer": 1.6, "think_format": 0.05, "time_format": 0.05, "time_iou": 0.35, "retrieval": 0.8}
    value, parts = total(trajectory(turn("right", "matched", 15, 25)), weights, RewardContext(0.5))
    expected = {"answer": 1.0, "think_format": 1.0, "time_format": 1.0, "time_iou": 1 / 3, "retrieval": 0.5}
    assert parts == pytest.approx(expected)
    assert value == pytest.approx(1.6 + 0.05 + 0.05 + 0.35 / 3 + 0.4)
    assert total(trajectory(turn()), {}) == (0, {})


def brevity(one, context):
    return 1.0 / len(one.turns)


def broken(one, context):
    return float("inf")


def test_the_users_own_reward(monkeypatch):
    module = types.ModuleType("my_rewards")
    module.brevity, module.broken, module.number = brevity, broken, 3
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    value, parts = total(trajectory(turn("wrong"), turn()), {"my_rewards:brevity": 2.0, "answer": 1.0})
    assert (value, parts) == (2.0, {"my_rewards:brevity": 0.5, "answer": 1.0})
    with pytest.raises(ValueError, match=r"my_rewards:broken.*inf"):
        total(trajectory(turn()), {"my_rewards:broken": 1.0})
    with pytest.raises(ConfigError, match="no function 'number'"):
        reward_function("my_rewards:number")
    with pytest.raises(ConfigError, match="no function 'missing'"):
        reward_function("my_rewards:missing")


@pytest.mark.parametrize("name", ["anwser", "", ":", "math:", ":sqrt"])
def test_an_unknown_reward_lists_the_known(name):
    with pytest.raises(
        ConfigError, match="answer, verdicts, found, think_format, time_format, time_iou, refine_presence, retrieval"
    ):
        total(trajectory(turn()), {name: 1.0})


def test_a_module_that_is_not_there():
    with pytest.raises(ConfigError, match="no_such_module"):
        reward_function("no_such_module:f")


@pytest.mark.parametrize("name", REWARDS)
def test_failed_and_empty_trajectories_have_no_reward(name):
    failed = trajectory(turn(), stop="failed", failure="video unreadable")
    for call in (lambda: REWARDS[name](failed, RewardContext(0.5)), lambda: total(failed, {})):
        with pytest.raises(ValueError, match=r"q1.*video unreadable"):
            call()
    with pytest.raises(ValueError, match="no executed turn"):
        value(name, context=RewardContext(0.5))


def test_no_truth_no_verdict():
    with pytest.raises(ValueError, match="no known video"):
        value("answer", turn(), moment=Moment("q1", "a dog"))


def test_the_query_that_follows_a_turn():
    refined = torch.zeros(8, 3)
    path = trajectory(turn(query=1.0, actions=refined), turn(query=2.0), turn(query=3.0, actions=refined), final=4.0)
    assert [following_query(path, place).tolist() for place in range(3)] == [[2.0] * 3, [3.0] * 3, [4.0] * 3]
    with pytest.raises(ValueError, match="turn 0 led to no query"):
        following_query(trajectory(turn(actions=refined), final=None), 0)


def test_verdicts_judge_every_turn_where_answer_judges_the_last():
    """A policy that rejects everything earns `answer` although it threw the right video away; `verdicts` shows it."""
    no = [turn("right", "not_matched"), turn("a", "not_matched"), turn("b", "not_matched")]
    assert value("answer", *no) == 1.0
    assert value("verdicts", *no) == pytest.approx(1 / 3)
    assert value("verdicts", turn("a", "not_matched"), turn("right", "matched"), stop="matched") == 1.0
    assert value("verdicts", turn("a", "matched"), stop="matched") == -1.0


@pytest.mark.parametrize(
    ("turns", "stop", "expected"),
    [
        ([turn("a", "not_matched"), turn("right", "matched", 10, 15)], "matched", 0.5),
        ([turn("a", "matched", 10, 20)], "matched", 0.0),
        ([turn("right", "not_matched"), turn("a", "not_matched")], "turns", 0.0),
        ([turn("right", "matched")], "matched", 0.0),
    ],
    ids=["right", "wrong-video", "nothing", "no-span"],
)
def test_found_is_the_overlap_of_what_was_accepted(turns, stop, expected):
    assert value("found", *turns, stop=stop) == pytest.approx(expected)


def test_progress_counts_what_a_reader_watches():
    found = [
        trajectory(turn("a", "not_matched"), turn("right", "matched", 10, 16), stop="matched"),
        trajectory(turn("right", "matched", 10, 12), stop="matched"),
        trajectory(turn("right", "not_matched"), turn("a", "not_matched"), turn("b", None)),
    ]
    expected = {"vcmr": 1 / 3, "ver": 4 / 6, "accepted_right": 2 / 3, "turns": 2.0}
    assert progress(found) == pytest.approx(expected)
