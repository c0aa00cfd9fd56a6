"""How frames become patch rows: the custom op `vsr1::frames_to_patches`, its backends, and the reference in plain torch.

The compiled backends resize in the integers of torch's byte kernel (`_patches_filter`) and make the reference's values of the
bytes, so their rows are those of the reference on a CPU bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vsr1.ops._dispatch import Backend, cpu_only, cuda_only, extension_missing, register, resolve, triton_missing
from vsr1.ops._patches_filter import Filter, resize_filter

# Not torch.library.custom_op, whose first call imports torch._dynamo: two seconds of everybody's first step.
torch.library.define(
    "vsr1::frames_to_patches",
    "(Tensor videos, int height, int width, int patch, int merge, int temporal, float[] mean, float[] std, "
    "ScalarType dtype, str backend) -> Tensor",
)
rows_of = torch.ops.vsr1.frames_to_patches.default


@torch.library.impl("vsr1::frames_to_patches", "default")
def _rows_of(
    videos: Tensor,
    height: int,
    width: int,
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    name = resolve("patches", backend, device=videos.device, dtype=videos.dtype, rows=dtype)
    compute = {"cpu": _compiled, "triton": _triton, "reference": reference}[name]
    return compute(videos, height, width, patch, merge, temporal, mean, std, dtype)


@torch.library.register_fake("vsr1::frames_to_patches")
def _no_rows(
    videos: Tensor,
    height: int,
    width: int,
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    count = videos.shape[0] * -(-videos.shape[1] // temporal) * (height // patch) * (width // patch)
    return videos.new_empty((count, 3 * temporal * patch * patch), dtype=dtype)


def _compiled(
    videos: Tensor,
    height: int,
    width: int,
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """In C++ (csrc/cpu/patches.cpp), which reads the frames where they lie and looks the values of their bytes up."""
    from vsr1._C import frames_to_patches

    rows = _no_rows(videos, height, width, patch, merge, temporal, mean, std, dtype)
    values = _normalise(torch.arange(256, dtype=torch.float32).repeat(3, 1), mean, std).to(dtype)
    filters = _filters(videos, height, width)
    frames_to_patches(
        pixels=videos.data_ptr(),
        counts=videos.shape[:2],
        strides=videos.stride(),
        filters=[
            (source, target, 0, 0, 0, 0)
            if found is None
            else (source, target, found.begin.data_ptr(), found.weights.data_ptr(), found.weights.shape[1], found.bits)
            for source, target, found in zip(videos.shape[2:4], (height, width), filters, strict=True)
        ],
        geometry=(patch, merge, temporal),
        values=values.data_ptr(),
        value_bytes=values.element_size(),
        threads=torch.get_num_threads(),
        rows=rows.data_ptr(),
    )
    return rows


def _triton(
    videos: Tensor,
    height: int,
    width: int,
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """In Triton (kernels/patches.py)."""
    from vsr1.kernels.patches import frames_to_patches

    rows = _no_rows(videos, height, width, patch, merge, temporal, mean, std, dtype)
    filters = _filters(videos, height, width)
    scaled = [(torch.tensor(part) * 255.0).tolist() for part in (mean, std)]
    frames_to_patches(videos, *filters, height, width, patch, merge, temporal, *scaled, rows)
    return rows


def _filters(videos: Tensor, height: int, width: int) -> list[Filter | None]:
    """The filters down and across, where the videos lie; None for a side that keeps its length."""
    sides = zip(videos.shape[2:4], (height, width), strict=True)
    return [None if source == target else resize_filter(source, target, videos.device) for source, target in sides]


def reference(
    videos: Tensor,
    height: int,
    width: int,
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain torch; arguments as in `frames_to_patches`, `videos` (B, T, H, W, 3) uint8."""
    resized = _resize(videos, height, width)
    missing = -resized.shape[1] % temporal
    resized = torch.cat([resized, resized[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    # (video, t, frame, merged row, row, y, merged column, column, x, channel) -> the order of the rows
    tiles = resized.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch)).unflatten(1, (-1, temporal))
    tiles = tiles.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    rows = torch.empty(tiles.shape, dtype=torch.float32, device=videos.device).copy_(tiles)
    return _normalise(rows.view(-1, 3, temporal * patch * patch), mean, std).flatten(1).to(dtype)


def _normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes (..., 3, n) as float32 to (byte / 255 - mean) / std, in place."""
    # Mean and deviation are scaled to bytes instead of the bytes to 0..1: bit for bit what the stock processor does.
    pixels.sub_(pixels.new_tensor(mean).mul_(255.0)[:, None])
    return pixels.div_(pixels.new_tensor(std).mul_(255.0)[:, None])


def _resize(videos: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of (B, T, H, W, 3) uint8 to (B, T, height, width, 3) uint8."""
    if videos.shape[2:4] == (height, width):
        return videos
    planes = videos.flatten(0, 1).permute(0, 3, 1, 2)
    resized = resize_on_cpu(planes, height, width) if videos.is_cpu else resize_in_float(planes, height, width)
    return resized.permute(0, 2, 3, 1).unflatten(0, videos.shape[:2])


def resize_on_cpu(planes: Tensor, height: int, width: int) -> Tensor:
    """(N, 3, H, W) uint8 resized by torch's byte kernel, which the CPU alone has; 20 times faster than the float one."""
    return F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)


def resize_in_float(planes: Tensor, height: int, width: int) -> Tensor:
    """The same in float32, on any device."""
    # One pass at a time: rounding and clamping only at the end gives other pixels, by up to 8 of 255 at hard edges.
    pixels = planes.float()
    for size in ((planes.shape[-2], width), (height, width)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        pixels = pixels.round_().clamp_(0, 255)
    return pixels.to(torch.uint8)


def _triton_refuses(*, device: torch.device, rows: torch.dtype, **_: Any) -> str | None:
    if rows not in (torch.float32, torch.bfloat16, torch.float16):
        return f"makes float32, bfloat16 and float16 rows; these are to be {str(rows).removeprefix('torch.')}"
    if rows == torch.bfloat16 and device.type == "cpu":
        return "runs on CPU tensors in Triton's interpreter only, which computes bfloat16 wrongly"
    return cuda_only(device=device)


register(
    "patches",
    cpu=Backend(extension_missing, cpu_only),
    triton=Backend(triton_missing, _triton_refuses),
    reference=Backend(),
)
