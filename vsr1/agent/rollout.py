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

from vsr1.agent import feedback
from vsr1.agent.feedback import Rocchio
from vsr1.agent.generate import OwnSpeaker
from vsr1.agent.speech import Sampling, Speaker
from vsr1.agent.verdict import Asking, Memo, Pair, Verdict, ask, ground, look_elsewhere, rewrite, rewriting_text
from vsr1.corpus import Corpus
from vsr1.errors import VideoError, Vsr1Error
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import CorpusMatrix, scan
from vsr1.ops.soft_query import NoiseStream, philox_normal
from vsr1.records import Moment, Stop, Trajectory, Turn

Refinement = Literal["soft", "hard", "rocchio", "random", "blank", "shuffled", "none"]

MOST_FAILED = 0.01  # share of the trajectories; beyond it the run stops instead of going on over a broken corpus


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs.

    turns: of search and verification, at most. verify: this many of the best videos are looked at each turn; of those the
    policy matches, the likeliest is accepted. exclude: never show a rejected video again.

    refinement: "soft" is the method, "hard" puts the policy's own words behind the query instead; the others are controls:
    "rocchio" moves the first query, whenever nothing was accepted, from the rejected videos towards the best others, as
    `rocchio` weighs them, and needs no policy that refines; "none" keeps the first query, "random" inserts Gaussian noise
    for soft tokens, "blank" and "shuffled" let the policy refine before an empty or another video. soft_tokens: insert only
    the first n of a refinement (None: all; 0: the query stays as it is); as each is made from those before it, these are
    what a policy would have made that stops there. accumulate: keep the soft tokens of earlier turns before those of this
    one. sigma: standard deviation of the exploration noise on soft tokens.

    fall_back: where nothing was accepted, answer with the video most probably right (`Trajectory.fallback`).

    samples: trajectories a query (a group, for training). most_tokens: of all replies of a trajectory; seconds: of wall
    time for a batch of queries; what they cut ends with "limit". batch: queries that advance together.
    """

    turns: int = 3
    verify: int = 1
    exclude: bool = True
    refinement: Refinement = "soft"
    rocchio: Rocchio = field(default_factory=Rocchio)
    soft_tokens: int | None = None
    accumulate: bool = False
    sigma: float = 0.0
    fall_back: bool = False
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    most_tokens: int | None = None
    seconds: float | None = None
    batch: int = 64


class Library(Protocol):
    """What the loop needs to know about the videos it searches; `vsr1.corpus.Corpus` is one."""

    @property
    def video_ids(self) -> Sequence[str]: ...
    def matrix(self) -> CorpusMatrix: ...
    def path(self, video_id: str) -> Path | str: ...


@dataclass
class Failures:
    """Counts trajectories over all calls it is given to, and stops the run when more than `share` of them failed."""

    share: float = MOST_FAILED
    expected: int = 0
    failed: int = 0

    def count(self, one: Trajectory, group: int) -> None:
        """Raises Vsr1Error when too many failed; one query's whole group may, as one bad file fails all of it."""
        if one.stop != "failed":
            return
        self.failed += 1
        if self.failed > max(self.share * self.expected, group):
            raise Vsr1Error(
                f"{self.failed} of {self.expected} trajectories failed, more than {self.share:.0%}; the last: {one.failure}"
            )


@dataclass
class _Open:
    """One trajectory under way. `actions` are the soft tokens in its present query, `place` its place in the result,
    `ranking` the best corpus rows of its last search."""

    place: int
    moment: Moment
    query: Tensor
    positive: int
    first: int
    sample: int
    turns: list[Turn] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    ranking: list[int] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)
    rank: int | None = None
    stop: Stop | None = None
    failure: str | None = None
    fallback: Turn | None = None

    def fail(self, reason: str) -> None:
        self.stop, self.failure = "failed", reason

    def tokens(self) -> int:
        return sum(len(turn.token_ids) for turn in self.turns)

    def done(self) -> Trajectory:
        return Trajectory(
            self.moment, tuple(self.turns), self.query, self.rank, self.stop or "turns", self.failure, self.fallback,
            self.sample,
        )  # fmt: skip


@dataclass(frozen=True)
class _Look:
    """A video that a trajectory looks at this turn: what to ask the policy, its score, and the seconds spent so far."""

    one: _Open
    pair: Pair
    score: float
    seconds: dict[str, float]

    def turn(self, number: int, verdict: Verdict, *, refining: bool) -> Turn:
        """The record of it. Only the verdict that refines keeps its soft tokens."""
        return Turn(
            self.pair.video_id,
            self.score,
            self.one.rank,
            verdict.reply,
            verdict.text,
            verdict.token_ids,
            verdict.token_logps,
            self.one.query,
            verdict.latents if refining else None,
            verdict.actions if refining else None,
            self.seconds,
            number,
            verdict.probability,
            verdict.rewriting if refining else (),
        )


def run(
    policy: Policy,
    embedder: Embedder,
    corpus: Corpus | Library,
    queries: Sequence[Moment],
    *,
    turns: int = 3,
    settings: LoopSettings | None = None,
    first: Sequence[str | None] | None = None,
    memo: Memo | None = None,
    speaker: Speaker | None = None,
    failures: Failures | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trajectory]:
    """Run the loop for `queries`; one trajectory a query and sample, in order. Arguments and errors as of `stream`;
    `settings` overrides `turns` where given."""
    settings = settings or LoopSettings(turns=turns)
    loop = _Loop(policy, embedder, corpus, settings, memo, speaker, failures, progress)
    found = dict(loop.run(queries, first))
    return [found[place] for place in range(len(found))]


def stream(
    policy: Policy,
    embedder: Embedder,
    corpus: Corpus | Library,
    queries: Sequence[Moment],
    settings: LoopSettings,
    *,
    first: Sequence[str | None] | None = None,
    memo: Memo | None = None,
    speaker: Speaker | None = None,
    failures: Failures | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Trajectory]:
    """Yield the trajectories as they finish.

    `first` names the video to show at turn 1 instead of the search's own (None: the search's), so that training can balance
    right and wrong videos. `memo` remembers greedy verdicts by (query id, video id) between calls that share a policy: runs
    that differ only in how they search then ask about each pair once. `speaker` is the engine that speaks the text, our own
    by default. `progress` is told (trajectories done, all).

    A video that cannot be found or read, or a query vector that is not finite, makes its trajectory `failed`, with the
    reason; once more than 1 % of them failed (counted over the calls that share `failures`), Vsr1Error stops the run.
    """
    for _, one in _Loop(policy, embedder, corpus, settings, memo, speaker, failures, progress).run(queries, first):
        yield one


class _Loop:
    """One call of `run` or `stream`."""

    def __init__(
        self,
        policy: Policy,
        embedder: Embedder,
        corpus: Corpus | Library,
        settings: LoopSettings,
        memo: Memo | None,
        speaker: Speaker | None,
        failures: Failures | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        if not len(corpus.video_ids):
            raise ValueError("the corpus is empty: add videos before searching it")
        if settings.turns < 1 or settings.verify < 1 or settings.samples < 1:
            raise ValueError(f"turns, verify and samples must be at least 1; got {settings}")
        if not 0 <= (settings.soft_tokens or 0) <= policy.settings.soft_tokens:
            raise ValueError(f"soft_tokens is {settings.soft_tokens}; the policy makes {policy.settings.soft_tokens}")
        self.policy, self.embedder, self.corpus, self.settings, self.memo = policy, embedder, corpus, settings, memo
        self.speaker = speaker or OwnSpeaker()
        self.failures = failures or Failures()
        self.progress = progress
        self.matrix = corpus.matrix().to(embedder.videos.device)
        self.video_ids = list(corpus.video_ids)
        self.row_of = {video_id: row for row, video_id in enumerate(self.video_ids)}

    @torch.no_grad()
    def run(self, queries: Sequence[Moment], first: Sequence[str | None] | None) -> Iterator[tuple[int, Trajectory]]:
        """(Place in the result, trajectory), as they finish."""
        settings = self.settings
        total, done = len(queries) * settings.samples, 0
        self.failures.expected += total
        for begin in range(0, len(queries), settings.batch):
            part = slice(begin, begin + settings.batch)
            for one in self._batch(queries[part], None if first is None else first[part], begin):
                done += 1
                if self.progress is not None:
                    self.progress(done, total)
                trajectory = one.done()
                self.failures.count(trajectory, settings.samples)
                yield one.place, trajectory

    def _batch(self, batch: Sequence[Moment], first: Sequence[str | None] | None, begin: int) -> Iterator[_Open]:
        """Run the queries of one batch; yields each trajectory when it ends."""
        settings = self.settings
        until = None if settings.seconds is None else time.monotonic() + settings.seconds
        vectors = self.embedder.embed_texts([moment.text for moment in batch])
        starts = first or [None] * len(batch)
        active = [
            _Open(
                (begin + number) * settings.samples + sample,
                moment,
                vector,
                self.row_of.get(moment.video_id or "", -1),
                -1 if start is None else self.row_of[start],
                sample,
            )
            for number, (moment, vector, start) in enumerate(zip(batch, vectors, starts, strict=True))
            for sample in range(settings.samples)
        ]
        for number in range(1, settings.turns + 1):
            # every batch and turn draws its own randomness
            seed = hash((settings.sampling.seed, begin, number - 1)) & 0x7FFFFFFF
            asking = Asking(self.speaker, replace(settings.sampling, seed=seed), settings.sigma, until)
            self._verify(self._search(active, number, asking), number, asking)
            if until is not None and time.monotonic() >= until:
                for one in active:
                    one.stop = one.stop or "limit"
            last = number == settings.turns
            ended = [one for one in active if one.stop is not None or last]
            active = [one for one in active if one.stop is None and not last]
            yield from self._end(ended, asking)
            if not active:
                return

    def _end(self, ended: Sequence[_Open], asking: Asking) -> Sequence[_Open]:
        """What a trajectory still needs when it stops: the rank under its last query, and an answer to fall back on."""
        moved = [one for one in ended if one.turns and one.query is not one.turns[-1].query and one.positive >= 0]
        if moved:
            positive = torch.tensor([one.positive for one in moved], device=self.matrix.device)
            ranks = scan(torch.stack([one.query for one in moved]), self.matrix, k=1, positive=positive).rank
            assert ranks is not None
            for one, rank in zip(moved, ranks.tolist(), strict=True):
                one.rank = rank
        if self.settings.fall_back:
            self._fall_back([one for one in ended if one.stop in (None, "limit")], asking)
        return ended

    def _fall_back(self, ended: Sequence[_Open], asking: Asking) -> None:
        """Answer with the video most probably right, with a span, where a turn gave a probability at all."""
        best: list[tuple[_Open, Turn]] = []
        for one in ended:
            told = [turn for turn in one.turns if turn.probability is not None]
            if told:
                best.append((one, max(told, key=lambda turn: turn.probability or 0.0)))
        paths = [Path(self.corpus.path(turn.video_id)) for _, turn in best]
        videos = self.policy.videos.encode_all(paths)
        pairs = [
            Pair(one.moment, turn.video_id, video, path, 0, asking.sampling.max_tokens)
            for (one, turn), video, path in zip(best, videos, paths, strict=True)
        ]
        replies = ground(self.policy, pairs, [turn for _, turn in best], asking)
        for (one, turn), reply in zip(best, replies, strict=True):
            one.fallback = replace(turn, reply=reply)

    def _search(self, active: Sequence[_Open], number: int, asking: Asking) -> list[_Look]:
        """One sweep for every open trajectory: the videos to verify."""
        started = time.perf_counter()
        settings = self.settings
        queries = torch.stack([one.query for one in active])
        # rejected videos are found too and dropped here, so that one sweep gives the rank in the whole corpus as well
        feeding = settings.refinement == "rocchio"
        most = max(len(one.shown) for one in active) if settings.exclude or feeding else 0
        k = min(settings.verify + most + feeding * settings.rocchio.relevant, len(self.video_ids))
        positive = torch.tensor([one.positive for one in active], device=queries.device)
        found = scan(queries, self.matrix, k=k, positive=positive)
        assert found.rank is not None
        ranks, ids, scores = found.rank.tolist(), found.ids.tolist(), found.scores.tolist()
        finite = torch.isfinite(queries).all(1).tolist()
        seconds = time.perf_counter() - started
        looking: list[tuple[_Open, int, float]] = []
        for place, one in enumerate(active):
            if not finite[place]:
                one.fail(f"query '{one.moment.query_id}': its vector is not finite")
                continue
            one.rank, one.ranking = ranks[place] if one.positive >= 0 else None, ids[place]
            gone = {-1, *(one.shown if settings.exclude else ())}
            best = [(row, score) for row, score in zip(ids[place], scores[place], strict=True) if row not in gone]
            if number == 1 and one.first >= 0:
                score = float(one.query @ self.matrix.rows[one.first].to(one.query))
                best = [(one.first, score), *(other for other in best if other[0] != one.first)]
            if not best:
                one.stop = "limit"  # every video has been shown
            looking += [(one, row, score) for row, score in best[: settings.verify]]
        return self._look(looking, asking, seconds)

    def _look(self, looking: Sequence[tuple[_Open, int, float]], asking: Asking, searched: float) -> list[_Look]:
        """Read the videos that were found; one that cannot be read fails its trajectory."""
        started = time.perf_counter()
        paths: dict[int, Path] = {}
        for one, row, _ in looking:
            try:
                paths[row] = Path(self.corpus.path(self.video_ids[row]))
            except Vsr1Error as error:
                one.fail(str(error))
        features = dict(zip(paths, self.policy.videos.encode(list(paths.values())), strict=True))
        seconds = {"search": searched, "video": time.perf_counter() - started}
        for one, row, _ in looking:
            if isinstance(video := features.get(row), VideoError):
                one.fail(str(video))
        looks = []
        for place, (one, row, score) in enumerate(looking):
            video = features.get(row)
            if one.stop is not None or video is None or isinstance(video, VideoError):
                continue
            limit = asking.sampling.max_tokens
            if self.settings.most_tokens is not None:
                limit = min(limit, max(1, self.settings.most_tokens - one.tokens()))
            one.shown.append(row)
            pair = Pair(one.moment, self.video_ids[row], video, paths[row], asking.sampling.seed + place, limit)
            looks.append(_Look(one, pair, score, dict(seconds)))
        return looks

    def _verify(self, looks: Sequence[_Look], number: int, asking: Asking) -> None:
        """Ask the policy about every video that was found; accept or refine."""
        pairs = [look.pair for look in looks]
        started = time.perf_counter()
        verdicts = ask(self.policy, pairs, asking, self.memo)
        if self.settings.refinement in ("blank", "shuffled"):
            shuffled = self.settings.refinement == "shuffled"
            verdicts = look_elsewhere(self.policy, pairs, verdicts, asking, shuffled=shuffled)
        if self.settings.refinement == "hard":
            verdicts = rewrite(self.policy, pairs, verdicts, asking, self.memo)
        if self.settings.soft_tokens is not None:
            verdicts = [verdict.shortened(self.settings.soft_tokens) for verdict in verdicts]
        spoken = time.perf_counter() - started
        together: dict[int, list[tuple[_Look, Verdict]]] = {}
        for look, verdict in zip(looks, verdicts, strict=True):
            look.seconds["policy"] = spoken
            together.setdefault(look.one.place, []).append((look, verdict))
        refined: list[tuple[_Open, Verdict]] = []
        for looked in together.values():
            chosen = self._decide(looked, number)
            if chosen is not None:
                refined.append((looked[0][0].one, chosen))
        if self.settings.refinement == "rocchio":
            self._feed_back([looked[0][0].one for looked in together.values() if looked[0][0].one.stop != "matched"])
        else:
            self._refine(refined, asking)

    def _decide(self, looked: Sequence[tuple[_Look, Verdict]], number: int) -> Verdict | None:
        """Record what one trajectory saw this turn, the accepted video last; returns the verdict to refine by, if any."""
        one = looked[0][0].one
        matched = [pair for pair in looked if pair[1].reply.answer == "matched"]
        accepted = max(matched, key=lambda pair: pair[1].probability or 0.0, default=None)
        refining = None
        if accepted is None:
            refining = next((verdict for _, verdict in looked if verdict.actions is not None), None)
        for look, verdict in sorted(looked, key=lambda pair: pair is accepted):
            one.turns.append(look.turn(number, verdict, refining=verdict is refining))
        if accepted is not None:
            one.stop = "matched"
        elif self.settings.most_tokens is not None and one.tokens() >= self.settings.most_tokens:
            one.stop = "limit"
        return refining

    def _refine(self, refined: Sequence[tuple[_Open, Verdict]], asking: Asking) -> None:
        """Make the next query of every trajectory that refines: one embedder batch, but one for each number of soft tokens
        where they accumulate."""
        if not refined or self.settings.refinement == "none" or self.settings.soft_tokens == 0:
            return
        if self.settings.refinement == "hard":
            texts = [f"{one.moment.text} {rewriting_text(self.policy, verdict.rewriting)}" for one, verdict in refined]
            vectors = self.embedder.embed_texts(texts)
            for (one, _), vector in zip(refined, vectors, strict=True):
                one.query = vector
            return
        by_length: dict[int, list[_Open]] = {}
        for one, verdict in refined:
            assert verdict.actions is not None
            one.actions = [*(one.actions if self.settings.accumulate else []), verdict.actions]
            by_length.setdefault(len(one.actions), []).append(one)
        for together in by_length.values():
            actions = torch.stack([torch.cat(one.actions) for one in together])
            if self.settings.refinement == "random":
                actions = philox_normal(actions.shape, NoiseStream(asking.sampling.seed), device=actions.device)
            texts = [one.moment.text for one in together]
            vectors = self.embedder.embed_texts(texts, self.policy.head.soft_tokens(actions))
            for one, vector in zip(together, vectors, strict=True):
                one.query = vector

    def _feed_back(self, rejecting: Sequence[_Open]) -> None:
        """Make the next query of every trajectory that accepted nothing, from the vectors of videos."""
        if not rejecting:
            return
        first = torch.stack([one.turns[0].query for one in rejecting])
        rankings, rejected = [one.ranking for one in rejecting], [one.shown for one in rejecting]
        vectors = feedback.moved(first, self.matrix, rankings, rejected, self.settings.rocchio)
        for one, vector in zip(rejecting, vectors, strict=True):
            one.query = vector
