"""Where a reply's answer begins, and what a constrained reply may be."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vsr1.agent import protocol
from vsr1.agent.constraint import at_most, reply_pattern
from vsr1.agent.speech import AnswerToken, answer_ids, answer_token
from vsr1.records import Reply


class Pieces:
    """A vocabulary that always takes its longest piece; characters are pieces."""

    def __init__(self, *pieces):
        self.pieces = [*pieces, *map(chr, range(32, 127))]

    def __call__(self, text, add_special_tokens=False):
        ids = []
        while text:
            best = max((piece for piece in self.pieces if text.startswith(piece)), key=len)
            ids.append(self.pieces.index(best))
            text = text[len(best) :]
        return {"input_ids": ids}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[index] for index in ids)


@pytest.mark.parametrize(
    ("pieces", "first", "second"),
    [
        (("<answer>", "matched", "not_matched"), "matched", "not_matched"),
        (("<", "answer", ">", "matched", "not", "_matched"), "matched", "not"),
        (("><", "answer", ">matched", ">not"), ">matched", ">not"),
        (("answer>m", "answer>n"), "answer>m", "answer>n"),
    ],
    ids=["tag-is-a-token", "tag-in-pieces", "merged-bracket", "merged-tag"],
)
@pytest.mark.parametrize("answer", ["matched", "not_matched"])
def test_the_answer_token_is_found_in_any_vocabulary(pieces, first, second, answer):
    tokenizer = Pieces(*pieces)
    text = f"<think>is it <answer>? no</think><answer>{answer}</answer>"
    ids = tokenizer(text)["input_ids"]
    found = answer_token(tokenizer, ids)
    assert found == AnswerToken(found.position, tokenizer.pieces.index(first), tokenizer.pieces.index(second))
    assert ids[found.position] == (found.matched if answer == "matched" else found.not_matched)
    assert {found.matched, found.not_matched} <= set(answer_ids(tokenizer))
    assert answer_token(tokenizer, ids[: found.position]) is None
    assert answer_token(tokenizer, []) is None


seconds = st.floats(0, 200).map(lambda second: round(second, 2))
thoughts = st.text().filter(lambda text: "<answer>" not in text)


@settings(max_examples=40, deadline=None)
@given(thoughts, seconds, seconds, seconds, st.booleans())
def test_a_constrained_reply_is_what_render_writes_with_times_within_the_video(think, start, end, duration, matched):
    reply = Reply("matched", start, end, think, False) if matched else Reply("not_matched", None, None, think, False)
    accepted = re.fullmatch(reply_pattern(duration), protocol.render(reply))
    assert bool(accepted) == (not matched or max(start, end) <= duration)


@pytest.mark.parametrize("text", ["maybe", "matched", "matched</answer> ", "not_matched</answer><start>1</start>"])
def test_nothing_else_may_stand_behind_the_tag(text):
    assert not re.fullmatch(reply_pattern(9.0), f"<think>a</think><answer>{text}")
    assert re.fullmatch(reply_pattern(9.0), "<think>a <answe <<answer b</think><answer>not_matched</answer>")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**5), st.integers(0, 10**5), st.sampled_from([1, 10, 1000, 10**5]))
def test_numbers_up_to_a_limit(number, limit, scale):
    text = f"{number / scale:g}"
    assume("e" not in text)
    assert bool(re.fullmatch(at_most(limit / scale), text)) == (number <= limit)


@pytest.mark.parametrize("limit", [0.0, 3.0, 3.125, 12.5, 29.97, 100.0, 123.4567])
def test_numbers_close_to_a_limit(limit):
    for step in (-1.0, -0.1, -0.01, -0.001, 0.0, 0.001, 0.01, 0.1, 1.0):
        number = round(limit + step, 4)
        assert bool(re.fullmatch(at_most(limit), f"{number}")) == (0 <= number <= limit), number
