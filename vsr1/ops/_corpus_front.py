"""What stands in front of the sweep: how a query is made, and the op that makes it in the sweep's own launch.

`HiddenState` and `SoftQuery` say in plain torch what the query is (`query()`), and hand their tensors over as the `Parts` of the
custom op `vsr1::refine_and_scan`, which has no gradient: where one is asked for, `vsr1.ops.corpus_scan.refine_and_scan` composes
`query()` and the scan. The op's own choice is between the CUDA kernel that does both and composing them as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vsr1.ops import _corpus_backends as backends
from vsr1.ops import _corpus_cuda
from vsr1.ops._dispatch import Backend, register, resolve

Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, int, float]
RefinedOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def rocchio(base: Tensor, accepted: Tensor | None, rejected: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Relevance feedback without a policy: normalise(base + alpha * mean(accepted) - beta * mean(rejected)).

    base (B, D); accepted and rejected (B, n, D) or None, each with its own n; rows that are all zero are padding and
    not counted, and a query without feedback keeps its direction. Returns (B, D) in base's dtype, of length 1. Source:
    Rocchio 1971.
    """
    moved = base.float()
    for name, weight, feedback in (("accepted", alpha, accepted), ("rejected", -beta, rejected)):
        if feedback is None:
            continue
        check_feedback(name, feedback, base)
        given = (feedback != 0).any(dim=2).sum(dim=1, keepdim=True)
        moved = moved + weight * feedback.float().sum(dim=1) / given.clamp(min=1)
    return F.normalize(moved, dim=1).to(base.dtype)


@dataclass(frozen=True)
class HiddenState:
    """The embedder's last hidden state before its final norm, and what turns it into a query.

    hidden (B, H); norm_weight (H,) and eps of the final RMSNorm; head (P, H) or None; dim keeps the first components of
    the projection (Matryoshka truncation), None keeps all.
    """

    hidden: Tensor
    norm_weight: Tensor
    head: Tensor | None = None
    dim: int | None = None
    eps: float = 1e-6

    def query(self) -> Tensor:
        """normalise((RMSNorm(hidden) @ head.T)[:, :dim]): (B, dim) in hidden's dtype, computed in float32."""
        width = self._checked_width()
        state = F.rms_norm(self.hidden.float(), self.norm_weight.shape, self.norm_weight.float(), self.eps)
        if self.head is not None:
            state = F.linear(state, self.head.float())
        return F.normalize(state[:, :width], dim=1).to(self.hidden.dtype)

    def outline(self) -> Tensor:
        """A tensor with the query's shape, dtype and device, whatever its values; costs nothing."""
        return self.hidden[:, :1].expand(-1, self._checked_width())

    def parts(self) -> Parts:
        """The tensors and numbers that the op takes."""
        return self.hidden, self.norm_weight, self.head, None, None, 1.0, self._checked_width(), self.eps

    def needs_gradient(self) -> bool:
        """Whether autograd follows any of the tensors."""
        return any(part is not None and part.requires_grad for part in (self.hidden, self.norm_weight, self.head))

    def _checked_width(self) -> int:
        if self.hidden.ndim != 2 or self.norm_weight.shape != self.hidden.shape[1:]:
            raise ValueError(
                f"hidden has shape {tuple(self.hidden.shape)} and norm_weight {tuple(self.norm_weight.shape)}; "
                "expected (B, H) and (H,)"
            )
        embedded = self.hidden.shape[1]
        if self.head is not None:
            if self.head.ndim != 2 or self.head.shape[1] != embedded:
                raise ValueError(f"head has shape {tuple(self.head.shape)}; expected (P, {embedded})")
            embedded = self.head.shape[0]
        if self.dim is not None and not 0 < self.dim <= embedded:
            raise ValueError(f"dim is {self.dim}; the embedding has {embedded} components")
        return embedded if self.dim is None else self.dim


@dataclass(frozen=True)
class SoftQuery:
    """A query and the soft tokens that move it: base (B, D), soft (B, n, D), gate a number or (), (B,) or (B, 1)."""

    base: Tensor
    soft: Tensor
    gate: float | Tensor = 1.0

    def query(self) -> Tensor:
        """normalise(base + gate * mean(soft)): (B, D) in base's dtype, computed in float32; n = 0 keeps base."""
        self.outline()
        gate = self.gate.float().reshape(-1, 1) if isinstance(self.gate, Tensor) else self.gate
        shift = self.soft.float().sum(dim=1) / max(self.soft.shape[1], 1)
        return F.normalize(self.base.float() + gate * shift, dim=1).to(self.base.dtype)

    def outline(self) -> Tensor:
        """A tensor with the query's shape, dtype and device, whatever its values; costs nothing."""
        check_feedback("soft", self.soft, self.base)
        if isinstance(self.gate, Tensor) and self.gate.shape not in ((), (len(self.base),), (len(self.base), 1)):
            raise ValueError(f"gate has shape {tuple(self.gate.shape)}; expected (), (B,) or (B, 1)")
        return self.base

    def parts(self) -> Parts:
        """The tensors and numbers that the op takes."""
        gate, value = (self.gate, 1.0) if isinstance(self.gate, Tensor) else (None, float(self.gate))
        return self.base, None, None, self.soft, gate, value, self.base.shape[1], 0.0

    def needs_gradient(self) -> bool:
        """Whether autograd follows any of the tensors."""
        return any(isinstance(part, Tensor) and part.requires_grad for part in (self.base, self.soft, self.gate))


def check_feedback(name: str, vectors: Tensor, base: Tensor) -> None:
    """Raises ValueError unless base is (B, D) and vectors (B, n, D)."""
    if base.ndim != 2 or vectors.ndim != 3 or (vectors.shape[0], vectors.shape[2]) != tuple(base.shape):
        raise ValueError(
            f"base has shape {tuple(base.shape)} and {name} {tuple(vectors.shape)}; expected (B, D) and (B, n, D)"
        )


torch.library.define(
    "vsr1::refine_and_scan",
    "(Tensor base, Tensor? weight, Tensor? head, Tensor? soft, Tensor? gate, float gate_value, int dim, float eps, "
    "Tensor rows, int k, Tensor? positive, float? temperature, bool expected, Tensor? exclude, Tensor? candidates, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
refined_scan = torch.ops.vsr1.refine_and_scan.default


@torch.library.impl("vsr1::refine_and_scan", "default")
def _refine_and_scan(
    base: Tensor,
    weight: Tensor | None,
    head: Tensor | None,
    soft: Tensor | None,
    gate: Tensor | None,
    gate_value: float,
    dim: int,
    eps: float,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    exclude: Tensor | None,
    candidates: Tensor | None,
    backend: str,
) -> RefinedOutputs:
    """The query (B, dim) that the parts make, and the outputs of `vsr1::corpus_scan` for it."""
    lines = None if gate is None else gate.float().reshape(-1).contiguous()
    front = _corpus_cuda.Front(base, weight, head, soft, gate_value if lines is None else lines)
    facts = {"asked": backend, "candidates": candidates is not None, "expected": expected, "front": front, "rows": rows}
    if resolve("refine_and_scan", "auto", device=rows.device, dtype=rows.dtype, **facts) == "cuda":
        positive = backends.usable_rows("positive", positive, rows)
        exclude = backends.usable_rows("exclude", exclude, rows)
        query = rows.new_empty((len(base), dim))
        sweep = partial(_corpus_cuda.sweep, expected=expected, front=front)
        return query, *backends.merged(sweep, query, rows, k, positive, temperature, expected, exclude)
    if weight is not None:
        query = HiddenState(base, weight, head, dim, eps).query()
    else:
        assert soft is not None
        query = SoftQuery(base, soft, gate_value if gate is None else gate).query()
    outputs = backends.corpus_scan(query, rows, k, positive, temperature, expected, exclude, candidates, backend)
    return query, *outputs


@torch.library.register_fake("vsr1::refine_and_scan")
def _(
    base: Tensor,
    weight: Tensor | None,
    head: Tensor | None,
    soft: Tensor | None,
    gate: Tensor | None,
    gate_value: float,
    dim: int,
    eps: float,
    rows: Tensor,
    k: int,
    positive: Tensor | None,
    temperature: float | None,
    expected: bool,
    *_: Any,
) -> RefinedOutputs:
    query = base.new_empty((base.shape[0], dim))
    return query, *backends.new_outputs(query, k, positive, temperature, expected)


def _cuda_refuses(
    *,
    device: torch.device,
    asked: str,
    candidates: bool,
    expected: bool,
    front: _corpus_cuda.Front,
    rows: Tensor,
    **_: Any,
) -> str | None:
    if asked not in ("auto", "cuda"):
        return f"is not backend '{asked}', which was asked for"
    if not len(front.base) or not len(rows):
        return "has nothing to launch"
    facts = {"candidates": candidates, "expected": expected, "named": asked == "cuda"}
    return backends.cuda_refuses(device=device, query=front.base, rows=rows, **facts) or front.refuses(rows)


register("refine_and_scan", cuda=Backend(backends.cuda_missing, _cuda_refuses), composed=Backend())
