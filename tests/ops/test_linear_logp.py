"""linear_logp against log_softmax on whole logits: values, every gradient, memory, and the rows and words it must not touch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.logits import answer, check, inputs, plain, upstream
from tests.ops.recorder import Recorder
from vsr1.errors import BackendUnavailable
from vsr1.ops import _linear_logp_backends as backends
from vsr1.ops import _linear_logp_kernels, last_backend
from vsr1.ops._dispatch import extension_missing
from vsr1.ops.linear_logp import linear_logp

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "chunk_bytes"),
    [(1, 1, 1, None), (7, 13, 5, 1), (33, 1001, 17, 60_000), (64, 257, 32, None), (5, 4500, 9, None)],
    ids=["T1-V1-H1", "T7-V13-H5-rowwise", "T33-V1001-H17-tails", "T64-V257-H32", "T5-V4500-H9-tiles"],
)
each_backend = pytest.mark.parametrize(
    "backend", ["reference", "cpu-portable", "cpu-avx2", "cpu-avx512"], indirect=True
)
needs_extension = pytest.mark.skipif(extension_missing() is not None, reason=str(extension_missing()))


@each_backend
@SHAPES
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_torch(
    backend: str, dtype: str, rows: int, vocabulary: int, width: int, chunk_bytes: int | None
) -> None:
    check(rows, vocabulary, width, DTYPES[dtype], chunk_bytes=chunk_bytes, backend=backend)
    assert last_backend() == backend


@needs_extension
@SHAPES
def test_products_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int, width: int, chunk_bytes: int | None
) -> None:
    monkeypatch.setattr(_linear_logp_kernels, "multiplies_bfloat16", lambda: True)
    check(rows, vocabulary, width, torch.bfloat16, chunk_bytes=chunk_bytes, backend="cpu")


@SHAPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_values_and_gradients_in_double(
    rows: int, vocabulary: int, width: int, chunk_bytes: int | None, bias: bool
) -> None:
    hidden, weight, target, offset = inputs(rows, vocabulary, width, bias=bias)
    up = upstream(rows)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return linear_logp(hidden, weight, target, temperature=0.7, bias=bias, entropy=True, chunk_bytes=chunk_bytes)

    found = answer(ours, (hidden, weight, offset), up)
    assert last_backend() == "reference"
    torch.testing.assert_close(found, answer(lambda h, w, b: plain(h, w, target, 0.7, b), (hidden, weight, offset), up))


def test_gradcheck() -> None:
    hidden, weight, target, bias = inputs(4, 6, 3)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_logp(hidden, weight, target, temperature=0.8, bias=bias, entropy=True, chunk_bytes=400)

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 6),
    vocabulary=st.integers(1, 600),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 8.0, 60.0]),
    temperature=st.floats(0.05, 20.0),
    dtype=st.sampled_from(list(DTYPES.values())),
    bias=st.booleans(),
    sure=st.booleans(),
)
def test_logp_is_never_positive(
    seed: int, rows: int, vocabulary: int, scale: float, temperature: float, dtype: torch.dtype, bias: bool, sure: bool
) -> None:
    hidden, weight, target, offset = inputs(rows, vocabulary, 5, dtype, bias=bias, seed=seed, scale=scale)
    if sure:  # the target is the best word
        target = (hidden.detach() @ weight.detach().T).argmax(1)
    for backend in ("reference",) if extension_missing() else ("reference", "cpu"):
        logp, entropy = linear_logp(
            hidden,
            weight,
            target,
            temperature=temperature,
            bias=offset,
            entropy=True,
            chunk_bytes=2000,
            backend=backend,
        )
        assert (logp <= 0).all()
        assert (entropy >= 0).all()
        assert (entropy <= math.log(vocabulary) * (1 + 1e-5) + 1e-5).all()


@each_backend
def test_certain_words(backend: str) -> None:
    hidden = torch.full((3, 4), 30.0)
    weight = torch.cat([torch.full((1, 4), 30.0), torch.randn(9, 4)])
    logp, entropy = linear_logp(hidden, weight, torch.zeros(3, dtype=torch.int64), entropy=True, backend=backend)
    assert (logp <= 0).all() and (logp > -1e-6).all()
    assert (entropy >= 0).all() and (entropy < 1e-6).all()


@each_backend
def test_a_forbidden_word_has_no_probability_and_no_gradient(backend: str) -> None:
    """Here the words of a whole tile, so that its rows know of no possible word at first."""
    hidden, weight, target, bias = inputs(5, 600, 3, torch.float32)
    with torch.no_grad():
        bias[:400] = -torch.inf
    target = target % 200 + 400
    logp, entropy = linear_logp(hidden, weight, target, bias=bias, entropy=True, chunk_bytes=1, backend=backend)
    (logp.sum() + entropy.sum()).backward()
    truth = plain(hidden, weight[400:], target - 400, bias=bias[400:])
    torch.testing.assert_close((logp, entropy), truth)
    assert weight.grad[:400].abs().max() == 0
    assert bias.grad[:400].abs().max() == 0
    assert torch.isfinite(weight.grad).all()
    assert torch.isfinite(hidden.grad).all()


@each_backend
def test_nothing_is_known_of_a_row_without_a_possible_word(backend: str) -> None:
    hidden, weight, target, _ = inputs(2, 7, 3, torch.float32)
    bias = torch.full((7,), -torch.inf)
    logp, entropy = linear_logp(hidden, weight, target, bias=bias, entropy=True, backend=backend)
    assert logp.isnan().all()
    assert entropy.isnan().all()


@each_backend
def test_a_nan_stays_in_its_row_and_a_row_without_gradient_is_not_touched(backend: str) -> None:
    hidden, weight, target, bias = inputs(9, 300, 4, torch.float32)
    with torch.no_grad():
        hidden[3, 1] = torch.nan
    logp, entropy = linear_logp(hidden, weight, target, bias=bias, entropy=True, backend=backend)
    assert logp.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[3]]
    others = torch.arange(9) != 3
    torch.autograd.backward((logp[others].sum(), entropy[others].sum()))
    rest = hidden.detach()[others].requires_grad_()
    known, truth = torch.autograd.grad(
        sum(map(torch.sum, plain(rest, weight, target[others], bias=bias))), (rest, weight)
    )
    torch.testing.assert_close(hidden.grad[others], known)
    assert hidden.grad[3].abs().max() == 0
    torch.testing.assert_close(weight.grad, truth, rtol=1e-4, atol=1e-5)


@each_backend
def test_a_nan_upstream_stays_visible(backend: str) -> None:
    hidden, weight, target, _ = inputs(4, 50, 4, torch.float32)
    up = torch.tensor([0.0, torch.nan, 1.0, 0.0])
    (grad,) = torch.autograd.grad(linear_logp(hidden, weight, target, backend=backend).logp, hidden, up)
    assert grad.isnan().any(1).tolist() == [False, True, False, False]
    assert (grad == 0).all(1).tolist() == [True, False, False, True]


@each_backend
def test_tied_weights_collect_both_gradients(backend: str) -> None:
    _, weight, target, _ = inputs(6, 300, 4, torch.float32)
    tokens = torch.arange(6)
    ours = torch.autograd.grad(linear_logp(weight[tokens] * 2, weight, target, backend=backend).logp.sum(), weight)
    truth = torch.autograd.grad(plain(weight[tokens] * 2, weight, target)[0].sum(), weight)
    torch.testing.assert_close(ours, truth)


@each_backend
def test_one_result_may_go_without_gradient(backend: str) -> None:
    hidden, weight, target, _ = inputs(6, 40, 4, torch.float32)
    for part in (0, 1):
        found = linear_logp(hidden, weight, target, entropy=True, backend=backend)[part]
        truth = plain(hidden, weight, target)[part]
        wanted = torch.autograd.grad(truth.sum(), (hidden, weight))
        torch.testing.assert_close(torch.autograd.grad(found.sum(), (hidden, weight)), wanted)
    assert linear_logp(hidden, weight, target).entropy is None


@each_backend
def test_no_rows(backend: str) -> None:
    hidden, weight, target, bias = inputs(0, 5, 2, torch.float32)
    logp, entropy = linear_logp(hidden, weight, target, bias=bias, entropy=True, backend=backend)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,)
    assert weight.grad.abs().sum() == 0
    assert hidden.grad.shape == (0, 2)


@each_backend
def test_any_strides(backend: str) -> None:
    hidden, weight, target, bias = inputs(12, 64, 6, torch.float32)
    truth = plain(hidden, weight, target, 1.0, bias)[0]
    wanted = torch.autograd.grad(truth.sum(), (hidden, weight, bias))
    turned = [tensor.detach().T.contiguous().T.requires_grad_() for tensor in (hidden, weight)]
    # with something else between their numbers
    spread = torch.stack([bias.detach(), -bias.detach()], 1)[:, 0].requires_grad_()
    every_other = torch.stack([target, (target + 1) % 64], 1)[:, 0]
    logp = linear_logp(*turned, every_other, bias=spread, chunk_bytes=10_000, backend=backend).logp
    torch.testing.assert_close(logp, truth)
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), (*turned, spread)), wanted)


def recorded(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    up: Tensor,
    needs: tuple[bool, ...],
    budget: int | None,
) -> tuple[Recorder, Recorder, tuple[Tensor, ...]]:
    """What forward and backward do, and the gradients; from inside the op, where a dispatch mode does not see."""
    with torch.no_grad(), Recorder() as forward:
        _, entropy, lse = backends.values(hidden, weight, target, None, 1.0, False, budget, backend)
    with torch.no_grad(), Recorder() as backward:
        grads = backends.gradients(
            up, None, hidden, weight, target, None, entropy, lse, 1.0, list(needs), budget, backend
        )
    return forward, backward, grads


@each_backend
def test_nothing_of_rows_times_vocabulary_is_ever_made(backend: str) -> None:
    hidden, weight, target, _ = inputs(512, 1000, 8, torch.float32)
    up = torch.ones(512)
    forward, backward, _ = recorded(backend, hidden, weight, target, up, (True, True, False), 200_000)
    assert 0 < forward.largest <= 200_000 / 4
    assert 0 < backward.largest <= 200_000 / 4
    whole, _, _ = recorded(backend, hidden, weight, target, up, (True, True, False), 1 << 30)
    assert whole.largest == 512 * 1000  # the recorder does see the logits when the budget lets them be


@each_backend
def test_rows_without_upstream_gradient_take_part_in_no_product(backend: str) -> None:
    hidden, weight, target, _ = inputs(40, 50, 8, torch.float32)
    up = torch.zeros(40)
    up[5:40:7] = 1.5
    _, backward, grads = recorded(backend, hidden, weight, target, up, (True, True, False), None)
    assert sorted(backward.products) == [(5, 8, 50), (5, 50, 8), (50, 5, 8)]
    assert grads[0][up == 0].abs().max() == 0
    _, backward, grads = recorded(backend, hidden, weight, target, torch.zeros(40), (True, True, False), None)
    assert backward.products == []
    assert grads[0].abs().max() == grads[1].abs().max() == 0


@each_backend
def test_a_frozen_weight_costs_no_product_and_no_memory(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target, _ = inputs(6, 3000, 4, torch.float32)
    weight.requires_grad_(False)
    # not as an op, into which a dispatch mode does not see
    monkeypatch.setattr(backends, "linear_logp_backward", backends.gradients)
    logp = linear_logp(hidden, weight, target, chunk_bytes=6 * 256 * 4, backend=backend).logp
    with Recorder() as backward:
        logp.sum().backward()
    assert weight.grad is None
    assert hidden.grad.abs().max() > 0
    # the logits and the gradient of the hidden states; that of the weight would have 6 for the rows or 1 for a chunk's
    assert {inner for _, inner, _ in backward.products} in ({4, 256, 3000 % 256}, {4, 3000})
    if backend == "cpu":
        assert backward.largest < weight.numel()
    _, _, grads = recorded(backend, hidden, weight, target, torch.ones(6), (True, False, False), None)
    assert grads[1].numel() == grads[2].numel() == 0


@needs_extension
def test_memory_beside_the_plain_path() -> None:
    """And the first call does not import torch._dynamo, which takes two seconds."""
    program = """
import sys, torch
from bench.harness import peak_memory
from tests.ops.logits import inputs, plain
from vsr1.ops.linear_logp import linear_logp
hidden, weight, target, _ = inputs(512, 16_000, 32, torch.float32, bias=False)
def ours(): return linear_logp(hidden, weight, target, entropy=True)
def step(function):
    logp, entropy = function()
    return torch.autograd.grad((logp + entropy).sum(), (hidden, weight))
step(ours)
assert "torch._dynamo" not in sys.modules
through_logits = lambda: plain(hidden, weight, target)
step(through_logits)
print(peak_memory(lambda: step(ours))[0], peak_memory(lambda: step(through_logits))[0])
"""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True, timeout=120)
    ours, whole = done.stdout.split()
    if ours == "None":
        pytest.skip("this kernel does not count a process' memory")
    assert float(whole) > 2 * 512 * 16_000 * 4 / 2**20
    assert float(ours) <= float(whole) / 8


@needs_extension
def test_the_same_bits_again_and_the_row_kernels_with_any_number_of_threads() -> None:
    hidden, weight, target, _ = inputs(200, 3000, 40, torch.float32)
    up = upstream(200)

    def call(hidden: Tensor, weight: Tensor) -> Any:
        return linear_logp(hidden, weight, target, entropy=True, backend="cpu")

    for one, other in zip(answer(call, (hidden, weight), up), answer(call, (hidden, weight), up), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(*pair) for count in (2, 5) for pair in zip(_rows(1), _rows(count), strict=True))


def _rows(threads: int) -> Iterator[Tensor]:
    """The sums and the gradient of one tile on so many threads."""
    from vsr1 import _C

    generator = torch.Generator().manual_seed(0)
    products, target = torch.randn(300, 1003, generator=generator), torch.randint(1003, (300,), generator=generator)
    peak, (total, weighted, picked) = torch.full((300,), -math.inf), torch.zeros(3, 300)
    tile = _C.LogitTile(
        products=products.data_ptr(), rows=300, columns=1003, stride=1003, bfloat16=False, first=0,
        target=target.data_ptr(), bias=0, scale=1.5, threads=threads,
    )  # fmt: skip
    _C.add_logits(
        tile, peak=peak.data_ptr(), total=total.data_ptr(), weighted=weighted.data_ptr(), picked=picked.data_ptr()
    )
    yield from (peak.clone(), total, weighted, picked)
    lse = peak + total.log()
    _C.logits_to_gradient(tile, lse=lse.data_ptr(), upstream=peak.data_ptr(), slope=0, entropy=0)
    yield products


@each_backend
def test_backward_is_served_as_forward_was(backend: str) -> None:
    hidden, weight, target, _ = inputs(3, 5, 2, torch.float32)
    logp = linear_logp(hidden, weight, target, backend=backend).logp
    linear_logp(hidden.double(), weight.double(), target)
    logp.sum().backward()
    assert last_backend() == backend


def test_auto_and_what_a_backend_refuses() -> None:
    hidden, weight, target, _ = inputs(3, 5, 2, torch.bfloat16)
    linear_logp(hidden, weight, target)
    assert last_backend() == ("reference" if extension_missing() else "cpu")
    if not extension_missing():
        with pytest.raises(BackendUnavailable, match="float64 is for the reference"):
            linear_logp(hidden.double(), weight.double(), target, backend="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="backend 'triton'"):
            linear_logp(hidden, weight, target, backend="triton")


def test_is_a_well_formed_custom_op() -> None:
    hidden, weight, target, bias = inputs(5, 7, 3, torch.float32)
    torch.library.opcheck(backends.linear_logp, (hidden, weight, target, bias, 0.9, True, None, "auto"))
    # in float64 too, which the reference serves
    double = [one.detach().double().requires_grad_() for one in (hidden, weight, bias)]
    torch.library.opcheck(backends.linear_logp, (*double[:2], target, double[2], 0.9, False, 4000, "auto"))
    compiled = torch.compile(lambda h: linear_logp(h, weight, target).logp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), linear_logp(hidden, weight, target).logp)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"hidden": torch.zeros(4, 3, 2)}, ValueError, "hidden must be"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, "int64"),
        ({"weight": torch.zeros(5, 4)}, ValueError, "H = 3"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "V >= 1"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, TypeError, "weight is torch.float64"),
        ({"weight": torch.zeros(5, 3, device="meta")}, TypeError, "weight is torch.float32 on meta"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, TypeError, "target is on meta"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, ValueError, "int32"),
        ({"target": torch.tensor([0, 1, 2, 5])}, ValueError, r"\[0, 5\).*\[0, 5\]"),
        ({"target": torch.tensor([0, 1, 2, -100])}, ValueError, "-100"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"bias": torch.zeros(5, dtype=torch.float16)}, TypeError, "bias is torch.float16"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
        ({"backend": "nonsense"}, ValueError, "nonsense"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], says: str) -> None:
    good = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=says):
        linear_logp(**{**good, **change})
