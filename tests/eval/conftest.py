"""The fixtures of this room: tiny models, and words for the policy's mouth."""

from __future__ import annotations

from tests.agent.loop import corpus, says
from tests.fixtures import embedder, files, make_corpus, moments, policy, tokenizer

__all__ = ["corpus", "embedder", "files", "make_corpus", "moments", "policy", "says", "tokenizer"]
