"""The peers of the rollout engine: they say and refine what the engine does, and take as many passes as it is told."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import public_rollout as peers
from vsr1.agent import protocol
from vsr1.agent.generate import soft_tokens
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.policy import Policy

TOKENS, GROUP = 4, 2


@pytest.fixture
def policy(policy: Policy) -> Policy:
    """It learns, all but its vision tower."""
    policy.videos.visual.requires_grad_(False)
    policy.settings = replace(policy.settings, soft_tokens=3)
    return policy


@pytest.fixture
def prompt(policy, frames) -> Row:
    return protocol.prompt(
        policy.tokenizer, "a small circle", policy.videos.encode_frames([frames(5)])[0], system="see"
    )


@pytest.fixture
def question(policy, frames, prompt) -> peers.Question:
    return peers.Question(torch.tensor(prompt.token_ids), *policy.videos.frames_to_rows(frames(5).pixels))


def replies(policy, count=GROUP) -> Tensor:
    words = [token for token in range(len(policy.tokenizer)) if token not in policy.tokenizer.all_special_ids]
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack(
        [torch.tensor(words)[torch.randperm(len(words), generator=generator)[:TOKENS]] for _ in range(count)]
    )
    return torch.cat([chosen, torch.full((count, 1), policy.refine_id)], 1)


def cached(policy, prompt, reply) -> Tensor:
    """The engine's latents of one row."""
    row = Row((*prompt.token_ids, *reply.tolist()), prompt.video)
    hidden, state = backbone.run(policy.model.model, [row], keep_cache=True)
    return soft_tokens(policy, hidden[:, -1], state).means[0]


def test_public_latents_are_those_over_the_cache_and_so_are_their_gradients(policy, prompt, question):
    (reply,) = replies(policy, 1)
    ids = torch.cat([question.ids, reply])
    layers = policy.model.model.language_model.layers
    weights = [layers[0].self_attn.q_proj.weight, layers[-1].mlp.up_proj.weight, policy.head.refine_projector[0].weight]
    found, expected = peers.public_latents(policy, ids, question, pre_norm=False), cached(policy, prompt, reply)
    assert found.shape == (policy.settings.soft_tokens, policy.settings.soft_size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    up = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    for one, two in zip(*(torch.autograd.grad((x * up).sum(), weights) for x in (found, expected)), strict=True):
        assert two.norm() > 0
        assert (one - two).norm() < 1e-4 * two.norm()


@torch.no_grad()
def test_the_first_latent_may_come_from_before_the_norm(policy, prompt, question):
    (reply,) = replies(policy, 1)
    ids = torch.cat([question.ids, reply])
    early, late = (peers.public_latents(policy, ids, question, pre_norm=where) for where in (True, False))
    states: list[Tensor] = []
    norm = policy.model.model.language_model.norm
    norm.register_forward_hook(lambda _, given, normed: states.extend((given[0][0, -1], normed[0, -1])))
    cached(policy, prompt, reply)
    before, behind = states[:2]
    torch.testing.assert_close(early[0], policy.head.refine_projector(before), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(late[0], policy.head.refine_projector(behind), atol=1e-5, rtol=1e-5)
    assert (early - late).abs().amax(1).min() > 1e-3  # and all that follow differ with it


@torch.no_grad()
def test_the_last_refine_counts_and_no_word_behind_it(policy, prompt, question):
    (reply,) = replies(policy, 1)
    twice = torch.cat([reply, reply])
    found = peers.public_latents(policy, torch.cat([question.ids, twice, reply[:2]]), question, pre_norm=False)
    torch.testing.assert_close(found, cached(policy, prompt, twice), atol=1e-5, rtol=1e-5)


def test_groups_agree_and_take_the_passes_that_their_algorithms_imply(policy, prompt, question):
    count, length = policy.settings.soft_tokens, TOKENS + 1
    (reply,) = replies(policy, 1)
    peers.learn_by_heart(policy, question, reply)
    with peers.counted(policy) as public:
        literal = peers.public_group(policy, question, GROUP, length, pre_norm=False)
    with peers.counted(policy) as batched:
        generated = peers.generate_group(policy, question, GROUP, length)
    assert torch.equal(literal.tokens, generated.tokens)
    assert torch.equal(literal.tokens, reply.expand(GROUP, -1))
    torch.testing.assert_close(literal.latents, generated.latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(literal.latents[-1], cached(policy, prompt, reply), atol=1e-5, rtol=1e-5)

    said = len(question.ids) + length - 1  # the last token is not fed to find another
    read = count * (len(question.ids) + length) + sum(range(count))
    assert public == peers.Passes(GROUP * (length + count), GROUP * (said + read), GROUP * (1 + count))
    assert batched == peers.Passes(length + count, GROUP * (said + read), 1)


def test_training_steps_agree_and_take_the_passes_that_their_algorithms_imply(policy, embedder, question):
    reference = copy.deepcopy(policy)
    reference.model.model.visual = policy.videos.visual
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(-20)
    generator = torch.Generator().manual_seed(3)
    count, size = policy.settings.soft_tokens, policy.settings.soft_size
    lesson = peers.Lesson(
        replies(policy),
        torch.tensor([1.0, -0.5]),
        torch.randn(GROUP, count, size, generator=generator),
        "a small circle",
        torch.nn.functional.normalize(torch.randn(7, embedder.dimension, generator=generator), dim=1),
    )
    models = policy, reference, embedder, question, lesson
    weights = dict(policy.named_parameters())
    learned = [
        "model.model.language_model.layers.0.self_attn.q_proj.weight",
        "head.refine_latent_input_projector.1.weight",
    ]
    steps, grads, passes = [], [], []
    for step in (peers.public_training_step, peers.plain_training_step):
        options = {"pre_norm": False} if step is peers.public_training_step else {}
        with peers.counted(policy, reference) as taken:
            steps.append(step(*models, **options))
        passes.append(taken)
        grads.append([weights[name].grad.clone() for name in learned])
    for one, two in zip(*steps, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    for one, two in zip(*grads, strict=True):
        assert two.norm() > 0
        assert (one - two).norm() < 1e-4 * two.norm()

    length = len(question.ids) + TOKENS + 1
    assert (passes[0].forwards, passes[0].videos) == (GROUP * (2 + 3 * count),) * 2
    assert passes[0].tokens == GROUP * ((2 + 3 * count) * length + 3 * sum(range(count)))
    assert passes[1] == peers.Passes(1 + count, GROUP * (2 * length + count - 1), 1)
