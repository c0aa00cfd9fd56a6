"""Muon and the split of parameters between the optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vsr1.train.optimizer import LARGEST, Muon, optimizers, orthogonal


@pytest.mark.parametrize("shape", [(40, 40), (64, 16), (16, 64)])
def test_orthogonal_evens_out_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices)
    values = torch.einsum("kmi,kmn,kin->ki", left, found, right)  # in the given matrices' own singular directions
    assert values.max() < 1.3
    assert values.flatten().quantile(0.1) > 0.6
    torch.testing.assert_close(orthogonal(100 * matrices), found, atol=1e-4, rtol=1e-3)


def test_a_zero_matrix_stays_zero() -> None:
    assert not orthogonal(torch.zeros(2, 8, 4)).any()


def test_agrees_with_torch_up_to_its_bfloat16() -> None:
    torch.manual_seed(0)
    ours = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in ((32, 32), (48, 24), (24, 48), (32, 32))])
    theirs = copy.deepcopy(ours)
    start = [one.detach().clone() for one in ours]
    mine = Muon([{"params": list(ours)}], 0.02, momentum=0.9, weight_decay=0.1)
    peer = torch.optim.Muon(
        list(theirs), lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        mine.step()
        peer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (one - other).norm() < 0.02 * moved


def test_takes_matrices_only() -> None:
    with pytest.raises(ValueError, match=r"\(4,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(4))]}], 1e-3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.inner = nn.Linear(8, 8)
        self.huge = nn.Linear(LARGEST + 1, LARGEST + 1, bias=False)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.words.weight


def test_every_parameter_has_one_optimizer() -> None:
    model = Model()
    groups = [
        {"params": [*model.words.parameters(), *model.huge.parameters()]},
        {"params": model.inner.parameters(), "lr": 0.5},
    ]
    muon, adamw = optimizers(model, groups, lr=0.1, muon=3.0, weight_decay=0.0)
    assert isinstance(muon, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    found = {
        id(one): (kind, group["peak"])
        for kind in (muon, adamw)
        for group in kind.param_groups
        for one in group["params"]
    }
    assert found == {
        id(model.inner.weight): (muon, 1.5),
        id(model.inner.bias): (adamw, 0.5),
        id(model.words.weight): (adamw, 0.1),  # the output layer too: it is tied to the table
        id(model.huge.weight): (adamw, 0.1),
    }


def test_without_muon_there_is_adamw_alone() -> None:
    model = Model()
    (only,) = optimizers(model, [{"params": list(model.parameters())}], lr=0.1, muon=0.0, weight_decay=0.0)
    assert isinstance(only, torch.optim.AdamW)
    assert {id(one) for group in only.param_groups for one in group["params"]} == {
        id(one) for one in model.parameters()
    }
