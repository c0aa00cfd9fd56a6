"""Shared-prefix attention against plain attention over concatenated keys, and packed groups against separate rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ops.prefix import check_error, plain, tensors
from vsr1.ops import last_backend
from vsr1.ops.prefix import group_block_mask, shared_prefix_attention

CASES = {
    "decode": {},
    "G1": {"group": 1},
    "no-gqa": {"key_heads": 4},
    "one-key-head": {"key_heads": 1},
    "L3": {"queries": 3},
    "no-prefix": {"prefix": 0},
    "no-suffix": {"suffix": 0},
    "ragged": {"owner": [2, 0, 2, 2, 0, 1]},
    "ragged-L3": {"owner": [3, 3, 0, 1, 0, 3], "queries": 3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_attention_over_concatenated_keys(case, masked):
    inputs = tensors(**case)
    group = torch.tensor(case["owner"]) if "owner" in case else case.get("group", 3)
    rows, _, queries, _ = inputs[0].shape
    prefix, suffix = inputs[1].shape[2], inputs[3].shape[2]
    masks = {}
    if masked:
        generator = torch.Generator().manual_seed(1)
        masks["prefix_mask"] = torch.rand(len(inputs[1]), prefix, generator=generator) < 0.7
        masks["suffix_mask"] = torch.rand(rows, queries, suffix, generator=generator) < 0.7
        if prefix:
            masks["prefix_mask"][:, 0] = True
        else:
            masks["suffix_mask"][..., 0] = True
    out = shared_prefix_attention(*inputs, group=group, scale=0.4, **masks)
    truth = plain(*inputs, group, scale=0.4, **masks)
    torch.testing.assert_close(out, truth)
    up = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.autograd.grad(out, inputs, up), torch.autograd.grad(truth, inputs, up))
    assert last_backend() == "reference"


def test_row_mask_and_default_scale():
    inputs = tensors()
    lengths = torch.tensor([1, 2, 3, 4, 5, 5])
    mask = torch.arange(5) < lengths[:, None]
    out = shared_prefix_attention(*inputs, group=3, suffix_mask=mask)
    torch.testing.assert_close(out, plain(*inputs, 3, suffix_mask=mask))


def test_gradcheck():
    inputs = tensors(groups=1, group=2, heads=2, key_heads=1, queries=2, prefix=3, suffix=2, width=2)
    triangle = torch.ones(2, 2, dtype=torch.bool).tril().expand(2, 2, 2)
    assert torch.autograd.gradcheck(lambda *a: shared_prefix_attention(*a, group=2, suffix_mask=triangle), inputs)


def test_gradcheck_of_ragged_groups():
    inputs = tensors(heads=2, key_heads=1, queries=2, prefix=3, suffix=2, width=2, owner=[1, 0, 1])
    owner = torch.tensor([1, 0, 1])
    mask = torch.tensor([[True, False, True], [True, True, True], [True, True, True]])
    assert torch.autograd.gradcheck(lambda *a: shared_prefix_attention(*a, group=owner, prefix_mask=mask), inputs)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    inputs = tensors()
    prefix_mask = torch.tensor([[False] * 7, [True] * 7])
    suffix_mask = torch.ones(6, 5, dtype=torch.bool)
    suffix_mask[1] = False
    out = shared_prefix_attention(*inputs, group=3, prefix_mask=prefix_mask, suffix_mask=suffix_mask)
    assert out[1].abs().max() == 0
    assert out[[0, 2, 3, 4, 5]].abs().min() > 0
    out.sum().backward()
    assert inputs[0].grad[1].abs().max() == 0
    assert all(torch.isfinite(t.grad).all() for t in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_one_and_a_half_times_that_of_the_plain_path(dtype):
    check_error(tensors(prefix=65, suffix=17, width=32, dtype=dtype), 3, backend="reference")


def test_packed_group_equals_separate_rows():
    """Attention with rotary-like position dependence, so that wrong positions show as well as a wrong mask."""
    generator = torch.Generator().manual_seed(3)
    prefix_length, lengths = 4, [3, 0, 2, 5]
    tokens = [torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (prefix_length, *lengths)]

    def attend(x, positions, mask):
        angle = positions[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
        a, b = x[:, :4], x[:, 4:]
        turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return F.scaled_dot_product_attention(turned[None], turned[None], x[None], attn_mask=mask)[0]

    block = group_block_mask(prefix_length, lengths)
    packed = attend(torch.cat(tokens), block.positions, block.mask).split([prefix_length, *lengths])
    for got, suffix in zip(packed[1:], tokens[1:], strict=True):
        row = torch.cat([tokens[0], suffix])
        causal = torch.ones(len(row), len(row), dtype=torch.bool).tril()
        expected = attend(row, torch.arange(len(row)), causal)
        torch.testing.assert_close(packed[0], expected[:prefix_length])
        torch.testing.assert_close(got, expected[prefix_length:])


def test_block_mask_by_hand():
    block = group_block_mask(2, [1, 2])
    assert block.positions.tolist() == [0, 1, 2, 2, 3]
    assert block.mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert group_block_mask(3, []).positions.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="-1"):
        group_block_mask(2, [1, -1])


@pytest.mark.parametrize("owner", [None, [1, 0]], ids=["even", "ragged"])
def test_is_a_well_formed_custom_op(owner):
    inputs = tensors(groups=1, group=2, owner=owner)
    masks = None, torch.ones(2, 1, 5, dtype=torch.bool)
    owner = None if owner is None else torch.tensor(owner)
    torch.library.opcheck(torch.ops.vsr1.shared_prefix_attention, (*inputs, owner, *masks, 0.5, "auto"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.zeros(6, 4, 8)}, "q must be"),
        ({"group": 4}, "group=4 must divide the 6 rows"),
        ({"group": torch.zeros(5, dtype=torch.int64)}, r"group must be an int, or int64 \(6,\)"),
        ({"group": torch.zeros(6)}, r"group must be .* torch.float32"),
        ({"group": torch.tensor([0, 1, 2, 0, 1, 1])}, "group must name prefixes 0 to 1; it has 2"),
        ({"group": torch.tensor([0, 1, -1, 0, 1, 1])}, "it has -1"),
        ({"k_prefix": torch.zeros(3, 2, 7, 8)}, r"k_prefix must have shape \(2, Hkv, length, 8\)"),
        ({"k_suffix": torch.zeros(6, 4, 5, 8), "v_suffix": torch.zeros(6, 4, 5, 8)}, "same number of key heads"),
        ({"v_suffix": torch.zeros(6, 2, 4, 8)}, "v_suffix must have the shape"),
        ({"v_prefix": torch.zeros(2, 2, 7, 8).half()}, "v_prefix is torch.float16"),
        ({"suffix_mask": torch.zeros(6, 4, dtype=torch.bool)}, "suffix_mask must be bool"),
        ({"prefix_mask": torch.zeros(2, 7)}, "prefix_mask must be bool"),
        ({"backend": "nonsense"}, "nonsense"),
    ],
)
def test_bad_arguments_are_named(change, says):
    names = ("q", "k_prefix", "v_prefix", "k_suffix", "v_suffix")
    good = dict(zip(names, (t.detach().float() for t in tensors()), strict=True))
    with pytest.raises(ValueError, match=says):
        shared_prefix_attention(**{**good, "group": 3, **change})
