"""Reasons for a verdict in one to three sentences: what may stand between <think> and </think>, and templates for it.

A rationale never decides anything: whether the video matches, and where, is known before it is written. So it must hold
no markup that could be read as an answer. Where there is no teacher to look at the video, templates say honestly what
is asked for and whether it is there, and nothing about the pictures that nobody has looked at.
"""

from __future__ import annotations

import re
from typing import Final
from zlib import crc32

from vsr1.data.pairs import Pair

TEMPLATE_VERSION: Final = "1"  # to be raised with every change of the sentences
MOST_WORDS: Final = 150  # three long sentences; a reply has to fit into what a policy may say
_MARKUP: Final = re.compile(r"</?\s*(?:think|answer|start|end)\s*>|<REFINE>|<\|[^|>]*\|>", re.IGNORECASE)
_MATCHED: Final = (
    'The query asks for "{query}". The video shows it from {start:g} to {end:g} seconds.',
    'Asked for: "{query}". This happens in the video between {start:g} and {end:g} seconds.',
    'From {start:g} to {end:g} seconds the video shows what the query describes: "{query}".',
)
_NOT_MATCHED: Final = (
    'The query asks for "{query}". The video does not show it.',
    'Asked for: "{query}". This does not happen in the video.',
    'Nowhere does the video show what the query describes: "{query}".',
)


def plain(text: str) -> str:
    """The text on one line, without markup."""
    return " ".join(_MARKUP.sub(" ", text).split())


def unfit(text: str) -> str | None:
    """Why a text cannot be a rationale, or None."""
    if found := _MARKUP.search(text):
        return f"it holds the markup '{found.group()}'"
    words = len(text.split())
    if not words:
        return "it is empty"
    return f"it has {words} words, at most {MOST_WORDS} are of use" if words > MOST_WORDS else None


def templated(pair: Pair) -> str:
    """A rationale from the query's own words; the wording varies with the pair and stays the same for one."""
    wordings = _MATCHED if pair.matched else _NOT_MATCHED
    wording = wordings[crc32(pair.pair_id.encode()) % len(wordings)]
    query = plain(pair.moment.text).rstrip(".").replace('"', "'")
    return wording.format(query=query, start=pair.moment.start, end=pair.moment.end)
