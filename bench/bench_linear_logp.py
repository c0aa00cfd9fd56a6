"""Time of linear_logp (values and gradients) against log_softmax on full logits, T=2048, V=32000, H=256, on the CPU.

Run: pytest bench/bench_linear_logp.py (add --benchmark-json=FILE to keep machine and figures).
"""

from __future__ import annotations

import pytest
import torch

from vsr1.ops.linear_logp import linear_logp

ROWS, VOCABULARY, WIDTH = 2048, 32_000, 256


def plain(hidden, weight, target):
    logs = (hidden @ weight.T).float().log_softmax(-1)
    return logs.gather(1, target[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def ours(hidden, weight, target):
    return linear_logp(hidden, weight, target, entropy=True)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all-rows", "half-the-rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("function", [ours, plain], ids=["linear_logp", "plain"])
def test_forward_and_backward(benchmark, function, dtype, share):
    """`share` of the rows have an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    upstream = (torch.rand(ROWS, generator=generator) < share).float()

    def step():
        logp, entropy = function(hidden, weight, target)
        return torch.autograd.grad((upstream * (logp + 0.01 * entropy)).sum(), (hidden, weight))

    benchmark.extra_info["threads"] = torch.get_num_threads()
    grads = benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert all(torch.isfinite(grad).all() for grad in grads)
