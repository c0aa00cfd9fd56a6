"""The optimizers of all stages: Muon for the matrices inside a network, AdamW for everything else.

A small model trained from nothing reaches in 300 steps of Muon what takes AdamW more than 1,000. torch has a Muon too; it
iterates in bfloat16, which a CPU without bfloat16 units emulates (21 matrices of 128 x 128 to 256: 0.6 s a step against
0.02 s here), and one matrix at a time. This one iterates in float32, all matrices of one shape together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic iteration that takes singular values from (0, 1] to about 1
ITERATIONS = 5
LARGEST = (
    512  # the smaller side of a matrix Muon takes: orthogonalising one of 1024 x 1024 costs a small model's whole step
)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is replaced by the nearest orthogonal matrix.

    For parameters (m, n); the update has the size AdamW's usually has, 0.2 sqrt(max(m, n)) times the learning rate, so
    that both take the same rates. K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the
    scale is that of J. Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982). ValueError for a parameter
    that is no matrix.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim != 2:
                    raise ValueError(f"Muon takes matrices; got a parameter of shape {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    kind = (weight.shape, weight.dtype, weight.device)
                    alike.setdefault(kind, []).append((weight, self._direction(weight, weight.grad, group["momentum"])))
            for (shape, *_), pairs in alike.items():
                updates = orthogonal(torch.stack([direction for _, direction in pairs]))
                size = 0.2 * math.sqrt(max(shape))
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - rate * decay).add_(update.to(weight.dtype), alpha=-rate * size)
        return loss

    def _direction(self, weight: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """The Nesterov momentum of one parameter, after it has taken in `gradient`."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, state["momentum"], momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """(k, m, n) -> about the nearest (semi-)orthogonal matrix of each, float32; a zero matrix stays zero."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = (matrices.mT if tall else matrices).float()
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


def optimizers(
    modules: nn.Module, parameters: Sequence[dict[str, Any]], *, lr: float, muon: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """The optimizers of `parameters` (groups of `params` with an optional `lr`); with `muon` 0 one AdamW for all.

    Each resulting group's `peak` is the learning rate a schedule scales; Muon's is `muon` times the group's. Embedding
    tables (and an output layer tied to one) are looked up row by row and are no matrices in Muon's sense.
    """
    tables = {id(module.weight) for module in modules.modules() if isinstance(module, nn.Embedding)}
    inner: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in parameters:
        peak = group.get("lr", lr)
        weights = list(group["params"])
        matrices = [
            one for one in weights if muon and one.ndim == 2 and min(one.shape) <= LARGEST and id(one) not in tables
        ]
        chosen = {id(one) for one in matrices}
        rest = [one for one in weights if id(one) not in chosen]
        inner += [{"params": matrices, "lr": muon * peak, "peak": muon * peak}] if matrices else []
        others += [{"params": rest, "lr": peak, "peak": peak}] if rest else []
    made: list[torch.optim.Optimizer] = [Muon(inner, lr, weight_decay=weight_decay)] if inner else []
    if others:
        made.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)))
    return made
