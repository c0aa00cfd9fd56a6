"""What the loop can be asked for beyond its defaults, and what becomes of it when something fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.agent.loop import ACCEPT, REJECT, SHORT, assert_equal, shown
from vsr1.agent import rollout, verdict
from vsr1.agent.generate import Said, generate
from vsr1.agent.rollout import Failures, LoopSettings
from vsr1.agent.speech import Sampling, Spoken
from vsr1.corpus import Corpus
from vsr1.errors import CorpusError, Vsr1Error
from vsr1.records import Reply


def test_several_videos_can_be_verified_in_a_turn(policy, embedder, corpus, moments, says):
    """Of the matched the likeliest is accepted and recorded last; of the rejected only the best ranked refines."""
    says(lambda query, number: REJECT)
    for one in rollout.run(policy, embedder, corpus, moments, settings=LoopSettings(turns=2, verify=2)):
        assert [turn.number for turn in one.turns] == [1, 1, 2, 2] and len(set(shown(one))) == 4
        assert [turn.actions is not None for turn in one.turns] == [True, False, True, False]
        assert one.turns[0].score >= one.turns[1].score and one.turns[0].rank == one.turns[1].rank
    odds = {"v0": -1.0, "v1": 3.0, "v2": 2.0, "v3": 0.5, "v4": 0.2, "v5": 1.0}
    says(lambda query, number: ACCEPT, lambda number: odds[f"v{number}"])
    for one in rollout.run(policy, embedder, corpus, moments, settings=LoopSettings(verify=3)):
        assert one.stop == "matched" and len(one.turns) == 3
        assert one.accepted.video_id == max(shown(one), key=odds.get)
        for turn in one.turns:
            assert turn.probability == pytest.approx(torch.tensor(odds[turn.video_id]).sigmoid().item())


def test_probabilities_are_calibrated(policy, embedder, corpus, moments, says):
    policy.settings = replace(policy.settings, calibration=(0.5, -1.0))
    says(lambda query, number: ACCEPT, lambda number: 3.0)
    (one,) = rollout.run(policy, embedder, corpus, moments[:1])
    assert one.turns[0].probability == pytest.approx(torch.tensor(0.5).sigmoid().item())


def test_soft_tokens_accumulate_or_are_made_anew(policy, embedder, corpus, moments, says):
    says(lambda query, number: REJECT)
    for accumulate in (False, True):
        settings = LoopSettings(turns=3, accumulate=accumulate)
        for one in rollout.run(policy, embedder, corpus, moments[:2], settings=settings):
            kept = [turn.actions for turn in one.turns]
            for upto, query in ((1, one.turns[1].query), (2, one.turns[2].query), (3, one.final_query)):
                inserted = torch.cat(kept[:upto] if accumulate else kept[upto - 1 : upto])
                with torch.no_grad():
                    expected = embedder.embed_texts([one.moment.text], policy.head.soft_tokens(inserted[None]))[0]
                torch.testing.assert_close(query, expected, atol=1e-5, rtol=1e-4)


def test_a_refinement_in_words_searches_with_them(policy, embedder, corpus, moments, says, monkeypatch):
    says(lambda query, number: REJECT)
    rejecting, begun = verdict.generate, []
    words = tuple(policy.tokenizer(" a circle ;", add_special_tokens=False)["input_ids"])

    def generate(policy, prompts, owner, sampling, *, stop=None, **options):
        if stop is None:
            yield from rejecting(policy, prompts, owner, sampling, **options)
            return
        begun.extend(prompt.begun for prompt in prompts)
        assert stop == policy.settings.rewriting[1]
        for place in range(len(owner)):
            yield place, Said(Spoken(words, torch.zeros(len(words)), None, True), None)

    monkeypatch.setattr(verdict, "generate", generate)
    settings, memo = LoopSettings(turns=2, refinement="hard"), {}
    found = rollout.run(policy, embedder, corpus, moments[:3], settings=settings, memo=memo)
    assert begun == [policy.settings.rewriting[0]] * 6
    for one in found:
        assert [turn.rewriting for turn in one.turns] == [words, words]
        with torch.no_grad():
            expected = embedder.embed_texts([one.moment.text + " a circle"])[0]
        torch.testing.assert_close(one.turns[1].query, expected)
    again = rollout.run(policy, embedder, corpus, moments[:3], settings=settings, memo=memo)
    assert len(begun) == 6  # remembered
    assert_equal(found, again)


def test_where_nothing_matched_the_likeliest_video_is_the_answer(policy, embedder, corpus, moments, says, monkeypatch):
    odds = [0.1, -2.0, 0.7, 0.3, -1.0, 0.2]
    says(lambda query, number: ACCEPT if query == moments[0].text else REJECT, lambda number: odds[number])
    grounded = []

    def ground(policy, pairs, turns, asking):
        grounded.extend(
            (pair.moment.query_id, pair.video_id, turn.video_id) for pair, turn in zip(pairs, turns, strict=True)
        )
        return [Reply("matched", 1.0, 2.0, "", False)] * len(pairs)

    monkeypatch.setattr(rollout, "ground", ground)
    found = rollout.run(policy, embedder, corpus, moments, settings=LoopSettings(turns=3, fall_back=True))
    assert found[0].accepted is not None and found[0].fallback is None
    for one in found[1:]:
        best = max(shown(one), key=lambda video: odds[int(video[1:])])
        assert one.accepted is None and one.fallback.video_id == best
        assert (one.fallback.reply.start, one.fallback.reply.end) == (1.0, 2.0)
        assert (one.moment.query_id, best, best) in grounded
    assert len(grounded) == len(found) - 1
    assert all(one.fallback is None for one in rollout.run(policy, embedder, corpus, moments))


def test_a_forced_answer_is_read_behind_the_policys_own_thoughts(policy, embedder, corpus, moments, monkeypatch):
    settings = LoopSettings(turns=1, sampling=SHORT)
    (one,) = rollout.run(policy, embedder, corpus, moments[:1], settings=settings)
    asked = []
    monkeypatch.setattr(
        verdict, "generate", lambda *arguments, **options: asked.append(arguments) or generate(*arguments, **options)
    )
    turn = replace(one.turns[0], text="<think>so</think><answer>not_matched</answer><REFINE>")
    path = corpus.path(turn.video_id)
    (video,) = policy.videos.encode_all([path])
    pair = verdict.Pair(moments[0], turn.video_id, video, path, 0, 9)
    (reply,) = verdict.ground(policy, [pair], [turn], verdict.Asking(rollout.OwnSpeaker(), Sampling(temperature=1.0)))
    ((_, (prompt,), _, sampling),) = asked
    assert prompt.begun == "<think>so</think><answer>matched</answer><start>"
    assert policy.text(prompt.row.token_ids).endswith("<|im_start|>assistant\n" + prompt.begun)
    assert sampling.constrained and sampling.temperature == 0
    assert reply.answer == "matched" and reply.think == "so" and 0 <= reply.start <= reply.end <= video.duration


def test_limits_in_tokens_and_seconds_are_hard(policy, embedder, corpus, moments):
    settings = LoopSettings(turns=3, sampling=SHORT, most_tokens=8)
    for one in rollout.run(policy, embedder, corpus, moments, settings=settings):
        assert [len(turn.token_ids) for turn in one.turns] == [6, 2] and one.stop == "limit"
    settings = LoopSettings(turns=3, sampling=SHORT, seconds=0.0)
    for one in rollout.run(policy, embedder, corpus, moments, settings=settings):
        assert [turn.token_ids for turn in one.turns] == [()] and one.stop == "limit"


class Elsewhere:
    """A corpus that knows no file for some of its videos."""

    def __init__(self, corpus: Corpus, missing: Sequence[str]) -> None:
        self.corpus, self.missing = corpus, missing
        self.video_ids, self.matrix = corpus.video_ids, corpus.matrix

    def path(self, video_id: str):
        if video_id in self.missing:
            raise CorpusError(f"video '{video_id}' has no file")
        return self.corpus.path(video_id)


def test_a_retrieval_that_fails_fails_its_trajectory_alone(policy, embedder, corpus, moments, says, monkeypatch):
    says(lambda query, number: ACCEPT)
    found = rollout.run(policy, embedder, Elsewhere(corpus, ["v1"]), moments)
    assert [one.stop for one in found] == ["matched", "failed"] + ["matched"] * 4
    assert found[1].failure == "video 'v1' has no file" and found[1].turns == ()
    embed = embedder.embed_texts

    def broken(texts, *soft):
        vectors = embed(texts, *soft)
        vectors[texts.index(moments[2].text)] = float("nan")
        return vectors

    monkeypatch.setattr(embedder, "embed_texts", broken)
    found = rollout.run(policy, embedder, corpus, moments)
    assert [one.stop == "failed" for one in found] == [False, False, True, False, False, False]
    assert "not finite" in found[2].failure


def test_a_run_stops_when_too_much_fails(policy, embedder, corpus, moments, says):
    says(lambda query, number: ACCEPT)
    broken = Elsewhere(corpus, ["v1", "v4"])
    with pytest.raises(Vsr1Error, match=r"2 of 6 trajectories failed, more than 1%; the last: video 'v4' has no file"):
        rollout.run(policy, embedder, broken, moments)
    group = LoopSettings(samples=8)  # one query's group may fail
    found = rollout.run(policy, embedder, Elsewhere(corpus, ["v1"]), moments, settings=group)
    assert [one.stop == "failed" for one in found] == [False] * 8 + [True] * 8 + [False] * 32
    assert [one.sample for one in found] == list(range(8)) * 6
    counted = Failures()
    rollout.run(policy, embedder, Elsewhere(corpus, ["v1"]), moments, failures=counted)
    with pytest.raises(Vsr1Error, match="2 of 12"):
        rollout.run(policy, embedder, Elsewhere(corpus, ["v1"]), moments, failures=counted)
    patient = Failures(share=0.5)
    assert len(rollout.run(policy, embedder, broken, moments, failures=patient)) == 6 and patient.failed == 2


def test_trajectories_are_streamed_as_they_finish(policy, embedder, corpus, moments, says):
    says(lambda query, number: ACCEPT if query in (moments[3].text, moments[5].text) else REJECT)
    stream = rollout.stream(policy, embedder, corpus, moments, LoopSettings(turns=2))
    order = [one.moment.query_id for one in stream]
    assert order == ["q3", "q5", "q0", "q1", "q2", "q4"]


@pytest.mark.parametrize("wrong", [{"turns": 0}, {"verify": 0}, {"samples": 0}])
def test_bad_settings_are_named(policy, embedder, corpus, moments, wrong):
    with pytest.raises(ValueError, match="at least 1"):
        rollout.run(policy, embedder, corpus, moments, settings=LoopSettings(**wrong))


class Parrot:
    """An engine that only speaks: every reply is the same."""

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, []

    def speak(self, policy, questions, owner, sampling, *, seeds=None, deadline=None):
        self.asked.append((len(questions), list(owner), len(set(seeds))))
        ids = tuple(policy.tokenizer(self.text, add_special_tokens=False)["input_ids"])
        return [Spoken(ids, torch.zeros(len(ids)), 0.5, True)] * len(owner)

    def sync(self, policy): ...


def test_an_engine_that_only_speaks_gets_its_soft_tokens_from_ours(policy, embedder, corpus, moments, says):
    parrot = Parrot(REJECT)
    settings = LoopSettings(turns=2, samples=2)
    found = rollout.run(policy, embedder, corpus, moments[:3], settings=settings, speaker=parrot)
    assert parrot.asked[0] == (3, [0, 0, 1, 1, 2, 2], 6) and len(parrot.asked) == 2
    assert found[0].turns[0].probability == pytest.approx(torch.tensor(0.5).sigmoid().item())
    says(lambda query, number: REJECT)
    ours = rollout.run(policy, embedder, corpus, moments[:3], settings=settings)
    for one, same in zip(found, ours, strict=True):
        for turn, expected in zip(one.turns, same.turns, strict=True):
            torch.testing.assert_close(turn.actions, expected.actions, atol=1e-5, rtol=1e-4)
    accepting = rollout.run(policy, embedder, corpus, moments[:3], speaker=Parrot(ACCEPT))
    assert all(one.turns[0].actions is None for one in accepting)
