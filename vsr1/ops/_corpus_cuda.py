"""The CUDA C++ sweep for few queries (csrc/cuda/corpus_scan.cu), called through ctypes.

It reads the corpus once also where `expected` is asked for, which the Triton kernels cannot. What it leaves is what
they leave (`kernels.corpus_scan.Sweep`), so the merge is theirs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

MAX_QUERIES = 16
DIMS = (1024, 1536, 2048)  # the kernel spreads a row over 16 warps at compile time
GROUP = 32


class _Arguments(ctypes.Structure):
    """`Sweep` in csrc/cuda/corpus_scan.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "rows", "exclude", "positive", "bar", "maxima", "runner_up")),
        *((name, ctypes.c_void_p) for name in ("nan_count", "greater", "peak", "mass", "partial", "own")),
        *((name, ctypes.c_int64) for name in ("row_stride", "row_count", "exclude_width")),
        ("temperature", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("queries", "dim", "blocks", "bfloat16")),
    )


@functools.cache
def library_missing() -> str | None:
    """Why the compiled kernel cannot serve here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    if importlib.util.find_spec("vsr1._cuda") is None:
        return "needs the compiled kernels vsr1._cuda: install vsr1 where nvcc is found"
    if torch.cuda.get_device_capability()[0] != 9:
        return "is compiled for compute capability 9.0 (Hopper)"
    return None


def refuses(query: Tensor, rows: Tensor) -> str | None:
    """Why these arrays are not for this kernel, or None."""
    if query.dtype != rows.dtype or rows.dtype == torch.float32:
        return f"takes queries and rows of one half type; these are {query.dtype} and {rows.dtype}"
    if query.shape[0] > MAX_QUERIES or rows.shape[1] not in DIMS:
        return f"takes up to {MAX_QUERIES} queries of {', '.join(map(str, DIMS))} components; these are {tuple(query.shape)}"
    if rows.data_ptr() % 16 or rows.stride(0) % 8:
        return "takes rows that begin at multiples of 16 bytes"
    return None


def sweep(
    query: Tensor,
    rows: Tensor,
    exclude: Tensor | None,
    positive: Tensor | None,
    bar: Tensor | None,
    temperature: float | None,
    expected: bool = False,
) -> Any:
    """As `kernels.corpus_scan.sweep`, with one entry of peak and mass a block instead of a row tile."""
    from vsr1.kernels.corpus_scan import Sweep

    B, D = query.shape
    groups = -(-rows.shape[0] // GROUP)
    blocks = min(groups, torch.cuda.get_device_properties(query.device).multi_processor_count)
    maxima = query.new_empty((B, groups), dtype=torch.float32)
    runner_up = query.new_empty((B, groups), dtype=torch.int32)
    nan_count = query.new_zeros(B, dtype=torch.int32)
    greater = None if positive is None else query.new_zeros(B, dtype=torch.int32)
    peak = None if temperature is None else query.new_empty((blocks, B), dtype=torch.float32)
    mass = None if peak is None else torch.empty_like(peak)
    partial = query.new_empty((blocks, B, D), dtype=torch.float32) if expected else None
    _launch(
        query, rows, blocks, temperature, exclude, positive=positive, bar=bar, maxima=maxima, runner_up=runner_up,
        nan_count=nan_count, greater=greater, peak=peak, mass=mass, partial=partial,
    )  # fmt: skip
    total = None
    if partial is not None and peak is not None and temperature is not None:
        highest = peak.amax(dim=0)
        level = highest.masked_fill(highest == float("-inf"), 0.0)
        total = torch.einsum("gb,gbd->bd", ((peak - level) / temperature).exp(), partial)
    return Sweep(maxima, runner_up, nan_count, greater, peak, mass, total)


def positive_scores(query: Tensor, rows: Tensor, positive: Tensor) -> Tensor:
    """(B,) float32 scores of the positive rows as `sweep` computes them, NaN for -1."""
    own = query.new_empty(query.shape[0], dtype=torch.float32)
    _launch(query, rows[positive.clamp(min=0)], 1, None, None, own=own)
    return own.masked_fill(positive < 0, float("nan"))


def _launch(
    query: Tensor, rows: Tensor, blocks: int, temperature: float | None, exclude: Tensor | None, **arrays: Tensor | None
) -> None:
    spec = importlib.util.find_spec("vsr1._cuda")
    if spec is None or spec.origin is None:
        raise ImportError(f"vsr1._cuda: {library_missing()}")
    arguments = _Arguments(
        query=query.data_ptr(),
        rows=rows.data_ptr(),
        exclude=None if exclude is None else exclude.data_ptr(),
        row_stride=rows.stride(0),
        row_count=rows.shape[0],
        exclude_width=0 if exclude is None else exclude.shape[1],
        temperature=temperature or 1.0,
        queries=query.shape[0],
        dim=query.shape[1],
        blocks=blocks,
        bfloat16=rows.dtype == torch.bfloat16,
        **{name: array.data_ptr() for name, array in arrays.items() if array is not None},
    )
    with torch.cuda.device(query.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = _library(spec.origin).vsr1_corpus_scan(ctypes.byref(arguments), ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"corpus_scan on {query.device}: {error.decode()}")


@functools.cache
def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.vsr1_corpus_scan.restype = ctypes.c_char_p
    return library
