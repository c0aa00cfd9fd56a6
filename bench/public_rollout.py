"""What the rollout engine is measured against: the public algorithm, literally, and what a careful user of transformers writes.

The public code of VideoSearch-R1 (arXiv 2607.00446) answers a group of G replies by G generations, and finds a reply's n soft
tokens by n passes over the whole row, vision tower included, without a cache. With e the token embeddings, r the index of the
last `<REFINE>`, P and R the refine head's projectors and F(.)_j what comes out of the language model at position j:

    z_1 = P(h_r)        z_{k+1} = P(F([e_{<=r}, R(z_1..z_k), e_{>r}])_{r+k})        latent i stands at pos(r) + i on all axes

where h_r is the state *before* the final norm, unlike all later ones (`pre_norm`; the checkpoints were trained so). A training
step takes log-probabilities of policy and reference and the latents three times, each reply by itself: 26 passes a reply.
`public_group`, `public_latents` and `public_training_step` do that. `generate_group` and `plain_training_step` are the
alternative: eight whole rows in one batch, the video encoded once. All of it was written from the description above, with
plain transformers calls; of vsr1 it takes the policy's parts and the formulas of the losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.soft_query import gaussian_logp
from vsr1.train.losses import latent_loss, policy_loss

LOUD = 10.0  # the logit of a token that is known by heart; all others are at 0
SIGMA, TEMPERATURE, BETA = 0.05, 0.1, 0.01  # as published: exploration, retrieval softmax, weight of the KL


@dataclass(frozen=True)
class Question:
    """A query beside a video, as a processor hands them over: prompt ids (P,), patches of pixels and their (1, 3) grid."""

    ids: Tensor
    pixels: Tensor
    grid: Tensor


class Group(NamedTuple):
    """G replies: their tokens (G, T), `<REFINE>` last, and their latents (G, n, D)."""

    tokens: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Lesson:
    """What a training step learns from: G replies (G, T), `<REFINE>` last; their advantages (G,), the noise (G, n, D) of their
    latents' actions; the query's text and the vectors (N, D) it is ranked among, the right one first."""

    replies: Tensor
    advantage: Tensor
    noise: Tensor
    text: str
    candidates: Tensor

    def row(self, index: int) -> Lesson:
        """The lesson of one reply alone."""
        one = slice(index, index + 1)
        return Lesson(self.replies[one], self.advantage[one], self.noise[one], self.text, self.candidates)


class Step(NamedTuple):
    """A training step: its loss, the replies' log-probabilities (G, T) and latents (G, n, D). Gradients are in `.grad`."""

    loss: Tensor
    logps: Tensor
    latents: Tensor


@dataclass
class Passes:
    """How often what was asked: calls of the policies' language models, the tokens these took in, videos that were encoded."""

    forwards: int = 0
    tokens: int = 0
    videos: int = 0


@contextmanager
def counted(*policies: Policy) -> Iterator[Passes]:
    """Count the passes of these policies, which may share a vision tower.

    A language model is counted at its first layer's feed-forward part, through which every token goes whoever drives the
    layers; a tower by the videos of each call.
    """
    passes = Passes()

    def read(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        passes.forwards += 1
        passes.tokens += arguments[0].shape[:-1].numel()

    def look(_: nn.Module, __: tuple[Any, ...], named: dict[str, Tensor]) -> None:
        passes.videos += named["grid_thw"].shape[0]

    towers = {policy.model.model.visual for policy in policies}
    hooks = [one.model.model.language_model.layers[0].mlp.register_forward_pre_hook(read) for one in policies]
    hooks += [tower.register_forward_pre_hook(look, with_kwargs=True) for tower in towers]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def learn_by_heart(policy: Policy, question: Question, reply: Tensor) -> None:
    """Give the policy an output matrix with which its greedy reply to this question is `reply` (T,), distinct tokens.

    Whoever generates then says the same, as long as it listens to the model, and ends with the reply's last token. T must not
    exceed the policy's width.
    """
    ids = torch.cat([question.ids, reply])
    hidden = policy.model.model(**_row(policy.model.model, ids, question), use_cache=False).last_hidden_state[0]
    weight = torch.zeros_like(policy.model.lm_head.weight)
    speaking = hidden[len(question.ids) - 1 : -1].double()
    weight[reply] = (LOUD * torch.linalg.pinv(speaking).T).to(weight)
    policy.model.lm_head.weight = nn.Parameter(weight)  # no longer that of the token embeddings, if it was


def public_latents(policy: Policy, ids: Tensor, question: Question, *, pre_norm: bool = True) -> Tensor:
    """The latents (n, D) of one row ids (L,): n whole passes over it. Differentiable."""
    core = policy.model.model
    at = int((ids == policy.refine_id).nonzero()[-1])
    latents = [_latent(policy, _first_states(core, ids, question, pre_norm)[at])]
    embeds = core.get_input_embeddings()(ids)
    positions, _ = core.get_rope_index(ids[None], _kinds(core, ids[None]), video_grid_thw=question.grid)
    for count in range(1, policy.settings.soft_tokens):
        entering = policy.head.refine_latent_input_projector(torch.stack(latents)).to(embeds.dtype)
        own = positions[:, :, at : at + 1] + torch.arange(1, count + 1, device=ids.device)
        hidden = core(
            inputs_embeds=torch.cat([embeds[: at + 1], entering, embeds[at + 1 :]])[None],
            position_ids=torch.cat([positions[:, :, : at + 1], own, positions[:, :, at + 1 :] + count], 2),
            pixel_values_videos=question.pixels,
            video_grid_thw=question.grid,
            use_cache=False,
        ).last_hidden_state
        latents.append(_latent(policy, hidden[0, at + count]))
    return torch.stack(latents)


@torch.no_grad()
def public_group(policy: Policy, question: Question, group: int, tokens: int, *, pre_norm: bool = True) -> Group:
    """`group` greedy replies of `tokens` tokens, one generation each, and their latents, n passes over the row each."""
    replies, latents = [], []
    for _ in range(group):
        row = _row(policy.model.model, question.ids, question)
        said = policy.model.generate(**row, max_new_tokens=tokens, do_sample=False)[0]
        replies.append(said[len(question.ids) :])
        latents.append(public_latents(policy, said, question, pre_norm=pre_norm))
    return Group(torch.stack(replies), torch.stack(latents))


@torch.no_grad()
def generate_group(policy: Policy, question: Question, group: int, tokens: int) -> Group:
    """The same by one batched generation and n batched passes over the whole rows, the video encoded once for all of them.

    Every reply must end with `<REFINE>`. The prompt is repeated here, which is what `num_return_sequences=group` does: that
    fails in transformers 5.23 for a tower without deepstack levels.
    """
    prompts = _encoded_rows(policy.model.model, question.ids.expand(group, -1), question)
    said = policy.model.generate(**prompts, max_new_tokens=tokens, do_sample=False)
    return Group(said[:, len(question.ids) :], _whole_row_latents(policy, {**prompts, "input_ids": said}))


def _whole_row_latents(policy: Policy, rows: dict[str, Any]) -> Tensor:
    """The latents (G, n, D) of rows that end with `<REFINE>`, by passes over all of them at once; all states are normed."""
    core, ids = policy.model.model, rows["input_ids"]
    positions, _ = core.get_rope_index(ids, _kinds(core, ids), video_grid_thw=rows["video_grid_thw"])
    embeds = core.get_input_embeddings()(ids)
    latents: list[Tensor] = []
    for _ in range(policy.settings.soft_tokens):
        hidden = core(
            inputs_embeds=embeds,
            position_ids=positions,
            mm_encoder_outputs=rows["mm_encoder_outputs"],
            use_cache=False,
        ).last_hidden_state[:, -1]
        latents.append(_latent(policy, hidden))
        entering = policy.head.refine_latent_input_projector(latents[-1]).to(embeds.dtype)
        embeds = torch.cat([embeds, entering[:, None]], 1)
        positions = torch.cat([positions, positions[:, :, -1:] + 1], 2)
    return torch.stack(latents, 1)


def public_training_step(
    policy: Policy, reference: Policy, embedder: Embedder, question: Question, lesson: Lesson, *, pre_norm: bool = True
) -> Step:
    """Losses and gradients of a group, reply by reply: 26 whole passes each, 17 of them with a gradient.

    Kinder than the public code where that changes no number: activations are kept instead of computed again, and the passes
    whose latents only feed the reward keep none.
    """
    policy.zero_grad()
    losses, logps, latents = [], [], []
    for index in range(len(lesson.replies)):
        own = lesson.row(index)
        ids = torch.cat([question.ids, own.replies[0]])
        logp = _every_logp(policy, ids, question)[len(question.ids) - 1 :]
        with torch.no_grad():
            reference_logp = _every_logp(reference, ids, question)[len(question.ids) - 1 :]
            latents.append(public_latents(policy, ids, question, pre_norm=pre_norm))
        explored = public_latents(policy, ids, question, pre_norm=pre_norm)
        refined = public_latents(policy, ids, question, pre_norm=pre_norm)
        loss = (
            text_loss(own, logp[None], reference_logp[None])
            + exploration_loss(own, explored[None])
            + retrieval_loss(own, policy, embedder, refined[None])
        ) / len(lesson.replies)
        loss.backward()
        losses.append(loss.detach())
        logps.append(logp.detach())
    return Step(torch.stack(losses).sum(), torch.stack(logps), torch.stack(latents))


def plain_training_step(
    policy: Policy, reference: Policy, embedder: Embedder, question: Question, lesson: Lesson
) -> Step:
    """The same losses from one batch of whole rows and its cache: logits of the replies only, one roll-out for both losses."""
    policy.zero_grad()
    core = policy.model.model
    prompts = question.ids.expand(len(lesson.replies), -1)
    rows = _encoded_rows(core, torch.cat([prompts, lesson.replies], 1), question)
    output = core(**rows, use_cache=True)
    logps = _reply_logps(policy, output.last_hidden_state, lesson.replies)
    with torch.no_grad():
        hidden = reference.model.model(**rows, use_cache=False).last_hidden_state
        reference_logps = _reply_logps(reference, hidden, lesson.replies)
    positions, _ = core.get_rope_index(
        **{name: rows[name] for name in ("input_ids", "mm_token_type_ids", "video_grid_thw")}
    )
    state, position = output.last_hidden_state[:, -1], positions[:, :, -1:]
    steps: list[Tensor] = []
    for _ in range(policy.settings.soft_tokens):
        if steps:
            position = position + 1
            state = core.language_model(
                inputs_embeds=policy.head.refine_latent_input_projector(steps[-1])[:, None].to(state.dtype),
                position_ids=position,
                past_key_values=output.past_key_values,
                use_cache=True,
            ).last_hidden_state[:, -1]
        steps.append(_latent(policy, state))
    latents = torch.stack(steps, 1)
    loss = (
        text_loss(lesson, logps, reference_logps)
        + exploration_loss(lesson, latents)
        + retrieval_loss(lesson, policy, embedder, latents)
    )
    loss.backward()
    return Step(loss.detach(), logps.detach(), latents.detach())


def plain_rows_pass(policy: Policy, prefix: Tensor, suffixes: Tensor, up: Tensor) -> Tensor:
    """Hidden states (G, R, H) of suffixes (G, R), each read behind its own copy of the prefix (P,), and their backward pass
    from the gradient `up` (G, R, H). One row at a time, or its memory would be G times as much."""
    policy.zero_grad()
    found = []
    for suffix, gradient in zip(suffixes, up, strict=True):
        output = policy.model.model(input_ids=torch.cat([prefix, suffix])[None], use_cache=False)
        hidden = output.last_hidden_state[0, len(prefix) :]
        hidden.backward(gradient)
        found.append(hidden.detach())
    return torch.stack(found)


def text_loss(lesson: Lesson, logps: Tensor, reference_logps: Tensor) -> Tensor:
    """On-policy GRPO with a KL to the reference, of log-probabilities (G, T)."""
    counts = torch.ones_like(logps, dtype=torch.bool)
    loss, _ = policy_loss(logps, logps.detach(), lesson.advantage, counts, beta=BETA, ref_logp=reference_logps)
    return loss


def exploration_loss(lesson: Lesson, latents: Tensor) -> Tensor:
    """The clipped loss of the latents' actions, drawn around the latents (G, n, D) that the policy gives now."""
    means = latents.detach()
    actions = means + SIGMA * lesson.noise
    loss, _ = latent_loss(latents, actions, gaussian_logp(actions, means, SIGMA), lesson.advantage, SIGMA)
    return loss


def retrieval_loss(lesson: Lesson, policy: Policy, embedder: Embedder, latents: Tensor) -> Tensor:
    """InfoNCE of the queries that these latents (G, n, D) refine."""
    queries = embedder.embed_texts([lesson.text] * len(latents), policy.head.soft_tokens(latents))
    right = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    return F.cross_entropy(queries @ lesson.candidates.T / TEMPERATURE, right)


def _first_states(core: Any, ids: Tensor, question: Question, pre_norm: bool) -> Tensor:
    """The hidden states (L, H) of the row as it is, in front of the final norm or behind it."""
    seen: list[Tensor] = []
    hook = core.language_model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    try:
        output = core(**_row(core, ids, question), use_cache=False)
    finally:
        hook.remove()
    return seen[0] if pre_norm else output.last_hidden_state[0]


def _latent(policy: Policy, hidden: Tensor) -> Tensor:
    """P: hidden states (..., H) -> latents (..., D), scaled by the gate if there is one."""
    head = policy.head
    hidden = hidden.to(head.dtype)
    latent = head.refine_projector(hidden)
    return latent if head.refine_gate is None else latent * head.refine_gate(hidden).sigmoid()


def _every_logp(policy: Policy, ids: Tensor, question: Question) -> Tensor:
    """The log-probability (L - 1,) of every token of a row but its first, through the logits of all of them."""
    logits = policy.model(**_row(policy.model.model, ids, question), use_cache=False).logits[0, :-1]
    return _picked(logits, ids[1:])


def _reply_logps(policy: Policy, hidden: Tensor, replies: Tensor) -> Tensor:
    """The log-probabilities (G, T) of the replies that rows of hidden states (G, L, H) end with."""
    return _picked(policy.model.lm_head(hidden[:, -replies.shape[1] - 1 : -1]), replies)


def _picked(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _kinds(core: Any, ids: Tensor) -> Tensor:
    """What transformers calls mm_token_type_ids: 2 for tokens of a video, 0 for words."""
    return 2 * (ids == core.config.video_token_id).int()


def _row(core: Any, ids: Tensor, question: Question) -> dict[str, Any]:
    """The arguments for one row ids (L,) and its pixels."""
    return {
        "input_ids": ids[None],
        "mm_token_type_ids": _kinds(core, ids[None]),
        "pixel_values_videos": question.pixels,
        "video_grid_thw": question.grid,
    }


def _encoded_rows(core: Any, ids: Tensor, question: Question) -> dict[str, Any]:
    """The arguments for rows ids (G, L) of one video, which is encoded here, once."""
    with torch.no_grad():
        video = core.get_video_features(question.pixels, question.grid, return_dict=True)
    video.pooler_output = video.pooler_output * len(ids)
    video.deepstack_features = [level * len(ids) for level in video.deepstack_features]
    return {
        "input_ids": ids,
        "mm_token_type_ids": _kinds(core, ids),
        "mm_encoder_outputs": {"video": video},
        "video_grid_thw": question.grid.repeat(len(ids), 1),
    }
