"""The harness of the benchmarks: what a goal says, who is timed and when, and that wrong answers are not timed at all."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench import exact, harness
from bench.harness import (
    Goal,
    Measurement,
    compare,
    faster_than,
    fastest_read,
    memory_within,
    mib_at_most,
    milliseconds_at_most,
    peak_memory,
    within,
)


class Stopwatch:
    """As much of pytest-benchmark's fixture as `compare` uses."""

    def __init__(self) -> None:
        self.stats: Any = None

    def pedantic(self, call: Any, *, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            call()
        self.stats = SimpleNamespace(stats=SimpleNamespace(min=0.004))


def test_a_goal_says_by_how_much_it_is_missed() -> None:
    assert str(Goal("x FAISS", 14, 12.6, least=True)) == "≥ 14 x FAISS: 12.6, **missed by 10 %**"
    assert str(Goal("x FAISS", 14, 14.0, least=True)) == "≥ 14 x FAISS: 14, met"
    assert str(Goal("ms", 1.45, 1.5225)) == "≤ 1.45 ms: 1.52, **missed by 5 %**"
    assert str(Goal("ms", 1.45, 1.45)) == "≤ 1.45 ms: 1.45, met"
    assert str(Goal("ms", 1.45, 1.4501)) == "≤ 1.45 ms: 1.45, **missed by 1 %**"  # a miss is never rounded away


def test_bounds_judge_only_what_was_measured() -> None:
    line = Measurement("case", 2.0, floor=1.6, mib=30.0, peers={"FAISS": 7.0}, peers_mib={"plain": 300.0})
    bounds = (
        faster_than("FAISS", 3.0),
        faster_than("torch", 3.0),
        within(1.2),
        within(1.5, "torch"),
        within(0.5, "FAISS"),
        milliseconds_at_most(1.0),
        mib_at_most(64),
        memory_within(1 / 8, "plain"),
        memory_within(1 / 8, "torch"),
    )
    goals = line.held_to(*bounds).goals
    assert [(goal.unit, round(goal.measured, 3), goal.shortfall > 0) for goal in goals] == [
        ("x FAISS", 3.5, False),
        ("x time of floor", 1.25, True),
        ("x time of FAISS", 0.286, False),
        ("ms", 2.0, True),
        ("MiB", 30.0, False),
        ("x memory of plain", 0.1, False),
    ]
    assert Measurement.read(asdict(line)) == line


def test_contenders_take_turns_and_the_absent_are_named() -> None:
    called: list[str] = []
    line = compare(
        Stopwatch(),
        "case",
        {"ours": lambda: called.append("ours"), "peer": lambda: called.append("peer"), "other": "pip install other"},
        lambda name, answer: called.append(f"check {name}"),
        reads=torch.zeros(1000),
        bounds=[faster_than("peer", 1.0)],
        most_rounds=3,
    )
    checked = ["ours", "check ours", "ours", "peer", "check peer", "peer"]  # the second call is for the memory
    assert called == [*checked, *["peer", "ours"] * 3]
    assert line is not None
    assert (line.ms, line.bytes, list(line.peers), line.absent) == (4.0, 4000, ["peer"], {"other": "pip install other"})
    assert line.floor is not None
    assert [goal.unit for goal in line.goals] == ["x peer"]


def test_a_long_call_is_made_once_and_ours_once_more_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    called: list[str] = []
    counts: dict[str, dict[str, int]] = {"calls": {}}

    def call(name: str, seconds: float) -> str:
        called.append(name)
        clock[0] += seconds
        return name

    def check(name: str, answer: str) -> None:
        assert name == answer
        counts["calls"][name] = len(called)

    calls = {name: partial(call, name, slow) for name, slow in (("ours", 5.0), ("slow", 6.0), ("fast", 1.0))}
    line = compare(Stopwatch(), "case", calls, check, counts=counts)
    assert called[:4] == ["ours", "slow", "fast", "fast"]
    assert called[-1] == "ours" and called.count("ours") == 2 and called.count("slow") == 1
    assert line is not None
    assert line.peers == {"slow": 6000, "fast": 1000}
    assert line.counts == {"calls": {"ours": 1, "slow": 2, "fast": 3}}


def test_nothing_is_timed_where_an_answer_is_wrong() -> None:
    def check(name: str, answer: str) -> None:
        if answer != "right":
            raise AssertionError(f"{name} is {answer}")

    watch = Stopwatch()
    with pytest.raises(AssertionError, match="peer is wrong"):
        compare(watch, "case", {"ours": lambda: "right", "peer": lambda: "wrong"}, check)
    assert watch.stats is None


def test_peak_memory_sees_what_is_freed_again() -> None:
    def call() -> float:
        return float(torch.ones(24 * 2**20 // 4).sum())

    used, seconds = peak_memory(call)
    if used is None:
        pytest.skip("this system does not count the memory of a process")
    assert 23 <= used < 40
    assert seconds > 0
    assert (peak_memory(lambda: None)[0] or 0) < 8


def test_the_floor_reads_all_of_it() -> None:
    tensor = torch.zeros(64, 1024)
    tensor[-1, -1] = float("inf")  # its bits as an integer, and itself, exceed everything else
    found = fastest_read(tensor)()
    total = max(found) if isinstance(found, list) else found.item()
    assert total > 0


def test_exact_search_and_its_checks() -> None:
    rows, query = exact.unit_rows(exact.BLOCK + 50, 6, torch.float32), exact.unit_rows(3, 6, torch.float32, seed=1)
    scores = query.double() @ rows.double().T
    wanted = scores.topk(5, dim=1)
    found = exact.top(query, rows, 5)
    torch.testing.assert_close(found.scores, wanted.values)
    assert torch.equal(found.ids, wanted.indices)

    exact.check_top("peer", query, rows, wanted.indices, found, 1e-6)
    worst = scores.argmin(dim=1)
    for ids, message in (
        (torch.cat([wanted.indices[:, :4], wanted.indices[:, :1]], dim=1), "peer returns a row twice"),
        (torch.cat([wanted.indices[:, :4], torch.full((3, 1), -1)], dim=1), "or one that is none"),
        (torch.cat([wanted.indices[:, :4], worst[:, None]], dim=1), "peer finds rows whose scores are"),
        (wanted.indices.flip(1), "peer finds rows whose scores are"),
    ):
        with pytest.raises(AssertionError, match=message):
            exact.check_top("peer", query, rows, ids, found, 1e-6)
    exact.check_scores("ours", query, rows, wanted.indices, wanted.values, 1e-6)
    with pytest.raises(AssertionError, match="ours returns scores"):
        exact.check_scores("ours", query, rows, wanted.indices, wanted.values + 1e-5, 1e-6)


def test_exact_loss_and_its_check() -> None:
    rows, query = exact.unit_rows(300, 6, torch.float32), exact.unit_rows(3, 6, torch.float32, seed=1)
    leaf, positive = query.double().requires_grad_(), torch.tensor([0, 299, 5])
    loss = F.cross_entropy(leaf @ rows.double().T / 0.07, positive, reduction="none")
    wanted = loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]
    found = exact.info_nce(query, rows, positive, 0.07)
    torch.testing.assert_close(found, wanted)
    exact.check_info_nce("peer", found, wanted, 1e-6, 1e-6)
    for wrong in ((found[0] + 1e-5, found[1]), (found[0], found[1] * (1 + 1e-5)), (found[0] * float("nan"), found[1])):
        with pytest.raises(AssertionError, match="peer: the loss is off"):
            exact.check_info_nce("peer", wrong, wanted, 1e-6, 1e-6)
