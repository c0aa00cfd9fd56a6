"""soft_token_step in C++, and what all backends share: the custom op, its gradient, and which heads are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.ops.recorder import Recorder
from tests.ops.soft_query import (
    NAMES,
    PARTS,
    SHAPE_IDS,
    SHAPES,
    STREAM,
    expect_gradients,
    expect_step,
    gradients,
    make_head,
    make_hidden,
)
from vsr1.errors import BackendUnavailable
from vsr1.ops import _soft_backends, last_backend
from vsr1.ops._dispatch import extension_missing
from vsr1.ops._soft_head import HeadWeights, plain_weights
from vsr1.ops.soft_query import NoiseStream, SoftStep, gaussian_logp, soft_token_step

pytestmark = pytest.mark.skipif(bool(extension_missing()), reason="needs vsr1._C")


def step_of(head: nn.Module, hidden: Tensor, backend: str = "cpu", sigma: float = 0.3) -> SoftStep:
    with torch.no_grad():
        step = soft_token_step(hidden, head, sigma=sigma, generator=STREAM, backend=backend)
    assert last_backend() == backend
    return step


def linear_layers(head: nn.Module) -> list[nn.Linear]:
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(("B", "H", "D"), [*SHAPES, (66, 24, 97)], ids=[*SHAPE_IDS, "B66-H24-D97"])
def test_matches_float64(B: int, H: int, D: int, dtype: torch.dtype, backend: str) -> None:
    head, hidden = make_head(H, D, dtype=dtype), make_hidden(B, H, dtype)
    expect_step(step_of(head, hidden, backend), head, hidden, 0.3, STREAM)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize("sigma", [0.0, 0.05, 3.0])
def test_sigma_and_gate(sigma: float, gate: bool) -> None:
    head, hidden = make_head(24, 40, gate=gate, dtype=torch.float32), make_hidden(3, 24, torch.float32)
    step = step_of(head, hidden, sigma=sigma)
    expect_step(step, head, hidden, sigma, STREAM)
    if sigma:
        torch.testing.assert_close(step.logp, gaussian_logp(step.action, step.mean, sigma), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(step.action, step.mean) and not step.logp.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    head, hidden = make_head(256, 640, dtype=dtype), make_hidden(17, 256, dtype)  # work enough for every thread
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(step_of(head, hidden))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(getattr(found[0], name), getattr(other, name)) for name in PARTS)


def test_rows_in_parts_draw_what_all_rows_draw() -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(7, 24, torch.float32)
    whole = soft_token_step(hidden, head, sigma=0.3, generator=STREAM, backend="cpu")
    first = soft_token_step(hidden[:3], head, sigma=0.3, generator=STREAM, backend="cpu")
    second = soft_token_step(hidden[3:], head, sigma=0.3, generator=first.noise, backend="cpu")
    for name in PARTS:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(first, name), getattr(second, name)]))
    assert second.noise == whole.noise == NoiseStream(STREAM.seed, STREAM.offset + 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_the_hidden_state_may_have_another_type_and_strides(dtype: torch.dtype) -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(6, 48, dtype).detach()[::2, ::2]
    step = step_of(head, hidden)
    assert step.policy_input.dtype == dtype and step.mean.dtype == torch.float32
    wide = step_of(head, hidden.float().contiguous())
    assert torch.equal(step.action, wide.action)
    assert torch.equal(step.policy_input, wide.policy_input.to(dtype))


def test_the_weights_may_have_any_strides() -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(3, 24, torch.float32)
    plain = step_of(head, hidden)
    for layer in linear_layers(head):
        layer.weight.data = layer.weight.data.T.contiguous().T
    assert all(torch.equal(*pair) for pair in zip(step_of(head, hidden)[:4], plain[:4], strict=True))


def test_nan_stays_in_its_row_and_no_rows_are_no_rows() -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(3, 24, torch.float32).detach()
    clean = step_of(head, hidden)
    hidden[1, 5] = math.nan
    step = step_of(head, hidden)
    for name in PARTS:
        assert getattr(step, name)[1].isnan().all()
        assert torch.equal(getattr(step, name)[[0, 2]], getattr(clean, name)[[0, 2]])
    empty = step_of(head, hidden[:0])
    assert empty.mean.shape == (0, 40) and empty.logp.shape == (0,) and empty.policy_input.shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
def test_gradients_match_float64(gate: bool, dtype: torch.dtype) -> None:
    head, hidden = make_head(24, 40, gate=gate, dtype=dtype), make_hidden(3, 24, dtype)
    expect_gradients(head, hidden, "cpu")


def test_a_frozen_head_has_gradients_in_the_hidden_states_alone() -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32).requires_grad_(False), make_hidden(3, 24, torch.float32)
    step = soft_token_step(hidden, head, sigma=0.3, generator=STREAM, backend="cpu")
    (found,) = torch.autograd.grad(step.logp.sum(), hidden)
    assert found.abs().max() > 0
    head.requires_grad_()
    step = soft_token_step(hidden.detach(), head, sigma=0.3, generator=STREAM, backend="cpu")
    last = head.refine_latent_input_projector[1].weight
    assert not torch.autograd.grad(step.mean.sum(), last)[0].any()  # what no output asked for depends on


def test_a_frozen_layer_costs_no_product() -> None:
    """A weight's gradient is a product over the rows, of which there are as many as of nothing else here."""
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(3, 24, torch.float32)
    layers = linear_layers(head)
    for learning in ([], *([layer] for layer in layers), layers):
        head.requires_grad_(False)
        for layer in learning:
            layer.requires_grad_()
        step = soft_token_step(hidden, head, sigma=0.3, generator=STREAM, backend="cpu")
        total = sum(getattr(step, name).sum() for name in PARTS)
        with Recorder() as backward:
            total.backward()
        found = [product for product in backward.products if product[1] == 3]
        assert sorted(found) == sorted((layer.out_features, 3, layer.in_features) for layer in learning)


def test_the_formula_by_finite_differences() -> None:
    """In float64: the backward pass that all backends share."""
    weights = plain_weights(make_head(4, 3))
    assert isinstance(weights, HeadWeights)

    def outputs(state: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _soft_backends.soft_step(state, tensors, weights.epsilons, 0.2, 1, 0, "reference")[::3]

    assert torch.autograd.gradcheck(outputs, (make_hidden(2, 4), *weights.tensors))


def test_opcheck() -> None:
    weights = plain_weights(make_head(24, 40, dtype=torch.float32))
    assert isinstance(weights, HeadWeights)
    hidden = make_hidden(3, 24, torch.float32)
    arguments = (hidden, weights.tensors, weights.epsilons, 0.3, 1, 2, "cpu")
    torch.library.opcheck(_soft_backends.soft_step, arguments)


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "gradient"])
def test_compiled_code_calls_the_op(gradient: bool) -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32).requires_grad_(gradient), make_hidden(3, 24, torch.float32)
    hidden = hidden.detach().requires_grad_(gradient)

    def call(hidden: Tensor) -> tuple[Tensor, ...]:
        return soft_token_step(hidden, head, sigma=0.3, generator=STREAM, backend="cpu")[:4]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(compiled(hidden), call(hidden), strict=True):
        assert torch.equal(found, wanted)
    if gradient:
        found, wanted = (torch.autograd.grad(one(hidden)[3].sum(), hidden)[0] for one in (compiled, call))
        assert torch.equal(found, wanted)


def test_auto_takes_the_extension_where_no_gradient_is_asked_for() -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(3, 24, torch.float32)
    soft_token_step(hidden, head)
    assert last_backend() == "reference"
    with torch.no_grad():
        soft_token_step(hidden, head)
    assert last_backend() == "cpu"
    soft_token_step(hidden.detach(), head.requires_grad_(False))
    assert last_backend() == "cpu"
    soft_token_step(hidden.detach().double(), make_head(24, 40).requires_grad_(False))
    assert last_backend() == "reference"


def test_auto_leaves_many_rows_of_float32_without_noise_to_torch() -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(33, 24, torch.float32).detach()

    def served(head: nn.Module, hidden: Tensor, sigma: float = 0.0, backend: str = "auto") -> str | None:
        with torch.no_grad():
            soft_token_step(hidden, head, sigma=sigma, generator=STREAM, backend=backend)
        return last_backend()

    assert served(head, hidden) == "reference"
    assert served(head, hidden[:32]) == "cpu"
    assert served(head, hidden, sigma=0.3) == "cpu"
    assert served(head, hidden, backend="cpu") == "cpu"
    assert served(head.to(torch.bfloat16), hidden) == "cpu"


class Adapted(nn.Linear):
    """A layer that does more than its weight says."""


def head_with(change: str) -> nn.Module:
    head = make_head(24, 40, dtype=torch.float32)
    projector, reader = head.refine_projector, head.refine_latent_input_projector
    if change == "adapter":
        projector[3] = Adapted(40, 40)
    elif change == "hook":
        reader[1].register_forward_hook(lambda module, arguments, output: output)
    elif change == "hook on the gate":
        head.refine_gate.register_forward_pre_hook(lambda module, arguments: None)
    elif change == "replaced forward":
        reader[0].forward = reader[0].forward
    elif change == "parametrization":
        nn.utils.parametrizations.weight_norm(projector[0])
    elif change == "no bias":
        projector[0] = nn.Linear(24, 40, bias=False)
    elif change == "tanh":
        projector[2] = nn.GELU("tanh")
    elif change == "two types":
        reader[0].to(torch.bfloat16)
    elif change == "more layers":
        head.refine_projector = nn.Sequential(*projector, nn.Identity())
    return head


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("adapter", "Adapted"),
        ("hook", "Linear has hooks"),
        ("hook on the gate", "Linear has hooks"),
        ("replaced forward", "LayerNorm has hooks or a forward"),
        ("parametrization", "ParametrizedLinear"),
        ("no bias", "a weight and a bias"),
        ("tanh", "tanh"),
        ("two types", "bfloat16"),
        ("more layers", "Identity"),
    ],
)
def test_heads_that_are_more_than_their_weights_go_to_the_reference(change: str, says: str) -> None:
    head, hidden = head_with(change), make_hidden(3, 24, torch.float32)
    with torch.no_grad():
        with pytest.raises(BackendUnavailable, match=says):
            soft_token_step(hidden, head, backend="cpu")
        if change != "two types":
            soft_token_step(hidden, head)
            assert last_backend() == "reference"


def test_other_reasons_to_refuse() -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(3, 24, torch.float32)
    with pytest.raises(BackendUnavailable, match="float64"):
        soft_token_step(hidden, make_head(24, 40), backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"\(B, 24\).*\(3, 12\)"):
        soft_token_step(hidden[:, :12], head, backend="cpu")
    with torch.autocast("cpu"), pytest.raises(BackendUnavailable, match="autocast"):
        soft_token_step(hidden, head, backend="cpu")
    with pytest.raises(BackendUnavailable, match="triton"):
        soft_token_step(hidden, head, backend="triton")
    with pytest.raises(BackendUnavailable, match="cuda"):
        soft_token_step(hidden, head, backend="cuda")


def test_hooks_see_the_step_of_auto() -> None:
    head, hidden = make_head(24, 40, dtype=torch.float32), make_hidden(3, 24, torch.float32)
    seen = []
    head.refine_projector[3].register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        soft_token_step(hidden, head)
    assert len(seen) == 1
    assert len(gradients(head, hidden, "auto")) == 13
