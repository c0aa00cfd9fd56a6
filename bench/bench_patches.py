"""Time of frames_to_patches against the stock processor's torch path, 64 frames 480x640 -> 256x352, on the CPU.

Run: pytest bench/bench_patches.py (add --benchmark-json=FILE to keep machine and figures).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vsr1.ops.patches import frames_to_patches

SIZE = (256, 352)
"""The nearest size on the 32-pixel grid to the 256x336 of common recipes."""


@pytest.fixture(scope="module")
def frames():
    return torch.randint(0, 256, (64, 480, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stock(frames):
    """What the Qwen3-VL video processor of transformers does to one video, without its bookkeeping."""
    video = F.interpolate(frames.permute(0, 3, 1, 2).contiguous(), SIZE, mode="bicubic", antialias=True)
    video = (video.float() - 127.5) / 127.5
    tiles = video.view(32, 2, 3, SIZE[0] // 32, 2, 16, SIZE[1] // 32, 2, 16)
    return tiles.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 1536)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_frames_to_patches(benchmark, frames, dtype):
    benchmark.extra_info["threads"] = torch.get_num_threads()
    rows, _ = benchmark.pedantic(frames_to_patches, (frames, SIZE), {"dtype": dtype}, rounds=5, warmup_rounds=1)
    assert rows.shape[1] == 1536


def test_stock_path(benchmark, frames):
    benchmark.extra_info["threads"] = torch.get_num_threads()
    rows = benchmark.pedantic(stock, (frames,), rounds=5, warmup_rounds=1)
    assert torch.equal(rows, frames_to_patches(frames, SIZE)[0])
