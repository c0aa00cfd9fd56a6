"""Shared by the tests of soft_token_step: heads, hidden states, and how far from float64 a backend may be."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from vsr1.ops.soft_query import NoiseStream, SoftStep, soft_token_step

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
PARTS = ("mean", "action", "logp", "policy_input")
STREAM = NoiseStream(2**64 - 5, 2**33 + 7)  # both words of both numbers count
SHAPES = [(1, 40, 24), (3, 24, 40), (7, 64, 64), (2, 41, 23)]  # B, H, D
SHAPE_IDS = [f"B{b}-H{h}-D{d}" for b, h, d in SHAPES]


def make_head(
    width: int = 12, query: int = 9, gate: bool = True, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> nn.Module:
    """A head in which every parameter counts."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Module()
    head.refine_projector = nn.Sequential(
        nn.Linear(width, query), nn.LayerNorm(query, 1e-3), nn.GELU(), nn.Linear(query, query)
    )
    head.refine_gate = nn.Linear(width, 1) if gate else None
    head.refine_latent_input_projector = nn.Sequential(nn.LayerNorm(query, 1e-2), nn.Linear(query, width))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return head.to(device, dtype)


def make_hidden(rows: int = 5, width: int = 12, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    hidden = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return hidden.to(device, dtype).requires_grad_()


def close(name: str, found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice as far from float64 as torch in the same type, beside one rounding of a number as large, or of 1."""
    distance = (found - truth).norm()
    allowed = 2.0 * (plain - truth).norm() + torch.finfo(found.dtype).eps * (truth.norm() + 1.0)
    assert distance <= allowed, f"{name}: {float(distance):.3g} from float64, {float(allowed):.3g} allowed"


def expect_step(step: SoftStep, head: nn.Module, hidden: Tensor, sigma: float, noise: NoiseStream | None) -> None:
    """Every output of `step` against float64."""
    with torch.no_grad():
        plain = soft_token_step(hidden, head, sigma=sigma, generator=noise, backend="reference")
        wide = deepcopy(head).double()
        truth = soft_token_step(hidden.double(), wide, sigma=sigma, generator=noise, backend="reference")
    for name in PARTS:
        found = getattr(step, name)
        assert found.dtype == getattr(plain, name).dtype and found.shape == getattr(plain, name).shape
        close(name, found, getattr(plain, name), getattr(truth, name))
    assert step.noise == plain.noise


def gradients(head: nn.Module, hidden: Tensor, backend: str, sigma: float = 0.3) -> list[Tensor]:
    """In the hidden states and all parameters of the head, of a scalar in which every output counts."""
    step = soft_token_step(hidden, head, sigma=sigma, generator=STREAM, backend=backend)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for seed, name in enumerate(PARTS):
        part = getattr(step, name)
        generator = torch.Generator().manual_seed(seed)
        total = (
            total
            + (part.double() * torch.randn(part.shape, dtype=torch.float64, generator=generator).to(part.device)).sum()
        )
    return list(torch.autograd.grad(total, [hidden, *head.parameters()]))


def expect_gradients(head: nn.Module, hidden: Tensor, backend: str) -> None:
    """Those of `backend` against float64."""
    found, plain = (gradients(head, hidden, name) for name in (backend, "reference"))
    truth = gradients(deepcopy(head).double(), hidden.detach().double().requires_grad_(), "reference")
    names = ["hidden", *(name for name, _ in head.named_parameters())]
    for name, *three in zip(names, found, plain, truth, strict=True):
        assert three[0].dtype == hidden.dtype
        close(name, *three)
