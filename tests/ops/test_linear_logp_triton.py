"""linear_logp on Triton's row kernels: on a GPU or, without one, in Triton's interpreter; and what ptxas makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.kernels import DEVICE, INTERPRETED, SHARED_MEMORY, compile_ahead, compiles, runs
from tests.ops.logits import answer, check, inputs, plain, upstream
from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops.linear_logp import linear_logp

kernels = pytest.importorskip("vsr1.kernels.linear_logp", reason="vsr1 is not installed: pip install -e .")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if DEVICE == "cuda":
    DTYPES["bf16"] = torch.bfloat16


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "chunk_bytes"),
    [(1, 1, 1, None), (7, 13, 5, 1), (33, 601, 17, 40_000), (3, 4700, 8, None)],
    ids=["T1-V1-H1", "T7-V13-H5-rowwise", "T33-V601-H17-tails", "T3-V4700-H8-two-blocks"],
)
def test_triton_error_is_at_most_twice_that_of_plain_torch(
    dtype: str, bias: bool, rows: int, vocabulary: int, width: int, chunk_bytes: int | None
) -> None:
    options = {"chunk_bytes": chunk_bytes, "backend": "triton"}
    check(rows, vocabulary, width, DTYPES[dtype], bias=bias, device=DEVICE, **options)
    assert last_backend() == "triton"


@runs
def test_triton_infinities_nan_and_a_target_outside() -> None:
    hidden, weight, target, bias = inputs(5, 600, 3, torch.float32, device=DEVICE)
    with torch.no_grad():
        bias[:400] = -torch.inf  # a whole tile of them
        hidden[2] = torch.nan
    target = target % 200 + 400
    options = {"bias": bias, "entropy": True, "chunk_bytes": 1, "backend": "triton"}
    logp, entropy = linear_logp(hidden, weight, target, **options)
    truth = plain(hidden, weight[400:], target - 400, bias=bias[400:])
    torch.testing.assert_close((logp, entropy), truth, equal_nan=True)
    known = torch.tensor([0, 1, 3, 4], device=DEVICE)
    torch.autograd.backward((logp[known].sum(), entropy[known].sum()))
    assert weight.grad[:400].abs().max() == 0
    assert torch.isfinite(weight.grad).all()
    assert hidden.grad[2].abs().max() == 0
    if DEVICE == "cuda":  # on a CPU it is an error
        target[1] = 600
        assert linear_logp(hidden, weight, target, **options).logp.isnan().tolist() == [False, True, True, False, False]


@runs
def test_triton_entropy_may_go_without_gradient_and_the_weight_may_be_frozen() -> None:
    hidden, weight, target, _ = inputs(6, 300, 4, torch.float32, device=DEVICE)
    logp, entropy = linear_logp(hidden, weight.detach(), target, entropy=True, backend="triton")
    truth = plain(hidden, weight.detach(), target)
    (wanted,) = torch.autograd.grad(truth[0].sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), hidden)[0], wanted)
    torch.testing.assert_close(entropy, truth[1])


@runs
def test_triton_gives_a_row_without_upstream_gradient_none_where_it_takes_part() -> None:
    """As it does in a graph, where nobody waits to see which rows to drop."""
    products = torch.tensor([[1.0, 2.0, 3.0], [math.nan] * 3], device=DEVICE)
    sums = torch.full((2,), 3.4, device=DEVICE)
    target, up = torch.tensor([0, 1], device=DEVICE), torch.tensor([1.0, 0.0], device=DEVICE)
    found = kernels.logits_to_gradient(products, 0, target, None, 1.0, sums, up, None, None, torch.float16)
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert (found[0] != 0).all()


@runs
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_triton_forward_and_backward_can_be_captured_in_a_graph() -> None:
    hidden, weight, target, _ = inputs(64, 5000, 128, torch.bfloat16, bias=False, device=DEVICE)
    up = upstream(64, DEVICE)

    def call(hidden: Any, weight: Any) -> Any:
        return linear_logp(hidden, weight, target, entropy=True, backend="triton")

    wanted = answer(call, (hidden, weight), up)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = answer(call, (hidden, weight), up)
    graph.replay()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@runs
def test_triton_says_what_it_cannot_do() -> None:
    hidden, weight, target, _ = inputs(3, 5, 2, torch.float64, device=DEVICE)
    with pytest.raises(BackendUnavailable, match="float64 is for the reference"):
        linear_logp(hidden, weight, target, backend="triton")
    if INTERPRETED:
        with pytest.raises(BackendUnavailable, match="interpreter only, which computes bfloat16 wrongly"):
            linear_logp(hidden.bfloat16(), weight.bfloat16(), target, backend="triton")


INTEGERS = {"columns": "i32", "stride": "i32", "gradient_stride": "i32", "first": "i32", "scale": "fp32"}
OPTIONAL = ("bias", "weighted", "slope", "entropy")


@compiles
@pytest.mark.parametrize("cap", [80, 90])
@pytest.mark.parametrize("lean", [False, True], ids=["whole", "lean"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("add", "fp32"), ("differentiate", "fp32"), ("differentiate", "bf16"), ("differentiate", "fp16")],
)
def test_compiles_for_gpus_without_spills(
    name: str, dtype: str, lean: bool, cap: int, record_property: pytest.RecordProperty
) -> None:
    function = getattr(kernels, f"{name}_kernel")
    types = {name: INTEGERS.get(name, "*fp32") for name in function.arg_names}
    types |= {"target": "*i64", "gradient": f"*{dtype}"}
    constants: dict[str, Any] = {"BLOCK": kernels.BLOCK, "num_warps": kernels.WARPS, "num_stages": 3}
    if lean:
        constants |= {name: None for name in OPTIONAL if name in function.arg_names}
    used = compile_ahead(function, constants, types, {"stride", "gradient_stride"}, cap)
    for what, count in used.items():
        record_property(what, count)
    assert used["spills"] == 0
    assert used["shared"] <= SHARED_MEMORY[cap]
    assert used["registers"] <= 128  # two programs of 256 threads at least on every multiprocessor
