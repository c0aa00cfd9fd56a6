"""frames_to_patches against the stock Qwen3-VL processor and an index-by-index reading of its layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize

from vsr1.errors import BackendUnavailable
from vsr1.ops import _patches_backends, last_backend
from vsr1.ops.patches import frames_to_patches, smart_size


class StockProcessor(Qwen3VLVideoProcessor):
    """The stock processor with its torchvision calls replaced by the torch calls behind them."""

    def convert_to_rgb(self, video):
        return video

    def resize(self, videos, size, **_):
        flat = torch.nn.functional.interpolate(videos.flatten(0, 1), self.target, mode="bicubic", antialias=True)
        return flat.unflatten(0, videos.shape[:2])

    def normalize(self, image, mean, std, inplace=False):
        return (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def stock(frames, size, **kwargs):
    processor = StockProcessor(do_sample_frames=False, cap_pixels_per_frame=False, **kwargs)
    processor.target = size
    out = processor(videos=[frames.permute(0, 3, 1, 2).contiguous()], return_tensors="pt")
    return out["pixel_values_videos"], out["video_grid_thw"]


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((4, 64, 96), (64, 96)), ((5, 70, 90), (64, 96)), ((1, 33, 47), (96, 32)), ((8, 120, 160), (64, 96))],
    ids=["T4-same", "T5-near", "T1-up", "T8-down"],
)
def test_equals_the_stock_processor(shape, size):
    frames = noise(*shape, 3)
    rows, grid = frames_to_patches(frames, size)
    expected, expected_grid = stock(frames, size)
    assert torch.equal(grid, expected_grid)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, expected)


def test_equals_the_stock_processor_with_torchvision():
    pytest.importorskip("torchvision")
    frames = noise(5, 70, 90, 3)
    processor = Qwen3VLVideoProcessor(do_sample_frames=False, do_resize=False)
    out = processor(videos=[frames[:, :64, :64].permute(0, 3, 1, 2).contiguous()], return_tensors="pt")
    rows, grid = frames_to_patches(frames[:, :64, :64], (64, 64))
    assert torch.equal(grid, out["video_grid_thw"])
    assert torch.equal(rows, out["pixel_values_videos"])


def test_mean_std_and_geometry_follow_the_arguments():
    frames, mean, std = noise(3, 56, 84, 3), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    rows, grid = frames_to_patches(frames, (56, 84), patch=14, merge=2, temporal=3, mean=mean, std=std)
    kwargs = {"patch_size": 14, "temporal_patch_size": 3, "image_mean": list(mean), "image_std": list(std)}
    expected, expected_grid = stock(frames, (56, 84), **kwargs)
    assert torch.equal(grid, expected_grid)
    assert torch.equal(rows, expected)


def test_every_value_sits_where_the_docstring_says():
    patch, merge, temporal = 2, 2, 2
    frames = noise(4, 8, 12, 3)
    rows, grid = frames_to_patches(
        frames, (8, 12), patch=patch, merge=merge, temporal=temporal, mean=(0,) * 3, std=(1,) * 3
    )
    t, h, w = grid[0].tolist()
    values = (rows * 255).round().long()
    order = [
        (a, i * merge + y, j * merge + x)
        for a in range(t)
        for i in range(h // merge)
        for j in range(w // merge)
        for y in range(merge)
        for x in range(merge)
    ]
    for row, (a, i, j) in zip(values, order, strict=True):
        tile = frames[a * temporal :][:temporal, i * patch :, j * patch :][:, :patch, :patch]
        assert row.tolist() == tile.permute(3, 0, 1, 2).flatten().tolist()


def test_odd_number_of_frames_repeats_the_last():
    frames = noise(3, 32, 32, 3)
    rows, _ = frames_to_patches(frames, (32, 32))
    repeated, _ = frames_to_patches(torch.cat([frames, frames[-1:]]), (32, 32))
    assert torch.equal(rows, repeated)


def test_a_batch_is_its_videos_one_after_another():
    videos = noise(3, 5, 40, 50, 3)
    rows, grid = frames_to_patches(videos, (32, 64))
    single = [frames_to_patches(video, (32, 64)) for video in videos]
    assert torch.equal(rows, torch.cat([r for r, _ in single]))
    assert torch.equal(grid, torch.cat([g for _, g in single]))
    rows, grid = frames_to_patches(videos[:0], (32, 64))
    assert rows.shape == (0, 1536)
    assert grid.shape == (0, 3)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 32)])
def test_both_resizes_agree_within_a_rounding_of_each_pass(size):
    planes = noise(4, 70, 45, 3).permute(0, 3, 1, 2)
    fast, slow = _patches_backends.resize_on_cpu(planes, *size), _patches_backends.resize_in_float(planes, *size)
    difference = (fast.int() - slow.int()).abs()
    assert difference.max() <= 2  # one unit per pass
    assert (difference > 0).float().mean() < 0.01


def test_strided_frames_and_half_precision():
    frames = noise(4, 64, 80, 6)[..., ::2]
    rows, _ = frames_to_patches(frames, (32, 32))
    assert torch.equal(rows, frames_to_patches(frames.contiguous(), (32, 32))[0])
    half, _ = frames_to_patches(frames, (32, 32), dtype=torch.bfloat16)
    assert torch.equal(half, rows.bfloat16())


@pytest.mark.parametrize(
    ("frames", "size", "error", "says"),
    [
        (torch.zeros(2, 32, 32, 3), (32, 32), TypeError, "float32"),
        (np.zeros((2, 32, 32, 3), np.uint8), (32, 32), TypeError, "ndarray"),
        (noise(2, 3, 32, 32), (32, 32), ValueError, r"\(2, 3, 32, 32\)"),
        (noise(0, 32, 32, 3), (32, 32), ValueError, "at least one frame"),
        (noise(2, 32, 32, 3), (32, 40), ValueError, r"multiples of patch \* merge = 32"),
        (noise(2, 32, 32, 3), (0, 32), ValueError, "multiples"),
    ],
)
def test_bad_arguments_are_named(frames, size, error, says):
    with pytest.raises(error, match=says):
        frames_to_patches(frames, size)


def test_backend_is_reported_and_unknown_ones_refused():
    frames_to_patches(noise(2, 32, 32, 3), (32, 32), backend="reference")
    assert last_backend() == "reference"
    with pytest.raises((ValueError, BackendUnavailable), match="triton"):
        frames_to_patches(noise(2, 32, 32, 3), (32, 32), backend="triton")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_a_well_formed_custom_op(backend):
    arguments = (noise(1, 3, 40, 50, 3), 32, 64, 16, 2, 2, [0.5] * 3, [0.5] * 3, torch.float32, backend)
    torch.library.opcheck(torch.ops.vsr1.frames_to_patches, arguments)


sides = st.integers(1, 3000)


@given(height=sides, width=sides, low=st.integers(0, 400), span=st.integers(1, 1000))
def test_smart_size_stays_on_the_grid_and_under_the_cap(height, width, low, span):
    factor, tile = 32, 32 * 32
    new_height, new_width = smart_size(
        height, width, min_pixels=low * tile, max_pixels=(low + span) * tile, factor=factor
    )
    assert new_height % factor == new_width % factor == 0
    assert 0 < new_height * new_width <= (low + span) * tile


@given(height=st.integers(64, 2000), width=st.integers(64, 2000))
def test_smart_size_is_the_stock_rule_for_ordinary_shapes(height, width):
    bounds = {"min_pixels": 64 * 32**2, "max_pixels": 256 * 32**2, "factor": 32}
    if max(height, width) / min(height, width) < 4:
        assert smart_size(height, width, **bounds) == smart_resize(1, height, width, temporal_factor=1, **bounds)


def test_smart_size_refuses_bounds_nothing_can_meet():
    with pytest.raises(ValueError, match="max_pixels=100"):
        smart_size(64, 64, min_pixels=0, max_pixels=100, factor=32)
    with pytest.raises(ValueError, match="min_pixels=9000"):
        smart_size(64, 64, min_pixels=9000, max_pixels=2000, factor=32)
