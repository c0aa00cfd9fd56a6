"""linear_logp against log_softmax on full logits: values, every gradient, memory, and the rows it must not touch."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vsr1.ops import last_backend
from vsr1.ops.linear_logp import linear_logp, reference, reference_backward


def plain(hidden, weight, target, temperature=1.0, bias=None):
    """The same through logits; log-softmax in float32 at least, as training code without the op does it."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = (logits if bias is None else logits + bias) / temperature
    logs = logits.log_softmax(-1)
    return logs.gather(1, target[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def inputs(rows, vocabulary, width, dtype=torch.float64, bias=True, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    target = torch.randint(vocabulary, (rows,), generator=generator)
    return normal(rows, width), normal(vocabulary, width), target, normal(vocabulary) if bias else None


def relative(got, truth):
    got, truth = got.detach().double(), truth.detach().double()
    return float((got - truth).norm() / truth.norm())


SHAPES = pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "chunk_bytes"),
    [(1, 1, 1, 1), (7, 13, 5, 1), (33, 101, 17, 3 * 101 * 8 * 10), (64, 257, 32, 1 << 20)],
    ids=["T1-V1-H1", "T7-V13-H5-rowwise", "T33-V101-H17-tail", "T64-V257-H32-one-chunk"],
)


@SHAPES
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_values_and_gradients_in_double(rows, vocabulary, width, chunk_bytes, temperature, bias):
    hidden, weight, target, offset = inputs(rows, vocabulary, width, bias=bias)
    leaves = [t for t in (hidden, weight, offset) if t is not None]
    logp, entropy = linear_logp(
        hidden, weight, target, temperature=temperature, bias=offset, entropy=True, chunk_bytes=chunk_bytes
    )
    expected = plain(hidden, weight, target, temperature, offset)
    torch.testing.assert_close((logp, entropy), expected)
    assert (logp <= 0).all()
    assert last_backend() == "reference"
    up = torch.randn(2, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad((up[0] * logp + up[1] * entropy).sum(), leaves)
    truths = torch.autograd.grad((up[0] * expected[0] + up[1] * expected[1]).sum(), leaves)
    torch.testing.assert_close(grads, truths)


def test_gradcheck():
    hidden, weight, target, bias = inputs(4, 6, 3)

    def call(hidden, weight, bias):
        return linear_logp(hidden, weight, target, temperature=0.8, bias=bias, entropy=True, chunk_bytes=400)

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    hidden, weight, target, bias = inputs(96, 331, 48, dtype, scale=0.5)
    leaves = (hidden, weight, bias)
    up = torch.randn(2, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def run(function, leaves):
        logp, entropy = function(*leaves)
        loss = (up[0].to(logp) * logp + up[1].to(logp) * entropy).sum()
        return (logp, entropy, *torch.autograd.grad(loss, leaves))

    truth = run(lambda h, w, b: plain(h, w, target, 0.9, b), [x.detach().double().requires_grad_() for x in leaves])
    naive = run(lambda h, w, b: plain(h, w, target, 0.9, b), leaves)
    ours = run(
        lambda h, w, b: linear_logp(h, w, target, temperature=0.9, bias=b, entropy=True, chunk_bytes=40_000), leaves
    )
    for name, o, n, t in zip(("logp", "entropy", "hidden", "weight", "bias"), ours, naive, truth, strict=True):
        assert o.dtype == n.dtype, name
        assert relative(o, t) <= 2 * relative(n, t) + 1e-7, name


def test_logp_is_never_positive_even_when_certain():
    hidden = torch.full((3, 4), 30.0)
    weight = torch.cat([torch.full((1, 4), 30.0), torch.randn(9, 4)])
    logp, entropy = linear_logp(hidden, weight, torch.zeros(3, dtype=torch.int64), entropy=True)
    assert (logp <= 0).all()
    assert (logp > -1e-6).all()
    assert (entropy >= 0).all()
    assert torch.isfinite(entropy).all()


def test_a_forbidden_word_has_no_probability_and_no_gradient():
    hidden, weight, target, bias = inputs(5, 7, 3)
    with torch.no_grad():
        bias[6] = -torch.inf
    target = target.clamp(max=5)
    logp, entropy = linear_logp(hidden, weight, target, bias=bias, entropy=True)
    (logp.sum() + entropy.sum()).backward()
    torch.testing.assert_close(logp, plain(hidden, weight[:6], target, bias=bias[:6])[0])
    assert weight.grad[6].abs().max() == 0
    assert torch.isfinite(weight.grad).all()
    assert torch.isfinite(hidden.grad).all()


def test_tied_weights_collect_both_gradients():
    _, weight, target, _ = inputs(6, 11, 4)
    tokens = torch.arange(6)
    ours = torch.autograd.grad(linear_logp(weight[tokens] * 2, weight, target).logp.sum(), weight)
    truth = torch.autograd.grad(plain(weight[tokens] * 2, weight, target)[0].sum(), weight)
    torch.testing.assert_close(ours, truth)


def test_without_entropy_there_is_none():
    hidden, weight, target, _ = inputs(3, 5, 2)
    assert linear_logp(hidden, weight, target).entropy is None


def test_no_rows():
    hidden, weight, target, bias = inputs(0, 5, 2)
    logp, entropy = linear_logp(hidden, weight, target, bias=bias, entropy=True)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0,)
    assert weight.grad.abs().sum() == 0
    assert hidden.grad.shape == (0, 2)


class Recorder(TorchDispatchMode):
    """Keeps the size of the largest tensor any torch operation produced, and the rows of every matrix product."""

    def __init__(self):
        super().__init__()
        self.largest, self.product_rows = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        if func is torch.ops.aten.mm.default:
            self.product_rows.append(args[0].shape[0])
        return out


def backward_with(hidden, weight, target, grad_logp, needs, chunk_bytes):
    """The plain functions under the custom op: a dispatch mode does not see inside an op."""
    empty = hidden.new_empty(0)
    with torch.no_grad(), Recorder() as forward:
        _, _, lse = reference(hidden, weight, target, None, 1.0, False, chunk_bytes)
    with torch.no_grad(), Recorder() as backward:
        grads = reference_backward(
            grad_logp, empty, hidden, weight, target, None, empty, lse, 1.0, list(needs), chunk_bytes
        )
    return forward, backward, grads


def test_nothing_of_rows_times_vocabulary_is_ever_made():
    rows, vocabulary, width = 512, 1000, 8
    hidden, weight, target, _ = inputs(rows, vocabulary, width, torch.float32)
    up = torch.ones(rows)
    forward, backward, _ = backward_with(hidden, weight, target, up, (True, True, False), 200_000)
    assert 0 < forward.largest <= 200_000 / 4
    assert 0 < backward.largest <= 200_000 / 4
    whole, _, _ = backward_with(hidden, weight, target, up, (True, True, False), 1 << 30)
    assert whole.largest == rows * vocabulary  # the recorder does see the logits when the budget lets them be


def test_rows_without_upstream_gradient_are_dropped():
    hidden, weight, target, _ = inputs(40, 50, 8)
    up = torch.zeros(40, dtype=torch.float64)
    up[5:40:7] = 1.5
    up[12] = torch.nan
    _, backward, grads = backward_with(hidden, weight, target, up, (True, False, False), 1 << 20)
    assert backward.product_rows == [5, 5]  # recomputed logits and the product with the weight
    assert grads[0][up == 0].abs().max() == 0
    assert grads[0][12].isnan().all(), "a NaN upstream must stay visible"
    assert grads[1].numel() == grads[2].numel() == 0


def test_frozen_weight_costs_no_product():
    hidden, weight, target, _ = inputs(6, 9, 4)
    weight.requires_grad_(False)
    linear_logp(hidden, weight, target).logp.sum().backward()
    assert weight.grad is None
    assert hidden.grad.abs().max() > 0
    with Recorder() as recorder:
        backward_with(
            hidden.detach(), weight, target, torch.ones(6, dtype=torch.float64), (True, False, False), 1 << 20
        )
    assert recorder.product_rows.count(9) == 0  # (V, T) x (T, H) never ran


def test_is_a_well_formed_custom_op():
    hidden, weight, target, bias = inputs(5, 7, 3)
    torch.library.opcheck(torch.ops.vsr1.linear_logp, (hidden, weight, target, bias, 0.9, True, 1 << 20, "auto"))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"hidden": torch.zeros(4, 3, 2)}, ValueError, "hidden must be"),
        ({"weight": torch.zeros(5, 4)}, ValueError, "H = 3"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "V >= 1"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, TypeError, "weight is torch.float64"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, ValueError, "int32"),
        ({"target": torch.tensor([0, 1, 2, 5])}, ValueError, r"\[0, 5\).*\[0, 5\]"),
        ({"target": torch.tensor([0, 1, 2, -100])}, ValueError, "-100"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
        ({"backend": "nonsense"}, ValueError, "nonsense"),
    ],
)
def test_bad_arguments_are_named(change, error, says):
    good = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=says):
        linear_logp(**{**good, **change})
