"""How a sweep is computed: the custom op `vsr1::corpus_scan`, its gradient, and its backends.

Arguments arrive checked (`vsr1.ops.corpus_scan`); row numbers are cleaned here, where their values may be looked at,
and every backend gets either `exclude` or ascending `candidates` with -1 for what does not count. All return the same
seven tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vsr1.ops import _corpus_cuda, _cuda_code
from vsr1.ops._dispatch import Backend, cpu_only, cuda_only, extension_missing, register, resolve, triton_missing

BLOCK_ELEMENTS = 1 << 22  # floats in one temporary of the reference: 16 MiB
GATHERED = 1 << 21  # scores that the merge on a GPU looks at in one go: 24 MiB with their row numbers
NEGATIVE_INFINITY = float("-inf")

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# Not torch.library.custom_op, whose first call imports torch._dynamo: two seconds of everybody's first search.
torch.library.define(
    "vsr1::corpus_scan",
    "(Tensor query, Tensor rows, int k, Tensor? positive, float? temperature, bool expected, Tensor? exclude, "
    "Tensor? candidates, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
corpus_scan = torch.ops.vsr1.corpus_scan.default


@torch.library.impl("vsr1::corpus_scan", "default")
def _sweep(
    query: Tensor,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    exclude: Tensor | None,
    candidates: Tensor | None,
    backend: str,
) -> Outputs:
    """The sweep; outputs as in `ScanResult`, of size 0 where not asked for (expected: only with its flag)."""
    positive = usable_rows("positive", positive, rows)
    exclude = usable_rows("exclude", exclude, rows)
    candidates = usable_rows("candidates", candidates, rows)
    if candidates is not None:
        candidates = candidates.sort(dim=1).values
        left_out = torch.zeros_like(candidates, dtype=torch.bool)
        left_out[:, 1:] = candidates[:, 1:] == candidates[:, :-1]
        if exclude is not None:
            left_out |= (candidates[:, :, None] == exclude[:, None, :]).any(dim=2)
            exclude = None
        candidates = candidates.masked_fill(left_out, -1)
    facts = {"candidates": candidates is not None, "expected": expected, "query": query, "rows": rows}
    facts["named"] = backend != "auto"
    name = resolve("corpus_scan", backend, device=rows.device, dtype=rows.dtype, **facts)
    return _IMPLEMENTATIONS[name](query, rows, k, positive, temperature, expected, exclude, candidates)


@torch.library.register_fake("vsr1::corpus_scan")
def _(
    query: Tensor,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    *_: Any,
) -> Outputs:
    return new_outputs(query, k, positive, temperature, expected)


def new_outputs(query: Tensor, k: int, positive: Tensor | None, temperature: float | None, expected: bool) -> Outputs:
    """Outputs to write, of size 0 where not asked for."""
    count, dim = query.shape

    def new(asked: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape if asked else (0,) * len(shape), dtype=dtype, device=query.device)

    return (
        new(True, torch.float32, count, k),
        new(True, torch.int64, count, k),
        new(True, torch.int64, count),
        new(positive is not None, torch.float32, count),
        new(positive is not None, torch.int64, count),
        new(temperature is not None, torch.float32, count),
        new(expected, torch.float32, count, dim),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, rows, _, positive, ctx.temperature = inputs[:5]
    _, ids, nan_count, _, rank, _, expected = output
    ctx.query_dtype = query.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(ids, nan_count, rank, expected)
    ctx.save_for_backward(rows, ids, positive, expected)


def _query_gradient(
    ctx: Any,
    scores: Tensor | None,
    _ids: None,
    _nan_count: None,
    positive_score: Tensor | None,
    _rank: None,
    lse: Tensor | None,
    _expected: None,
) -> tuple[Tensor | None, ...]:
    rows, ids, positive, expected = ctx.saved_tensors
    gradient = torch.zeros((ids.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
    if lse is not None and ctx.temperature is not None:
        gradient = gradient + lse[:, None] * expected / ctx.temperature
    if len(rows) and positive_score is not None and positive is not None:
        gradient = gradient + positive_score[:, None] * rows[positive.clamp(min=0)].float()
    if len(rows) and scores is not None:
        gradient = gradient + scores_gradient(scores, ids, rows)
    return gradient.to(ctx.query_dtype), None, None, None, None, None, None, None, None


def scores_gradient(scores: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """The gradient (B, D) float32 in the query, given that in the scores (B, k) of the rows `ids`; -1 has none."""
    weights = scores.masked_fill(ids < 0, 0.0)
    return torch.bmm(weights[:, None], rows[ids.clamp(min=0)].float())[:, 0]


torch.library.register_autograd("vsr1::corpus_scan", _query_gradient, setup_context=_remember)


def usable_rows(name: str, ids: Tensor | None, rows: Tensor) -> Tensor | None:
    """Row numbers with everything outside the corpus turned into -1; on CPU, where looking is free, an error."""
    if ids is None:
        return None
    if ids.device.type == "cpu" and ids.numel() and not (ids.min() >= -1 and ids.max() < len(rows)):
        bad = ids[(ids < -1) | (ids >= len(rows))][0].item()
        raise ValueError(f"{name} lists row {bad}; the corpus has {len(rows)} rows (-1 is padding)")
    return ids.masked_fill((ids < 0) | (ids >= len(rows)), -1).contiguous()


def _reference(
    query: Tensor,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    exclude: Tensor | None,
    candidates: Tensor | None,
) -> Outputs:
    """The sweep in plain torch, block by block, with everything in float32."""
    query = query.float()
    count, dim = query.shape
    best = query.new_full((count, k), NEGATIVE_INFINITY)
    best_ids = torch.full((count, k), -1, dtype=torch.int64, device=query.device)
    nan_count = torch.zeros(count, dtype=torch.int64, device=query.device)
    greater = torch.zeros_like(nan_count)
    peak = query.new_full((count,), NEGATIVE_INFINITY)
    mass = query.new_zeros(count)
    direction = query.new_zeros(count, dim)
    positive_score = _positive_score(query, rows, positive)
    for ids, scores, values in _blocks(query, rows, exclude, candidates):
        nan = scores.isnan()
        nan_count += nan.sum(dim=1)
        scores = scores.masked_fill(nan, NEGATIVE_INFINITY)
        best, best_ids = _top(torch.cat([best, scores], dim=1), torch.cat([best_ids, ids], dim=1), k)
        if positive is not None:
            greater += ((scores > _bar(positive_score)) & (ids != positive[:, None])).sum(dim=1)
        if temperature is not None:
            raised = torch.maximum(peak, scores.amax(dim=1))
            level = raised.masked_fill(raised == NEGATIVE_INFINITY, 0.0)
            shrink = ((peak - level) / temperature).exp()
            weights = ((scores - level[:, None]) / temperature).exp()
            peak, mass = raised, mass * shrink + weights.sum(dim=1)
            if expected:
                # A row with a NaN or an infinity has weight 0 or NaN; 0 x NaN must not spoil the other rows.
                usable = values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                direction = direction * shrink[:, None] + torch.matmul(weights[:, None], usable)[:, 0]
    empty = mass == 0
    lse = (peak / (temperature or 1.0) + mass.log()).masked_fill(empty, NEGATIVE_INFINITY)
    direction = direction / mass.masked_fill(empty, 1.0)[:, None]
    found = (best, best_ids, nan_count, positive_score, _rank(greater, positive), lse, direction)
    return _only_asked(found, positive, temperature, expected)


def _blocks(
    query: Tensor, rows: Tensor, exclude: Tensor | None, candidates: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Row numbers (B, n), scores (B, n) with -inf where not selectable, and float32 rows, (n, D) or (B, n, D)."""
    count, dim = query.shape
    if candidates is not None:
        step = max(1, BLOCK_ELEMENTS // max(count * dim, 1))
        for ids in candidates.split(step, dim=1) if candidates.numel() and len(rows) else ():
            values = rows[ids.clamp(min=0)].float()
            scores = torch.matmul(values, query[:, :, None])[:, :, 0]
            yield ids, scores.masked_fill(ids < 0, NEGATIVE_INFINITY), values
        return
    step = max(1, BLOCK_ELEMENTS // max(count, dim))
    for start in range(0, len(rows) if count else 0, step):
        values = rows[start : start + step].float()
        scores = query @ values.T
        size = len(values)
        if exclude is not None:
            # One column more than the block has takes every entry that belongs to another block.
            column = (exclude - start).where((exclude >= start) & (exclude < start + size), size)
            left_out = torch.zeros((count, size + 1), dtype=torch.bool, device=rows.device).scatter_(1, column, True)
            scores = scores.masked_fill(left_out[:, :size], NEGATIVE_INFINITY)
        yield torch.arange(start, start + size, device=rows.device).expand(count, size), scores, values


def _top(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k columns of (B, n), equal scores in column order; columns past n or at -inf become (-inf, -1).

    Each (score, column) pair is packed into one integer whose order is the wanted one: torch.topk alone leaves ties
    open.
    """
    count, width = scores.shape
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 and 0.0 the same bits
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    column = torch.arange(width, device=scores.device)
    keys = (ordered << 32) | (0xFFFFFFFF - column)
    chosen = 0xFFFFFFFF - (keys.topk(min(k, width), dim=1).values & 0xFFFFFFFF)
    chosen = F.pad(chosen, (0, k - chosen.shape[1]), value=-1)
    best = scores.gather(1, chosen.clamp(min=0)) if width else scores.new_empty((count, k))
    best = best.masked_fill(chosen < 0, NEGATIVE_INFINITY)
    best_ids = ids.gather(1, chosen.clamp(min=0)) if width else ids.new_empty((count, k))
    return best, best_ids.masked_fill(best == NEGATIVE_INFINITY, -1)


def _positive_score(query: Tensor, rows: Tensor, positive: Tensor | None) -> Tensor:
    if positive is None or not len(rows):
        return query.new_full((len(query),), math.nan)
    scores = (query * rows[positive.clamp(min=0)].float()).sum(dim=1)
    return scores.masked_fill(positive < 0, math.nan)


def _bar(positive_score: Tensor) -> Tensor:
    """(B, 1): what a score must exceed to count as above the positive; anything does where the positive's is NaN."""
    return positive_score.masked_fill(positive_score.isnan(), NEGATIVE_INFINITY)[:, None]


def _rank(greater: Tensor, positive: Tensor | None) -> Tensor:
    return greater + 1 if positive is None else (greater + 1).masked_fill(positive < 0, -1)


def _only_asked(found: Outputs, positive: Tensor | None, temperature: float | None, expected: bool) -> Outputs:
    scores, ids, nan_count, positive_score, rank, lse, direction = found
    if positive is None:
        positive_score, rank = positive_score.new_empty(0), rank.new_empty(0)
    if temperature is None:
        lse = lse.new_empty(0)
    return scores, ids, nan_count, positive_score, rank, lse, direction if expected else direction.new_empty((0, 0))


def _cpu(
    query: Tensor,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    exclude: Tensor | None,
    candidates: Tensor | None,
) -> Outputs:
    """The sweep in C++ (csrc/cpu/corpus_scan.cpp): one pass, on as many threads as torch uses."""
    from vsr1._C import corpus_scan as sweep

    outputs = new_outputs(query, k, positive, temperature, expected)
    query_bfloat16 = query.dtype == torch.bfloat16
    query = query.float().contiguous()

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    sweep(
        query=address(query),
        query_bfloat16=query_bfloat16,
        queries=query.shape[0],
        rows=address(rows),
        row_count=rows.shape[0],
        dim=rows.shape[1],
        row_stride=rows.stride(0),
        bfloat16=rows.dtype == torch.bfloat16,
        k=k,
        positive=address(positive),
        exclude=address(exclude),
        exclude_width=0 if exclude is None else exclude.shape[1],
        candidates=address(candidates),
        candidates_width=-1 if candidates is None else candidates.shape[1],
        temperature=0.0 if temperature is None else temperature,
        expected=expected,
        threads=torch.get_num_threads(),
        outputs=[address(output) for output in outputs],
    )
    return outputs


def _triton(
    query: Tensor,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    exclude: Tensor | None,
    candidates: Tensor | None,
) -> Outputs:
    """The sweep on a GPU (kernels/corpus_scan.py) and the merge of its partial results."""
    from vsr1.kernels import corpus_scan as kernels
    from vsr1.kernels.corpus_expected import SecondPass

    sweep = partial(kernels.sweep, second_pass=SecondPass if expected else None)
    return merged(sweep, query, rows, k, positive, temperature, expected, exclude)


def _cuda(
    query: Tensor,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    exclude: Tensor | None,
    candidates: Tensor | None,
) -> Outputs:
    """The sweep for few queries in CUDA C++ (csrc/cuda/corpus_scan.cuh) and the same merge."""
    sweep = partial(_corpus_cuda.sweep, expected=expected)
    return merged(sweep, query, rows, k, positive, temperature, expected, exclude)


def merged(
    sweep: Callable[..., Any],
    query: Tensor,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    exclude: Tensor | None,
) -> Outputs:
    """All outputs from what `sweep` leaves (`kernels.corpus_scan.Sweep`); it may be the sweep that writes the query."""
    from vsr1.kernels import corpus_scan as kernels

    if not len(query) or not len(rows):  # nothing to launch
        return _reference(query, rows, k, positive, temperature, expected, exclude, None)
    query = query.contiguous()
    outputs = list(new_outputs(query, 0, None, None, False))
    swept = sweep(query, rows, exclude, positive, temperature)

    best, best_ids = [], []
    chosen = min(k, swept.maxima.shape[1] + 1)  # one more than there are shows gather_scores that no group stays behind
    step = max(1, GATHERED // max(1, chosen * kernels.group_size(len(query))))
    for first in range(0, len(query), step):
        part = slice(first, first + step)
        groups = kernels.select(swept.maxima[part], None, chosen)
        left_out = None if exclude is None else exclude[part]
        scores, ids = kernels.select(*kernels.gather_scores(query[part], rows, swept, first, *groups, left_out), k)
        order = scores.sort(dim=1, descending=True, stable=True)  # selected in row order, so the lower row comes first
        best.append(order.values)
        best_ids.append(ids.gather(1, order.indices))

    outputs[:3] = torch.cat(best), torch.cat(best_ids), swept.nan_count.long()
    if positive is not None:
        outputs[3], outputs[4] = swept.positive_score, _rank(swept.greater.long(), positive)
    if temperature is not None:
        highest = swept.peak.amax(dim=0)
        level = highest.masked_fill(highest == NEGATIVE_INFINITY, 0.0)
        mass = (swept.mass * ((swept.peak - level) / temperature).exp()).sum(dim=0)
        outputs[5] = level / temperature + mass.log()
        if expected:
            outputs[6] = swept.expected / mass.masked_fill(mass == 0, 1.0)[:, None]
    scores, ids, nan_count, positive_score, rank, lse, direction = outputs
    return scores, ids, nan_count, positive_score, rank, lse, direction


def _cpu_refuses(*, device: torch.device, dtype: torch.dtype, **_: Any) -> str | None:
    if dtype == torch.float16:
        return "takes float32 and bfloat16 rows; these are float16"
    return cpu_only(device=device)


def cuda_missing() -> str | None:
    return triton_missing() or _cuda_code.missing()


def cuda_refuses(
    *, device: torch.device, candidates: bool, expected: bool, named: bool, query: Tensor, rows: Tensor, **_: Any
) -> str | None:
    if candidates:
        return "sweeps whole corpora; 'candidates' are for the other backends"
    if not (expected or named):
        return "serves sweeps that ask for expected, others where it is named; the Triton kernels are faster there"
    reason = cuda_only(device=device)
    if reason is None and not named and torch.cuda.get_device_capability(device) != _corpus_cuda.MEASURED:
        reason = "was measured on compute capability 9.0 alone; elsewhere it serves where it is named"
    return reason or _corpus_cuda.refuses(query, rows)


def _triton_refuses(*, device: torch.device, dtype: torch.dtype, candidates: bool, **_: Any) -> str | None:
    if candidates:
        return "sweeps whole corpora; 'candidates' are for the other backends"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "runs on CPU tensors in Triton's interpreter only, which computes bfloat16 wrongly"
    return cuda_only(device=device)


_IMPLEMENTATIONS = {"cpu": _cpu, "cuda": _cuda, "triton": _triton, "reference": _reference}
register(
    "corpus_scan",
    cpu=Backend(extension_missing, _cpu_refuses),
    cuda=Backend(cuda_missing, cuda_refuses),
    triton=Backend(triton_missing, _triton_refuses),
    reference=Backend(),
)
