"""The policy loss behind linear_logp beside other people's: Liger's chunked loss and the method TRL's trainer computes its own
with, on the same tensors; and beside nobody's, by finite differences through both.

Neither is needed to test: Liger comes with the `test` extra where it has wheels for what it needs, TRL (which brings pandas and
Arrow along) is compared with where somebody installed it. `by_hand` in test_losses.py spells the same formulas out.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vsr1.ops.linear_logp import linear_logp
from vsr1.ops.soft_query import gaussian_logp
from vsr1.train.losses import distillation_loss, group_advantages, latent_loss, policy_loss, sft_loss

LONGEST = 13
TYPES = pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "gspo"])
TERMS = pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.0, 0.7), (0.3, 1.0), (0.3, 0.7)])


class Case:
    """Hidden states and a head to differentiate, and the constants of an update: every completion has a token that counts, of
    different lengths and with a hole; about a quarter of the ratios are clipped."""

    def __init__(
        self,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        sizes: tuple[int, int, int, int] = (6, 11, 24, 97),
    ):
        rows, tokens, width, words = sizes
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = normal(rows, tokens, width).to(dtype).requires_grad_()
        self.weight = (0.1 * normal(words, width)).to(dtype).requires_grad_()
        self.target = torch.randint(words, (rows, tokens), generator=generator)
        self.mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)
        self.mask[0] = True
        self.mask[0, 2] = False
        self.advantage = torch.linspace(-1.5, 1, rows, dtype=dtype)
        self.temperature = temperature
        now = self.logp().detach()
        self.old = now + (0.5 * normal(rows, tokens)).to(dtype)
        self.ref = now + (0.5 * normal(rows, tokens)).to(dtype)

    def logp(self, entropy: bool = False) -> Any:
        rows, target = self.hidden.flatten(0, 1), self.target.flatten()
        found = linear_logp(rows, self.weight, target, temperature=self.temperature, entropy=entropy)
        logp, spread = found.logp.unflatten(0, self.target.shape), found.entropy
        return (logp, spread.unflatten(0, self.target.shape)) if spread is not None else logp

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def assert_the_same(case: Case, ours: Tensor, theirs: Tensor, bound: float) -> None:
    """The losses, which are of size 1, differ by at most `bound`; each gradient by at most `bound` of its norm."""
    assert ours.item() == pytest.approx(theirs.item(), abs=bound)
    for mine, other in zip(case.gradients(ours), case.gradients(theirs), strict=True):
        assert other.norm() > 0
        assert float((mine - other).norm() / other.norm()) <= bound


CLIPS = {"clip_low": 0.15, "clip_high": 0.28}
THEIR_CLIPS = {"epsilon_low": 0.15, "epsilon_high": 0.28}


def our_loss(
    case: Case, logp: Any, loss_type: Any, beta: float, **entropy_terms: Any
) -> tuple[Tensor, dict[str, float]]:
    return policy_loss(
        logp,
        case.old,
        case.advantage,
        case.mask,
        loss_type=loss_type,
        beta=beta,
        ref_logp=case.ref,
        max_length=LONGEST,
        **CLIPS,
        **entropy_terms,
    )


def their_name(loss_type: str) -> dict[str, str]:
    """Elsewhere gspo is grpo with ratios of sequences."""
    gspo = loss_type == "gspo"
    return {"loss_type": "grpo" if gspo else loss_type, "importance_sampling_level": "sequence" if gspo else "token"}


@TYPES
@TERMS
def test_liger(loss_type: Any, beta: float, temperature: float) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    case = Case(temperature)
    loss, stats = our_loss(case, case.logp(), loss_type, beta)
    liger = chunked.LigerFusedLinearGRPOLoss(
        beta=beta,
        temperature=temperature,
        max_completion_length=LONGEST,
        use_ref_model=beta > 0,
        compiled=False,
        **THEIR_CLIPS,
        **their_name(loss_type),
    )
    theirs, numbers = liger(
        case.hidden,
        case.weight,
        case.target,
        case.mask.float(),
        case.advantage,
        ref_per_token_logps=case.ref,
        old_per_token_logps=case.old,
    )
    assert_the_same(case, loss, theirs, 1e-6)
    if beta:
        assert stats["kl"] == pytest.approx(numbers[0].item(), rel=1e-5)
    if loss_type != "gspo":  # whose completions Liger weighs by their tokens here
        assert stats["clip_low"] + stats["clip_high"] == pytest.approx(numbers[-1].item(), abs=1e-6)
        assert stats["clip_low"] > 0 and stats["clip_high"] > 0


def trl_trainer(case: Case, loss_type: str, beta: float, bonus: float) -> Any:
    """As much of TRL's trainer as its loss looks at, with log-probabilities from full logits."""

    def scores(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        logs = (case.hidden @ case.weight.T / case.temperature).log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        return logs.gather(-1, case.target[..., None])[..., 0], entropy, None

    return SimpleNamespace(
        _get_per_token_logps_and_entropies=scores,
        _entropy_bonus_enabled=bonus > 0,
        _metrics={"eval": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda one: one, reduce=lambda one, reduction: one, num_processes=1),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        entropy_coef=bonus,
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
        **THEIR_CLIPS,
        **their_name(loss_type),
    )


@TYPES
@TERMS
@pytest.mark.parametrize("bonus", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
def test_trl(loss_type: Any, beta: float, temperature: float, bonus: float, dtype: torch.dtype, bound: float) -> None:
    if importlib.util.find_spec("trl") is None or not version("trl").startswith("1.16."):
        pytest.skip("needs TRL 1.16, whose trainer is known from the inside")
    if bonus and loss_type not in ("bnpo", "dapo"):
        pytest.skip("TRL adds the token mean of the entropy whatever the type; here it is averaged like the rest")
    trainer = pytest.importorskip("trl").GRPOTrainer
    case = Case(temperature, dtype)
    logp, entropy = case.logp(entropy=True)
    loss, stats = our_loss(case, logp, loss_type, beta, entropy=entropy, entropy_bonus=bonus)
    stub = trl_trainer(case, loss_type, beta, bonus)
    mask = case.mask.long()
    inputs = {
        "prompt_ids": case.target[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": case.target,
        "completion_mask": mask,
        "advantages": case.advantage,
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.ref,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer._compute_loss(stub, None, inputs)
    assert_the_same(case, loss, theirs, bound)
    logged = {name: values[0] for name, values in stub._metrics["eval"].items()}
    assert stats["clip_low"] == pytest.approx(logged["clip_ratio/low_mean"], abs=1e-6)
    assert stats["clip_high"] == pytest.approx(logged["clip_ratio/high_mean"], abs=1e-6)
    assert stats["entropy"] == pytest.approx(logged["entropy"], rel=1e-5)
    if beta:
        assert stats["kl"] == pytest.approx(logged["kl"], rel=1e-5)


@TYPES
def test_finite_differences_through_the_head(loss_type: Any) -> None:
    """In float64 from the hidden states and the head on; no ratio lies within a step of a clip."""
    case = Case(dtype=torch.float64, sizes=(3, 4, 5, 9))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        found = linear_logp(hidden.flatten(0, 1), weight, case.target.flatten(), temperature=0.9, entropy=True)
        assert found.entropy is not None
        logp, entropy = (one.unflatten(0, (3, 4)) for one in (found.logp, found.entropy))
        terms = {"beta": 0.3, "ref_logp": case.ref, "entropy": entropy, "entropy_bonus": 0.2, "max_length": 6}
        return policy_loss(logp, case.old, case.advantage, case.mask, loss_type=loss_type, **terms, **CLIPS)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight))


def test_finite_differences_of_the_other_losses() -> None:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean, action = 0.1 * normal(3, 2, 4), normal(3, 2, 4)
    old, advantage = gaussian_logp(action, mean, 1.0) + 0.05 * normal(3, 2), normal(3)
    mask = torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    assert torch.autograd.gradcheck(
        lambda z: latent_loss(z, action, old, advantage, 1.0, 0.2, mask)[0], mean.requires_grad_()
    )
    weight = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    weight[1, 2:] = 0
    assert torch.autograd.gradcheck(lambda logp: sft_loss(logp, weight), normal(3, 5).requires_grad_())
    target = normal(3, 2, 4)
    assert torch.autograd.gradcheck(lambda soft: distillation_loss(soft, target), normal(3, 2, 4).requires_grad_())


@TYPES
def test_a_tied_head_gets_the_gradient_of_both_its_uses(loss_type: Any) -> None:
    """The matrix that embeds the tokens also scores them: one gradient, as autograd finds it through full logits."""
    case = Case(dtype=torch.float64)
    table = case.weight.detach().clone().requires_grad_()

    def loss(fused: bool) -> Tensor:
        hidden = (table[case.target].cumsum(1) / 3).tanh()  # some network over the embeddings
        if fused:
            logp = linear_logp(hidden.flatten(0, 1), table, case.target.roll(-1, 1).flatten()).logp
            logp = logp.unflatten(0, case.target.shape)
        else:
            logp = (hidden @ table.T).log_softmax(-1).gather(-1, case.target.roll(-1, 1)[..., None])[..., 0]
        old = logp.detach() + 0.5 * (case.old - case.ref)
        return policy_loss(logp, old, case.advantage, case.mask, loss_type=loss_type, max_length=LONGEST)[0]

    ours, theirs = (torch.autograd.grad(loss(fused), table)[0] for fused in (True, False))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("seed", range(5))
def test_advantages_of_random_groups(seed: int) -> None:
    """Against the sentence of the paper, group by group; rewards as they come: coarse, so that some groups do not vary."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(4, (24,), generator=generator)
    rewards = torch.randint(3, (24,), generator=generator).double() / 2
    mask = torch.rand(24, generator=generator) < 0.8
    found = {mode: group_advantages(rewards, groups, mode=mode, mask=mask) for mode in ("std", "mean", "leave_one_out")}
    for index in range(24):
        own = rewards[(groups == groups[index]) & mask]
        gap, n = rewards[index] - own.mean(), len(own)
        still = not mask[index] or n < 2 or own.max() == own.min()
        expected = {"std": gap / (own.std() + 1e-4), "mean": gap, "leave_one_out": gap * n / (n - 1) if n > 1 else gap}
        for mode, (advantage, _) in found.items():
            torch.testing.assert_close(advantage[index], torch.zeros_like(gap) if still else expected[mode])
