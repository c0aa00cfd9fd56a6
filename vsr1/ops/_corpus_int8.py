"""Exact top-k from int8 codes: the custom op `vsr1::corpus_scan_int8` and its backends.

The codes bracket every score, so only rows that may be among the best k are scored exactly, in float64, from the rows
themselves. Every backend returns the rows in the order of their float64 scores, equal ones by row number:

scores (B, k) float32, those scores rounded, and ids (B, k) int64, -inf and -1 where fewer than k rows are left;
nan_count (B,) int64; rescored (B,) int64, the rows that were scored exactly; fallbacks (B,) int64, 1 where the brackets
left too many rows and all of them were scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vsr1.ops._corpus_backends import BLOCK_ELEMENTS, NEGATIVE_INFINITY, new_outputs, scores_gradient, usable_rows
from vsr1.ops._dispatch import Backend, cpu_only, cuda_only, extension_missing, register, resolve, triton_missing

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

torch.library.define(
    "vsr1::corpus_scan_int8",
    "(Tensor query, Tensor rows, Tensor codes, Tensor scales, Tensor residuals, int k, Tensor? exclude, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
corpus_scan_int8 = torch.ops.vsr1.corpus_scan_int8.default


@torch.library.impl("vsr1::corpus_scan_int8", "default")
def _sweep(
    query: Tensor,
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    residuals: Tensor,
    k: int,
    exclude: Tensor | None,
    backend: str,
) -> Outputs:
    """The sweep over the codes; outputs as the module says."""
    exclude = usable_rows("exclude", exclude, rows)
    name = resolve("corpus_scan_int8", backend, device=rows.device, dtype=rows.dtype)
    return _IMPLEMENTATIONS[name](query, rows, codes, scales, residuals, k, exclude)


@torch.library.register_fake("vsr1::corpus_scan_int8")
def _(query: Tensor, rows: Tensor, codes: Tensor, scales: Tensor, residuals: Tensor, k: int, *_: Any) -> Outputs:
    return _new_outputs(query, k)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, rows = inputs[:2]
    ctx.query_dtype = query.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(rows, output[1])


def _query_gradient(ctx: Any, scores: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rows, ids = ctx.saved_tensors
    if scores is None or not len(rows):
        gradient = torch.zeros((len(ids), rows.shape[1]), device=rows.device)
    else:
        gradient = scores_gradient(scores, ids, rows)
    return gradient.to(ctx.query_dtype), None, None, None, None, None, None, None


torch.library.register_autograd("vsr1::corpus_scan_int8", _query_gradient, setup_context=_remember)


def _new_outputs(query: Tensor, k: int) -> Outputs:
    scores, ids, nan_count, *_ = new_outputs(query, k, None, None, False)
    return scores, ids, nan_count, torch.empty_like(nan_count), torch.empty_like(nan_count)


def _reference(
    query: Tensor, rows: Tensor, codes: Tensor, scales: Tensor, residuals: Tensor, k: int, exclude: Tensor | None
) -> Outputs:
    """What the others must find: every row scored in float64, block by block."""
    query = query.double()
    count, device = len(query), query.device
    best = query.new_full((count, 0), NEGATIVE_INFINITY)
    best_ids = torch.empty((count, 0), dtype=torch.int64, device=device)
    nan_count = torch.zeros(count, dtype=torch.int64, device=device)
    rescored = torch.full_like(nan_count, len(rows))
    step = max(1, BLOCK_ELEMENTS // max(count * rows.shape[1], 1))
    for start in range(0, len(rows) if count else 0, step):
        values = rows[start : start + step].double()
        # Summed row by row in one order, which a matrix product would not promise: copies of a row must tie.
        scores = (query[:, None] * values).sum(dim=2)
        ids = torch.arange(start, start + len(values), device=device).expand(count, len(values))
        if exclude is not None:
            left_out = (ids[:, :, None] == exclude[:, None, :]).any(dim=2)
            scores = scores.masked_fill(left_out, NEGATIVE_INFINITY)
            rescored -= left_out.sum(dim=1)
        nan_count += scores.isnan().sum(dim=1)
        scores = torch.cat([best, scores.masked_fill(scores.isnan(), NEGATIVE_INFINITY)], dim=1)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]  # ids ascend among equals
        best, best_ids = scores.gather(1, order), torch.cat([best_ids, ids], dim=1).gather(1, order)
    found = best.new_full((count, k), NEGATIVE_INFINITY)
    found_ids = torch.full((count, k), -1, dtype=torch.int64, device=device)
    found[:, : best.shape[1]] = best
    found_ids[:, : best.shape[1]] = best_ids.masked_fill(best == NEGATIVE_INFINITY, -1)
    return found.float(), found_ids, nan_count, rescored, torch.zeros_like(nan_count)


def _cpu(
    query: Tensor, rows: Tensor, codes: Tensor, scales: Tensor, residuals: Tensor, k: int, exclude: Tensor | None
) -> Outputs:
    """The sweep in C++ (csrc/cpu/corpus_int8.cpp), on as many threads as torch uses."""
    from vsr1._C import corpus_scan_int8 as sweep

    outputs = _new_outputs(query, k)
    query = query.float().contiguous()
    sweep(
        query=query.data_ptr(),
        queries=query.shape[0],
        rows=rows.data_ptr(),
        row_count=rows.shape[0],
        dim=rows.shape[1],
        row_stride=rows.stride(0),
        bfloat16=rows.dtype == torch.bfloat16,
        codes=codes.data_ptr(),
        code_stride=codes.stride(0),
        scales=scales.data_ptr(),
        residuals=residuals.data_ptr(),
        k=k,
        exclude=0 if exclude is None else exclude.data_ptr(),
        exclude_width=0 if exclude is None else exclude.shape[1],
        threads=torch.get_num_threads(),
        outputs=[output.data_ptr() for output in outputs],
    )
    return outputs


def _triton(
    query: Tensor, rows: Tensor, codes: Tensor, scales: Tensor, residuals: Tensor, k: int, exclude: Tensor | None
) -> Outputs:
    """The sweep on a GPU (kernels/corpus_int8.py)."""
    from vsr1.kernels.corpus_int8 import top_k

    return top_k(query, rows, codes, scales, residuals, k, exclude)


def _cpu_refuses(*, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float16:
        return "takes float32 and bfloat16 rows; these are float16"
    return cpu_only(device=device)


def _triton_refuses(*, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "runs on CPU tensors in Triton's interpreter only, which computes bfloat16 wrongly"
    return cuda_only(device=device)


_IMPLEMENTATIONS = {"cpu": _cpu, "triton": _triton, "reference": _reference}
register(
    "corpus_scan_int8",
    cpu=Backend(extension_missing, _cpu_refuses),
    triton=Backend(triton_missing, _triton_refuses),
    reference=Backend(),
)
