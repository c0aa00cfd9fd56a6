"""The comparison of linear_logp with others: wrong answers are found, absent peers say why, and a GPU's lines are made."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import logp_peers as peers

SIZE = (12, 90, 8)


def test_everybody_at_hand_gives_the_same_gradient() -> None:
    hidden, weight, target = peers.inputs(*SIZE, torch.float32)
    up = torch.linspace(-1, 1, 12)
    judge = peers.Judge(peers.row_step, peers.plain, hidden, weight, target, up)
    rows, absent = peers.available(peers.ROWS)
    assert {*rows, *absent} == {*peers.ROWS}
    for name, function in {"vsr1": peers.ours, **rows}.items():
        judge(name, peers.row_step(function, hidden, weight, target, up))
    judge = peers.Judge(peers.mean_step, peers.plain_mean, hidden, weight, target)
    means, absent = peers.available(peers.MEANS)
    assert {*means, *absent} == {*peers.MEANS}
    for name, function in {"vsr1": peers.ours_mean, **means}.items():
        judge(name, peers.mean_step(function, hidden, weight, target))


def test_a_wrong_answer_is_found() -> None:
    hidden, weight, target = peers.inputs(*SIZE, torch.float32)
    judge = peers.Judge(peers.mean_step, peers.plain_mean, hidden, weight, target)
    grads = peers.mean_step(peers.ours_mean, hidden, weight, target)
    for wrong in ((-grads[0], grads[1]), (grads[0], grads[1] * 1.001), (grads[0] * torch.nan, grads[1])):
        with pytest.raises(AssertionError, match="peer is off by"):
            judge("peer", wrong)


def test_a_frozen_head_has_no_gradient() -> None:
    hidden, weight, target = peers.inputs(*SIZE, torch.float32, frozen=True)
    judge = peers.Judge(peers.row_step, peers.plain, hidden, weight, target, torch.ones(12))
    answer = peers.row_step(peers.ours, hidden, weight, target, torch.ones(12))
    assert len(answer) == len(judge.truth) == 3
    judge("vsr1", answer)


def test_lines_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the GPU: every case runs, in small, on the CPU; a peer that fails or is wrong is told as absent."""
    pytest.importorskip("triton")
    from bench import gpu_linear_logp as gpu

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory\nand so on")

    monkeypatch.setattr(gpu, "T", 16)
    monkeypatch.setattr(gpu, "V", 50)
    monkeypatch.setattr(gpu, "LIMITS", {8: 25.0, 16: 48.0})
    monkeypatch.setattr(gpu, "milliseconds", lambda call: call() and 1.0)
    monkeypatch.setattr(gpu, "workspace", lambda call: call() and 2.0)
    on_cpu = {"device": "cpu"}
    made, generator, randn, arange = peers.inputs, torch.Generator, torch.randn, torch.arange
    monkeypatch.setattr(peers, "inputs", lambda *sizes, **options: made(*sizes, **{**options, **on_cpu}))
    monkeypatch.setattr(torch, "Generator", lambda *_: generator())
    monkeypatch.setattr(torch, "randn", lambda *sizes, **options: randn(*sizes, **{**options, **on_cpu}))
    monkeypatch.setattr(torch, "arange", lambda end, **_: arange(end))
    monkeypatch.setattr(peers, "ROWS", {"plain": lambda: peers.plain, "broken": lambda: fails})
    wrong = partial(lambda hidden, weight, target: 2 * peers.plain_mean(hidden, weight, target))
    monkeypatch.setattr(peers, "MEANS", {"plain": lambda: peers.plain_mean, "wrong": lambda: wrong})
    lines = list(gpu.measurements())
    assert len(lines) == gpu.COUNT
    assert [goal.unit for line in lines for goal in line.goals] == [
        "ms",
        "MiB",
        "x time of own, every row",
        "MiB",
        "ms",
    ]
    assert lines[0].peers == {"plain": 1.0}
    assert lines[0].absent["broken"].endswith(": out of memory")
    assert "wrong is off by" in lines[3].absent["wrong"]
