"""soft_token_step on Triton: on a GPU, in the interpreter, and compiled ahead of time for what it uses of a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.kernels import DEVICE, SHARED_MEMORY, compile_ahead, compiles, runs
from tests.ops.soft_query import (
    NAMES,
    PARTS,
    SHAPE_IDS,
    SHAPES,
    STREAM,
    expect_gradients,
    expect_step,
    make_head,
    make_hidden,
)
from vsr1.errors import BackendUnavailable
from vsr1.ops import _soft_cuda, last_backend
from vsr1.ops._cuda_code import missing
from vsr1.ops.soft_query import soft_token_step

kernels = pytest.importorskip("vsr1.kernels.soft_query")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
on_cuda = pytest.mark.skipif(bool(missing()), reason="needs a GPU and compiled CUDA kernels")


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("B", "H", "D"), [*SHAPES, (33, 24, 300)], ids=[*SHAPE_IDS, "B33-H24-D300"])
def test_triton_matches_float64(B: int, H: int, D: int, dtype: torch.dtype) -> None:
    head, hidden = make_head(H, D, dtype=dtype, device=DEVICE), make_hidden(B, H, dtype, DEVICE)
    with torch.no_grad():
        step = soft_token_step(hidden, head, sigma=0.3, generator=STREAM, backend="triton")
    assert last_backend() == "triton"
    expect_step(step, head, hidden, 0.3, STREAM)


@runs
@pytest.mark.parametrize(("sigma", "gate"), [(0.0, True), (0.05, False)])
def test_sigma_and_gate(sigma: float, gate: bool) -> None:
    head, hidden = make_head(24, 40, gate, torch.float32, DEVICE), make_hidden(3, 24, torch.float32, DEVICE)
    step = soft_token_step(hidden, head, sigma=sigma, generator=STREAM, backend="triton")
    expect_step(step, head, hidden, sigma, STREAM)
    assert sigma or (torch.equal(step.action, step.mean) and not step.logp.any())


@runs
def test_gradients_match_float64() -> None:
    head, hidden = make_head(24, 40, True, torch.float32, DEVICE), make_hidden(3, 24, torch.float32, DEVICE)
    expect_gradients(head, hidden, "triton")


@runs
def test_rows_in_parts_draw_what_all_rows_draw() -> None:
    head, hidden = make_head(24, 40, True, torch.float32, DEVICE), make_hidden(7, 24, torch.float32, DEVICE)
    whole = soft_token_step(hidden, head, sigma=0.3, generator=STREAM, backend="triton")
    again = soft_token_step(hidden, head, sigma=0.3, generator=STREAM, backend="triton")
    assert all(torch.equal(getattr(whole, name), getattr(again, name)) for name in PARTS)
    first = soft_token_step(hidden[:3], head, sigma=0.3, generator=STREAM, backend="triton")
    second = soft_token_step(hidden[3:], head, sigma=0.3, generator=first.noise, backend="triton")
    for name in PARTS:
        torch.testing.assert_close(getattr(whole, name), torch.cat([getattr(first, name), getattr(second, name)]))


@runs
def test_what_triton_refuses() -> None:
    head, hidden = make_head(24, 40, device=DEVICE), make_hidden(3, 24, device=DEVICE)
    with pytest.raises(BackendUnavailable, match="float64"):
        soft_token_step(hidden, head, backend="triton")
    head = head.float()
    with pytest.raises(BackendUnavailable, match="65"):
        soft_token_step(make_hidden(65, 24, device=DEVICE), head, backend="triton")
    if DEVICE == "cpu":
        with pytest.raises(BackendUnavailable, match="bfloat16 wrongly"):
            soft_token_step(hidden, head.bfloat16(), backend="triton")


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(
    ("B", "H", "D"), [(1, 64, 32), (3, 64, 64), (17, 32, 96), (64, 512, 1024), (8, 2048, 2048)], ids=str
)
def test_cuda_matches_float64(B: int, H: int, D: int, dtype: torch.dtype) -> None:
    head, hidden = make_head(H, D, dtype=dtype, device="cuda"), make_hidden(B, H, dtype, "cuda")
    with torch.no_grad():
        for sigma in (0.3, 0.0):
            step = soft_token_step(hidden, head, sigma=sigma, generator=STREAM, backend="cuda")
            assert last_backend() == "cuda"
            expect_step(step, head, hidden, sigma, STREAM)


@on_cuda
def test_cuda_steps_of_all_sizes_follow_each_other_and_replay() -> None:
    """The counter that blocks meet at serves one launch after the other; captured calls have their own."""
    heads = [make_head(H, D, dtype=torch.bfloat16, device="cuda") for H, D in ((64, 32), (96, 96), (512, 1024))]
    states = [make_hidden(5, H, torch.bfloat16, "cuda").detach() for H in (64, 96, 512)]
    with torch.no_grad():

        def steps() -> list[torch.Tensor]:
            return [
                soft_token_step(state, head, sigma=0.3, generator=STREAM, backend="cuda").policy_input
                for head, state in zip(heads, states, strict=True)
            ]

        wanted = [part.clone() for part in steps()]
        for _ in range(3):
            assert all(torch.equal(*pair) for pair in zip(steps(), wanted, strict=True))
        graphs, captured = [], []
        for _ in range(2):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                captured.append(steps())
        for _ in range(3):
            for graph, parts in zip(graphs, captured, strict=True):
                for part in parts:
                    part.fill_(math.nan)
                graph.replay()
                assert all(torch.equal(*pair) for pair in zip(parts, wanted, strict=True))


@on_cuda
def test_what_cuda_refuses() -> None:
    head, hidden = make_head(40, 64, dtype=torch.bfloat16, device="cuda"), make_hidden(3, 40, torch.bfloat16, "cuda")
    with pytest.raises(BackendUnavailable, match="multiples of 32"):
        soft_token_step(hidden, head, backend="cuda")
    with pytest.raises(BackendUnavailable, match="float32"):
        soft_token_step(hidden, head.float(), backend="cuda")


OF_THE_HEAD = ("left", "weight", "bias", "state", "gate", "gate_bias", "norm", "norm_bias")  # of the head's type
NUMBERS = ("B", "N", "K", "H", "D", "seed_low", "seed_high", "offset_low", "offset_high")
CASES = [
    ("product", "bf16", 1, 90), ("product", "bf16", 64, 90), ("product", "fp16", 32, 80), ("product", "bf16", 64, 80),
    ("product", "fp32", 64, 90), ("product", "fp32", 1, 80), ("activate", "bf16", 1, 90), ("activate", "bf16", 1, 80),
    ("action", "bf16", 1, 90), ("action", "bf16", 1, 80), ("action", "fp32", 1, 90),
]  # fmt: skip


@compiles
@pytest.mark.parametrize(
    ("kernel", "dtype", "rows", "cap"), CASES, ids=[f"{k}-{d}-B{b}-sm_{c}" for k, d, b, c in CASES]
)
def test_compiles_for_gpus_without_spills(kernel: str, dtype: str, rows: int, cap: int) -> None:
    torch_dtype = {name: dtype for dtype, name in NAMES.items()}[dtype]
    options = kernels.product_blocks(rows, torch_dtype) if kernel == "product" else kernels.row_blocks(2048)
    function = getattr(kernels, f"{kernel}_kernel")
    constants: dict[str, Any] = {"NOISE": True, "BLOCK_H": 2048, "num_stages": 3, **options}
    types = {name: "i32" if name in NUMBERS else "*fp32" for name in function.arg_names}
    types |= dict.fromkeys(OF_THE_HEAD, f"*{dtype}") | dict.fromkeys(("epsilon", "sigma", "log_density"), "fp32")
    if kernel != "product":
        types["out"] = f"*{dtype}"
    used = compile_ahead(function, constants, types, {"N", "K", "H", "D"}, cap)
    print(kernel, dtype, rows, f"sm_{cap}", used)  # on record with `pytest -rP`
    assert used["spills"] == 0
    assert used["shared"] <= SHARED_MEMORY[cap]


def test_the_cuda_kernel_fits_hopper_and_not_ampere() -> None:
    assert _soft_cuda.shared_bytes(2048, 2048) <= SHARED_MEMORY[90]
    assert _soft_cuda.shared_bytes(2048, 2048) > SHARED_MEMORY[80] >= _soft_cuda.shared_bytes(1024, 1024)
    assert _soft_cuda.block_count(2048, 2048) == 128  # of 132 multiprocessors
