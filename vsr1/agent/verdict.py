"""What the policy makes of a shown video: its verdict, and the refinements that follow a rejection.

Pairs of one query and one video that are asked about in a turn go to the policy together; the samples of a pair share its
prompt, and pairs that a `memo` knows are not asked again. The controls of refinement (soft tokens made before an empty or
another video) and refinement in words start from the same verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vsr1.agent import protocol
from vsr1.agent.allowed import ANSWER_TAG
from vsr1.agent.generate import (
    OwnSpeaker,
    Prompt,
    Refining,
    Said,
    SoftTokens,
    generate,
    in_order,
    prompt_of,
    soft_tokens_after,
)
from vsr1.agent.speech import Question, Sampling, Speaker
from vsr1.models.policy import Policy
from vsr1.models.vision import VideoFeatures, blank
from vsr1.ops.soft_query import NoiseStream
from vsr1.records import Moment, Reply, Turn

Memo = dict[tuple[str, str], "Verdict"]
"""Greedy verdicts by (query id, video id)."""


@dataclass(frozen=True)
class Pair:
    """A query and a video that is shown to it; seed draws the reply, limit bounds its tokens."""

    moment: Moment
    video_id: str
    video: VideoFeatures
    path: Path
    seed: int
    limit: int

    @property
    def key(self) -> tuple[str, str]:
        return self.moment.query_id, self.video_id


@dataclass(frozen=True)
class Verdict:
    """What the policy made of one pair: its reply, the probability that the video is the right one (None without an
    answer), and, if it refines, its soft tokens (n, D), or the query in its own words."""

    reply: Reply
    text: str
    token_ids: tuple[int, ...]
    token_logps: Tensor
    probability: float | None
    latents: Tensor | None = None
    actions: Tensor | None = None
    rewriting: tuple[int, ...] = ()

    def shortened(self, count: int) -> Verdict:
        """The same with the first `count` of its soft tokens."""
        if self.latents is None or self.actions is None:
            return self
        return replace(self, latents=self.latents[:count], actions=self.actions[:count])


@dataclass(frozen=True)
class Asking:
    """How the policy is asked: the engine that speaks, how it draws, the exploration of soft tokens, and when to stop."""

    speaker: Speaker
    sampling: Sampling
    sigma: float = 0.0
    deadline: float | None = None


def ask(policy: Policy, pairs: Sequence[Pair], asking: Asking, memo: Memo | None = None) -> list[Verdict]:
    """The policy's verdict on each pair, those in `memo` from there; new ones are remembered in it."""
    known: Memo = {} if memo is None else memo
    fresh = [index for index, pair in enumerate(pairs) if pair.key not in known]
    verdicts = dict(zip(fresh, _speak(policy, [pairs[index] for index in fresh], asking), strict=True))
    if memo is not None:
        memo.update((pairs[index].key, verdict) for index, verdict in verdicts.items())
    return [verdicts[index] if index in verdicts else known[pair.key] for index, pair in enumerate(pairs)]


def _questions(pairs: Sequence[Pair]) -> tuple[list[Question], list[int]]:
    """The distinct questions behind the pairs, and the number of each pair's question."""
    keys = list(dict.fromkeys(pair.key for pair in pairs))
    first = {pair.key: pair for pair in reversed(pairs)}
    questions = [Question(first[key].moment.text, first[key].video, first[key].path) for key in keys]
    number = {key: index for index, key in enumerate(keys)}
    return questions, [number[pair.key] for pair in pairs]


def _speak(policy: Policy, pairs: Sequence[Pair], asking: Asking) -> list[Verdict]:
    """Ask about all pairs in one batch."""
    if not pairs:
        return []
    questions, owner = _questions(pairs)

    def read(index: int, token_ids: tuple[int, ...]) -> tuple[str, Reply]:
        text = policy.text(token_ids)
        return text, protocol.parse(text, duration=pairs[index].video.duration)

    def wants(index: int, token_ids: tuple[int, ...]) -> bool:
        return read(index, token_ids)[1].answer != "matched"

    found = _replies(policy, questions, owner, pairs, asking, wants=Refining(wants, asking.sigma, _noise(asking)))
    scale, offset = policy.settings.calibration
    verdicts = []
    for index, said in enumerate(found):
        spoken, soft = said.spoken, said.soft
        text, reply = read(index, spoken.token_ids)
        odds = None if spoken.matched is None else torch.tensor(scale * spoken.matched + offset)
        verdicts.append(
            Verdict(
                reply,
                text,
                spoken.token_ids,
                spoken.token_logps,
                None if odds is None else float(odds.sigmoid()),
                None if soft is None else soft.means,
                None if soft is None else soft.actions,
            )
        )
    return verdicts


def _noise(asking: Asking) -> NoiseStream:
    return NoiseStream(asking.sampling.seed, 0)


def _replies(
    policy: Policy,
    questions: Sequence[Question],
    owner: Sequence[int],
    pairs: Sequence[Pair],
    asking: Asking,
    wants: Refining,
) -> list[Said]:
    """What was said to each pair. Soft tokens need hidden states, so for an engine that only speaks they are made here,
    behind its words."""
    seeds, prompts = [pair.seed for pair in pairs], [prompt_of(policy, question) for question in questions]
    if isinstance(asking.speaker, OwnSpeaker):
        found = generate(
            policy,
            prompts,
            owner,
            asking.sampling,
            seeds=seeds,
            refining=wants,
            limits=[pair.limit for pair in pairs],
            rows=asking.speaker.rows,
            deadline=asking.deadline,
        )
        return in_order(found)
    spoken = asking.speaker.speak(policy, questions, owner, asking.sampling, seeds=seeds, deadline=asking.deadline)
    spoken = [
        one
        if len(one.token_ids) <= pair.limit
        else replace(one, token_ids=one.token_ids[: pair.limit], token_logps=one.token_logps[: pair.limit])
        for one, pair in zip(spoken, pairs, strict=True)
    ]
    ids = [one.token_ids for one in spoken]
    refine = [row for row, said in enumerate(ids) if said[-1:] == (policy.refine_id,) and wants.wants(row, said)]
    soft: dict[int, SoftTokens] = {}
    if refine:
        rows, where = [prompt.row for prompt in prompts], [owner[row] for row in refine]
        made = soft_tokens_after(policy, rows, where, [ids[row] for row in refine], wants.sigma, wants.noise)
        soft = {row: _row(made, place) for place, row in enumerate(refine)}
    return [Said(one, soft.get(row)) for row, one in enumerate(spoken)]


def _row(soft: SoftTokens, row: int) -> SoftTokens:
    return SoftTokens(soft.means[row], soft.actions[row], soft.logps[row])


def look_elsewhere(
    policy: Policy, pairs: Sequence[Pair], verdicts: Sequence[Verdict], asking: Asking, *, shuffled: bool
) -> list[Verdict]:
    """The control of the video's worth: the same words, but the soft tokens come from reading them before an empty or,
    `shuffled`, the next other video of its shape among those that refine; an empty one where there is none."""
    wants = [index for index, verdict in enumerate(verdicts) if verdict.actions is not None]
    if not wants:
        return list(verdicts)
    rows = []
    for position, index in enumerate(wants):
        own = pairs[index]
        others = [pairs[other] for other in (*wants[position + 1 :], *wants[:position])] if shuffled else []
        fitting = (one.video for one in others if one.video_id != own.video_id and one.video.grid == own.video.grid)
        seen = next(fitting, None) or blank(own.video)
        prompt = prompt_of(policy, Question(own.moment.text, own.video, own.path))
        rows.append(replace(prompt.row, video=seen))
    replies = [verdicts[index].token_ids for index in wants]
    soft = soft_tokens_after(policy, rows, range(len(rows)), replies, asking.sigma, _noise(asking))
    changed = list(verdicts)
    for index, mean, action in zip(wants, soft.means, soft.actions, strict=True):
        changed[index] = replace(verdicts[index], latents=mean, actions=action)
    return changed


def rewrite(
    policy: Policy, pairs: Sequence[Pair], verdicts: Sequence[Verdict], asking: Asking, memo: Memo | None = None
) -> list[Verdict]:
    """Refinement in words, which soft tokens stand beside: the policy begins anew before the same video and says what it
    looks for (`PolicySettings.rewriting`); these tokens are kept in the verdict."""
    wants = [i for i, verdict in enumerate(verdicts) if verdict.actions is not None and not verdict.rewriting]
    changed = list(verdicts)
    if wants:
        questions, owner = _questions([pairs[index] for index in wants])
        opening, stop = policy.settings.rewriting
        prompts = [_begun(policy, question, opening) for question in questions]
        found = generate(policy, prompts, owner, asking.sampling, stop=stop, deadline=asking.deadline)
        for place, said in found:
            index = wants[place]
            changed[index] = replace(verdicts[index], rewriting=said.spoken.token_ids)
    if memo is not None:
        memo.update((pairs[index].key, changed[index]) for index in wants)
    return changed


def rewriting_text(policy: Policy, token_ids: Sequence[int]) -> str:
    """The words of a rewriting, without what ended them."""
    ended = {policy.refine_id, policy.eos_id}
    text = policy.text([token for token in token_ids if token not in ended])
    return text.removesuffix(policy.settings.rewriting[1]).strip()


def ground(policy: Policy, pairs: Sequence[Pair], turns: Sequence[Turn], asking: Asking) -> list[Reply]:
    """What the policy says of videos it has rejected if it has to accept them: the same thoughts, "matched", and a span."""
    begun = [f"{turn.text.split(ANSWER_TAG)[0]}{ANSWER_TAG}matched</answer><start>" for turn in turns]
    prompts = [
        _begun(policy, Question(pair.moment.text, pair.video, pair.path), text)
        for pair, text in zip(pairs, begun, strict=True)
    ]
    sampling = replace(asking.sampling, temperature=0.0, constrained=True, max_tokens=24)
    found = generate(policy, prompts, range(len(prompts)), sampling, stop="</end>", deadline=asking.deadline)
    texts = [text + policy.text(said.spoken.token_ids) for text, said in zip(begun, in_order(found), strict=True)]
    return [protocol.parse(text, duration=pair.video.duration) for text, pair in zip(texts, pairs, strict=True)]


def _begun(policy: Policy, question: Question, text: str) -> Prompt:
    """The prompt of a question whose reply begins with `text`."""
    prompt = prompt_of(policy, question)
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    row = replace(prompt.row, token_ids=(*prompt.row.token_ids, *ids))
    return Prompt(row, begun=text, duration=prompt.duration)
