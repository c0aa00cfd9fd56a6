"""Decoding with a shared prefix, no gradient asked: every backend and instruction set against plain attention in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.prefix import plain, tensors
from vsr1.ops import last_backend
from vsr1.ops._dispatch import extension_missing
from vsr1.ops.prefix import shared_prefix_attention

MANY = [
    1,
    0,
    1,
    1,
    3,
] * 7  # 21 rows of one prefix: more queries than two registers hold; prefix 2 has none, nor has the last
CASES = {
    "even": {},
    "one-row": {"groups": 1, "group": 1},
    "one-query-a-prefix": {"group": 1, "key_heads": 4},
    "many-rows": {"owner": MANY},
    "no-gqa": {"owner": MANY, "key_heads": 4},
    "one-key-head": {"owner": [1, 0, 0], "key_heads": 1},
    "L3": {"owner": [2, 0, 2], "queries": 3},
    "D23": {"owner": MANY, "width": 23},
    "D1": {"width": 1},
    "D256": {"width": 256},
    "P48": {"prefix": 48, "suffix": 49},
    "no-prefix": {"prefix": 0},
    "no-suffix": {"suffix": 0},
}


def made(case, dtype=torch.float32):
    options = {"prefix": 131, "suffix": 19, "width": 32, "dtype": dtype} | case
    inputs = [t.detach() for t in tensors(**options)]
    return inputs, torch.tensor(case["owner"]) if "owner" in case else case.get("group", 3)


def random_masks(inputs, group):
    """A third of everything hidden, all of it from the last row."""
    generator = torch.Generator().manual_seed(1)
    (rows, _, queries, _), (prefixes, _, prefix, _), suffix = inputs[0].shape, inputs[1].shape, inputs[3].shape[2]
    prefix_mask = torch.rand(prefixes, prefix, generator=generator) < 0.7
    suffix_mask = torch.rand((rows, suffix) if queries == 1 else (rows, queries, suffix), generator=generator) < 0.7
    if rows:
        prefix_mask[group[-1] if isinstance(group, torch.Tensor) else -1] = False
        suffix_mask[-1] = False
    return {"prefix_mask": prefix_mask, "suffix_mask": suffix_mask}


def check(out, inputs, group, masks):
    truth = plain(*(t.double() for t in inputs), group, **masks)
    naive = plain(*inputs, group, **masks)
    assert out.dtype == inputs[0].dtype
    size = truth.norm().clamp(min=1e-30)
    error, allowed = (float((x.double() - truth).norm() / size) for x in (out, naive))
    assert error <= 1.5 * allowed + 2 * 2**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error(case, dtype, backend):
    inputs, group = made(case, dtype)
    masks = random_masks(inputs, group)
    for options in ({}, masks):
        out = shared_prefix_attention(*inputs, group=group, backend=backend, **options)
        assert last_backend() == backend
        check(out, inputs, group, options)
    if len(out):
        assert out[-1].abs().max() == 0


def test_reads_views_of_larger_buffers(backend):
    """Suffixes are the beginning of buffers whose rest is NaN; the keys of the prefix lie head by head, or key by key."""
    (q, k_prefix, v_prefix, k_suffix, v_suffix), group = made({"owner": MANY, "key_heads": 4})
    rows, heads, suffix, width = k_suffix.shape
    buffers = torch.full((2, rows + 2, heads, suffix + 9, width + 3), torch.nan)
    views = [
        buffer[:rows, :, :suffix, :width].copy_(t) for buffer, t in zip(buffers, (k_suffix, v_suffix), strict=True)
    ]
    turned = k_prefix.transpose(1, 2).contiguous().transpose(1, 2)
    queries = q.transpose(0, 3).contiguous().transpose(0, 3)  # even its last dimension is strided
    spread = torch.zeros(2 * rows, dtype=torch.int64)[::2].copy_(group)
    masks = random_masks((q, k_prefix, v_prefix, k_suffix, v_suffix), group)
    strided = {name: mask.T.contiguous().T for name, mask in masks.items()}
    out = shared_prefix_attention(queries, turned, v_prefix, *views, group=spread, backend=backend, **strided)
    expected = shared_prefix_attention(q, k_prefix, v_prefix, k_suffix, v_suffix, group=group, backend=backend, **masks)
    torch.testing.assert_close(out, expected)


@pytest.mark.skipif(bool(extension_missing()), reason="there is no compiled extension")
def test_the_number_of_threads_cannot_be_seen():
    """With enough to do that every thread gets a share."""
    inputs, group = made({"owner": [0, 1] * 16, "heads": 8, "prefix": 1000, "width": 64})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(shared_prefix_attention(*inputs, group=group))
            assert last_backend() == "cpu"
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, found[0]) for out in found)


def test_nan_stays_in_its_row(backend):
    inputs, group = made({"owner": MANY})
    clean = shared_prefix_attention(*inputs, group=group, backend=backend)
    inputs[0][4, 1] = torch.nan
    out = shared_prefix_attention(*inputs, group=group, backend=backend)
    assert out[4, 1].isnan().all()
    out[4, 1] = clean[4, 1]
    assert torch.equal(out, clean)


def test_no_rows_give_none(backend):
    q, k_prefix, v_prefix, k_suffix, v_suffix = (t.detach() for t in tensors(dtype=torch.float32))
    none = torch.zeros(0, dtype=torch.int64)
    inputs = q[:0], k_prefix, v_prefix, k_suffix[:0], v_suffix[:0]
    assert shared_prefix_attention(*inputs, group=none, backend=backend).shape == (0, *q.shape[1:])


@pytest.mark.parametrize("value", [-1, 5])
def test_an_owner_that_is_no_prefix_is_named(backend, value):
    inputs, group = made({"owner": MANY})
    group[3] = value
    with pytest.raises(ValueError, match="group must name prefixes 0 to 4; it has"):
        shared_prefix_attention(*inputs, group=group, backend=backend)


def test_gradients_do_not_need_the_compiled_forward_to_be_torch_s(backend):
    """The backward takes the log-partition that decoding leaves, also under an instruction set's own rounding."""
    inputs = tensors(owner=[1, 0, 1], prefix=20, queries=2, dtype=torch.float32)
    owner = torch.tensor([1, 0, 1])
    up = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(shared_prefix_attention(*inputs, group=owner, backend=backend), inputs, up)
    assert last_backend() == backend
    torch.testing.assert_close(found, torch.autograd.grad(plain(*inputs, owner), inputs, up), rtol=1e-4, atol=1e-5)
