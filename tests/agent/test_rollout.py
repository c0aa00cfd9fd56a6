"""The loop on tiny random models: what it shows, when it stops, what it asks and what it searches with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.agent.loop import ACCEPT, REJECT, SHORT, assert_equal, shown
from vsr1.agent import rollout
from vsr1.agent.rollout import LoopSettings
from vsr1.agent.speech import Sampling
from vsr1.records import Moment


def test_an_accept_ends_the_loop(policy, embedder, corpus, moments, says):
    says(lambda query, number: ACCEPT)
    found = rollout.run(policy, embedder, corpus, moments)
    first = embedder.embed_texts([moment.text for moment in moments])
    for index, one in enumerate(found):
        (turn,) = one.turns
        assert one.stop == "matched" and one.accepted is turn and one.failure is None
        assert turn.video_id == f"v{index}" and turn.rank == one.final_rank == 1
        assert turn.latents is None and turn.actions is None
        assert (turn.reply.start, turn.reply.end) == (1.0, (25 + index) / 8)  # clamped to the shown video
        torch.testing.assert_close(one.final_query, first[index])


def test_an_accept_at_the_second_turn_leaves_the_others_running(policy, embedder, corpus, moments, says):
    says(lambda query, number: ACCEPT if query == moments[2].text and number != 2 else REJECT)
    found = rollout.run(policy, embedder, corpus, moments, turns=3)
    assert [len(one.turns) for one in found] == [3, 3, 2, 3, 3, 3]
    assert [one.stop for one in found] == ["turns", "turns", "matched", "turns", "turns", "turns"]
    assert found[2].accepted is found[2].turns[1]


def test_a_rejected_video_is_not_shown_again(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    for one in rollout.run(policy, embedder, corpus, moments, turns=4):
        assert one.stop == "turns" and one.accepted is None
        assert len(one.turns) == len(set(shown(one))) == 4
        assert all(turn.actions.shape == (4, embedder.dimension) for turn in one.turns)


def test_without_exclusion_and_refinement_it_is_shown_again(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    settings = LoopSettings(turns=3, exclude=False, refinement="none")
    for index, one in enumerate(rollout.run(policy, embedder, corpus, moments, settings=settings)):
        assert shown(one) == [f"v{index}"] * 3


def test_ranks_are_those_of_a_float64_search(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    vectors = corpus.matrix().rows.double()
    ranks = set()
    for one in rollout.run(policy, embedder, corpus, moments):
        positive = corpus.row(one.moment.video_id)
        for query, rank in [*((turn.query, turn.rank) for turn in one.turns), (one.final_query, one.final_rank)]:
            scores = vectors @ query.double()
            assert rank == 1 + int((scores > scores[positive]).sum())
            ranks.add(rank)
        for turn in one.turns:
            expected = vectors[corpus.row(turn.video_id)] @ turn.query.double()
            assert turn.score == pytest.approx(float(expected), abs=1e-5)
    assert len(ranks) > 1


def test_a_corpus_that_has_been_seen_whole_is_the_limit(policy, embedder, make_corpus, files, moments, says):
    says(lambda query, number: REJECT)
    for one in rollout.run(policy, embedder, make_corpus(files[:2]), moments[:2], turns=5):
        assert one.stop == "limit" and sorted(shown(one)) == ["v0", "v1"]


def test_a_broken_file_fails_its_trajectory_alone(policy, embedder, make_corpus, files, moments, says, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    corpus = make_corpus([files[0], broken, *files[2:]])
    says(lambda query, number: ACCEPT)
    found = rollout.run(policy, embedder, corpus, moments)
    assert found[1].stop == "failed" and str(broken) in found[1].failure and found[1].turns == ()
    assert found[1].accepted is None
    others = [one for index, one in enumerate(found) if index != 1]
    assert [(one.stop, shown(one)) for one in others] == [("matched", [f"v{i}"]) for i in (0, 2, 3, 4, 5)]


def test_a_query_without_truth_has_no_rank(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    unknown = Moment("free", moments[0].text)
    elsewhere = replace(moments[1], video_id="of another corpus")
    one, other, known = rollout.run(policy, embedder, corpus, [unknown, elsewhere, moments[2]])
    for found in (one, other):
        assert found.final_rank is None and [turn.rank for turn in found.turns] == [None] * 3
    assert known.final_rank is not None and known.turns[0].rank == 1


def test_an_empty_corpus_is_an_error(policy, embedder, make_corpus, moments):
    with pytest.raises(ValueError, match="corpus is empty"):
        rollout.run(policy, embedder, make_corpus([]), moments)


def test_samples_of_a_query_are_neighbours_and_share_their_prefill(policy, embedder, corpus, moments, asked):
    alone = rollout.run(policy, embedder, corpus, moments[:3], settings=LoopSettings(turns=2, sampling=SHORT))
    assert asked == [(3, 3), (3, 3)]
    settings = LoopSettings(turns=2, samples=3, sampling=SHORT)
    group = rollout.run(policy, embedder, corpus, moments[:3], settings=settings)
    assert asked[2:] == [(3, 9), (3, 9)]
    assert_equal(group, [one for one in alone for _ in range(3)])
    for one, same in zip(group[::3], alone, strict=True):
        for turn, expected in zip(one.turns, same.turns, strict=True):
            torch.testing.assert_close(turn.token_logps, expected.token_logps, atol=1e-4, rtol=1e-3)


def test_sampled_replies_of_a_group_differ(policy, embedder, corpus, moments):
    settings = LoopSettings(turns=1, samples=4, sampling=replace(SHORT, temperature=1.0))
    found = rollout.run(policy, embedder, corpus, moments[:2], settings=settings)
    assert [one.moment for one in found] == [moments[0]] * 4 + [moments[1]] * 4
    for group in (found[:4], found[4:]):
        assert len({one.turns[0].token_ids for one in group}) > 1


def test_samples_that_part_are_still_asked_about_their_own_video(policy, embedder, corpus, moments, says):
    """Exploration sends the samples of a query to different videos: then no prefill can be shared."""
    said = []

    def words(query, number):
        said.append(f"v{number}")
        return REJECT

    says(words)
    settings = LoopSettings(turns=2, samples=6, sigma=3.0, exclude=False)
    found = rollout.run(policy, embedder, corpus, moments[:1], settings=settings)
    second = [one.turns[1].video_id for one in found]
    assert len(set(second)) > 1
    assert said[-6:] == second


def test_controls_of_refinement(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    second = {}
    for how in ("soft", "none", "random", "blank", "shuffled"):
        settings = LoopSettings(turns=2, refinement=how, sampling=Sampling(seed=3))
        found = rollout.run(policy, embedder, corpus, moments, settings=settings)
        first = torch.stack([one.turns[0].query for one in found])
        second[how] = torch.stack([one.turns[1].query for one in found])
        assert torch.equal(first, second[how]) == (how == "none")
    for index, how in enumerate(second):
        for other in list(second)[index + 1 :]:
            distance = (second[how] - second[other]).norm(dim=-1)
            assert distance.min() > 1e-4, f"{how} searches like {other}"


def test_a_rejection_without_refine_keeps_the_query(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT.replace("<REFINE>", ""))
    for one in rollout.run(policy, embedder, corpus, moments, turns=2):
        assert one.turns[0].actions is None
        assert torch.equal(one.turns[0].query, one.turns[1].query)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_the_next_query_holds_the_actions(policy, embedder, corpus, moments, says, sigma):
    says(lambda query, number: REJECT)
    for one in rollout.run(policy, embedder, corpus, moments[:3], settings=LoopSettings(turns=2, sigma=sigma)):
        turn, following = one.turns
        spread = (turn.actions - turn.latents).std()
        assert spread == pytest.approx(sigma, rel=0.2)
        with torch.no_grad():
            soft = torch.stack([policy.head.soft_tokens(turn.actions), policy.head.soft_tokens(turn.latents)])
            of_actions, of_latents = embedder.embed_texts([one.moment.text] * 2, soft)
        torch.testing.assert_close(following.query, of_actions, atol=1e-5, rtol=1e-4)
        if sigma:
            assert (following.query - of_latents).norm() > 1e-3


def test_memory_spares_the_second_run_every_question(policy, embedder, corpus, moments, asked):
    settings, memo = LoopSettings(turns=2, sampling=SHORT), {}
    first = rollout.run(policy, embedder, corpus, moments, settings=settings, memo=memo)
    calls = len(asked)
    assert calls > 0 and set(memo) == {(one.moment.query_id, video) for one in first for video in shown(one)}
    second = rollout.run(policy, embedder, corpus, moments, settings=settings, memo=memo)
    assert len(asked) == calls
    assert_equal(first, second)
    one_more = rollout.run(policy, embedder, corpus, moments, settings=replace(settings, turns=3), memo=memo)
    assert asked[calls:] == [(len(moments), len(moments))]  # only what is new is asked
    assert [shown(one)[:2] for one in one_more] == [shown(one) for one in first]


@pytest.mark.parametrize("how", ["blank", "shuffled"])
def test_a_control_of_the_video_says_the_same_words(policy, embedder, corpus, moments, asked, how):
    settings, memo = LoopSettings(turns=1, sampling=SHORT), {}
    found = rollout.run(policy, embedder, corpus, moments, settings=settings, memo=memo)
    calls, verdicts = len(asked), dict(memo)
    other = rollout.run(policy, embedder, corpus, moments, settings=replace(settings, refinement=how), memo=memo)
    assert len(asked) == calls
    assert memo == verdicts  # what was made before another video is no verdict on this one
    for one, twin in zip(found, other, strict=True):
        (turn,), (changed,) = one.turns, twin.turns
        assert (turn.text, turn.video_id) == (changed.text, changed.video_id)
        assert (turn.actions is None) == (changed.actions is None)
        assert turn.actions is None or not torch.equal(turn.actions, changed.actions)


def test_another_video_is_another_one(policy, embedder, corpus, moments, says):
    """Where all are shown the same video, as where one query is alone, the other video is an empty one."""
    says(lambda query, number: REJECT)

    def run(how, queries, first):
        settings = LoopSettings(turns=1, sampling=SHORT, refinement=how)
        found = rollout.run(policy, embedder, corpus, queries, settings=settings, first=first)
        return [one.turns[0].actions for one in found]

    same = moments[:3], ["v5"] * 3
    assert all(map(torch.equal, run("shuffled", *same), run("blank", *same)))
    mixed = moments[:3], ["v5", "v5", "v4"]
    assert not any(map(torch.equal, run("shuffled", *mixed), run("blank", *mixed)))


def test_equal_seeds_repeat_a_run_and_other_seeds_do_not(policy, embedder, corpus, moments):
    def run(seed):
        sampling = Sampling(temperature=1.0, max_tokens=6, seed=seed)
        return rollout.run(policy, embedder, corpus, moments, settings=LoopSettings(turns=2, sampling=sampling))

    one, same, other = run(1), run(1), run(2)
    assert_equal(one, same)
    texts = [[turn.text for found in runs for turn in found.turns] for runs in (one, other)]
    assert sum(a != b for a, b in zip(*texts, strict=True)) > len(moments)


def test_seeds_also_choose_the_exploration(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)

    def actions(seed):
        settings = LoopSettings(turns=2, samples=2, sigma=0.3, sampling=Sampling(seed=seed))
        found = rollout.run(policy, embedder, corpus, moments[:2], settings=settings)
        return torch.stack([turn.actions - turn.latents for one in found for turn in one.turns[:1]])

    assert torch.equal(actions(1), actions(1))
    noise = torch.cat([actions(1), actions(2)])
    assert len({tuple(one.flatten().tolist()) for one in noise}) == 8  # every sample of every seed draws its own


@pytest.mark.parametrize("scripted", [True, False])
def test_batches_change_nothing(policy, embedder, corpus, moments, says, scripted):
    if scripted:
        says(lambda query, number: ACCEPT if number == 4 else REJECT)
    settings = LoopSettings(turns=3, sampling=SHORT)
    reports: list[tuple[int, int]] = []
    whole = rollout.run(policy, embedder, corpus, moments, settings=settings)
    parts = rollout.run(
        policy,
        embedder,
        corpus,
        moments,
        settings=replace(settings, batch=4),
        progress=lambda done, total: reports.append((done, total)),
    )
    assert_equal(whole, parts)
    assert reports == [(done, 6) for done in range(1, 7)]


def test_a_stream_yields_before_the_next_batch_begins(policy, embedder, corpus, moments, asked):
    settings = LoopSettings(turns=1, batch=2, sampling=SHORT)
    stream = rollout.stream(policy, embedder, corpus, moments, settings)
    assert next(stream).moment == moments[0] and asked == [(2, 2)]
    assert len(list(stream)) == 5 and len(asked) == 3


def test_no_queries_give_no_trajectories(policy, embedder, corpus):
    assert rollout.run(policy, embedder, corpus, []) == []


def test_every_turn_says_where_its_time_went(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    for one in rollout.run(policy, embedder, corpus, moments[:2]):
        for turn in one.turns:
            assert set(turn.seconds) == {"search", "video", "policy"} and min(turn.seconds.values()) >= 0
