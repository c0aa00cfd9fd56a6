"""How the policy speaks: prefill, token by token, then soft tokens by one-token steps over the same cache.

Distinct prompts are prefilled once and repeated for a group of samples. Rows of a batch finish independently: a row
ends when it has said `<REFINE>` (or the turn-closing token, or the limit); its later columns are masked, so its soft
tokens continue from exactly what it said. The soft tokens' recurrence is written once, in `soft_tokens`, and is used
with gradients by training and without by the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsr1.models import backbone
from vsr1.models.backbone import Row, State
from vsr1.models.policy import Policy
from vsr1.ops.soft_query import NoiseStream, gaussian_logp, soft_token_step


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; max_tokens bounds a reply; seed makes sampling repeatable."""

    temperature: float = 0.0
    max_tokens: int = 96
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Replies of R rows: token ids and log-probabilities (ragged), hidden state (R, H) behind each row's last token,
    the state to continue from, and whether each row said `<REFINE>`."""

    token_ids: list[tuple[int, ...]]
    token_logps: list[Tensor]
    hidden: Tensor
    refine: Tensor
    state: State


@dataclass(frozen=True)
class SoftTokens:
    """Soft tokens of R rows: means and actions (R, n, D), log-probability of each action (R, n)."""

    means: Tensor
    actions: Tensor
    logps: Tensor


@torch.no_grad()
def generate(policy: Policy, prompts: Sequence[Row], sampling: Sampling, *, group: int = 1) -> Generated:
    """Reply to each prompt `group` times (rows of one prompt are neighbours)."""
    hidden, state = backbone.run(policy.model.model, prompts, keep_cache=True)
    assert state is not None
    state = state.repeat(group) if group > 1 else state
    last = hidden[:, -1].repeat_interleave(group, 0)
    rows = last.shape[0]
    generator = torch.Generator(device=last.device).manual_seed(sampling.seed)
    running = torch.ones(rows, dtype=torch.bool, device=last.device)
    tokens: list[Tensor] = []
    logps: list[Tensor] = []
    spoken: list[Tensor] = []
    refine = torch.zeros_like(running)
    for _ in range(sampling.max_tokens):
        logp = torch.log_softmax(policy.logits(last) / (sampling.temperature or 1.0), -1)
        token = torch.multinomial(logp.exp(), 1, generator=generator)[:, 0] if sampling.temperature else logp.argmax(-1)
        tokens.append(token)
        logps.append(logp.gather(1, token[:, None])[:, 0])
        spoken.append(running)
        # the hidden state behind a row's last token seeds its soft tokens, so that token is fed before the row stops
        stepped = backbone.advance(policy.model.model, state, policy.token_embeddings(token), running)
        last = torch.where(running[:, None], stepped, last)
        refine = refine | (running & (token == policy.refine_id))
        running = running & (token != policy.refine_id) & (token != policy.eos_id)
        if not bool(running.any()):
            break
    lengths = torch.stack(spoken).sum(0).tolist()
    all_tokens, all_logps = torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu()
    return Generated(
        [tuple(all_tokens[row, :length].tolist()) for row, length in enumerate(lengths)],
        [all_logps[row, :length].clone() for row, length in enumerate(lengths)],
        last,
        refine,
        state,
    )


def soft_tokens(
    policy: Policy,
    hidden: Tensor,
    state: State,
    *,
    sigma: float = 0.0,
    noise: NoiseStream | None = None,
    replay: Tensor | None = None,
) -> SoftTokens:
    """n = policy.settings.soft_tokens soft tokens a row, from the hidden state (R, H) at `<REFINE>` and its cache.

    z_1 = P(hidden); the action a_k = z_k + sigma * noise is fed over the cache as R(a_k), and z_{k+1} = P(of what comes
    out). replay (R, n, D): take these actions instead of drawing, to find their probability under the present weights.
    Gradients flow through the cache into everything but the replayed actions.
    """
    means, actions, logps = [], [], []
    count = policy.settings.soft_tokens
    for index in range(count):
        step = soft_token_step(hidden, policy.head, sigma=0.0 if replay is not None else sigma, generator=noise)
        action, logp, entering = step.action, step.logp, step.policy_input
        if replay is not None:
            action = replay[:, index]
            entering = policy.head.policy_inputs(action).to(hidden.dtype)
            logp = gaussian_logp(action, step.mean, sigma) if sigma else logp
        noise = step.noise
        means.append(step.mean)
        actions.append(action)
        logps.append(logp)
        if index + 1 < count:
            hidden = backbone.advance(policy.model.model, state, entering)
    return SoftTokens(torch.stack(means, 1), torch.stack(actions, 1), torch.stack(logps, 1))
