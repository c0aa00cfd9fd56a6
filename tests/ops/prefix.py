"""Inputs of shared-prefix attention, and what it must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vsr1.ops.prefix import shared_prefix_attention

NAMES = ("out", "q", "k_prefix", "v_prefix", "k_suffix", "v_suffix")


def tensors(
    groups=2, group=3, heads=4, key_heads=2, queries=1, prefix=7, suffix=5, width=8, dtype=torch.float64, owner=None
):
    """q, keys and values; with an `owner`, the prefix of each row, one prefix more than it names."""
    generator = torch.Generator().manual_seed(0)
    rows = groups * group if owner is None else len(owner)
    groups = groups if owner is None else max(owner) + 2
    shapes = [
        (rows, heads, queries, width),
        (groups, key_heads, prefix, width),
        (groups, key_heads, prefix, width),
        (rows, key_heads, suffix, width),
        (rows, key_heads, suffix, width),
    ]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def plain(q, k_prefix, v_prefix, k_suffix, v_suffix, group, prefix_mask=None, suffix_mask=None, scale=None):
    """Every row with its own copy of the prefix, through torch's attention."""
    rows, _, queries, _ = q.shape
    owner = group if isinstance(group, torch.Tensor) else torch.arange(rows, device=q.device) // group
    k = torch.cat([k_prefix[owner], k_suffix], 2)
    v = torch.cat([v_prefix[owner], v_suffix], 2)
    seen = torch.ones(rows, queries, k.shape[2], dtype=torch.bool, device=q.device)
    prefix = k_prefix.shape[2]
    if prefix_mask is not None:
        seen[..., :prefix] = prefix_mask[owner][:, None]
    if suffix_mask is not None:
        seen[..., prefix:] = suffix_mask if suffix_mask.dim() == 3 else suffix_mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=True)


def check_error(inputs, group, **options):
    """Output and every gradient are within 1.5 times the error of plain attention of the same dtype.

    Beside that stands the rounding of the log-partition, a number of about 5, from which the backward makes the weights
    anew; plain attention of a few queries keeps them.
    """
    exact = [t.detach().double().requires_grad_() for t in inputs]
    masks = {name: mask for name, mask in options.items() if name.endswith("_mask")}

    def run(function, tensors, **options):
        out = function(*tensors, group=group, **options)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    truth = run(plain, exact, **masks)
    naive = run(plain, inputs, **masks)
    ours = run(shared_prefix_attention, inputs, **options)
    for name, o, n, t in zip(NAMES, ours, naive, truth, strict=True):
        assert o.dtype == inputs[0].dtype, name
        error, allowed = (float((x.double() - t).detach().norm() / t.detach().norm().clamp(min=1e-30)) for x in (o, n))
        assert error <= 1.5 * allowed + 5 * 2**-24, name
