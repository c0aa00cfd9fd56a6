"""frames_to_patches on a GPU beside torch's float path there, and reading as many bytes as come in and go out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import milliseconds, replayed, workspace
from bench.gpu_corpus_scan import reading
from bench.harness import Measurement, faster_than
from vsr1.ops import last_backend
from vsr1.ops.patches import frames_to_patches

_TESTS = Path(__file__).resolve().parent.parent / "tests" / "ops" / "test_patches_triton.py"
TESTS = [str(_TESTS)]
SANITIZED = [f"{_TESTS}::test_triton_reads_any_strides", f"{_TESTS}::test_triton_geometry_and_batches"]
SHAPES = {
    "64 frames 480x640 -> 256x352": ((64, 480, 640), (256, 352)),
    "64 frames 256x352, left as they are": ((64, 256, 352), (256, 352)),
    "16 frames 1080x1920 -> 448x800": ((16, 1080, 1920), (448, 800)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COUNT = len(SHAPES) * len(DTYPES)
"""How many measurements there are."""


def in_torch(frames: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The same in float32 throughout, as image libraries do it on a GPU: no byte between the passes."""
    video = frames.permute(0, 3, 1, 2).float()
    if video.shape[2:] != size:
        video = F.interpolate(video, size, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    video = video.sub_(127.5).div_(127.5)
    tiles = video.view(len(frames) // 2, 2, 3, size[0] // 32, 2, 16, size[1] // 32, 2, 16)
    return tiles.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 1536).to(dtype)


def measurements() -> Iterator[Measurement]:
    """Every shape in every dtype; ours must have the bits of the reference on the CPU, torch the picture."""
    for name, (shape, size) in SHAPES.items():
        frames = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        truth = frames_to_patches(frames, size, backend="reference")[0]
        frames = frames.cuda()
        for dtype_name, dtype in DTYPES.items():
            ours, plain = partial(frames_to_patches, frames, size, dtype=dtype), partial(in_torch, frames, size, dtype)
            rows = ours()[0]
            backend = last_backend()
            if not torch.equal(rows.cpu(), truth.to(dtype)):
                raise AssertionError(f"{name}, {dtype_name}: {backend} does not give the bits of the reference")
            if (plain().float().cpu() - truth).abs().mean() > 2 / 255:  # on average a byte off
                raise AssertionError(f"{name}, {dtype_name}: torch's float path gives another picture")
            moved = frames.nbytes + rows.nbytes
            line = Measurement(
                f"{dtype_name} {name}", replayed(ours), moved,
                floor=reading(torch.zeros(moved, dtype=torch.uint8, device="cuda")), backend=backend,
                eager=milliseconds(ours), mib=workspace(ours), peers={"torch": replayed(plain)},
            )  # fmt: skip
            yield line.held_to(faster_than("torch", 3.0))
