"""soft_token_step against its modules written out, its density against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.ops.soft_query import make_head, make_hidden
from vsr1.ops import last_backend
from vsr1.ops.soft_query import NoiseStream, gaussian_logp, philox_normal, soft_token_step


@pytest.mark.parametrize("gate", [True, False])
def test_without_noise_the_action_is_the_mean(gate):
    head, hidden = make_head(gate=gate), make_hidden()
    step = soft_token_step(hidden, head)
    first, norm, _, last = head.refine_projector
    mean = last(nn.functional.gelu(norm(first(hidden))))
    if gate:
        mean = mean / (1 + torch.exp(-head.refine_gate(hidden)))
    torch.testing.assert_close(step.mean, mean)
    assert torch.equal(step.action, step.mean)
    assert torch.equal(step.logp, torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(step.policy_input, head.refine_latent_input_projector(mean))
    assert step.noise is None
    assert last_backend() == "reference"


def test_the_noisy_action_is_used_and_has_its_density():
    head, hidden = make_head(), make_hidden()
    stream = NoiseStream(7, 3)
    step = soft_token_step(hidden, head, sigma=0.3, generator=stream)
    torch.testing.assert_close(step.action, step.mean + 0.3 * philox_normal((5, 9), stream).double())
    density = torch.distributions.Normal(step.mean, 0.3).log_prob(step.action)
    torch.testing.assert_close(step.logp, density.mean(-1))
    torch.testing.assert_close(step.policy_input, head.refine_latent_input_projector(step.action))


def test_noise_replays_and_advances():
    head, hidden = make_head(), make_hidden()
    start = NoiseStream(11)
    first = soft_token_step(hidden, head, sigma=0.1, generator=start)
    second = soft_token_step(hidden, head, sigma=0.1, generator=first.noise)
    assert first.noise == NoiseStream(11, 12)  # 45 numbers are 12 blocks of four
    assert torch.equal(first.action, soft_token_step(hidden, head, sigma=0.1, generator=start).action)
    assert not torch.equal(first.action, second.action)
    assert soft_token_step(hidden, head, generator=start).noise == start


class Step(nn.Module):
    """The op as a module, so that its parameters can be passed in."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return soft_token_step(hidden, self.head, sigma=0.2, generator=NoiseStream(1))


def test_gradients_of_every_input():
    module, hidden = Step(make_head(width=4, query=3)), make_hidden(2, 4)
    names = [name for name, _ in module.named_parameters()]

    def outputs(hidden, *parameters):
        step = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), hidden)
        return step.mean, step.action, step.policy_input

    assert torch.autograd.gradcheck(outputs, (hidden, *module.parameters()))


def test_gradient_of_logp_is_the_score():
    head, hidden = make_head(), make_hidden()
    step = soft_token_step(hidden, head, sigma=0.2, generator=NoiseStream(2))
    (score,) = torch.autograd.grad(step.logp.sum(), step.mean, retain_graph=True)
    torch.testing.assert_close(score, ((step.action - step.mean) / 0.2**2 / 9).detach())
    assert torch.autograd.grad(step.logp.sum(), hidden)[0].abs().max() > 0


def test_half_precision_keeps_the_noise():
    head, hidden = make_head(dtype=torch.float32), make_hidden(dtype=torch.float32).detach().bfloat16()
    step = soft_token_step(hidden, head, sigma=1e-3, generator=NoiseStream(3))
    assert step.policy_input.dtype == torch.bfloat16
    assert step.mean.dtype == step.action.dtype == step.logp.dtype == torch.float32
    low = soft_token_step(hidden, head.bfloat16(), sigma=1e-3, generator=NoiseStream(3))
    torch.testing.assert_close((low.action - low.mean) / 1e-3, philox_normal((5, 9), NoiseStream(3)), atol=1e-3, rtol=0)


def test_gaussian_logp_is_differentiable_on_both_sides():
    a, m = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, m: gaussian_logp(a, m, 0.5), (a, m))


def test_traces_under_torch_compile():
    head, hidden = make_head(), make_hidden()

    def call(hidden):
        return soft_token_step(hidden, head, sigma=0.1, generator=NoiseStream(4))[:4]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(hidden), call(hidden), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"hidden": torch.zeros(3, 12, dtype=torch.int64)}, TypeError, "int64"),
        ({"hidden": torch.zeros(12)}, ValueError, r"\(12,\)"),
        ({"sigma": -0.1}, ValueError, "-0.1"),
        ({"sigma": float("nan")}, ValueError, "nan"),
        ({"sigma": 0.1}, ValueError, "NoiseStream"),
        ({"backend": "trito"}, ValueError, "trito"),
    ],
)
def test_bad_arguments_are_named(arguments, error, says):
    with pytest.raises(error, match=says):
        soft_token_step(**{"hidden": torch.zeros(3, 12), "head": make_head(dtype=torch.float32), **arguments})


def test_bad_density_and_stream_are_named():
    with pytest.raises(ValueError, match="sigma above 0"):
        gaussian_logp(torch.zeros(2), torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="one shape"):
        gaussian_logp(torch.zeros(2), torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="-1"):
        NoiseStream(-1)
