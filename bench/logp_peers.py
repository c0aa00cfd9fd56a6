"""Others' ways from hidden states to log-probabilities, and the check that all of them pass before they are timed.

Two questions are asked. *Log-probabilities and entropy*, with a gradient of their own for each row: plain torch and TRL's
chunked function answer it. And *mean log-probability*, which is minus the cross-entropy, the one thing that every fused loss
computes: Liger's chunked GRPO loss is minus its gradient at advantages of 1, cut-cross-entropy and QuACK are cross-entropies. An
answer is logp, entropy and the gradients of hidden and weight, or of the mean those gradients alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vsr1.ops.linear_logp import linear_logp

Answer = tuple[Tensor, ...]
Rows = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""hidden (T, H), weight (V, H), target (T,) in; logp and entropy (T,) out."""
Mean = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The same in; out a scalar with the gradient of the mean log-probability."""
TRL_CHUNK = 8192  # words a tile


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Through all logits, log-softmax in float32 at least."""
    logs = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
    return logs.gather(1, target[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def plain_mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target)


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp, entropy = linear_logp(hidden, weight, target, entropy=True)
    assert entropy is not None
    return logp, entropy


def ours_mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logp(hidden, weight, target).logp.mean()


def trl() -> Rows:
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    importlib.import_module("trl.trainer.utils")  # its backward wants it

    def rows(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy, *_ = function.apply(hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
        return logp, entropy

    return rows


def trl_mean() -> Mean:
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    importlib.import_module("trl.trainer.utils")
    return lambda hidden, weight, target: function.apply(hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ())[
        0
    ].mean()


def liger() -> Mean:
    grpo = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    loss = grpo(beta=0.0, use_ref_model=False, compiled=False, loss_type="dapo")

    def mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        ones = torch.ones(1, device=hidden.device)
        mask = torch.ones_like(target)[None]
        return -loss(hidden[None], weight, target[None], mask, ones)[0]

    return mean


def cut_cross_entropy() -> Mean:
    if not torch.cuda.is_available():
        raise ImportError("its kernels run on a GPU only")
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, target: -function(hidden, weight, target, filter_eps=None)


def quack() -> Mean:
    if not torch.cuda.is_available():
        raise ImportError("its kernels run on a GPU only")
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda hidden, weight, target: -function(hidden, weight, target)


def available(makers: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The peers that are at hand, and why the others are not."""
    found, absent = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            absent[name] = str(error).splitlines()[0]
    return found, absent


ROWS: dict[str, Callable[[], Rows]] = {"plain": lambda: plain, "TRL chunked": trl}
MEANS: dict[str, Callable[[], Mean]] = {
    "plain": lambda: plain_mean,
    "TRL chunked": trl_mean,
    "Liger chunked": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "QuACK": quack,
}


def row_step(function: Rows, hidden: Tensor, weight: Tensor, target: Tensor, up: Tensor) -> Answer:
    """Forward and backward: `up` (T,) is the gradient of logp, a hundredth of it that of the entropy."""
    logp, entropy = function(hidden, weight, target)
    grads = torch.autograd.grad((up * (logp + 0.01 * entropy)).sum(), _wanted(hidden, weight))
    return logp.detach(), entropy.detach(), *grads


def mean_step(function: Mean, hidden: Tensor, weight: Tensor, target: Tensor) -> Answer:
    return torch.autograd.grad(function(hidden, weight, target), _wanted(hidden, weight))


def _wanted(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (hidden, weight) if weight.requires_grad else (hidden,)


def inputs(
    rows: int, words: int, width: int, dtype: torch.dtype, *, frozen: bool = False, device: str = "cpu"
) -> Answer:
    """hidden (rows, width), weight (words, width) and target, whose logits are a few units wide."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (
        (2 / width**0.5 * torch.randn(words, width, generator=generator, device=device))
        .to(dtype)
        .requires_grad_(not frozen)
    )
    return hidden, weight, torch.randint(words, (rows,), generator=generator, device=device)


class Judge:
    """Holds an answer to at most `times` the error of plain torch in the same type, part by part; the truth is float64's."""

    def __init__(
        self, step: Callable[..., Answer], plainly: Any, hidden: Tensor, weight: Tensor, *rest: Tensor
    ) -> None:
        wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (hidden, weight)]
        if step is row_step:
            self.truth = step(partial(_exactly, entropy=True), *wide, *rest)
        else:
            self.truth = step(lambda *three: _exactly(*three, entropy=False)[0].mean(), *wide, *rest)
        self.allowed = [2 * far + 1e-6 for far in self.off(step(plainly, hidden, weight, *rest))]

    def off(self, answer: Answer) -> list[float]:
        """The distance of each part from the truth, as a share of its length."""
        return [
            float((one.double() - true).norm() / true.norm())
            for one, true in zip(answer, self.truth[-len(answer) :], strict=True)
        ]

    def __call__(self, name: str, answer: Answer) -> None:
        distances, allowed = self.off(answer), self.allowed[-len(answer) :]
        if any(not one <= most for one, most in zip(distances, allowed, strict=True)):
            raise AssertionError(f"{name} is off by {distances}; {allowed} is allowed")


def _exactly(hidden: Tensor, weight: Tensor, target: Tensor, *, entropy: bool) -> Any:
    """In float64, some rows at a time."""
    return linear_logp(hidden, weight, target, entropy=entropy, chunk_bytes=1 << 30, backend="reference")
