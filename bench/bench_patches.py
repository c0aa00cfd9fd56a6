"""frames_to_patches on the CPU beside the torch calls of the stock processor: 64 frames 480x640 -> 256x352."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Goal, Measurement, faster_than
from vsr1.ops.patches import frames_to_patches

SIZE = (256, 352)
"""The nearest size on the 32-pixel grid to the 256x336 of common recipes."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stock(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """What the Qwen3-VL video processor of transformers does to one video, without its bookkeeping."""
    video = F.interpolate(frames.permute(0, 3, 1, 2).contiguous(), SIZE, mode="bicubic", antialias=True)
    video = (video.float() - 127.5) / 127.5
    tiles = video.view(len(frames) // 2, 2, 3, SIZE[0] // 32, 2, 16, SIZE[1] // 32, 2, 16)
    return tiles.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 1536).to(dtype)


def ours(frames: Tensor, dtype: torch.dtype, backend: str = "auto") -> Tensor:
    return frames_to_patches(frames, SIZE, dtype=dtype, backend=backend)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_to_patches(race: Callable[..., None], quick: bool, dtype: str) -> None:
    count = 4 if quick else 64
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (count, 480, 640, 3), dtype=torch.uint8, generator=generator)
    # One step of a byte, from -1 to 1 in 255 of them, and the rounding of the dtype.
    truth, allowed = stock(frames, torch.float32), 2 / 255 + torch.finfo(DTYPES[dtype]).eps

    def check(name: str, rows: Tensor) -> None:
        worst = (rows.float() - truth).abs().max().item()
        if rows.dtype != DTYPES[dtype] or not worst <= allowed:
            raise AssertionError(f"{name}: {rows.dtype} rows are off by up to {worst:.4f}; {allowed:.4f} is allowed")

    output_mib = truth.numel() * DTYPES[dtype].itemsize / 2**20

    def memory(line: Measurement) -> Goal | None:
        return None if line.mib is None else Goal("x memory of the output", 2.0, line.mib / output_mib)

    race(
        f"{dtype} {count} frames 480x640 -> {SIZE[0]}x{SIZE[1]}",
        {
            "vsr1": partial(ours, frames, DTYPES[dtype]),
            "stock": partial(stock, frames, DTYPES[dtype]),
            "own reference": partial(ours, frames, DTYPES[dtype], "reference"),
        },
        check,
        reads=frames,
        bounds=[faster_than("stock", 3.0), memory],
    )
