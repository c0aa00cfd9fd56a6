"""Words for the policy's mouth, and what the tests of the loop look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from vsr1.agent import protocol, verdict
from vsr1.agent.generate import Said, SoftTokens, generate, soft_tokens_after
from vsr1.agent.speech import Sampling, Spoken
from vsr1.corpus import Corpus
from vsr1.records import Reply, Trajectory

REJECT = protocol.render(Reply("not_matched", None, None, "no", True))
ACCEPT = protocol.render(Reply("matched", 1.0, 999.0, "yes", True))
SHORT = Sampling(max_tokens=6)


@pytest.fixture
def corpus(make_corpus, files) -> Corpus:
    return make_corpus(files)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """(prompts, replies) of every call of `generate` the loop makes."""
    calls = []

    def counted(policy, prompts, owner, sampling, **options):
        calls.append((len(prompts), len(owner)))
        return generate(policy, prompts, owner, sampling, **options)

    monkeypatch.setattr(verdict, "generate", counted)
    return calls


@pytest.fixture
def says(monkeypatch) -> Callable[..., None]:
    """Puts words into the policy's mouth: `says(words)` with words(query text, number of the shown video) -> reply,
    and with odds(number of the shown video) -> log-odds of a match, none by default.

    The words are read by the real model, so hidden states, cache and soft tokens are those of a policy that said them.
    """

    def script(words, odds=lambda number: None):
        def generate(policy, prompts, owner, sampling, *, refining=None, **_):
            replies, numbers = [], []
            for place in owner:
                query = policy.text(prompts[place].row.token_ids).split('Query: "')[1].split('"')[0]
                number = round(prompts[place].duration * 8) - 25  # the files differ in length by one frame each
                numbers.append(number)
                replies.append(tuple(policy.tokenizer(words(query, number), add_special_tokens=False)["input_ids"]))
            rows = [row for row, ids in enumerate(replies) if ids[-1] == policy.refine_id and refining.wants(row, ids)]
            soft = {}
            if rows:
                made = soft_tokens_after(
                    policy,
                    [prompt.row for prompt in prompts],
                    [owner[row] for row in rows],
                    [replies[row] for row in rows],
                    refining.sigma,
                    refining.noise,
                )
                soft = {row: SoftTokens(made.means[n], made.actions[n], made.logps[n]) for n, row in enumerate(rows)}
            for row, ids in enumerate(replies):
                yield row, Said(Spoken(ids, torch.zeros(len(ids)), odds(numbers[row]), True), soft.get(row))

        monkeypatch.setattr(verdict, "generate", generate)

    return script


def shown(one: Trajectory) -> list[str]:
    return [turn.video_id for turn in one.turns]


def assert_equal(one: Sequence[Trajectory], other: Sequence[Trajectory]) -> None:
    """Two runs say, show and search the same; vectors up to rounding."""
    assert [found.moment for found in one] == [found.moment for found in other]
    for a, b in zip(one, other, strict=True):
        assert (shown(a), a.stop, a.final_rank) == (shown(b), b.stop, b.final_rank)
        assert [(t.text, t.token_ids, t.rank) for t in a.turns] == [(t.text, t.token_ids, t.rank) for t in b.turns]
        torch.testing.assert_close(a.final_query, b.final_query, atol=1e-5, rtol=1e-4)
        for t, u in zip(a.turns, b.turns, strict=True):
            torch.testing.assert_close(t.query, u.query, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(t.actions, u.actions, atol=1e-4, rtol=1e-3)
