"""The CUDA C++ sweep for few queries (csrc/cuda/corpus_scan.cuh) and what it can do before it scores: refine the queries.

It reads the corpus once also where `expected` is asked for, which the Triton kernels cannot, and it makes the queries itself
where a `Front` is given, so a call is one launch and the merge (two launches for a hidden state, whose head is a product of its
own). What it leaves is what the Triton sweep leaves (`kernels.corpus_scan.Sweep`), so the merge is theirs.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vsr1.ops import _cuda_code

MEASURED = (9, 0)  # the compute capability on which it was faster than the Triton kernels
MAX_QUERIES = 16
MAX_SOFT = 16  # soft tokens that every block reads again; more are cheaper to add up once, before the sweep
DIMS = (1024, 1536, 2048)  # the kernel spreads a row over 16 warps at compile time
GROUP = 32
TILE = 16
WARPS = 16
STAGES = (3, 2)  # tiles in shared memory, as many as fit
NAMES = {torch.float16: "vsr1::Half", torch.bfloat16: "vsr1::Bfloat16"}


class Arguments(ctypes.Structure):
    """`Sweep` in csrc/cuda/corpus_scan.cuh."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "rows", "exclude", "positive", "refined", "projected", "weight")
        ),
        *((name, ctypes.c_void_p) for name in ("soft", "gate", "maxima", "runner_up", "nan_count", "greater")),
        *((name, ctypes.c_void_p) for name in ("positive_score", "peak", "mass", "partial")),
        *((name, ctypes.c_int64) for name in ("query_stride", "row_stride", "row_count", "exclude_width")),
        *((name, ctypes.c_float) for name in ("slope", "gate_value")),
        *((name, ctypes.c_int32) for name in ("gate_stride", "soft_count", "queries")),
    )


class Projection(ctypes.Structure):
    """`Projection` in csrc/cuda/projection.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "head", "out")),
        *((name, ctypes.c_int64) for name in ("hidden_stride", "head_stride")),
        *((name, ctypes.c_int32) for name in ("width", "outputs", "queries")),
    )


@dataclass(frozen=True)
class Front:
    """What queries are made of: normalise(base * weight + gate * mean(soft)), or normalise((base * weight) @ head[:D].T).

    base (B, D), with a head (B, H), without one (B, D or more); weight of its width, head (D or more, H) and soft (B, n, D)
    in its dtype; gate a number or float32 (1,) or (B,). None is left out.
    """

    base: Tensor
    weight: Tensor | None = None
    head: Tensor | None = None
    soft: Tensor | None = None
    gate: float | Tensor = 1.0

    def refuses(self, rows: Tensor) -> str | None:
        """Why the kernels cannot make these queries for these rows, or None."""
        arrays = [array for array in (self.base, self.weight, self.head, self.soft) if array is not None]
        gate = [self.gate] if isinstance(self.gate, Tensor) else []
        if any(array.dtype != rows.dtype for array in arrays):
            return f"refines what has the rows' type; these are {', '.join(str(array.dtype) for array in arrays)}"
        if any(array.device != rows.device for array in arrays + gate):
            return f"refines what is on {rows.device}"
        if not all(_aligned(array) for array in arrays):
            return "refines arrays whose lines are contiguous and begin at multiples of 16 bytes"
        if self.head is not None and self.base.shape[1] % 8:
            return "projects hidden states whose width is a multiple of 8"
        if self.soft is not None and (self.soft.shape[1] > MAX_SOFT or not self.soft.is_contiguous()):
            return f"refines with up to {MAX_SOFT} soft tokens that are contiguous; these have shape {tuple(self.soft.shape)}"
        return None


def refuses(query: Tensor, rows: Tensor) -> str | None:
    """Why these arrays are not for this kernel, or None."""
    if query.dtype != rows.dtype or rows.dtype not in NAMES:
        return f"takes queries and rows of one half type; these are {query.dtype} and {rows.dtype}"
    if query.shape[0] > MAX_QUERIES or rows.shape[1] not in DIMS:
        sizes = ", ".join(map(str, DIMS))
        return f"takes up to {MAX_QUERIES} queries of {sizes} components; these are {query.shape[0]} of {rows.shape[1]}"
    if not _aligned(rows):
        return "takes rows that begin at multiples of 16 bytes"
    room = shared_limit(rows.device)
    if stages(rows.shape[1], room) is None:
        return f"needs more than the {room // 1024} KiB of shared memory that this GPU gives a block for this dimension"
    return None


def shared_bytes(dim: int, stage_count: int) -> int:
    """`sizeof(SharedMemory<T, dim, stage_count>)`, a multiple of its alignment."""
    ring = stage_count * TILE * (dim + 8) * 2
    scores = WARPS * TILE * TILE * 4 + TILE * (TILE + 8) * 2
    state = 3 * TILE * 4 + TILE * TILE * 4 + TILE * 4 + TILE * 12 + 64 * 4
    return -(-(ring + scores + state + stage_count * 8) // 128) * 128


def stages(dim: int, room: int) -> int | None:
    """How many tiles fit into `room` bytes of shared memory; None if too few."""
    return next((count for count in STAGES if shared_bytes(dim, count) <= room), None)


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def sweep(
    query: Tensor,
    rows: Tensor,
    exclude: Tensor | None,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool = False,
    front: Front | None = None,
) -> Any:
    """As `kernels.corpus_scan.sweep`, with one entry of peak and mass a block instead of a row tile.

    With a front, query (B, D) is written, not read.
    """
    from vsr1.kernels.corpus_scan import Sweep

    B, D = query.shape
    groups = -(-rows.shape[0] // GROUP)
    blocks = min(groups, torch.cuda.get_device_properties(query.device).multi_processor_count)
    maxima = query.new_empty((B, groups), dtype=torch.float32)
    runner_up = query.new_empty((B, groups), dtype=torch.int32)
    nan_count = query.new_zeros(B, dtype=torch.int32)
    greater = None if positive is None else query.new_zeros(B, dtype=torch.int32)
    positive_score = None if positive is None else query.new_empty(B, dtype=torch.float32)
    peak = None if temperature is None else query.new_empty((blocks, B), dtype=torch.float32)
    mass = None if peak is None else torch.empty_like(peak)
    partial = query.new_empty((blocks, B, D), dtype=torch.float32) if expected else None
    start = _as_it_is(query) if front is None else _refined(front, query)
    arguments = Arguments(
        rows=rows.data_ptr(),
        row_stride=rows.stride(0),
        row_count=rows.shape[0],
        exclude_width=0 if exclude is None else exclude.shape[1],
        slope=math.log2(math.e) / (temperature or 1.0),
        queries=B,
        **_addresses(
            **start.arrays, exclude=exclude, positive=positive, maxima=maxima, runner_up=runner_up, nan_count=nan_count,
            greater=greater, positive_score=positive_score, peak=peak, mass=mass, partial=partial,
        ),
        **start.numbers,
    )  # fmt: skip
    count = stages(D, shared_limit(query.device))
    if count is None:
        raise ValueError(f"corpus_scan: {refuses(query, rows)}")
    name = f"vsr1::sweep_kernel<{NAMES[rows.dtype]}, {D // WARPS}, {count}>"
    _cuda_code.launch(
        name, arguments, blocks=blocks, threads=32 * WARPS, shared=shared_bytes(D, count), device=query.device
    )
    total = None
    if partial is not None and peak is not None and temperature is not None:
        highest = peak.amax(dim=0)
        level = highest.masked_fill(highest == float("-inf"), 0.0)
        total = torch.einsum("gb,gbd->bd", ((peak - level) / temperature).exp(), partial)
    return Sweep(maxima, runner_up, nan_count, greater, peak, mass, total, positive_score)


@dataclass(frozen=True)
class _Start:
    """The fields of `Arguments` that say where the queries come from; keeps the arrays alive until the launch."""

    arrays: dict[str, Tensor | None]
    numbers: dict[str, float]


def _as_it_is(query: Tensor) -> _Start:
    if query.data_ptr() % 16:
        query = query.clone()
    return _Start({"query": query}, {"query_stride": query.stride(0)})


def _refined(front: Front, query: Tensor) -> _Start:
    if front.head is not None:
        return _Start({"projected": _projected(front, query), "refined": query}, {})
    arrays = {"query": front.base, "weight": front.weight, "soft": front.soft, "refined": query}
    numbers: dict[str, float] = {
        "query_stride": front.base.stride(0),
        "soft_count": 0 if front.soft is None else front.soft.shape[1],
    }
    if isinstance(front.gate, Tensor):
        return _Start({**arrays, "gate": front.gate}, {**numbers, "gate_stride": int(len(front.gate) > 1)})
    return _Start(arrays, {**numbers, "gate_value": front.gate})


def _projected(front: Front, query: Tensor) -> Tensor:
    """(B, D) float32, not yet normalised."""
    out = query.new_empty(query.shape, dtype=torch.float32)
    hidden, weight, head = front.base, front.weight, front.head
    assert head is not None
    arguments = Projection(
        hidden_stride=hidden.stride(0),
        head_stride=head.stride(0),
        width=hidden.shape[1],
        outputs=query.shape[1],
        queries=len(query),
        **_addresses(hidden=hidden, weight=weight, head=head, out=out),
    )
    name = f"vsr1::projection_kernel<{NAMES[head.dtype]}>"
    _cuda_code.launch(name, arguments, blocks=query.shape[1] // 16, threads=256, shared=0, device=query.device)
    return out


def _aligned(array: Tensor) -> bool:
    """Whether lines along the last axis can be read 16 bytes at a time; takes half types."""
    strides = array.stride()
    return array.data_ptr() % 16 == 0 and strides[-1] == 1 and not any(stride % 8 for stride in strides[:-1])


def _addresses(**arrays: Tensor | None) -> dict[str, int]:
    return {name: array.data_ptr() for name, array in arrays.items() if array is not None}
