"""Shared-prefix attention on the CPU: the compiled decoding and torch's flash kernels, against plain attention in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.prefix import check_error, plain, tensors
from vsr1.ops import last_backend
from vsr1.ops.prefix import shared_prefix_attention

OWNER = [2, 0, 2, 2, 0, 4, 1]  # prefix 3 has no rows, nor has the last
TRAINING = {
    "even": {"groups": 2, "group": 3, "queries": 37, "suffix": 37},
    "ragged": {"owner": OWNER, "queries": 37, "suffix": 37},
    "no-gqa": {"key_heads": 4, "queries": 20, "suffix": 20},
    "no-prefix": {"queries": 20, "suffix": 20, "prefix": 0},
    "no-suffix": {"queries": 20, "suffix": 0, "owner": OWNER},
    "few-queries": {"queries": 2, "suffix": 9, "owner": OWNER},
}


def group_of(case, group=3):
    return torch.tensor(case["owner"]) if "owner" in case else case.get("group", group)


def training_masks(inputs):
    """Prefixes padded on the left; right-padded causal suffixes, and a row of padding alone."""
    q, k_prefix, _, k_suffix, _ = inputs
    (prefixes, _, prefix, _), (rows, _, queries, _), suffix = k_prefix.shape, q.shape, k_suffix.shape[2]
    begin = torch.arange(prefixes)[:, None] * 3
    length = suffix - torch.arange(rows)[:, None] * 2
    triangle = torch.ones(queries, suffix, dtype=torch.bool).tril(max(suffix - queries, 0))
    real = torch.arange(suffix) < length
    return {"prefix_mask": torch.arange(prefix) >= begin, "suffix_mask": triangle & real[:, None]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", TRAINING.values(), ids=TRAINING)
def test_training_error(case, masked, dtype):
    inputs = tensors(**{"prefix": 65, "width": 32, "dtype": dtype} | case)
    check_error(inputs, group_of(case), **(training_masks(inputs) if masked else {}))
    assert last_backend() == "cpu"


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    inputs = tensors(queries=12, suffix=12, owner=[1, 0, 1], dtype=torch.float32)
    prefix_mask = torch.tensor([[True] * 7, [False] * 7, [True] * 7])
    suffix_mask = torch.ones(3, 12, 12, dtype=torch.bool).tril()
    suffix_mask[2, 5] = False
    owner = torch.tensor([1, 0, 1])
    masks = {"prefix_mask": prefix_mask, "suffix_mask": suffix_mask}
    out = shared_prefix_attention(*inputs, group=owner, **masks)
    assert last_backend() == "cpu"
    torch.testing.assert_close(out, plain(*inputs, owner, **masks))
    assert out[2, :, 5].abs().max() == 0
    out.sum().backward()
    assert inputs[0].grad[2, :, 5].abs().max() == 0
    assert all(torch.isfinite(t.grad).all() for t in inputs)


@pytest.mark.parametrize("owner", [None, [1, 0]], ids=["even", "ragged"])
def test_is_a_well_formed_custom_op(owner):
    inputs = tensors(groups=1, group=2, queries=12, suffix=12, owner=owner, dtype=torch.float32)
    masks = None, torch.ones(2, 12, 12, dtype=torch.bool).tril()
    owner = None if owner is None else torch.tensor(owner)
    torch.library.opcheck(torch.ops.vsr1.shared_prefix_attention, (*inputs, owner, *masks, 0.5, "cpu"))
