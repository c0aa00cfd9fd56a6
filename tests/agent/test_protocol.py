"""Reading replies: everything the policy may say, sensible or not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsr1.agent import protocol
from vsr1.records import Reply

seconds = st.integers(0, 500).map(float) | st.integers(0, 5000).map(lambda tenth: tenth / 10)
thoughts = st.text(st.characters(codec="ascii", exclude_characters="<>"), max_size=30).map(str.strip)


@given(thoughts, st.sampled_from(["matched", "not_matched"]), st.none() | st.tuples(seconds, seconds), st.booleans())
def test_what_is_rendered_is_read_back(think, answer, span, refine):
    start, end = sorted(span) if span else (None, None)
    reply = Reply(answer, start, end, think, refine)
    assert protocol.parse(protocol.render(reply)) == reply


pieces = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<start>", "</start>", "<end>", "</end>", "<REFINE>",
     "matched", "not_matched", "NOT matched", "3", "-4.5", "1e9", "nan", "7 s", " ", "\n", "<", "é", "\x00"]
)  # fmt: skip


@given(st.lists(pieces | st.text(max_size=5), max_size=25).map("".join), st.none() | st.floats(0, 100))
def test_no_text_breaks_the_parser(text, duration):
    reply = protocol.parse(text, duration=duration)
    assert reply.answer in ("matched", "not_matched", None)
    assert (reply.start is None) == (reply.end is None)
    if reply.start is not None and reply.end is not None:
        assert 0 <= reply.start <= reply.end and math.isfinite(reply.end)
        assert duration is None or reply.end <= duration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>matched</answer><start>2</start><end>5.5</end><REFINE>", Reply("matched", 2.0, 5.5, "a", True)),
        ("<answer> Not_Matched </answer>", Reply("not_matched", None, None, "", False)),
        ("<answer>matched</answer><start>9</start><end>4</end>", Reply("matched", 4.0, 9.0, "", False)),
        ("<answer>matched</answer><start>9</start>", Reply("matched", None, None, "", False)),
        ("<answer>maybe</answer><REFINE>", Reply(None, None, None, "", True)),
        (
            "<think><answer>matched</answer></think><answer>not_matched</answer>",
            Reply("not_matched", None, None, "<answer>matched</answer>", False),
        ),
        ("<think>never closed <answer>matched</answer>", Reply("matched", None, None, "", False)),
    ],
    ids=["whole", "spelling", "reversed", "half-span", "unknown", "tags-in-thought", "open-thought"],
)  # fmt: skip
def test_cases(text, expected):
    assert protocol.parse(text) == expected


def test_spans_are_clamped_to_the_shown_video():
    reply = protocol.parse("<answer>matched</answer><start>3</start><end>99</end>", duration=12.0)
    assert (reply.start, reply.end) == (3.0, 12.0)
