"""What the benchmarks of soft_token_step share on all machines: a step, the same in torch, and the check of their answers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vsr1.models.refine import RefineHead
from vsr1.ops.soft_query import NoiseStream, SoftStep, gaussian_logp, soft_token_step

SIGMA = 0.1
STREAM = NoiseStream(seed=1)


@dataclass(frozen=True)
class Case:
    """B hidden states and a head with H = D."""

    name: str
    hidden: Tensor
    head: RefineHead

    @property
    def arguments(self) -> tuple[Tensor, RefineHead]:
        return self.hidden, self.head

    @property
    def options(self) -> dict[str, Any]:
        return {"sigma": SIGMA, "generator": STREAM}


def make_case(count: int, width: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = RefineHead(width, width, width, gate=True).to(device, dtype).requires_grad_(False)
    hidden = torch.randn(count, width, generator=generator).to(device, dtype)
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return Case(f"{kind} H = D = {width}, B = {count}", hidden, head)


def in_torch(case: Case) -> SoftStep:
    """As one writes it with the head's modules and torch's own noise."""
    head, hidden = case.head, case.hidden
    assert head.refine_gate is not None
    mean = (head.refine_projector(hidden) * torch.sigmoid(head.refine_gate(hidden))).float()
    action = mean + SIGMA * torch.randn_like(mean)
    policy_input = head.refine_latent_input_projector(action.to(hidden.dtype))
    return SoftStep(mean, action, gaussian_logp(action, mean, SIGMA), policy_input, None)


def truth_of(case: Case) -> SoftStep:
    """The step in float64."""
    wide = deepcopy(case.head).double()
    return soft_token_step(case.hidden.double(), wide, **case.options, backend="reference")


def check_step(case: Case, truth: SoftStep, rounding: float, name: str, step: SoftStep) -> None:
    """AssertionError unless the parts are within `rounding` of float64. Noise of torch's own makes an action of its own."""
    reader = deepcopy(case.head.refine_latent_input_projector).double()
    wanted = {
        "mean": truth.mean,
        "logp": gaussian_logp(step.action.double(), step.mean.double(), SIGMA),
        "policy_input": reader(step.action.double()),
        **({"action": truth.action} if step.noise is not None else {}),
    }
    for part, value in wanted.items():
        off = float((getattr(step, part).double() - value).norm() / value.norm())
        if not off <= rounding:
            raise AssertionError(f"{name}: {part} differs from float64 by {off:.1e} of its length")


def weights_read(case: Case) -> Tensor:
    """As many bytes as the weights that a step reads."""
    head = case.head
    used = (head.refine_projector, head.refine_gate, head.refine_latent_input_projector)
    size = sum(weight.numel() for module in used if module is not None for weight in module.parameters())
    return torch.zeros(size // 8 * 8, dtype=case.hidden.dtype, device=case.hidden.device)
