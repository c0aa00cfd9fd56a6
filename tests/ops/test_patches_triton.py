"""frames_to_patches on Triton: on a GPU or, without one, in Triton's interpreter; and what ptxas makes of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels import DEVICE, INTERPRETED, SHARED_MEMORY, compile_ahead, compiles, runs
from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops.patches import frames_to_patches

kernels = pytest.importorskip("vsr1.kernels.patches", reason="vsr1 is not installed: pip install -e .")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if DEVICE == "cuda":
    DTYPES["bf16"] = torch.bfloat16
IMAGENET = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Half of it black or white, where the cubic leaves the bytes."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    hard = torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator) * 255
    return torch.where(torch.rand((*shape[:-3], 1, 1, 1), generator=generator) < 0.5, frames, hard)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one program after another; few of them, each with more lines. Other tests keep one line."""
    if INTERPRETED:
        monkeypatch.setitem(kernels.ACROSS, "BLOCK_Y", 8)


def check(frames: torch.Tensor, size: tuple[int, int], **options: Any) -> None:
    """The bits of the reference on the CPU."""
    wanted = frames_to_patches(frames, size, backend="reference", **options)
    found = frames_to_patches(frames.to(DEVICE), size, backend="triton", **options)
    assert last_backend() == "triton"
    for one, other in zip(found, wanted, strict=True):
        assert one.device.type == DEVICE
        assert torch.equal(one.cpu(), other)


@runs
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 32, 96), (32, 96)),
        ((3, 35, 90), (32, 96)),
        ((1, 25, 47), (32, 160)),
        ((1, 32, 130), (32, 32)),
        ((2, 50, 64), (32, 64)),
        ((1, 1, 1), (32, 32)),
        ((1, 200, 3), (32, 64)),
    ],
    ids=["same", "T3-near", "up", "across-only", "down-only", "one-pixel", "down-and-up"],
)
def test_triton_gives_the_bits_of_the_reference(shape: tuple[int, int, int], size: tuple[int, int], dtype: str) -> None:
    check(noise(*shape, 3), size, dtype=DTYPES[dtype], **IMAGENET)


@runs
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("geometry", [(7, 3, 3), (16, 1, 1)], ids=["p7-m3-t3", "p16-m1-t1"])
def test_triton_geometry_and_batches(geometry: tuple[int, int, int]) -> None:
    patch, merge, temporal = geometry
    size = (patch * merge, 2 * patch * merge)
    check(noise(2, temporal + 1, 25, 40, 3), size, patch=patch, merge=merge, temporal=temporal)
    check(noise(0, 4, 25, 40, 3), size, patch=patch, merge=merge, temporal=temporal)


@runs
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("size", [(40, 60), (20, 20)], ids=["same", "resized"])
def test_triton_reads_any_strides(size: tuple[int, int]) -> None:
    options = {"patch": 20, "merge": 1}
    planar = noise(2, 1, 3, 40, 60).permute(0, 1, 3, 4, 2)  # decoders that put channels first
    check(planar, size, **options)
    check(noise(1, 4, 80, 60, 6)[:, ::2, 1::2, :, 1:4], size, **options)
    check(noise(1, 40, 60, 3).expand(2, -1, -1, -1), size, **options)
    check(noise(60, 40, 2, 3).permute(2, 1, 0, 3), size, **options)


@runs
def test_triton_copies_frames_whose_offsets_leave_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = noise(2, 3, 40, 50).permute(0, 2, 3, 1)
    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: copied.append(tensor) or contiguous(tensor))
    check(frames, (32, 64))
    assert not copied
    monkeypatch.setattr(kernels, "WIDEST", 3 * 40 * 50 - 1)
    check(frames, (32, 64))
    assert len(copied) == 1


@runs
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_triton_serves_a_gpu_unasked_and_without_waiting_for_it() -> None:
    frames = noise(4, 60, 80, 3).cuda()
    frames_to_patches(frames, (32, 64))  # compiles, and keeps the filters
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, grid = frames_to_patches(frames, (32, 64), dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert last_backend() == "triton"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = frames_to_patches(frames, (32, 64), dtype=torch.bfloat16)
    graph.replay()
    assert torch.equal(captured[0], rows)
    assert torch.equal(captured[1], grid)


@runs
def test_triton_says_what_it_cannot_do() -> None:
    frames = noise(2, 32, 32, 3).to(DEVICE)
    with pytest.raises(BackendUnavailable, match="makes float32, bfloat16 and float16 rows; these are to be float64"):
        frames_to_patches(frames, (32, 32), dtype=torch.float64, backend="triton")
    if INTERPRETED:
        with pytest.raises(BackendUnavailable, match="interpreter only, which computes bfloat16 wrongly"):
            frames_to_patches(frames, (32, 32), dtype=torch.bfloat16, backend="triton")


TYPES = {"frames": "*u8", "begins": "*i32", "weights": "*i16", "out": "*u8"}
TYPES |= {f"{name}_{channel}": "fp32" for name in ("mean", "std") for channel in range(3)}
ALIGNED = {"width", "line", "frame", "video"}


@compiles
@pytest.mark.parametrize("cap", [80, 90])
@pytest.mark.parametrize("kernel", ["across", "across-planar", "down-fp32", "down-bf16", "down-fp16", "down-same"])
def test_compiles_for_gpus_without_spills(kernel: str, cap: int, record_property: pytest.RecordProperty) -> None:
    name, _, variant = kernel.partition("-")
    function = getattr(kernels, f"{name}_kernel")
    types = {name: TYPES.get(name, "i32") for name in function.arg_names}
    types["rows"] = f"*{variant}" if variant in ("fp32", "bf16", "fp16") else "*fp32"
    constants: dict[str, Any] = dict(kernels.ACROSS if name == "across" else kernels.DOWN)
    if name == "down":
        constants |= {"PATCH": 16, "MERGE": 2, "TEMPORAL": 2, "BLOCK_Y": 16}
    if variant in ("fp32", "bf16", "fp16", "planar"):  # which follow a pass across, or a decoder's planes
        constants["pixel"] = 1
    if variant == "same":
        constants |= {"begins": None, "weights": None}
    used = compile_ahead(function, constants, types, ALIGNED, cap)
    for what, count in used.items():
        record_property(what, count)
    assert used["spills"] == 0
    assert used["shared"] <= SHARED_MEMORY[cap]
    assert (
        4 * used["registers"] * 32 * constants["num_warps"] <= 65536
    )  # four programs at least on every multiprocessor
