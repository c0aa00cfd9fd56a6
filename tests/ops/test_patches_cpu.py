"""frames_to_patches in C++, set by set of instructions, and the filters it shares with the GPU: the bits of torch's kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vsr1.ops import last_backend
from vsr1.ops._dispatch import extension_missing
from vsr1.ops._patches_filter import resize_filter
from vsr1.ops.patches import frames_to_patches

compiled = pytest.mark.skipif(bool(extension_missing()), reason="needs vsr1._C")
IMAGENET = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


def noise(*shape, seed=0):
    """Every second frame black or white, where the cubic leaves the bytes."""
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    frames[..., ::2, :, :, :] = frames[..., ::2, :, :, :].gt(127) * 255
    return frames


def bits(rows):
    return rows.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])


def check(frames, size, backend="cpu", **options):
    found = frames_to_patches(frames, size, backend=backend, **options)
    assert last_backend() == backend
    wanted = frames_to_patches(frames, size, backend="reference", **options)
    assert torch.equal(bits(found[0]), bits(wanted[0]))
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4, 64, 96), (64, 96)),
        ((5, 70, 90), (64, 96)),
        ((1, 33, 47), (96, 160)),
        ((2, 64, 333), (64, 32)),
        ((3, 151, 96), (64, 96)),
        ((1, 1, 1), (32, 32)),
        ((2, 700, 3), (32, 64)),
        ((1, 3, 700), (64, 32)),
    ],
    ids=["same", "T5-near", "up", "across-only", "down-only", "one-pixel", "down-and-up", "up-and-down"],
)
def test_gives_the_bits_of_the_reference(shape, size, dtype, backend):
    check(noise(*shape, 3), size, backend, dtype=dtype, **IMAGENET)


@pytest.mark.parametrize("geometry", [(7, 3, 3), (1, 1, 1), (14, 2, 2), (16, 1, 4)], ids=str)
def test_geometry_and_batches(geometry, backend):
    patch, merge, temporal = geometry
    for size in ((patch * merge, patch * merge), (3 * patch * merge, 5 * patch * merge)):
        check(noise(2, 5, 30, 53, 3), size, backend, patch=patch, merge=merge, temporal=temporal)
        check(noise(0, 5, 30, 53, 3), size, backend, patch=patch, merge=merge, temporal=temporal)


@pytest.mark.parametrize("size", [(40, 60), (20, 20), (60, 80)], ids=["same", "smaller", "larger"])
def test_reads_any_strides(size, backend):
    options = {"patch": 10}
    check(noise(2, 2, 40, 60, 3).permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2), size, backend, **options)
    check(noise(2, 6, 80, 60, 6)[:, ::2, 1::2, :, 1:4], size, backend, **options)
    check(noise(1, 40, 60, 3).expand(3, -1, -1, -1), size, backend, **options)
    check(noise(60, 40, 3, 3).permute(2, 1, 0, 3), size, backend, **options)


@compiled
@pytest.mark.parametrize("shape", [(1, 300, 400), (9, 120, 160)], ids=["one-frame-in-parts", "frames"])
def test_threads_change_no_bit(shape):
    frames, threads, found = noise(*shape, 3), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(frames_to_patches(frames, (256, 352), backend="cpu")[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], frames_to_patches(frames, (256, 352), backend="reference")[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


@compiled
@pytest.mark.parametrize("options", [{}, {"patch": 7, "merge": 1}], ids=["aligned", "unaligned"])
def test_many_rows_take_another_way_to_memory(options):
    frames = noise(11, 90, 120, 3)
    size = (320, 480) if not options else (315, 476)
    rows, _ = frames_to_patches(frames, size, backend="cpu", **options)
    assert rows.nbytes >= 8 << 20  # kManyBytes of csrc/cpu/patches.cpp
    check(frames, size, **options)


@compiled
def test_serves_the_cpu_unasked():
    frames_to_patches(noise(2, 40, 50, 3), (32, 64))
    assert last_backend() == "cpu"


sides = st.integers(1, 1200)


@settings(max_examples=60, deadline=None)
@given(source=sides, target=sides, seed=st.integers(0, 99))
def test_filters_are_those_of_torchs_byte_kernel(source, target, seed):
    lines = noise(1, 8, source, 3, seed=seed).permute(0, 3, 1, 2)
    wanted = F.interpolate(lines, (8, target), mode="bicubic", antialias=True)
    begin, weights, precision = resize_filter(source, target)
    assert weights.shape[1] % 2 == 0
    places = begin[:, None] + torch.arange(weights.shape[1])
    assert begin.min() >= 0
    assert not weights[places >= source].any()
    total = (lines[..., places.clamp(max=source - 1)].int() * weights.int()).sum(-1)
    found = (total + (1 << precision >> 1) >> precision).clamp(0, 255)
    assert torch.equal(found, wanted.int())


def test_a_filter_is_made_once():
    assert resize_filter(123, 45) is resize_filter(123, 45)
