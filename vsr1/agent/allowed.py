"""What a reply may say inside its tags, token by token: the two answers, and times within the video.

The sentences allowed in a tag are few, so they are written out, tokenised and put in a trie; while a reply is inside the
tag, only the children of its place in the trie may follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

Trie = dict[int, Any]  # token -> Trie; empty where the tag is closed

ANSWER_TAG = "<answer>"
ANSWERS = ("matched", "not_matched")
_TIME_TAGS = {"<start>": "</start><end>", "<end>": "</end>"}  # and what follows the time: a span needs both


class Allowed:
    """The tries of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._times = cache(self._write_times)
        self._answers = self._trie(f"{answer}</answer>" for answer in ANSWERS)

    def opened(self, text: str, duration: float) -> Trie | None:
        """The trie of the tag that `text` has just opened, None where it ends in no tag; duration in seconds."""
        if text.endswith(ANSWER_TAG):
            return self._answers
        for tag in _TIME_TAGS:
            if text.endswith(tag):
                return self._times(tag, int(duration * 10))
        return None

    def _write_times(self, tag: str, tenths: int) -> Trie:
        return self._trie(f"{tenth / 10:g}{_TIME_TAGS[tag]}" for tenth in range(tenths + 1))

    def _trie(self, sentences: Iterable[str]) -> Trie:
        root: Trie = {}
        for ids in self._tokenizer(list(sentences), add_special_tokens=False)["input_ids"]:
            node = root
            for token in ids:
                node = node.setdefault(token, {})
        return root
