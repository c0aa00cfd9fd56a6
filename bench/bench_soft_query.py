"""soft_token_step on the CPU beside reading its weights once: H = D = 2048, float32. Its goal is one for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch

from vsr1.models.refine import RefineHead
from vsr1.ops.soft_query import NoiseStream, SoftStep, soft_token_step


@pytest.mark.parametrize("count", [1, 64])
def test_step(race: Callable[..., None], quick: bool, count: int) -> None:
    width = 256 if quick else 2048
    torch.manual_seed(0)
    head = RefineHead(width, width, width, gate=True).requires_grad_(False)
    hidden = torch.randn(count, width)
    noise = NoiseStream(seed=1)
    truth = soft_token_step(hidden.double(), deepcopy(head).double(), sigma=0.1, generator=noise)

    def check(name: str, step: SoftStep) -> None:
        for part in ("mean", "action", "logp", "policy_input"):
            found, wanted = getattr(step, part).double(), getattr(truth, part)
            if not (found - wanted).norm() <= 1e-5 * wanted.norm():
                raise AssertionError(f"{name}: {part} differs from float64 by more than float32's rounding")

    used = (head.refine_projector, head.refine_gate, head.refine_latent_input_projector)
    weights = [weight for module in used if module is not None for weight in module.parameters()]
    read = torch.empty(sum(weight.numel() for weight in weights) // 2 * 2)  # as many bytes as those of the weights
    case = f"fp32 H = D = {width}, B = {count}"
    race(case, {"vsr1": partial(soft_token_step, hidden, head, sigma=0.1, generator=noise)}, check, reads=read.zero_())
