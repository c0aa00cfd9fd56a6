"""How the policy speaks and refines: one prefill a prompt, continuous batching, soft tokens over the same cache.

Every prompt is read once, however many replies it gets. All living replies take one step at a time together: those that
speak draw a token, those that have said `<REFINE>` and go on take a soft-token step, and whoever is done leaves its row to
one that waits. So text and soft tokens of different replies share every pass of the model, and what a reply says does not
depend on its neighbours: each draws its tokens from its own seed.

The soft tokens' recurrence with gradients, over rows that are known already, is `soft_tokens`; training uses it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vsr1.agent import protocol
from vsr1.agent.allowed import ANSWER_TAG, ANSWERS, Allowed, Trie
from vsr1.agent.speech import Question, Sampling, Spoken
from vsr1.models import backbone
from vsr1.models.backbone import Row, State
from vsr1.models.policy import Policy
from vsr1.models.slots import Slots
from vsr1.ops.soft_query import NoiseStream, gaussian_logp, soft_token_step


@dataclass(frozen=True)
class SoftTokens:
    """Soft tokens of R rows: means and actions (R, n, D), log-probability of each action (R, n). One row's alone have no
    R."""

    means: Tensor
    actions: Tensor
    logps: Tensor


@dataclass(frozen=True)
class Refining:
    """Which replies go on with soft tokens, and how they are drawn: `wants(number of the reply, token ids)` is asked of
    every reply that ends with `<REFINE>`; sigma and noise as in `soft_token_step`."""

    wants: Callable[[int, tuple[int, ...]], bool]
    sigma: float = 0.0
    noise: NoiseStream | None = None


@dataclass(frozen=True)
class Said:
    """A reply and, if it went on, its soft tokens."""

    spoken: Spoken
    soft: SoftTokens | None


@dataclass(frozen=True)
class Prompt:
    """What a reply continues: the row, what it already holds of the reply (as text), and the shown video's seconds."""

    row: Row
    begun: str = ""
    duration: float = float("inf")


ROWS = 128
READ_TOKENS = 32768


class OwnSpeaker:
    """The own engine; rows: how many replies are under way at once; read_tokens: most tokens of their prompts that go through
    the model in one pass."""

    def __init__(self, rows: int = ROWS, read_tokens: int = READ_TOKENS) -> None:
        self.rows, self.read_tokens = rows, read_tokens

    def speak(
        self,
        policy: Policy,
        questions: Sequence[Question],
        owner: Sequence[int],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[Spoken]:
        """See `vsr1.agent.speech.Speaker`."""
        prompts = [prompt_of(policy, question) for question in questions]
        limits: dict[str, Any] = {"rows": self.rows, "read_tokens": self.read_tokens, "deadline": deadline}
        found = generate(policy, prompts, owner, sampling, seeds=seeds, **limits)
        return [said.spoken for said in in_order(found)]

    def sync(self, policy: Policy) -> None:
        """The own engine reads the policy's weights where they are."""


def prompt_of(policy: Policy, question: Question) -> Prompt:
    """The policy's prompt for a question."""
    row = protocol.prompt(policy.tokenizer, question.query, question.video, system=policy.settings.system)
    return Prompt(row, duration=question.video.duration)


@dataclass
class _Reply:
    """One continuation under way; `soft` is None while it speaks."""

    index: int
    prompt: int
    text: str
    uniforms: np.ndarray | None
    limit: int
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    matched: float | None = None
    inside: Trie | None = None
    soft: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def said(self, finished: bool) -> Said:
        soft = None if not self.soft else SoftTokens(*(torch.stack(part) for part in zip(*self.soft, strict=True)))
        return Said(Spoken(tuple(self.ids), torch.tensor(self.logps), self.matched, finished), soft)


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    owner: Sequence[int],
    sampling: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    refining: Refining | None = None,
    limits: Sequence[int] | None = None,
    stop: str | None = None,
    rows: int = ROWS,
    read_tokens: int = READ_TOKENS,
    deadline: float | None = None,
) -> Iterator[tuple[int, Said]]:
    """One reply for each entry of `owner` (the number of its prompt), as (its place in `owner`, what was said), in the order
    in which they end.

    seeds: one a reply; by default they follow from `sampling.seed` and the place. Replies that go on with soft tokens
    (`refining`) end behind them. limits: most tokens of each reply, if below `sampling.max_tokens`; stop: text that ends
    one. At `deadline` (of `time.monotonic()`) whatever is not done is yielded unfinished.
    """
    if not owner:
        return
    if seeds is None:
        seeds = [sampling.seed * 1_000_003 + index for index in range(len(owner))]
    limits = [min(sampling.max_tokens, limit) for limit in limits or [sampling.max_tokens] * len(owner)]
    batch = _Batch(policy, prompts, owner, sampling, seeds, limits, refining, stop, min(rows, len(owner)), read_tokens)
    while batch.waiting or batch.alive:
        if deadline is not None and time.monotonic() >= deadline:
            yield from ((reply.index, reply.said(False)) for reply in [*batch.alive, *map(batch.begin, batch.waiting)])
            return
        batch.admit()
        yield from batch.step()


def in_order(found: Iterable[tuple[int, Said]]) -> list[Said]:
    """What `generate` yields, by place."""
    return [said for _, said in sorted(found, key=lambda one: one[0])]


class _Batch:
    """The replies of one call of `generate`."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        owner: Sequence[int],
        sampling: Sampling,
        seeds: Sequence[int],
        limits: Sequence[int],
        refining: Refining | None,
        stop: str | None,
        rows: int,
        read_tokens: int,
    ) -> None:
        self.policy, self.prompts, self.owner, self.sampling = policy, prompts, owner, sampling
        self.seeds, self.limits, self.refining, self.stop = seeds, limits, refining, stop
        self.noise = None if refining is None else refining.noise
        self.raw = policy.settings.first_latent == "unnormed"
        self.constraint = Allowed(policy.tokenizer) if sampling.constrained else None
        self.answers = [policy.tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
        # the replies of a prompt follow one another, so that a prompt leaves as soon as it can
        self.waiting = deque(sorted(range(len(owner)), key=lambda index: owner[index]))
        self.alive: list[_Reply] = []
        self.placed: list[int] = []  # the prompt in each place
        self.hidden = torch.empty(0, policy.model.config.text_config.hidden_size, device=policy.videos.device)
        longest = max(len(prompts[index].row) for index in set(owner))
        places = min(rows + 1, len(set(owner)))  # one more: its living rows may end while others of it wait
        self.slots = Slots(policy.model.model, places=places, longest=longest, rows=rows, read_tokens=read_tokens)

    def begin(self, index: int) -> _Reply:
        """A reply that has said nothing yet."""
        uniforms = None
        if self.sampling.temperature:
            uniforms = np.random.default_rng(self.seeds[index]).random(self.sampling.max_tokens)
        prompt = self.owner[index]
        return _Reply(index, prompt, self.prompts[prompt].begun, uniforms, self.limits[index])

    def admit(self) -> None:
        """Give free rows to replies that wait; not one by one, because reading prompts together is cheaper."""
        free = self.slots.rows - len(self.alive)
        if not self.waiting or (self.alive and free < max(1, self.slots.rows // 4)):
            return
        entering = [self.begin(self.waiting.popleft()) for _ in range(min(free, len(self.waiting)))]
        fresh = [prompt for prompt in dict.fromkeys(reply.prompt for reply in entering) if prompt not in self.placed]
        if fresh:
            self.slots.read([self.prompts[prompt].row for prompt in fresh])
            self.placed += fresh
        ends = self.slots.open([self.placed.index(reply.prompt) for reply in entering])
        self.hidden = torch.cat([self.hidden.to(ends), ends])
        self.alive += entering

    def step(self) -> Iterator[tuple[int, Said]]:
        """Every living reply takes one token or one soft token; yields those that end."""
        speaking = [row for row, reply in enumerate(self.alive) if reply.soft is None]
        refining = [row for row, reply in enumerate(self.alive) if reply.soft is not None]
        embeds = torch.empty_like(self.hidden)
        ended: dict[int, bool] = {}
        if speaking:
            tokens = self._speak(speaking)
            embeds[speaking] = self.policy.token_embeddings(tokens).to(embeds)
            for row in speaking:
                reply = self.alive[row]
                finished = reply.ids[-1] in (self.policy.refine_id, self.policy.eos_id)
                finished = finished or (self.stop is not None and reply.text.endswith(self.stop))
                if self._goes_on(reply):
                    reply.soft = []
                elif finished or len(reply.ids) >= reply.limit:
                    ended[row] = finished
        if refining:
            embeds[refining] = self._refine(refining).to(embeds)
            count = self.policy.settings.soft_tokens
            ended |= {row: True for row in refining if len(self.alive[row].soft or ()) == count}
        yield from ((self.alive[row].index, self.alive[row].said(finished)) for row, finished in ended.items())
        embeds = embeds[self._close(sorted(ended, reverse=True))]
        if not self.alive:
            self.hidden = embeds
            return
        hidden = self.slots.step(embeds, normed=not self.raw)
        if self.raw:  # released checkpoints make the first soft token from the state before the last norm
            first = torch.tensor([reply.soft == [] for reply in self.alive], device=hidden.device)
            hidden = torch.where(first[:, None], hidden, self.policy.model.model.language_model.norm(hidden))
        self.hidden = hidden

    def _speak(self, rows: list[int]) -> Tensor:
        replies = [self.alive[row] for row in rows]
        logits = self.policy.logits(self.hidden[rows])
        allowed: list[Trie | None] = []
        for place, reply in enumerate(replies):
            if reply.matched is None and reply.text.endswith(ANSWER_TAG) and _thought(reply.text):
                yes, no = logits[place, self.answers].tolist()
                reply.matched = yes - no
            if self.constraint is not None and not reply.inside and _thought(reply.text):
                reply.inside = self.constraint.opened(reply.text, self.prompts[reply.prompt].duration)
            allowed.append(reply.inside or None)
        uniforms = None
        if self.sampling.temperature:
            uniforms = torch.tensor([reply.uniforms[len(reply.ids)] for reply in replies if reply.uniforms is not None])
        tokens, logps = draw(logits, self.sampling.temperature, self.sampling.top_p, uniforms, allowed)
        for reply, token, logp in zip(replies, tokens.tolist(), logps.tolist(), strict=True):
            reply.ids.append(token)
            reply.logps.append(logp)
            reply.text += self.policy.piece(token)
            reply.inside = reply.inside.get(token) if reply.inside else None
        return tokens

    def _goes_on(self, reply: _Reply) -> bool:
        if self.refining is None or reply.ids[-1] != self.policy.refine_id:
            return False
        return self.refining.wants(reply.index, tuple(reply.ids))

    def _refine(self, rows: list[int]) -> Tensor:
        assert self.refining is not None
        step = soft_token_step(self.hidden[rows], self.policy.head, sigma=self.refining.sigma, generator=self.noise)
        self.noise = step.noise
        for place, row in enumerate(rows):
            soft = self.alive[row].soft
            assert soft is not None
            soft.append((step.mean[place], step.action[place], step.logp[place]))
        return step.policy_input

    def _close(self, rows: list[int]) -> list[int]:
        """End these rows, last first; returns the rows that are left, by their old numbers in their new order."""
        left = list(range(len(self.alive)))
        for row in rows:
            self.slots.close(row)
            for values in (left, self.alive):
                values[row] = values[-1]  # type: ignore[assignment]
                values.pop()
        needed = {reply.prompt for reply in self.alive}
        if self.waiting:
            needed.add(self.owner[self.waiting[0]])
        for place in range(len(self.placed) - 1, -1, -1):
            if self.placed[place] not in needed:
                self.slots.leave(place)
                self.placed[place] = self.placed[-1]
                self.placed.pop()
        return left


def _thought(text: str) -> bool:
    """Whether the reply is past its thoughts, where tags count."""
    return "<think>" not in text or "</think>" in text


def draw(
    logits: Tensor,
    temperature: float,
    top_p: float = 1.0,
    uniforms: Tensor | None = None,
    allowed: Sequence[Trie | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (R,) and their log-probabilities (R,) from logits (R, V).

    temperature 0 takes the likeliest token and gives log-probabilities at temperature 1; otherwise uniforms (R,) in [0, 1)
    pick by the inverse of the distribution function. The log-probability is the policy's own, before top_p and `allowed`
    (which tokens each row may take, None for any) changed what is drawn.
    """
    logp = torch.log_softmax(logits / (temperature or 1.0), -1)
    open_to = logp
    for row, tokens in enumerate(allowed or ()):
        if tokens:
            if open_to is logp:
                open_to = logp.clone()
            ids = torch.tensor(list(tokens), device=logp.device)
            kept = logp[row, ids]
            open_to[row] = -torch.inf
            open_to[row, ids] = kept
    if not temperature:
        token = open_to.argmax(-1)
    else:
        assert uniforms is not None, "sampling needs a uniform number a row"
        chance = open_to.exp().double()  # double: a sum over 150,000 tokens must not lose the rare ones
        if top_p < 1.0:
            chance = _nucleus(chance, top_p)
        below = chance.cumsum(-1)
        token = torch.searchsorted(below, uniforms.to(below)[:, None] * below[:, -1:], right=True)[:, 0]
    return token, logp.gather(1, token[:, None])[:, 0]


def _nucleus(chance: Tensor, top_p: float) -> Tensor:
    """chance (R, V) with everything outside the smallest set that holds `top_p` of it set to 0."""
    ordered, order = chance.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    outside = before >= top_p * chance.sum(-1, keepdim=True)
    return chance.masked_fill(outside.gather(1, order.argsort(-1)), 0.0)


def soft_tokens_after(
    policy: Policy,
    prompts: Sequence[Row],
    owner: Sequence[int],
    replies: Sequence[tuple[int, ...]],
    sigma: float = 0.0,
    noise: NoiseStream | None = None,
) -> SoftTokens:
    """The soft tokens behind replies that are known already, each continuing prompt `owner[r]`: for words that came from
    another engine, or were said before another video."""
    _, state = backbone.run(policy.model.model, prompts, keep_cache=True)
    assert state is not None
    state = state.branch(torch.tensor(owner, device=state.mask.device))
    normed = policy.settings.first_latent == "normed"
    _, last = backbone.feed_tokens(policy.model.model, state, replies, normed=normed)
    return soft_tokens(policy, last, state, sigma=sigma, noise=noise)


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
    Gradients flow through the cache into everything but the replayed actions. `hidden` is normed or not as
    `policy.settings.first_latent` says.
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
