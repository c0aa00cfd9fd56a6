"""soft_token_step against its modules written out, its density against torch's, its noise against published vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vsr1.ops import last_backend
from vsr1.ops.soft_query import NoiseStream, gaussian_logp, philox4x32, philox_normal, soft_token_step


def make_head(width=12, query=9, gate=True, dtype=torch.float64):
    torch.manual_seed(0)
    head = nn.Module()
    head.refine_projector = nn.Sequential(
        nn.Linear(width, query), nn.LayerNorm(query), nn.GELU(), nn.Linear(query, query)
    )
    head.refine_gate = nn.Linear(width, 1) if gate else None
    head.refine_latent_input_projector = nn.Sequential(nn.LayerNorm(query), nn.Linear(query, width))
    return head.to(dtype)


def make_hidden(rows=5, width=12, dtype=torch.float64):
    return torch.randn(rows, width, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)


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


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox4x32(torch.tensor(counter, dtype=torch.int64)[:, None], key[0] | key[1] << 32)
    assert words.flatten().tolist() == expected


def test_philox_normals_are_normal_and_addressable():
    numbers = philox_normal((200_000,), NoiseStream(5)).double()
    moments = [numbers.mean(), numbers.square().mean() - 1, numbers.pow(3).mean(), numbers.pow(4).mean() - 3]
    assert max(abs(float(m)) for m in moments) < 0.06
    assert abs(float((numbers[::2] * numbers[1::2]).mean())) < 0.02
    assert torch.equal(philox_normal((3, 4), NoiseStream(5, 2)).flatten(), numbers[8:20].float())
    assert philox_normal((0, 4), NoiseStream(5)).shape == (0, 4)
    far = NoiseStream(2**64 - 1, 2**40)
    assert torch.isfinite(philox_normal((5,), far)).all()
    assert far.after(5).offset == 2**40 + 2


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
        ({"backend": "triton"}, ValueError, "triton"),
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
