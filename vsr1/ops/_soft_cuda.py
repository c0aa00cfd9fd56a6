"""The soft-token step for a GPU whose multiprocessors together hold the whole head in shared memory: csrc/cuda/soft_query.cuh.

Its blocks wait for each other through a counter that must be a multiple of their number when a launch begins. So launches that
may overlap, or differ in size, must not share one: every stream has its own for each size, and so has every call that a CUDA
graph captures.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vsr1.ops import _cuda_code
from vsr1.ops._corpus_cuda import NAMES, shared_limit

TILE = 16  # outputs of a block
THREADS = 256
MULTIPLE = 32  # of widths
COUNTERS = 4096  # of a device; 32 KiB hold as many captured calls as anybody makes
ALIGNMENT = 16
_WEIGHTS = ("first", "first_bias", "norm", "norm_bias", "second", "second_bias", "read_norm", "read_norm_bias", "read")
_ARRAYS = (
    "state",
    *_WEIGHTS,
    "read_bias",
    "gate",
    "gate_bias",
    "mean",
    "action",
    "logp",
    "policy_input",
    "wide",
    "narrow",
)


class Arguments(ctypes.Structure):
    """`SoftStep` in csrc/cuda/soft_query.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_ARRAYS, "meetings")),
        ("seed", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("epsilon", "read_epsilon", "sigma", "log_density")),
        *((name, ctypes.c_int32) for name in ("rows", "width", "query_width", "begin", "end")),
    )


def refuses(*, state: Tensor, weights: Sequence[Tensor], named: bool, **_: object) -> str | None:
    """Why this step is not for the kernel, or None."""
    if not named:
        return "has been measured on no GPU; it serves where it is named"
    if state.dtype not in NAMES:
        return f"takes float16 and bfloat16 heads; this one is {str(state.dtype).removeprefix('torch.')}"
    width, query_width = state.shape[1], weights[0].shape[0]
    if width % MULTIPLE or query_width % MULTIPLE:
        return f"takes widths that are multiples of {MULTIPLE}; these are {width} and {query_width}"
    if any(tensor.data_ptr() % ALIGNMENT for tensor in (state, weights[0], weights[4], weights[8])):
        return f"takes matrices that begin at multiples of {ALIGNMENT} bytes"
    needed, room = shared_bytes(width, query_width), shared_limit(state.device)
    if needed > room:
        return f"holds its part of the head in {needed // 1024} KiB of shared memory; a block of this GPU has {room // 1024} KiB"
    blocks, places = block_count(width, query_width), multiprocessors(state.device)
    if blocks > places:
        return f"needs {blocks} multiprocessors for these widths; this GPU has {places}"
    return None


def shared_bytes(width: int, query_width: int) -> int:
    """Lines of the three matrices, partial sums and the warps' sums: as `SoftBlock` lays them out."""
    lines = TILE * 2 * (width + 2 * query_width + 3 * 32)
    return lines + 4 * (8 * TILE * TILE + 8)


def block_count(width: int, query_width: int) -> int:
    """Of a launch: 16 outputs each."""
    return max(width, query_width) // TILE


def multiprocessors(device: torch.device) -> int:
    """How many blocks run at the same time, at one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def step(
    state: Tensor,
    weights: Sequence[Tensor],
    epsilons: Sequence[float],
    sigma: float,
    seed: int,
    offset: int,
    log_density: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """As `vsr1.kernels.soft_query.step`, in one launch."""
    (rows, width), query_width = state.shape, weights[0].shape[0]
    wide = torch.empty((rows, query_width), dtype=torch.float32, device=state.device)
    narrow = torch.empty((rows, query_width), dtype=state.dtype, device=state.device)
    gate = weights[10:] or (None, None)
    arrays = dict(zip(_ARRAYS, (state, *weights[:10], *gate, *outputs, wide, narrow), strict=True))
    arguments = Arguments(
        **{name: array.data_ptr() for name, array in arrays.items() if array is not None},
        meetings=_counter(state.device, block_count(width, query_width)),
        seed=seed,
        offset=offset,
        epsilon=epsilons[0],
        read_epsilon=epsilons[1],
        sigma=sigma,
        log_density=log_density,
        rows=rows,
        width=width,
        query_width=query_width,
        begin=0,
        end=5,
    )
    _launch(arguments, state)


def _launch(arguments: Arguments, state: Tensor) -> None:
    _cuda_code.launch(
        f"vsr1::soft_step_kernel<{NAMES[state.dtype]}>",
        arguments,
        blocks=block_count(arguments.width, arguments.query_width),
        threads=THREADS,
        shared=shared_bytes(arguments.width, arguments.query_width),
        device=state.device,
    )


_counters: dict[torch.device, tuple[Tensor, Iterator[int], dict[tuple[int, int], int]]] = {}


def _counter(device: torch.device, blocks: int) -> int:
    """The address of the counter for a launch on the current stream: the stream's, or a new one for a call that is captured."""
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _counters:
        if capturing:
            raise RuntimeError("soft_query: take one step on this GPU before a CUDA graph captures the next")
        _counters[device] = (torch.zeros(COUNTERS, dtype=torch.int64, device=device), iter(range(COUNTERS)), {})
    counters, unused, held = _counters[device]
    key = torch.cuda.current_stream(device).cuda_stream, blocks
    if not capturing and key in held:
        return counters[held[key]].data_ptr()
    index = next(unused, None)
    if index is None:
        raise RuntimeError(f"soft_query: {COUNTERS} CUDA graphs and streams hold a step each; name backend='triton'")
    if not capturing:
        held[key] = index
    return counters[index].data_ptr()
