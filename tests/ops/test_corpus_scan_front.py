"""What stands in front of the sweep: Rocchio, and the soft-query update that scans in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vsr1.ops.corpus_scan import (
    HiddenState,
    SoftQuery,
    refine_and_scan,
    rocchio,
    scan,
)


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
