"""Rollouts and training steps of a group on the CPU, beside the public algorithm and a careful use of transformers.

The policies have random weights, but know one reply by heart, so that all contenders say the same and nobody wins by ending
early; tokens, latents, losses and gradients must agree before anything is timed. Beside the times stand the passes: calls of
the language model, the tokens that it took in, and how often the vision tower encoded the video.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import public_rollout as peers
from bench.harness import Bound, faster_than, within
from bench.public_rollout import Group, Lesson, Passes, Question, Step
from vsr1.agent import protocol
from vsr1.agent.generate import Prompt, Refining, generate, soft_tokens
from vsr1.agent.speech import Sampling
from vsr1.models import backbone
from vsr1.models.backbone import Row, State
from vsr1.models.embedder import INSTRUCTION, Embedder
from vsr1.models.policy import SYSTEM, Policy
from vsr1.models.tiny import TinyConfig
from vsr1.models.tokenizer import train_tokenizer
from vsr1.ops.linear_logp import linear_logp
from vsr1.video import Frames

GROUP, SPOKEN, CANDIDATES = 8, 80, 25  # replies, their words before `<REFINE>`, videos a query is ranked among
PREFIX, SUFFIX = 2048, 256
MODELS = {
    "tiny": TinyConfig(),
    # In the proportions of Qwen3-VL-2B: a tower half as wide as the language model; 16 frame pairs of 16 tokens.
    "mid": TinyConfig(
        hidden=256, layers=8, heads=8, feed_forward=1024, vision_hidden=128, vision_layers=6, merge=2, max_frames=32
    ),
}
TEXT = "a small red circle moves to the right while the user compares them"
CLOSE = 1e-3  # of its length: how far an answer may be from another's
PUBLIC, GENERATE, PLAIN = "public", "generate + full latents", "eight plain rows"


@dataclass(frozen=True)
class Setting:
    """A policy and everything it is asked about, in the forms that the contenders take."""

    policy: Policy
    reference: Policy
    embedder: Embedder
    frames: Frames
    question: Question
    lesson: Lesson
    reply: Tensor


@cache
def setting(size: str, quick: bool) -> Setting:
    """Random weights and pixels; the same every time."""
    config, spoken, group = MODELS[size], SPOKEN, GROUP
    if quick:
        config, spoken, group = replace(config, layers=2, vision_layers=2, max_frames=4, soft_tokens=2), 6, 2
    torch.manual_seed(0)
    stamps = [f"<{second}.5 seconds>" for second in range(config.max_frames)]
    tokenizer = train_tokenizer([SYSTEM, INSTRUCTION, TEXT, "system user assistant", 'Query: ""', *stamps] * 2)
    embedder = Embedder.tiny(tokenizer, config).eval().requires_grad_(False)
    policy = Policy.tiny(embedder, soft_tokens=config.soft_tokens).eval()
    policy.settings = replace(policy.settings, system=SYSTEM)
    reference = copy.deepcopy(policy).requires_grad_(False)
    policy.videos = reference.videos = embedder.videos
    policy.model.model.visual = reference.model.model.visual = embedder.videos.visual
    pixels = torch.randint(0, 256, (config.max_frames, config.pixels, config.pixels, 3), dtype=torch.uint8)
    seconds = torch.arange(config.max_frames, dtype=torch.float64)
    frames = Frames(pixels=pixels, seconds=seconds, duration=float(config.max_frames), source=Path("made up"))
    question = Question(torch.tensor(read(policy, frames).token_ids), *policy.videos.frames_to_rows(pixels))

    words = torch.tensor(sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}))
    picks = torch.stack([words[torch.randperm(len(words))[:spoken]] for _ in range(group)])
    replies = torch.cat([picks, torch.full((group, 1), policy.refine_id)], 1)
    lesson = Lesson(
        replies,
        torch.linspace(-1, 1, group),
        torch.randn(group, config.soft_tokens, policy.settings.soft_size),
        TEXT,
        F.normalize(torch.randn(CANDIDATES, embedder.dimension), dim=1),
    )
    reference.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(policy.model.lm_head.weight) / 20)
    peers.learn_by_heart(policy, question, replies[0])
    return Setting(policy, reference, embedder, frames, question, lesson, replies[0])


def read(policy: Policy, frames: Frames) -> Row:
    """The prompt, from pixels."""
    (video,) = policy.videos.encode_frames([frames])
    return protocol.prompt(policy.tokenizer, TEXT, video, system=policy.settings.system)


def ours_group(given: Setting) -> Group:
    policy, group = given.policy, len(given.lesson.replies)
    said = dict(
        generate(
            policy,
            [Prompt(read(policy, given.frames))],
            [0] * group,
            Sampling(max_tokens=len(given.reply)),
            refining=Refining(wants=lambda *_: True),
        )
    )
    soft = [said[place].soft for place in range(group)]
    return Group(
        torch.tensor([said[place].spoken.token_ids for place in range(group)]),
        torch.stack([one.means for one in soft if one is not None]),
    )


def ours_training_step(given: Setting) -> Step:
    policy, lesson = given.policy, given.lesson
    policy.zero_grad()
    prompt, replies = read(policy, given.frames), lesson.replies
    owner = torch.zeros(len(replies), dtype=torch.int64)

    def passed(one: Policy) -> tuple[Tensor, Tensor, State]:
        """Log-probabilities, the states at `<REFINE>`, and what continues them."""
        core = one.model.model
        ends, state = backbone.run(core, [prompt], keep_cache=True)
        assert state is not None
        state = state.branch(owner)
        hidden, last = backbone.feed_tokens(core, state, replies.tolist())
        before = torch.cat([ends[owner, -1][:, None], hidden[:, :-1]], 1)
        logps = linear_logp(before.flatten(0, 1), one.model.lm_head.weight, replies.flatten()).logp
        return logps.view(replies.shape), last, state

    logps, last, state = passed(policy)
    with torch.no_grad():
        reference_logps, _, _ = passed(given.reference)
    latents = soft_tokens(policy, last, state).means
    loss = peers.text_loss(lesson, logps, reference_logps) + peers.exploration_loss(lesson, latents)
    loss = loss + peers.retrieval_loss(lesson, policy, given.embedder, latents)
    loss.backward()
    return Step(loss.detach(), logps.detach(), latents.detach())


def ours_packed_pass(policy: Policy, prefix: Tensor, suffixes: Tensor, up: Tensor) -> Tensor:
    """Hidden states (G, R, H) of suffixes (G, R) behind the prefix (P,) they share, and their backward pass from `up`."""
    policy.zero_grad()
    core = policy.model.model
    _, state = backbone.run(core, [Row(tuple(prefix.tolist()))], keep_cache=True)
    assert state is not None
    state = state.branch(torch.zeros(len(suffixes), dtype=torch.int64))
    hidden = backbone.feed(core, state, policy.token_embeddings(suffixes))
    hidden.backward(up)
    return hidden.detach()


class Judge:
    """Whether all contenders answer alike, and their passes."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {"policy forwards": {}, "policy tokens": {}, "vision passes": {}}
        self.first: tuple[str, tuple[Tensor, ...]] | None = None

    def __call__(self, name: str, answer: tuple[tuple[Tensor, ...], Passes]) -> None:
        found, passes = answer
        for what, number in zip(self.counts.values(), (passes.forwards, passes.tokens, passes.videos), strict=True):
            what[name] = number
        if self.first is None:
            self.first = name, found
        other, wanted = self.first
        for place, (one, two) in enumerate(zip(found, wanted, strict=True)):
            off = float((one.double() - two.double()).norm() / two.double().norm())
            if not off <= CLOSE:
                raise AssertionError(f"part {place} of the answer of {name} is {off:.1e} off that of {other}")


def counting(given: Setting, call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Passes]:
    with peers.counted(given.policy, given.reference) as passes:
        return call(), passes


def race_of(
    race: Callable[..., None],
    case: str,
    given: Setting,
    contenders: Mapping[str, Callable[[], tuple[Tensor, ...]]],
    bounds: list[Bound],
    videos: int = 1,
) -> None:
    """Time contenders that must agree; ours, the first, encodes every video once."""
    judge = Judge()

    def check(name: str, answer: Any) -> None:
        judge(name, answer)
        if name == "vsr1" and answer[1].videos != videos:
            raise AssertionError(f"vsr1 ran the vision tower {answer[1].videos} times instead of {videos}")

    calls = {name: partial(counting, given, call) for name, call in contenders.items()}
    race(case, calls, check, bounds=bounds, counts=judge.counts)


def described(size: str, given: Setting) -> str:
    """The case's size, as its tests' names begin."""
    group, spoken = given.lesson.replies.shape
    return f"{size}, prompt {len(given.question.ids)}, G = {group} x {spoken} tokens + {given.lesson.noise.shape[1]} latents"


@pytest.mark.parametrize("size", MODELS)
def test_rollout(race: Callable[..., None], quick: bool, size: str) -> None:
    """Replies of a group and their latents, from pixels."""
    given = setting(size, quick)
    asked = given.policy, given.question, *given.lesson.replies.shape
    contenders = {
        "vsr1": partial(ours_group, given),
        PUBLIC: partial(peers.public_group, *asked, pre_norm=False),
        GENERATE: partial(peers.generate_group, *asked),
    }
    bounds = [faster_than(PUBLIC, 8), faster_than(GENERATE, 2)] if size == "mid" else []
    race_of(race, f"rollout, {described(size, given)}", given, contenders, bounds)


class Learned(NamedTuple):
    """What a training step came to; the gradients of the first and the last layers that it reaches."""

    loss: Tensor
    logps: Tensor
    latents: Tensor
    first: Tensor
    last: Tensor


def learned(given: Setting, step: Callable[[], Step]) -> Learned:
    made = step()
    layers = given.policy.model.model.language_model.layers
    weights = layers[0].self_attn.q_proj.weight, given.policy.head.refine_latent_input_projector[1].weight
    first, last = (weight.grad.clone() for weight in weights)
    return Learned(*made, first, last)


@pytest.mark.parametrize("size", MODELS)
def test_rollout_training_step(race: Callable[..., None], quick: bool, size: str) -> None:
    """Losses of words and latents of a group, with gradients and a reference, from pixels."""
    given = setting(size, quick)
    asked = given.policy, given.reference, given.embedder, given.question, given.lesson
    contenders = {
        "vsr1": partial(learned, given, partial(ours_training_step, given)),
        PUBLIC: partial(learned, given, partial(peers.public_training_step, *asked, pre_norm=False)),
        PLAIN: partial(learned, given, partial(peers.plain_training_step, *asked)),
    }
    bounds = [faster_than(PUBLIC, 4)] if size == "mid" else []
    race_of(race, f"training step, {described(size, given)}", given, contenders, bounds)


@pytest.mark.parametrize("size", ["mid"])
def test_rollout_packed_pass(race: Callable[..., None], quick: bool, size: str) -> None:
    """Forward and backward of long replies to one longer prompt, words only."""
    given = setting(size, quick)
    group, before, behind = len(given.lesson.replies), *((64, 16) if quick else (PREFIX, SUFFIX))
    generator = torch.Generator().manual_seed(1)
    words = torch.tensor(
        sorted({*given.policy.tokenizer.get_vocab().values()} - {*given.policy.tokenizer.all_special_ids})
    )
    prefix, suffixes = (
        words[torch.randint(len(words), shape, generator=generator)] for shape in ((before,), (group, behind))
    )
    up = torch.randn(group, behind, given.policy.model.config.text_config.hidden_size, generator=generator)
    contenders = {
        "vsr1": partial(ours_packed_pass, given.policy, prefix, suffixes, up),
        PLAIN: partial(peers.plain_rows_pass, given.policy, prefix, suffixes, up),
    }
    case = f"forward + backward, {size}, prefix {before:,}, G = {group} x {behind} tokens"
    contenders = {name: partial(traced, given.policy, call) for name, call in contenders.items()}
    race_of(race, case, given, contenders, [within(0.4, PLAIN)], videos=0)


def traced(policy: Policy, call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    """The hidden states that a pass gives, and the gradients that it leaves in the first layer and in the embeddings."""
    hidden, model = call(), policy.model.model.language_model
    return hidden, model.layers[0].self_attn.k_proj.weight.grad.clone(), model.embed_tokens.weight.grad.clone()
