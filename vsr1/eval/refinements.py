"""Refinements looked at one by one: what the first n soft tokens find, and how long soft tokens and words take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vsr1.agent import verdict
from vsr1.agent.generate import OwnSpeaker, prompt_of, soft_tokens_after
from vsr1.agent.rollout import Library
from vsr1.agent.speech import Question, Sampling
from vsr1.agent.verdict import Asking, Pair, Verdict
from vsr1.eval.outcomes import Floats
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import CorpusMatrix, scan
from vsr1.records import Trajectory, Turn

_TIMED, _BATCH = 4, 16  # batches that are timed, refinements in each


@torch.no_grad()
def first(
    policy: Policy, embedder: Embedder, matrix: CorpusMatrix, rows: dict[str, int], trajectories: Sequence[Trajectory]
) -> dict[str, Floats]:
    """Under "0", "1", .. the number of all soft tokens, an array (N,): 1 where the right video is first in the whole corpus
    after the first refinement, if that inserts only its first n soft tokens. NaN for trajectories without a turn."""
    turns = [one.turns[0] if one.turns else None for one in trajectories]
    refined = [index for index, turn in enumerate(turns) if turn is not None and turn.actions is not None]
    rank = np.array([np.nan if turn is None else turn.rank for turn in turns], np.float64)
    found = {}
    for count in range(policy.settings.soft_tokens + 1):
        now = rank.copy()
        if count and refined:
            actions = torch.stack([_actions(trajectories[index].turns[0])[:count] for index in refined])
            texts = [trajectories[index].moment.text for index in refined]
            vectors = embedder.embed_texts(texts, policy.head.soft_tokens(actions))
            right = [rows[trajectories[index].moment.video_id or ""] for index in refined]
            swept = scan(vectors, matrix, k=1, positive=torch.tensor(right, device=vectors.device)).rank
            assert swept is not None
            now[refined] = swept.cpu().numpy()
        found[str(count)] = np.where(np.isnan(now), np.nan, now == 1)
    return found


@torch.no_grad()
def seconds(
    policy: Policy, embedder: Embedder, corpus: Library, trajectories: Sequence[Trajectory], max_tokens: int
) -> dict[str, Floats]:
    """Under "soft" and "hard", seconds a refinement, one number for each of at most four batches of first refinements.

    Both kinds are timed on the same queries and from the same point: the query and the rejected video are read, the soft
    tokens or the words made, and the new query embedded. (In the loop, soft tokens go on from the reply's own cache and are
    cheaper by that reading.) Without a refinement there are no numbers.
    """
    refined = [one for one in trajectories if one.turns and one.turns[0].actions is not None]
    refined = refined[: _TIMED * _BATCH]
    batches = [refined[begin : begin + _BATCH] for begin in range(0, len(refined), _BATCH)]
    asking = Asking(OwnSpeaker(), Sampling(max_tokens=max_tokens))
    spent: dict[str, list[float]] = {"soft": [], "hard": []}
    for number, batch in enumerate([*batches[:1], *batches]):  # the first once more, as a warm-up
        paths = [Path(corpus.path(one.turns[0].video_id)) for one in batch]
        videos = policy.videos.encode_all(paths)
        pairs = [
            Pair(one.moment, one.turns[0].video_id, video, path, 0, max_tokens)
            for one, video, path in zip(batch, videos, paths, strict=True)
        ]
        verdicts = [_verdict(one.turns[0]) for one in batch]
        for kind, refine in (("soft", _soft), ("hard", _hard)):
            taken = _timed(partial(refine, policy, embedder, pairs, verdicts, asking))
            if number:
                spent[kind].append(taken / len(batch))
    return {kind: np.array(each) for kind, each in spent.items()}


def _soft(
    policy: Policy, embedder: Embedder, pairs: Sequence[Pair], verdicts: Sequence[Verdict], asking: Asking
) -> Tensor:
    prompts = [prompt_of(policy, Question(pair.moment.text, pair.video, pair.path)).row for pair in pairs]
    replies = [one.token_ids for one in verdicts]
    made = soft_tokens_after(policy, prompts, range(len(prompts)), replies)
    return embedder.embed_texts([pair.moment.text for pair in pairs], policy.head.soft_tokens(made.actions))


def _hard(
    policy: Policy, embedder: Embedder, pairs: Sequence[Pair], verdicts: Sequence[Verdict], asking: Asking
) -> Tensor:
    said = verdict.rewrite(policy, pairs, verdicts, asking)
    words = [verdict.rewriting_text(policy, one.rewriting) for one in said]
    return embedder.embed_texts([f"{pair.moment.text} {text}" for pair, text in zip(pairs, words, strict=True)])


def _timed(work: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    work().cpu()  # waits for a GPU
    return time.perf_counter() - began


def _verdict(turn: Turn) -> Verdict:
    return Verdict(
        turn.reply, turn.text, turn.token_ids, turn.token_logps, turn.probability, turn.latents, turn.actions
    )


def _actions(turn: Turn) -> Tensor:
    assert turn.actions is not None
    return turn.actions
