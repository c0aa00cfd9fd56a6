"""Frames to patch rows on a GPU, in two launches: resize across; resize down, normalise and write in the order of the patches.

Both passes are sums of int16 weights times bytes, rounded and clamped to bytes, so the pixels are those of the CPU bit for bit
(vsr1/ops/_patches_filter.py); normalisation subtracts and divides in float32 as torch does. A resized line is read by several
lines further down, so what lies between the passes is bytes, plane by plane, (frames, 3, H, width): half of float32 rows for
480 x 640 to 256 x 352, and most of it still in L2 when the second pass comes for it. A pass whose side keeps its length is left
out, and the second one then reads the frames themselves.

A program of the first pass takes all channels of its pixels, since they share their cache lines; one of the second takes the
lines of one row of patches, so that what it writes are runs of patch x patch values. Offsets of frames and rows are 64-bit,
within a frame 32-bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# As measured on an H100: a thread a pixel, so that many loads of single bytes are on their way; taller tiles take thrice as long.
ACROSS = {"BLOCK_Y": 1, "BLOCK_X": 128, "UNROLL": 4, "num_warps": 4}
DOWN = {"BLOCK_X": 32, "UNROLL": 8, "num_warps": 1}
Filter = tuple[Tensor, Tensor, int]
"""begin (n,) int32, weights (n, taps) int16 and their bits behind the point: vsr1.ops._patches_filter."""
WIDEST = 2**31  # bytes from the first to the last of a frame, for 32-bit offsets


@triton.jit
def rounded(b_sum, bits):
    """Sums of `bits` bits behind the point as bytes, int32."""
    b_sum = (b_sum + (1 << bits >> 1)) >> bits
    return tl.minimum(tl.maximum(b_sum, 0), 255)


@triton.jit(do_not_specialize=["H", "T", "taps", "bits"])
def across_kernel(
    frames, begins, weights, out, T, H, W, width, video, frame, line, pixel, channel, taps, bits,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out (B T, 3, H, width) = the frames resized across; the strides of the frames are in bytes."""
    tiles_x = tl.cdiv(width, BLOCK_X)
    tiles = tiles_x * tl.cdiv(H, BLOCK_Y)
    n = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    o_y = tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
    o_x = tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    m_y = o_y[:, None] < H
    m_x = o_x < width
    b_begin = tl.load(begins + o_x, mask=m_x, other=0)
    p_weight = weights + o_x * taps
    p_line = frames + (n // T).to(tl.int64) * video + (n % T).to(tl.int64) * frame + o_y[:, None] * line
    b_red = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32)
    b_green = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32)
    b_blue = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32)
    for j in tl.range(0, taps, loop_unroll_factor=UNROLL):
        b_place = b_begin + j
        b_weight = tl.load(p_weight + j, mask=m_x, other=0).to(tl.int32)[None, :]
        m_pixel = m_y & (b_place < W)[None, :]
        p_pixel = p_line + (b_place * pixel)[None, :]
        b_red += b_weight * tl.load(p_pixel, mask=m_pixel, other=0).to(tl.int32)
        b_green += b_weight * tl.load(p_pixel + channel, mask=m_pixel, other=0).to(tl.int32)
        b_blue += b_weight * tl.load(p_pixel + 2 * channel, mask=m_pixel, other=0).to(tl.int32)
    p_out = out + n.to(tl.int64) * 3 * H * width + o_y[:, None] * width + o_x[None, :]
    m_out = m_y & m_x[None, :]
    tl.store(p_out, rounded(b_red, bits).to(tl.uint8), mask=m_out)
    tl.store(p_out + H * width, rounded(b_green, bits).to(tl.uint8), mask=m_out)
    tl.store(p_out + 2 * H * width, rounded(b_blue, bits).to(tl.uint8), mask=m_out)


@triton.jit(do_not_specialize=["H", "T", "times", "bands", "taps", "bits"])
def down_kernel(
    frames, begins, weights, rows, T, times, H, bands, columns, video, frame, line, pixel, channel, taps, bits,
    mean_0, mean_1, mean_2, std_0, std_1, std_2,
    PATCH: tl.constexpr, MERGE: tl.constexpr, TEMPORAL: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """rows = one row of patches of one frame (the last one may stand in for others), resized down unless begins is None."""
    width = columns * PATCH
    tiles_x = tl.cdiv(width, BLOCK_X)
    tile = tl.program_id(0)
    o_x = tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    tile = tile // tiles_x
    band = tile % bands
    tile = tile // bands
    c = tile % 3
    slot = tile // 3  # of a frame among those of all videos, with the last ones repeated
    t = slot % (times * TEMPORAL)
    b = slot // (times * TEMPORAL)
    o_y = tl.arange(0, BLOCK_Y)
    m_x = o_x < width
    m_y = o_y < PATCH
    m_out = m_y[:, None] & m_x[None, :]
    p_frame = frames + b.to(tl.int64) * video + tl.minimum(t, T - 1).to(tl.int64) * frame + c * channel
    p_column = p_frame + (o_x * pixel)[None, :]
    o_line = band * PATCH + o_y
    if begins is None:
        b_byte = tl.load(p_column + (o_line * line)[:, None], mask=m_out, other=0).to(tl.int32)
    else:
        b_begin = tl.load(begins + o_line, mask=m_y, other=0)
        b_sum = tl.zeros((BLOCK_Y, BLOCK_X), tl.int32)
        for j in tl.range(0, taps, loop_unroll_factor=UNROLL):
            b_place = b_begin + j
            b_weight = tl.load(weights + o_line * taps + j, mask=m_y, other=0).to(tl.int32)
            m_pixel = (m_y & (b_place < H))[:, None] & m_x[None, :]
            b_sum += b_weight[:, None] * tl.load(p_column + (b_place * line)[:, None], mask=m_pixel, other=0).to(
                tl.int32
            )
        b_byte = rounded(b_sum, bits)
    mean = tl.where(c == 0, mean_0, tl.where(c == 1, mean_1, mean_2))
    std = tl.where(c == 0, std_0, tl.where(c == 1, std_1, std_2))
    b_value = tl.div_rn(b_byte.to(tl.float32) - mean, std)
    b_column = o_x // PATCH
    # Merged rows of patches lie whole after each other; within one, merged columns; within those, patches row by row.
    b_patch = (band // MERGE * (columns // MERGE) + b_column // MERGE) * MERGE + band % MERGE
    b_patch = b_patch * MERGE + b_column % MERGE
    first = (b.to(tl.int64) * times + t // TEMPORAL) * bands * columns
    o_within = ((c * TEMPORAL + t % TEMPORAL) * PATCH + o_y[:, None]) * PATCH + (o_x % PATCH)[None, :]
    o_row = (first + b_patch.to(tl.int64)) * (3 * TEMPORAL * PATCH * PATCH)
    tl.store(rows + o_row[None, :] + o_within, b_value.to(rows.dtype.element_ty), mask=m_out)


def frames_to_patches(
    videos: Tensor,
    down: Filter | None,
    across: Filter | None,
    height: int,
    width: int,
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    rows: Tensor,
) -> None:
    """Fills `rows` with the patches of videos (B, T, H, W, 3) uint8 of any strides.

    down, across: filters on the GPU, None for a side that keeps its length. mean and std of the channels are in bytes, float32.
    """
    count, frames, lines, pixels, _ = videos.shape
    if not rows.numel():
        return
    extent = sum((size - 1) * stride for size, stride in zip(videos.shape[2:], videos.stride()[2:], strict=True))
    if extent >= WIDEST:
        videos = videos.contiguous()
    source = videos
    if across is not None:
        begins, weights, bits = across
        planes = torch.empty((count, frames, 3, lines, width), dtype=torch.uint8, device=videos.device)
        tiles = triton.cdiv(lines, ACROSS["BLOCK_Y"]) * triton.cdiv(width, ACROSS["BLOCK_X"])
        across_kernel[(count * frames * tiles,)](
            videos, begins, weights, planes, frames, lines, pixels, width, *videos.stride(), weights.shape[1], bits, **ACROSS
        )  # fmt: skip
        source = planes.permute(0, 1, 3, 4, 2)
    begins, weights, bits = (None, None, 0) if down is None else down
    times, bands, columns = -(-frames // temporal), height // patch, width // patch
    down_kernel[(count * times * temporal * 3 * bands * triton.cdiv(width, DOWN["BLOCK_X"]),)](
        source, begins, weights, rows, frames, times, lines, bands, columns, *source.stride(),
        0 if weights is None else weights.shape[1], bits, *mean, *std,
        PATCH=patch, MERGE=merge, TEMPORAL=temporal, BLOCK_Y=triton.next_power_of_2(patch), **DOWN,
    )  # fmt: skip
