"""The protocol between the loop and the policy: one prompt format and one reply format, for training and use alike.

A prompt shows one query and one retrieved video; a reply thinks, answers, gives a span if the video matches, and ends
with `<REFINE>`, whose hidden state seeds the soft tokens of the next query.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from vsr1.models.backbone import Row
from vsr1.models.policy import SYSTEM
from vsr1.models.tokenizer import IM_END, IM_START, REFINE
from vsr1.models.vision import VideoFeatures, video_token_ids
from vsr1.records import Answer, Reply

_ANSWERS: dict[str, Answer] = {
    "matched": "matched",
    "match": "matched",
    "not_matched": "not_matched",
    "notmatched": "not_matched",
    "not-matched": "not_matched",
    "not matched": "not_matched",
    "mismatch": "not_matched",
}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def prompt(tokenizer: PreTrainedTokenizerBase, query: str, video: VideoFeatures, *, system: str = SYSTEM) -> Row:
    """The policy's input row for one query and one video, up to where its reply begins."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head = ids(f'{IM_START}system\n{system}{IM_END}\n{IM_START}user\nQuery: "{query}"\nRetrieved video: ')
    tail = ids(f"{IM_END}\n{IM_START}assistant\n")
    return Row((*head, *video_token_ids(tokenizer, video), *tail), video)


def render(reply: Reply) -> str:
    """The reply as text; `parse` reads it back. Whole seconds are written without a fraction."""
    text = f"<think>{reply.think}</think><answer>{reply.answer}</answer>"
    if reply.start is not None and reply.end is not None:
        text += f"<start>{reply.start:g}</start><end>{reply.end:g}</end>"
    return text + (REFINE if reply.refine else "")


def _between(text: str, tag: str) -> str | None:
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found.group(1).strip() if found else None


def _seconds(text: str, tag: str) -> float | None:
    number = _NUMBER.search(_between(text, tag) or "")
    return float(number.group()) if number else None


def parse(text: str, *, duration: float | None = None) -> Reply:
    """Read a reply. Never raises: what cannot be read is None.

    The first tag of each kind behind the think block counts. A span needs both times; reversed times are swapped, and
    times are clamped to [0, duration] where the shown video's duration (seconds) is given.
    """
    think = _between(text, "think") or ""
    said = text.split("</think>", 1)[-1]
    answer = _ANSWERS.get((_between(said, "answer") or "").lower())
    start, end = _seconds(said, "start"), _seconds(said, "end")
    if start is None or end is None:
        start = end = None
    else:
        limit = float("inf") if duration is None else duration
        start, end = sorted(min(max(second, 0.0), limit) for second in (start, end))
    return Reply(answer, start, end, think, REFINE in said)
