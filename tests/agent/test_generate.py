"""Replies and soft tokens over the cache against passes without one."""

from __future__ import annotations

import pytest
import torch

from vsr1.agent import protocol
from vsr1.agent.generate import Sampling, generate, soft_tokens
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.ops.soft_query import NoiseStream


@pytest.fixture
def prompts(policy, frames):
    features = policy.videos.encode_frames([frames(4, seed=1), frames(6, seed=2)])
    texts = ["a small red circle", "a circle"]
    return [protocol.prompt(policy.tokenizer, text, one) for text, one in zip(texts, features, strict=True)]


def greedy(policy, prompt, steps):
    """One row, re-reading everything at every step."""
    said: list[int] = []
    for _ in range(steps):
        hidden, _ = backbone.run(policy.model.model, [Row((*prompt.token_ids, *said), prompt.video)])
        said.append(int(policy.logits(hidden[0, -1]).argmax()))
        if said[-1] in (policy.refine_id, policy.eos_id):
            break
    return tuple(said)


@torch.no_grad()
def test_greedy_replies_equal_replies_without_a_cache(policy, prompts):
    found = generate(policy, prompts, Sampling(max_tokens=12))
    for row, prompt in enumerate(prompts):
        assert found.token_ids[row] == greedy(policy, prompt, 12)


@torch.no_grad()
def test_rows_stop_on_their_own_and_keep_their_log_probabilities(policy, prompts):
    # make <REFINE> likely enough to stop rows at different lengths
    policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.clone())
    policy.model.lm_head.weight[policy.refine_id] *= 0.0
    found = generate(policy, prompts, Sampling(temperature=3.0, max_tokens=400, seed=3), group=4)
    lengths = [len(ids) for ids in found.token_ids]
    assert len(set(lengths)) > 1 and found.refine.any()
    for row, ids in enumerate(found.token_ids):
        assert policy.refine_id not in ids[:-1] and policy.eos_id not in ids[:-1]
        prompt = prompts[row // 4]
        hidden, _ = backbone.run(policy.model.model, [Row((*prompt.token_ids, *ids), prompt.video)])
        logits = policy.logits(hidden[0, -len(ids) - 1 : -1]) / 3.0
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(found.token_logps[row], expected, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(found.hidden[row], hidden[0, -1], atol=1e-4, rtol=1e-3)


def full_soft_tokens(policy, prompt, reply):
    """The recurrence by re-reading the whole row, its soft tokens included, at every step."""
    inputs, _, following = backbone._assemble(
        policy.model.model, [Row((*prompt.token_ids, *reply), prompt.video)], None
    )
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    means = []
    for step in range(policy.settings.soft_tokens):
        hidden = policy.model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        means.append(policy.head.refine_projector(hidden[:, -1]))
        entering = policy.head.refine_latent_input_projector(means[-1])
        embeds = torch.cat([embeds, entering[:, None]], 1)
        positions = torch.cat([positions, (following + step).view(1, 1, 1).expand(3, 1, 1)], 2)
    return torch.stack(means, 1)[0]


def test_cached_soft_tokens_equal_a_full_pass_and_so_do_their_gradients(policy, prompts):
    found = generate(policy, prompts, Sampling(temperature=1.0, max_tokens=9, seed=1))
    rows = [Row((*prompt.token_ids, *ids), prompt.video) for prompt, ids in zip(prompts, found.token_ids, strict=True)]
    policy.model.model.language_model.requires_grad_(True)
    weight = policy.model.model.language_model.layers[0].self_attn.q_proj.weight

    hidden, state = backbone.run(policy.model.model, rows, keep_cache=True)
    cached = soft_tokens(policy, hidden[:, -1], state).means
    full = torch.stack([full_soft_tokens(policy, p, ids) for p, ids in zip(prompts, found.token_ids, strict=True)])
    torch.testing.assert_close(cached, full, atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # the state a reply leaves behind is the same one
        live = soft_tokens(policy, found.hidden, found.state).means
    torch.testing.assert_close(live, full, atol=1e-5, rtol=1e-4)

    direction = torch.randn_like(cached)
    (ours,) = torch.autograd.grad((cached * direction).sum(), weight)
    (expected,) = torch.autograd.grad((full * direction).sum(), weight)
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


@torch.no_grad()
def test_replaying_actions_finds_the_probability_they_were_drawn_with(policy, prompts):
    rows = [Row((*prompt.token_ids, policy.refine_id), prompt.video) for prompt in prompts]

    def start():
        hidden, state = backbone.run(policy.model.model, rows, keep_cache=True)
        return hidden[:, -1], state

    drawn = soft_tokens(policy, *start(), sigma=0.3, noise=NoiseStream(5))
    assert (drawn.actions - drawn.means).abs().max() > 0.1
    again = soft_tokens(policy, *start(), sigma=0.3, replay=drawn.actions)
    torch.testing.assert_close(again.means, drawn.means)
    torch.testing.assert_close(again.logps, drawn.logps)
    silent = soft_tokens(policy, *start())
    assert (silent.means[:, 1] - drawn.means[:, 1]).abs().max() > 1e-4  # the action, not the mean, was fed back
