"""The loop: retrieve, verify, refine, and again, for many queries at once.

Every turn, all queries still open make one sweep of the corpus, one policy batch and one embedder batch. Rollouts for
training, evaluation and serving are this same function; they differ only in sampling, in how many samples a query gets,
and in who reads the trajectories.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from vsr1.agent import protocol
from vsr1.agent.generate import Sampling, generate, soft_tokens
from vsr1.corpus import Corpus
from vsr1.errors import VideoError
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.models.vision import VideoFeatures, blank
from vsr1.ops.corpus_scan import CorpusMatrix, scan
from vsr1.ops.soft_query import NoiseStream, philox_normal
from vsr1.records import Moment, Reply, Trajectory, Turn

Refinement = Literal["soft", "random", "blank", "shuffled", "none"]


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs.

    turns: at most this many videos a query. exclude: never show a rejected video again. refinement: "soft" is the
    method; the others are controls: "none" keeps the first query, "random" inserts Gaussian noise for soft tokens,
    "blank" and "shuffled" let the policy refine before an empty or another video. sigma: standard deviation of the
    exploration noise on soft tokens. samples: trajectories a query (a group, for training).
    """

    turns: int = 3
    exclude: bool = True
    refinement: Refinement = "soft"
    sigma: float = 0.0
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    batch: int = 64


class Library(Protocol):
    """What the loop needs to know about the videos it searches; `vsr1.corpus.Corpus` is one."""

    @property
    def video_ids(self) -> Sequence[str]: ...
    def matrix(self) -> CorpusMatrix: ...
    def path(self, video_id: str) -> Path | str: ...


@dataclass
class _Open:
    """One trajectory under way."""

    moment: Moment
    query: Tensor
    positive: int
    first: int
    turns: list[Turn] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    stop: Literal["matched", "turns", "limit", "failed"] | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the policy made of one (query, video) pair: its reply and, if it refines, its soft tokens (n, D)."""

    reply: Reply
    text: str
    token_ids: tuple[int, ...]
    token_logps: Tensor
    latents: Tensor | None
    actions: Tensor | None


def run(
    policy: Policy,
    embedder: Embedder,
    corpus: Corpus | Library,
    queries: Sequence[Moment],
    *,
    turns: int = 3,
    settings: LoopSettings | None = None,
    first: Sequence[str | None] | None = None,
    memo: dict[tuple[str, str], Verdict] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trajectory]:
    """Run the loop for `queries`; one trajectory a query and sample, in order.

    `settings` overrides `turns` where given. `first` names the video to show at turn 1 instead of the search's own (None:
    the search's), so that training can balance right and wrong videos. `memo` remembers greedy verdicts by (query id,
    video id) between calls that share a policy: runs that differ only in how they search then ask about each pair once.
    A video that cannot be read makes its trajectory `failed`, with the reason; nothing is swallowed.
    """
    settings = settings or LoopSettings(turns=turns)
    return list(stream(policy, embedder, corpus, queries, settings, first=first, memo=memo, progress=progress))


@torch.no_grad()
def stream(
    policy: Policy,
    embedder: Embedder,
    corpus: Corpus | Library,
    queries: Sequence[Moment],
    settings: LoopSettings,
    *,
    first: Sequence[str | None] | None = None,
    memo: dict[tuple[str, str], Verdict] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Trajectory]:
    """As `run`, but trajectories are yielded batch by batch."""
    if not len(corpus.video_ids):
        raise ValueError("the corpus is empty: add videos before searching it")
    matrix, video_ids = corpus.matrix().to(embedder.videos.device), list(corpus.video_ids)
    row_of = {video_id: row for row, video_id in enumerate(video_ids)}
    done = 0
    for begin in range(0, len(queries), settings.batch):
        batch = queries[begin : begin + settings.batch]
        starts = [None] * len(batch) if first is None else first[begin : begin + settings.batch]
        vectors = embedder.embed_texts([moment.text for moment in batch])
        opened = [
            _Open(moment, vector, row_of.get(moment.video_id or "", -1), -1 if start is None else row_of[start])
            for moment, vector, start in zip(batch, vectors, starts, strict=True)
            for _ in range(settings.samples)
        ]
        for turn in range(settings.turns):
            active = [one for one in opened if one.stop is None]
            if not active:
                break
            seed = hash((settings.sampling.seed, begin, turn)) & 0x7FFFFFFF
            # every batch and turn draws its own randomness
            turned = replace(settings, sampling=replace(settings.sampling, seed=seed))
            _take_turn(policy, embedder, corpus, matrix, video_ids, active, turned, memo)
        ranks = _ranks(matrix, torch.stack([one.query for one in opened]), [one.positive for one in opened])
        for one, rank in zip(opened, ranks, strict=True):
            yield Trajectory(one.moment, tuple(one.turns), one.query, rank, one.stop or "turns", one.failure)
        done += len(batch)
        if progress is not None:
            progress(done, len(queries))


def _ranks(matrix: CorpusMatrix, queries: Tensor, positives: Sequence[int]) -> list[int | None]:
    known = [index for index, row in enumerate(positives) if row >= 0]
    ranks: list[int | None] = [None] * len(positives)
    if known:
        positive = torch.tensor([positives[index] for index in known], device=queries.device)
        found = scan(queries[known], matrix, k=1, positive=positive)
        assert found.rank is not None
        for index, rank in zip(known, found.rank.tolist(), strict=True):
            ranks[index] = rank
    return ranks


def _take_turn(
    policy: Policy,
    embedder: Embedder,
    corpus: Corpus | Library,
    matrix: CorpusMatrix,
    video_ids: list[str],
    active: list[_Open],
    settings: LoopSettings,
    memo: dict[tuple[str, str], Verdict] | None,
) -> None:
    """One turn for every open trajectory: sweep, look, ask the policy, refine the rejected."""
    started = time.perf_counter()
    queries = torch.stack([one.query for one in active])
    exclude = None
    if settings.exclude and active[0].shown:
        exclude = torch.tensor([one.shown for one in active], device=queries.device)
    found = scan(queries, matrix, k=1, exclude=exclude)
    ranks = _ranks(matrix, queries, [one.positive for one in active])
    rows, scores = found.ids[:, 0].tolist(), found.scores[:, 0].tolist()
    for index, one in enumerate(active):
        if one.first >= 0 and not one.shown:
            rows[index], scores[index] = one.first, float(one.query @ matrix.rows[one.first].to(one.query))
    searched = time.perf_counter()

    for one, row in zip(active, rows, strict=True):
        if row < 0:
            one.stop = "limit"  # every video has been shown
    shown = [
        (one, row, score, rank) for one, row, score, rank in zip(active, rows, scores, ranks, strict=True) if row >= 0
    ]
    features = policy.videos.encode([Path(corpus.path(video_ids[row])) for _, row, _, _ in shown])
    looked = time.perf_counter()

    asked: list[tuple[_Open, int, float, int | None, VideoFeatures]] = []
    for (one, row, score, rank), video in zip(shown, features, strict=True):
        one.shown.append(row)
        if isinstance(video, VideoError):
            one.stop, one.failure = "failed", str(video)
        else:
            asked.append((one, row, score, rank, video))
    verdicts = ask(
        policy,
        [(one.moment, video_ids[row], video) for one, row, _, _, video in asked],
        settings,
        memo,
    )
    spoken = time.perf_counter()

    refined: list[tuple[_Open, Tensor]] = []
    for (one, row, score, rank, _), verdict in zip(asked, verdicts, strict=True):
        seconds = {"search": searched - started, "video": looked - searched, "policy": spoken - looked}
        one.turns.append(
            Turn(
                video_ids[row], score, rank, verdict.reply, verdict.text, verdict.token_ids, verdict.token_logps,
                one.query, verdict.latents, verdict.actions, seconds,
            )
        )  # fmt: skip
        if verdict.reply.answer == "matched":
            one.stop = "matched"
        elif verdict.actions is not None:
            refined.append((one, verdict.actions))
    if refined and settings.refinement != "none":
        actions = torch.stack([soft for _, soft in refined])
        if settings.refinement == "random":
            actions = philox_normal(actions.shape, NoiseStream(settings.sampling.seed), device=actions.device)
        vectors = embedder.embed_texts([one.moment.text for one, _ in refined], policy.head.soft_tokens(actions))
        for (one, _), vector in zip(refined, vectors, strict=True):
            one.query = vector


def ask(
    policy: Policy,
    pairs: Sequence[tuple[Moment, str, VideoFeatures]],
    settings: LoopSettings,
    memo: dict[tuple[str, str], Verdict] | None = None,
) -> list[Verdict]:
    """The policy's verdict on each (moment, video id, features); pairs already in `memo` are not asked again."""
    known = {} if memo is None else memo
    keys = [(moment.query_id, video_id) for moment, video_id, _ in pairs]
    fresh = [index for index, key in enumerate(keys) if key not in known]
    asked = _speak(policy, [pairs[index] for index in fresh], settings) if fresh else []
    verdicts = dict(zip(fresh, asked, strict=True))
    if memo is not None:
        memo.update((keys[index], verdict) for index, verdict in verdicts.items())
    found = [verdicts[index] if index in verdicts else known[key] for index, key in enumerate(keys)]
    if settings.refinement in ("blank", "shuffled"):
        return _look_elsewhere(policy, pairs, found, settings)
    return found


def _speak(policy: Policy, pairs: Sequence[tuple[Moment, str, VideoFeatures]], settings: LoopSettings) -> list[Verdict]:
    """Generate replies; identical (query, video) pairs next to each other share one prefill when all groups are equal."""
    keys = [(moment.query_id, video_id) for moment, video_id, _ in pairs]
    group = settings.samples if _grouped(keys, settings.samples) else 1
    prompts = [
        protocol.prompt(policy.tokenizer, moment.text, video, system=policy.settings.system)
        for moment, _, video in pairs[::group]
    ]
    said = generate(policy, prompts, settings.sampling, group=group)
    texts = policy.tokenizer.batch_decode([list(ids) for ids in said.token_ids], skip_special_tokens=False)
    replies = [protocol.parse(text, duration=video.duration) for text, (_, _, video) in zip(texts, pairs, strict=True)]
    wants = [index for index, reply in enumerate(replies) if reply.answer != "matched" and bool(said.refine[index])]
    latents: dict[int, Tensor] = {}
    actions: dict[int, Tensor] = {}
    if wants:
        rows = torch.tensor(wants, device=said.hidden.device)
        noise = NoiseStream(settings.sampling.seed, 0)
        soft = soft_tokens(policy, said.hidden[rows], said.state.select(rows), sigma=settings.sigma, noise=noise)
        latents = dict(zip(wants, soft.means, strict=True))
        actions = dict(zip(wants, soft.actions, strict=True))
    return [
        Verdict(replies[i], texts[i], said.token_ids[i], said.token_logps[i], latents.get(i), actions.get(i))
        for i in range(len(pairs))
    ]


def _grouped(keys: Sequence[tuple[str, str]], samples: int) -> bool:
    if samples == 1 or len(keys) % samples:
        return False
    return all(len(set(keys[begin : begin + samples])) == 1 for begin in range(0, len(keys), samples))


def _look_elsewhere(
    policy: Policy,
    pairs: Sequence[tuple[Moment, str, VideoFeatures]],
    verdicts: Sequence[Verdict],
    settings: LoopSettings,
) -> list[Verdict]:
    """The control of the video's worth: the same words, but the soft tokens come from reading them before a blank or
    another pair's video."""
    wants = [index for index, verdict in enumerate(verdicts) if verdict.actions is not None]
    if not wants:
        return list(verdicts)
    rows = []
    for position, index in enumerate(wants):
        moment, _, own = pairs[index]
        other = pairs[wants[(position + 1) % len(wants)]][2]
        seen = other if settings.refinement == "shuffled" and other.grid == own.grid else blank(own)
        prompt = protocol.prompt(policy.tokenizer, moment.text, own, system=policy.settings.system)
        rows.append(Row((*prompt.token_ids, *verdicts[index].token_ids), seen))
    hidden, state = backbone.run(policy.model.model, rows, keep_cache=True)
    assert state is not None
    noise = NoiseStream(settings.sampling.seed, 0)
    soft = soft_tokens(policy, hidden[:, -1], state, sigma=settings.sigma, noise=noise)
    changed = list(verdicts)
    for index, mean, action in zip(wants, soft.means, soft.actions, strict=True):
        changed[index] = replace(verdicts[index], latents=mean, actions=action)
    return changed
