"""Decoded frames to the rows a Qwen3-VL vision tower reads.

Frames come in as bytes, (T, H, W, 3). They are resized to a size the patch grid divides, an odd last frame is repeated
so that frames pair up in time, and the pixels are rescaled, normalised and written in the order of the rows: one row per
patch of `temporal` frames x `patch` x `patch` pixels, the `merge` x `merge` patches that become one token next to each
other. In C++ a few lines at a time go all that way in cache; on a GPU only the resized width lies in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vsr1.ops._patches_backends import reference, rows_of

__all__ = ["frames_to_patches", "reference", "smart_size"]


def frames_to_patches(
    frames: Tensor,
    size: tuple[int, int],
    *,
    patch: int = 16,
    merge: int = 2,
    temporal: int = 2,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Turn frames into patch rows and their grid, as `Qwen3VLVideoProcessor` of transformers does.

    Args:
        frames: (T, H, W, 3) uint8 RGB, T >= 1; or (B, T, H, W, 3) for B videos of one shape. Any strides.
        size: (height, width) in pixels after resizing, multiples of `patch * merge`; see `smart_size`. Frames of that
            size already are left untouched; others go through an antialiased bicubic resize (Catmull-Rom, a = -0.5),
            rounded and clamped to bytes after each of its two passes (width, then height), as Pillow and torch's byte
            kernel do it.
        patch, merge, temporal: the vision tower's patch side (pixels), merge side (patches) and frames per patch.
        mean, std: per channel, in units of pixel / 255.
        dtype: of the rows; the arithmetic is float32.

    Returns:
        rows (B * t * h * w, 3 * temporal * patch * patch) in `dtype`, ordered video, t, merged row, merged column, row
        and column inside the merge; values ordered channel, frame, y, x.
        grid (B, 3) int64 on the same device: (t, h, w) patches.

    Raises:
        TypeError: frames that are not a uint8 tensor. ValueError: a wrong shape, no frame, or a size off the grid.
    """
    _validate(frames, size, patch, merge, temporal, mean, std, dtype)
    videos = frames if frames.dim() == 5 else frames[None]
    height, width = size
    grid = (-(-videos.shape[1] // temporal), height // patch, width // patch)
    rows = rows_of(
        videos, height, width, patch, merge, temporal, [float(m) for m in mean], [float(s) for s in std], dtype, backend
    )
    # Filled where it lies: a GPU would be waited for until it has a copy.
    grids = torch.empty((videos.shape[0], 3), dtype=torch.int64, device=frames.device)
    for column, count in enumerate(grid):
        grids[:, column].fill_(count)
    return rows, grids


def smart_size(height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """The (height, width) to resize one frame to: multiples of `factor`, aspect ratio kept as well as the grid allows.

    `min_pixels` and `max_pixels` bound height * width. The upper bound always holds; the lower one holds unless no size
    between the two lies on the grid. Inside the bounds each side is rounded to the nearest multiple (never to 0), as in
    Qwen2-VL's `smart_resize`. Raises ValueError for sides below 1 and for bounds no size can meet.
    """
    if min(height, width, factor) < 1:
        raise ValueError(f"height, width and factor must be at least 1; got {height}, {width}, {factor}")
    if max_pixels < max(min_pixels, factor * factor):
        raise ValueError(
            f"max_pixels={max_pixels} must be at least min_pixels={min_pixels} and one tile of {factor}x{factor} pixels"
        )
    size = _on_grid(height, factor, round), _on_grid(width, factor, round)
    if size[0] * size[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        size = _on_grid(height * grow, factor, math.ceil), _on_grid(width * grow, factor, math.ceil)
    if size[0] * size[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        size = _on_grid(height / shrink, factor, math.floor), _on_grid(width / shrink, factor, math.floor)
    # A side held up at one tile leaves the other one longer than the area allows (aspect ratios in the hundreds).
    longest = max_pixels // (factor * factor * (min(size) // factor)) * factor
    return min(size[0], longest), min(size[1], longest)


def _on_grid(side: float, factor: int, rounding: Callable[[float], int]) -> int:
    return max(1, rounding(side / factor)) * factor


def _validate(
    frames: Tensor,
    size: tuple[int, int],
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        what = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames must be a uint8 torch tensor; got {what}")
    if frames.dim() not in (4, 5) or frames.shape[-1] != 3 or 0 in frames.shape[-4:]:
        raise ValueError(
            f"frames must have shape (T, H, W, 3) or (B, T, H, W, 3) with at least one frame; got {tuple(frames.shape)}"
        )
    if min(patch, merge, temporal) < 1:
        raise ValueError(f"patch, merge and temporal must be at least 1; got {patch}, {merge}, {temporal}")
    factor = patch * merge
    if len(size) != 2 or min(size) < factor or size[0] % factor or size[1] % factor:
        raise ValueError(
            f"size must be (height, width) in multiples of patch * merge = {factor}; got {tuple(size)} "
            "(smart_size gives such a size)"
        )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std need three values each, std above 0; got mean={mean}, std={std}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type; got {dtype}")
