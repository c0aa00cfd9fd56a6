"""The fixtures of this room."""

from __future__ import annotations

from tests.agent.loop import asked, corpus, says
from tests.fixtures import embedder, files, frames, make_corpus, moments, policy, tokenizer

__all__ = ["asked", "corpus", "embedder", "files", "frames", "make_corpus", "moments", "policy", "says", "tokenizer"]
