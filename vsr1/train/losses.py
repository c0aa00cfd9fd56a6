"""Every learning formula, once, in plain torch on small tensors.

Rewards of a group of roll-outs become advantages; log-probabilities (from `vsr1.ops.linear_logp`, which never makes the
logits) and advantages become the policy loss on text; means and actions of the soft tokens become the latent loss. The
supervised and the distillation loss of the first stage stand beside them. Each loss comes with a dict of plain numbers
for the log. A GPU is waited for twice a loss: once to refuse what cannot be learned from, once to read the numbers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vsr1.ops.soft_query import gaussian_logp

AdvantageMode = Literal["std", "mean", "leave_one_out"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo"]

LARGEST_LOG_RATIO = 80.0
"""A ratio beyond e^80 counts as e^80, near float32's end: were it infinite, a zero advantage and the zero gradient of the
clipped branch, times it, would be NaN."""


class Advantages(NamedTuple):
    """B roll-outs in N groups."""

    advantage: Tensor
    """(B,) float32 (float64 for float64 rewards); 0 for masked roll-outs and in groups without variance."""
    varied: Tensor
    """(N,) bool, by ascending group id: whether the group's kept rewards differ at all; where not, nothing is
    learned.
    """


def group_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    *,
    mode: AdvantageMode = "std",
    eps: float = 1e-4,
    mask: Tensor | None = None,
) -> Advantages:
    """How much better each roll-out is than the others of its group.

    With m and s the mean and the unbiased standard deviation of the group's n kept rewards:
        std            A_i = (r_i - m) / (s + eps)                      GRPO, arXiv 2402.03300
        mean           A_i = r_i - m                                    Dr. GRPO, arXiv 2503.20783
        leave_one_out  A_i = r_i - mean of the others = n/(n-1) (r_i - m)   RLOO, arXiv 2402.14740

    Args:
        rewards: (B,). groups: (B,) integer ids in any order, or the size of consecutive groups.
        mask: (B,) bool, False for roll-outs that do not count (failed ones): they take no part in m and s.

    Raises ValueError for mismatched shapes, a size that does not divide B, an unknown mode, no roll-outs to count, or a
    kept reward that is not finite.
    """
    if mode not in get_args(AdvantageMode):
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(get_args(AdvantageMode))}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (B,); got {tuple(rewards.shape)}")
    count = len(rewards)
    if isinstance(groups, int):
        if groups < 1 or count % groups:
            raise ValueError(f"a group size of {groups} does not divide {count} rewards")
        groups = torch.arange(count, device=rewards.device) // groups
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    _same_shape(rewards=rewards, groups=groups, mask=mask)
    _require(mask, reward=rewards)
    ids, member = torch.unique(groups, return_inverse=True)
    kept = _wide(rewards).masked_fill(~mask, 0)
    zeros = kept.new_zeros(len(ids))

    def per_group(values: Tensor) -> Tensor:
        return zeros.index_add(0, member, values)

    size = per_group(mask.to(kept))
    centred = (kept - (per_group(kept) / size.clamp(min=1))[member]).masked_fill(~mask, 0)
    # Compared, not subtracted: three rewards of 0.9 leave a deviation of one rounding, which 1 / s would blow up.
    low = zeros.scatter_reduce(0, member, kept.masked_fill(~mask, torch.inf), "amin", include_self=False)
    high = zeros.scatter_reduce(0, member, kept.masked_fill(~mask, -torch.inf), "amax", include_self=False)
    varied = high > low
    if mode == "std":
        deviation = (per_group(centred.square()) / (size - 1).clamp(min=1)).sqrt()
        advantage = centred / (deviation + eps)[member]
    elif mode == "leave_one_out":
        advantage = centred * (size / (size - 1).clamp(min=1))[member]
    else:
        advantage = centred
    return Advantages(advantage.masked_fill(~varied[member], 0), varied)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    loss_type: LossType = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_bonus: float = 0.0,
    max_length: int | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped policy-gradient loss of R completions of up to T tokens.

    With the token's ratio r = exp(logp - old_logp) and A its advantage, a token costs
        l = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL - entropy_bonus H
        KL = exp(ref_logp - logp) - (ref_logp - logp) - 1        (unbiased and never negative; Schulman's k3)
    and the tokens are averaged by `loss_type`:
        grpo     mean over completions of the completion's token mean          arXiv 2402.03300
        bnpo     sum over all tokens / number of tokens                        (batch-normalised)
        dapo     the same over the whole optimiser step: pass `denominator`    arXiv 2503.14476 (with clip_high 0.28)
        dr_grpo  sum over all tokens / (R * max_length)                        arXiv 2503.20783
        gspo     r is the completion's, exp(mean_t(logp - old_logp)); mean over completions   arXiv 2507.18071
                 (whose clips are much narrower: 3e-4 and 4e-4)
    Completions without a single counted token are not counted as completions either.

    Args:
        logp: (R, T) with gradient. old_logp, ref_logp: (R, T), constants; `logp.detach()` as old_logp when on-policy.
        advantage: (R,), or (R, T) where tokens of one completion differ (not for gspo).
        mask: (R, T) bool, True for tokens the policy chose. Values elsewhere may be anything, NaN included. At these
            tokens old_logp, ref_logp and the advantage must be finite; a logp that is not shows in the loss.
        entropy: (R, T), needed with `entropy_bonus`; only logged otherwise.
        max_length: the constant length dr_grpo divides by.
        denominator: replaces the count divided by (tokens for bnpo and dapo, completions for the others), so that
            losses of micro-batches or processes add up to the loss of the step.

    Computed in float32 at least. Returns the loss and: loss, ratio, clip_low and clip_high (fractions of tokens,
    completions for gspo, whose gradient is cut), old_kl (k3 from the old policy), kl (if ref_logp), entropy (if given).

    Raises ValueError: mismatched shapes, no counted token, a constant that is not finite where it counts, an unknown
    loss_type, or a term asked for without its tensor.
    """
    if loss_type not in get_args(LossType):
        raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(get_args(LossType))}")
    if logp.dim() != 2:
        raise ValueError(f"logp must have shape (R, T); got {tuple(logp.shape)}")
    if advantage.dim() == 1 and loss_type != "gspo" and advantage.shape == logp.shape[:1]:
        advantage = advantage[:, None].expand_as(logp)
    _same_shape(logp=logp, old_logp=old_logp, mask=mask, ref_logp=ref_logp, entropy=entropy)
    if loss_type == "gspo":
        _same_shape(**{"logp.sum(1)": logp[:, 0], "advantage (one per completion)": advantage})
    else:
        _same_shape(logp=logp, advantage=advantage)
    if beta and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp")
    if entropy_bonus and entropy is None:
        raise ValueError(f"entropy_bonus={entropy_bonus} needs entropy")
    constant_length = max_length or 0
    if loss_type == "dr_grpo" and constant_length < 1:
        raise ValueError(f"dr_grpo divides by a constant length: max_length must be at least 1; got {max_length}")
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be above 0; got {denominator}")
    _require(mask, advantage=advantage, old_logp=old_logp, ref_logp=ref_logp)

    lengths = mask.sum(1)
    rows = lengths > 0
    count = (mask if loss_type in ("bnpo", "dapo") else rows).sum() if denominator is None else denominator

    def completion_mean(values: Tensor) -> Tensor:
        return values.masked_fill(~mask, 0).sum(1) / lengths.clamp(min=1)

    def average(values: Tensor) -> Tensor:
        if loss_type in ("grpo", "gspo"):
            return completion_mean(values).sum() / count
        total = values.masked_fill(~mask, 0).sum() / count
        return total / constant_length if loss_type == "dr_grpo" else total

    logp = _wide(logp)
    # Masked before the exponential: garbage there would reach the gradient as 0 * inf.
    log_ratio = (logp - old_logp.detach()).masked_fill(~mask, 0)
    if loss_type == "gspo":
        objective, stats = _clipped(completion_mean(log_ratio), advantage, clip_low, clip_high, rows)
        loss = -objective.sum() / count
    else:
        objective, stats = _clipped(log_ratio, advantage, clip_low, clip_high, mask)
        loss = -average(objective)
    if ref_logp is not None:
        kl = _k3((ref_logp.detach() - logp).masked_fill(~mask, 0))
        stats["kl"] = _mean(kl, mask)
        loss = loss + beta * average(kl) if beta else loss
    if entropy is not None:
        stats["entropy"] = _mean(_wide(entropy), mask)
        loss = loss - entropy_bonus * average(_wide(entropy)) if entropy_bonus else loss
    stats["old_kl"] = _mean(_k3(-log_ratio), mask)
    return loss, as_numbers(loss=loss, **stats)


def latent_loss(
    mean: Tensor,
    action: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    sigma: float,
    clip: float = 0.2,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped policy-gradient loss of the soft tokens: R refinements of n tokens of width D.

    -mean over counted tokens of min(r A, clip(r, 1 - clip, 1 + clip) A), r = exp(gaussian_logp(action, mean, sigma)
    - old_logp); the density is the per-coordinate average `vsr1.ops.soft_query.gaussian_logp` explains. The actions are
    the ones that were inserted into the query whose retrieval earned A, so at r = 1 this is the score-function gradient
    of that reward.

    Args:
        mean: (R, n, D) with gradient: the head's outputs now, along the recorded actions. action: (R, n, D), constants.
        old_logp: (R, n), as `soft_token_step` gave it. advantage: (R,), from the turn's own retrieval reward.
        mask: (R, n) bool, True for the soft tokens that count; all by default. Values elsewhere may be anything.

    Returns the loss and: loss, ratio, clip_low, clip_high, old_kl, distance (root mean square of (action - mean) /
    sigma, 1 for a policy that has not moved). Raises ValueError as `policy_loss` does, and for sigma <= 0.
    """
    if mean.dim() != 3:
        raise ValueError(f"mean must have shape (R, n, D); got {tuple(mean.shape)}")
    mask = torch.ones(mean.shape[:2], dtype=torch.bool, device=mean.device) if mask is None else mask
    _same_shape(mean=mean, action=action)
    _same_shape(**{"mean[..., 0]": mean[..., 0]}, old_logp=old_logp, mask=mask)
    _same_shape(**{"mean[:, 0, 0]": mean[:, 0, 0]}, advantage=advantage)
    _require(mask, advantage=advantage, old_logp=old_logp)
    # Masked before the density: its derivative there would be 0 times the garbage.
    skipped = ~mask[..., None]
    mean, action = _wide(mean).masked_fill(skipped, 0), _wide(action.detach()).masked_fill(skipped, 0)
    log_ratio = (gaussian_logp(action, mean, sigma) - old_logp.detach()).masked_fill(~mask, 0)
    spread = advantage[:, None].expand_as(log_ratio)
    objective, stats = _clipped(log_ratio, spread, clip, clip, mask)
    loss = -objective.sum() / mask.sum()
    stats["old_kl"] = _mean(_k3(-log_ratio), mask)
    stats["distance"] = _mean(((action - mean) / sigma).square().mean(-1), mask).sqrt()
    return loss, as_numbers(loss=loss, **stats)


def sft_loss(logp: Tensor, weight: Tensor, *, denominator: float | None = None) -> Tensor:
    """Weighted token mean of the negative log-likelihood: -sum(weight logp) / sum(weight). `denominator` replaces the sum of
    weights, where a step is taken in parts.

    logp, weight: (B, T); weights are at least 0, and 0 marks tokens that are not learned (whatever logp holds there).
    Larger weights on the verdict and the times keep them from drowning in the rationale. Raises ValueError for
    mismatched shapes, a negative or non-finite weight, or none above 0.
    """
    _same_shape(logp=logp, weight=weight)
    learned, wrong = weight != 0, ~(torch.isfinite(weight) & (weight >= 0))
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ValueError(f"weight at {where} is {weight[tuple(where)].item()}; weights are finite and at least 0")
    _require(learned)
    total = weight.sum() if denominator is None else denominator
    return -(weight * _wide(logp).masked_fill(~learned, 0)).sum() / total


def distillation_loss(soft: Tensor, target: Tensor, power: Tensor | None = None) -> Tensor:
    """Distance of soft tokens to target vectors: mean((s - t)^2) / mean(t^2) + mean(1 - cos(s, t)).

    soft, target: (R, n, H), e.g. the embedder-side soft tokens and the token embeddings of a text refinement; no
    gradient reaches the target. Dividing by the target's mean square makes the first term 1 for soft = 0 whatever the
    scale of the embedding table (`power` gives another, where a step is taken in parts); the second asks for the
    direction, which is what a LayerNorm downstream keeps.
    Raises ValueError for mismatched shapes, no vectors, or a target that is not finite or all zero.
    """
    _same_shape(soft=soft, target=target)
    soft, target = _wide(soft), _wide(target.detach())
    power = target.square().mean() if power is None else power
    if not target.numel() or not torch.isfinite(power) or power == 0:
        raise ValueError(f"target must hold finite vectors, not all of them zero; its mean square is {power.item()}")
    direction = 1 - F.cosine_similarity(soft, target, dim=-1)
    return (soft - target).square().mean() / power + direction.mean()


def _clipped(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective (arXiv 1707.06347), 0 where the mask is False, and how often it clips."""
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"the lower clip must lie in [0, 1] and the upper one at or above 0; got {low}, {high}")
    advantage = advantage.masked_fill(~mask, 0)
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage).masked_fill(~mask, 0)
    return objective, {
        "ratio": _mean(ratio, mask),
        "clip_low": _mean((ratio < 1 - low) & (advantage < 0), mask),
        "clip_high": _mean((ratio > 1 + high) & (advantage > 0), mask),
    }


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - x - 1 with x = log q - log p: an estimate of KL(p || q) from samples of p that is never negative."""
    return torch.expm1(log_ratio) - log_ratio


def as_numbers(**scalars: Tensor) -> dict[str, float]:
    """Zero-dimensional tensors as plain numbers, all of them in one transfer."""
    return dict(zip(scalars, torch.stack([one.detach() for one in scalars.values()]).tolist(), strict=True))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean where the mask is True, for the log; no gradient."""
    return values.detach().masked_fill(~mask, 0).sum() / mask.sum()


def _wide(values: Tensor) -> Tensor:
    """In float32, or float64 where it was: ratios and means of half precision would be mostly rounding."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _same_shape(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must agree: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def _require(mask: Tensor, **values: Tensor | None) -> None:
    """Something counts, and what counts is finite; `values` are (R, ..) like the mask, or (R,), one for a row of it."""
    bad = {
        name: ~torch.isfinite(one) & (mask if one.dim() == mask.dim() else mask.any(1))
        for name, one in values.items()
        if one is not None
    }
    counts, *found = torch.stack([mask.any(), *(wrong.any() for wrong in bad.values())]).tolist()
    if not counts:
        raise ValueError(f"nothing counts: the mask {tuple(mask.shape)} is False everywhere")
    for name in (name for name, wrong in zip(bad, found, strict=True) if wrong):
        where, one = bad[name].nonzero()[0].tolist(), values[name]
        assert one is not None
        raise ValueError(f"{name} at {where} is {one[tuple(where)].item()}; mask out what failed first")
