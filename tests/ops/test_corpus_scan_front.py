"""What stands in front of the sweep: Rocchio, and the soft-query update that scans in one call."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops._corpus_front import refined_scan
from vsr1.ops._dispatch import extension_missing, resolve, triton_missing
from vsr1.ops.corpus_scan import HiddenState, SoftQuery, refine_and_scan, rocchio, scan

MISSING = {"reference": None, "cpu": extension_missing(), "triton": triton_missing()}
interpreted = "TRITON_INTERPRET" in os.environ
BACKENDS = ["triton"] if interpreted else ["reference", "cpu"]


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def test_rocchio_moves_towards_the_accepted_and_away_from_the_rejected() -> None:
    base, accepted, rejected = unit(2, 5), unit(2, 3, 5, seed=1), unit(2, 4, 5, seed=2)
    rejected[1, 1:] = 0.0  # padding
    wanted = base + 0.75 * accepted.mean(1) - 0.25 * torch.stack([rejected[0].mean(0), rejected[1, 0]])
    assert torch.allclose(rocchio(base, accepted, rejected, 0.75, 0.25), F.normalize(wanted, dim=1))
    assert torch.allclose(rocchio(base, None, rejected[:, :0], 1.0, 1.0), base)
    with pytest.raises(ValueError, match=r"accepted \(2, 5\); expected"):
        rocchio(base, base, None, 1.0, 1.0)


def test_refine_and_scan_makes_the_query_then_scans() -> None:
    rows, base, soft = unit(50, 6), unit(3, 6, seed=1), unit(3, 4, 6, seed=2)
    gate = torch.tensor([0.0, 0.5, 2.0], requires_grad=True)
    query, found = refine_and_scan(SoftQuery(base, soft, gate), rows, k=4)
    assert torch.allclose(query, F.normalize(base + gate[:, None] * soft.mean(1), dim=1))
    assert torch.equal(found.ids, scan(query, rows, k=4).ids)
    found.scores.sum().backward()
    assert gate.grad is not None
    assert torch.allclose(SoftQuery(base, soft[:, :0]).query(), base)

    hidden, weight, head = unit(3, 10, seed=3), torch.rand(10) + 0.5, unit(8, 10, seed=4)
    query, _ = refine_and_scan(HiddenState(hidden, weight, head, dim=6), rows, k=1)
    normed = hidden * (hidden.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight
    assert torch.allclose(query, F.normalize((normed @ head.T)[:, :6], dim=1), atol=1e-6)
    with pytest.raises(ValueError, match="dim is 9; the embedding has 8"):
        refine_and_scan(HiddenState(hidden, weight, head, dim=9), rows, k=1)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if MISSING[request.param] is not None:
        pytest.skip(f"{request.param} {MISSING[request.param]}")
    return request.param


STATES = {
    "soft": lambda dtype: SoftQuery(unit(3, 6, dtype=dtype), unit(3, 4, 6, seed=2, dtype=dtype), 0.5),
    "gate": lambda dtype: SoftQuery(unit(3, 6, dtype=dtype), unit(3, 4, 6, seed=2), torch.tensor(0.5)),
    "gates": lambda dtype: SoftQuery(unit(3, 6, dtype=dtype), unit(3, 4, 6, seed=2, dtype=dtype), torch.rand(3, 1)),
    "no-soft": lambda dtype: SoftQuery(unit(3, 6, dtype=dtype), unit(3, 0, 6), 0.5),
    "hidden": lambda dtype: HiddenState(unit(3, 9, dtype=dtype), torch.ones(9), dim=6),
    "head": lambda dtype: HiddenState(unit(3, 9, dtype=dtype), torch.rand(9), unit(8, 9, seed=1, dtype=dtype), 6),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "top": {"k": 3},
    "all": {
        "k": 3,
        "positive": torch.tensor([1, -1, 7]),
        "temperature": 0.2,
        "exclude": torch.tensor([[2], [3], [-1]]),
    },
    "candidates": {"k": 2, "candidates": torch.tensor([[2, 5, 2], [3, -1, 9], [0, 1, 2]]), "temperature": 1.0},
}


# The interpreter is slow: it is there for the way the op takes, which is the same for every state.
@pytest.mark.parametrize("options", ["all", "candidates"] if interpreted else OPTIONS)
@pytest.mark.parametrize("state", ["gates"] if interpreted else STATES)
def test_the_scan_is_that_of_the_query(state: str, options: str, backend: str) -> None:
    if backend == "triton" and options == "candidates":
        with pytest.raises(BackendUnavailable, match="'candidates' are for the other backends"):
            refine_and_scan(STATES[state](torch.float32), unit(20, 6), **OPTIONS[options], backend=backend)
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if interpreted and dtype != torch.float32:
            continue
        rows = unit(20, 6, seed=5, dtype=torch.float32 if dtype == torch.float16 else dtype)
        made = STATES[state](dtype)
        query, found = refine_and_scan(made, rows, **OPTIONS[options], backend=backend)
        assert last_backend() == backend
        assert query.dtype == dtype and torch.equal(query, made.query())
        torch.testing.assert_close(query.float().norm(dim=1), torch.ones(3), rtol=1e-2, atol=0.0)
        wanted = scan(query, rows, **OPTIONS[options], backend=backend)
        for field in dataclasses.fields(found):
            one, other = getattr(found, field.name), getattr(wanted, field.name)
            assert (one is None) == (other is None), field.name
            assert one is None or torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), field.name


def test_gradients_are_those_of_the_formula(backend: str) -> None:
    rows, positive = unit(20, 6, seed=5), torch.tensor([1, 2, 7])
    base, soft, gate = unit(3, 6), unit(3, 4, 6, seed=2), torch.tensor([0.3, -1.0, 2.0])
    leaves = [leaf.requires_grad_() for leaf in (base, soft, gate)]
    _, found = refine_and_scan(SoftQuery(*leaves), rows, k=2, positive=positive, temperature=0.3, backend=backend)
    loss = (found.lse - found.positive_score / 0.3 + found.scores.sum(dim=1)).sum()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    query = F.normalize(exact[0] + exact[2][:, None] * exact[1].mean(dim=1), dim=1)
    scores = query @ rows.double().T
    plain = (scores / 0.3).logsumexp(dim=1) - scores[range(3), positive] / 0.3 + scores.topk(2).values.sum(dim=1)
    wanted = torch.autograd.grad(plain.sum(), exact)
    for ours, other in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert (ours - other).norm() <= 1e-5 * other.norm()


@pytest.mark.skipif(interpreted, reason="slow, and nothing here is the kernel's")
def test_gradients_reach_the_hidden_state(backend: str) -> None:
    rows = unit(20, 6, seed=5)
    leaves = [leaf.requires_grad_() for leaf in (unit(3, 9), torch.rand(9) + 0.5, unit(8, 9, seed=1))]
    _, found = refine_and_scan(HiddenState(*leaves, dim=6), rows, k=2, backend=backend)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    normed = exact[0] * (exact[0].square().mean(dim=1, keepdim=True) + 1e-6).rsqrt() * exact[1]
    scores = F.normalize((normed @ exact[2].T)[:, :6], dim=1) @ rows.double().T
    wanted = torch.autograd.grad(scores.topk(2).values.sum(), exact)
    for ours, other in zip(torch.autograd.grad(found.scores.sum(), leaves), wanted, strict=True):
        assert (ours - other).norm() <= 1e-4 * other.norm()


def test_no_queries_and_no_rows(backend: str) -> None:
    query, found = refine_and_scan(
        SoftQuery(unit(0, 6), unit(0, 2, 6)), unit(20, 6), k=3, temperature=1.0, backend=backend
    )
    assert query.shape == (0, 6) and found.ids.shape == (0, 3) and found.expected.shape == (0, 6)
    query, found = refine_and_scan(SoftQuery(unit(2, 6), unit(2, 0, 6)), unit(20, 6)[:0], k=1, backend=backend)
    assert torch.allclose(query, unit(2, 6)) and found.ids.tolist() == [[-1], [-1]]


def test_what_does_not_fit_is_named() -> None:
    rows = unit(20, 6)
    with pytest.raises(ValueError, match="corpus holds 6-d vectors; the query has 5"):
        refine_and_scan(SoftQuery(unit(2, 5), unit(2, 1, 5)), rows, k=1)
    with pytest.raises(ValueError, match=r"gate has shape \(3,\)"):
        refine_and_scan(SoftQuery(unit(2, 6), unit(2, 1, 6), torch.ones(3)), rows, k=1)
    with pytest.raises(ValueError, match=r"head has shape \(6, 8\); expected \(P, 9\)"):
        refine_and_scan(HiddenState(unit(2, 9), torch.ones(9), unit(6, 8)), rows, k=1)
    with pytest.raises(ValueError, match="k is 3000"):
        refine_and_scan(SoftQuery(unit(2, 6), unit(2, 1, 6)), rows, k=3000)


@pytest.mark.parametrize("state", ["soft", "gates", "head"])
def test_opcheck_of_the_front(state: str) -> None:
    parts = STATES[state](torch.float32).parts()
    arguments = (*parts, unit(20, 6), 3, torch.tensor([1, 2, 7]), 0.5, True, None, None, "reference")
    torch.library.opcheck(refined_scan, arguments)


def test_the_front_compiles_without_a_graph_break() -> None:
    rows, base, soft = unit(20, 6), unit(3, 6), unit(3, 4, 6, seed=2)

    def search(base: Tensor, soft: Tensor) -> Tensor:
        query, found = refine_and_scan(SoftQuery(base, soft, 0.5), rows, k=3)
        return query.sum() + found.scores.sum()

    compiled = torch.compile(search, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(base, soft), search(base, soft))
    leaf, plain = soft.clone().requires_grad_(), soft.clone().requires_grad_()
    compiled(base, leaf).backward()
    search(base, plain).backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


def test_another_backend_than_cuda_is_composed() -> None:
    facts: dict[str, Any] = {"candidates": False, "expected": True, "front": None, "rows": unit(2, 6)}
    for asked in ("reference", "cpu", "triton"):
        name = resolve("refine_and_scan", "auto", device=torch.device("cpu"), dtype=torch.float32, asked=asked, **facts)
        assert name == "composed"
