"""What searches should find, in float64 and block by block on any device, and whether they found it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 20_000  # rows that are made or widened at a time


class Top(NamedTuple):
    """The best k rows of each query: scores (B, k) float64, descending, and ids (B, k) int64."""

    scores: Tensor
    ids: Tensor


def unit_rows(count: int, dim: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """(count, dim) random vectors of length 1, up to the rounding of dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty(count, dim, dtype=dtype, device=device)
    for block in rows.split(BLOCK):
        block.copy_(F.normalize(torch.randn(block.shape, generator=generator, device=device), dim=1))
    return rows


def top(query: Tensor, rows: Tensor, k: int) -> Top:
    """The truth for queries (B, D) and rows (N, D)."""
    wide = query.double()
    best = Top(wide.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64, device=query.device))
    for start in range(0, len(rows), BLOCK):
        scores = wide @ rows[start : start + BLOCK].double().T
        ids = torch.arange(start, start + scores.shape[1], device=query.device).expand_as(scores)
        order = torch.cat([best.scores, scores], dim=1).topk(min(k, start + scores.shape[1]), dim=1)
        best = Top(order.values, torch.cat([best.ids, ids], dim=1).gather(1, order.indices))
    return best


def check_top(name: str, query: Tensor, rows: Tensor, found: Tensor, exact: Top, rounding: float) -> None:
    """The ids found (B, k), best first, name k different rows that score what the best rows score, within `rounding`.

    Queries past those of `exact` are not looked at, and of `exact` the first k columns. AssertionError names the contender.
    """
    found, wide = found[: len(exact.scores)].long(), query[: len(exact.scores)].double()
    wanted = exact.scores[: len(found), : found.shape[1]]
    ordered = found.sort(dim=1).values
    if not ((ordered[:, 1:] > ordered[:, :-1]).all() and (found >= 0).all() and (found < len(rows)).all()):
        raise AssertionError(f"{name} returns a row twice, or one that is none")
    scores = torch.stack([rows[ids].double() @ one for ids, one in zip(found, wide, strict=True)])
    off = (scores - wanted).abs().max().item()
    if not off <= rounding:
        raise AssertionError(
            f"{name} finds rows whose scores are {off:.2e} from the best ones; {rounding:.0e} is rounding"
        )


def check_scores(name: str, query: Tensor, rows: Tensor, ids: Tensor, scores: Tensor, rounding: float) -> None:
    """The scores (B, k) returned are those of the rows named, within `rounding`."""
    exact = torch.stack([rows[line].double() @ one.double() for line, one in zip(ids, query, strict=True)])
    off = (scores - exact).abs().max().item()
    if not off <= rounding:
        raise AssertionError(
            f"{name} returns scores that are {off:.2e} from those of its rows; {rounding:.0e} is rounding"
        )


def info_nce(query: Tensor, rows: Tensor, positive: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss (B,) and its gradient (B, D); for unit vectors and temperatures of 0.01 and more no peak is needed."""
    query = query.double()
    mass, expected = query.new_zeros(len(query)), torch.zeros_like(query)
    for block in rows.split(BLOCK):
        wide = block.double()
        weights = (query @ wide.T / temperature).exp()
        mass += weights.sum(dim=1)
        expected += weights @ wide
    own = rows[positive].double()
    loss = mass.log() - (query * own).sum(dim=1) / temperature
    return loss, (expected / mass[:, None] - own) / temperature


def check_info_nce(
    name: str, found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], loss_rounding: float, rounding: float
) -> None:
    """The loss within `loss_rounding`, the gradient within `rounding` of its length; as many queries as were asked."""
    count = len(found[0])
    loss_off = (found[0] - exact[0][:count]).abs().max().item()
    gradient_off = ((found[1] - exact[1][:count]).norm() / exact[1][:count].norm()).item()
    if not (loss_off <= loss_rounding and gradient_off <= rounding):
        raise AssertionError(
            f"{name}: the loss is off by {loss_off:.2e}, the gradient by {gradient_off:.2e} of its length"
        )
