"""Rocchio's feedback and shortened refinements in the loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.agent.loop import ACCEPT, REJECT, assert_equal, shown
from vsr1.agent import feedback, rollout
from vsr1.agent.feedback import Rocchio
from vsr1.agent.rollout import LoopSettings
from vsr1.ops.corpus_scan import CorpusMatrix

TURNS_AWAY = REJECT.replace("<REFINE>", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_queries_move_from_the_rejected_towards_the_best_others(dtype, quantized):
    rows = F.normalize(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)), dim=1).to(dtype)
    matrix = CorpusMatrix(rows).quantize() if quantized else CorpusMatrix(rows)
    queries = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    rankings, rejected = [[4, 2, 7, 1], [5, 0, -1], [3, -1]], [[2], [6, 8], [3]]
    found = feedback.moved(queries, matrix, rankings, rejected, Rocchio(alpha=2.0, beta=0.5, gamma=0.25, relevant=2))
    wide = rows.float()
    expected = [  # the third query has nothing left to move towards
        2 * queries[0] + 0.5 * wide[[4, 7]].mean(0) - 0.25 * wide[2],
        2 * queries[1] + 0.5 * wide[[5, 0]].mean(0) - 0.25 * wide[[6, 8]].mean(0),
        2 * queries[2] - 0.25 * wide[3],
    ]
    assert found.dtype == queries.dtype
    torch.testing.assert_close(found, F.normalize(torch.stack(expected), dim=1))


@pytest.mark.parametrize("reject", [REJECT, TURNS_AWAY], ids=["refines", "does not"])
def test_the_loop_feeds_back_what_it_has_rejected(policy, embedder, corpus, moments, says, reject):
    """Always from the first query and from every video rejected so far, whether the policy would refine or not."""
    says(lambda query, number: reject if query != moments[3].text else ACCEPT)
    settings = LoopSettings(turns=3, refinement="rocchio", rocchio=Rocchio(relevant=2))
    matrix = corpus.matrix()
    row = {video_id: number for number, video_id in enumerate(corpus.video_ids)}
    for one in rollout.run(policy, embedder, corpus, moments, settings=settings):
        if one.moment == moments[3]:
            assert one.stop == "matched" and one.final_query is one.turns[0].query
            continue
        queries = [*(turn.query for turn in one.turns), one.final_query]
        for turn in (1, 2, 3):
            gone = [row[video] for video in shown(one)[:turn]]
            ranking = (matrix.rows.float() @ queries[turn - 1].float()).argsort(descending=True).tolist()
            best = [other for other in ranking if other not in gone][:2]
            wide = matrix.rows.float()
            expected = queries[0] + 0.75 * wide[best].mean(0) - 0.15 * wide[gone].mean(0)
            torch.testing.assert_close(queries[turn], F.normalize(expected, dim=0), atol=1e-5, rtol=1e-4)
        assert len(set(shown(one))) == 3


def test_feedback_stays_with_the_videos_there_are(policy, embedder, corpus, moments, says):
    """More relevant videos than the corpus holds, and rejected ones that may be shown again."""
    says(lambda query, number: REJECT)
    settings = LoopSettings(turns=7, refinement="rocchio", exclude=False)
    for one in rollout.run(policy, embedder, corpus, moments[:2], settings=settings):
        assert len(one.turns) == 7 and torch.isfinite(one.final_query).all()


def test_only_the_first_soft_tokens_are_inserted(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    memo = {}
    for count in (3, None, 1):  # one memo serves every number of them
        settings = LoopSettings(turns=2, soft_tokens=count)
        for one in rollout.run(policy, embedder, corpus, moments[:2], settings=settings, memo=memo):
            for turn, query in zip(one.turns, (one.turns[1].query, one.final_query), strict=True):
                assert turn.actions.shape[0] == turn.latents.shape[0] == (count or 4)
                with torch.no_grad():
                    expected = embedder.embed_texts([one.moment.text], policy.head.soft_tokens(turn.actions[None]))[0]
                torch.testing.assert_close(query, expected, atol=1e-5, rtol=1e-4)
    assert all(verdict.actions.shape[0] == 4 for verdict in memo.values())


def test_the_first_soft_tokens_are_those_of_a_policy_that_makes_no_more(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    first = rollout.run(policy, embedder, corpus, moments[:2], settings=LoopSettings(turns=2, soft_tokens=2))
    policy.settings = replace(policy.settings, soft_tokens=2)
    assert_equal(first, rollout.run(policy, embedder, corpus, moments[:2], settings=LoopSettings(turns=2)))


def test_no_soft_tokens_are_no_refinement(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    none = rollout.run(policy, embedder, corpus, moments[:2], settings=LoopSettings(turns=2, soft_tokens=0))
    for one in none:
        assert one.final_query is one.turns[0].query and one.turns[0].actions.shape[0] == 0
    same = rollout.run(policy, embedder, corpus, moments[:2], settings=LoopSettings(turns=2, refinement="none"))
    assert [shown(one) for one in none] == [shown(one) for one in same]


@pytest.mark.parametrize("count", [-1, 5])
def test_a_number_of_soft_tokens_that_there_is_not(policy, embedder, corpus, moments, count):
    with pytest.raises(ValueError, match=f"soft_tokens is {count}; the policy makes 4"):
        rollout.run(policy, embedder, corpus, moments, settings=LoopSettings(soft_tokens=count))
