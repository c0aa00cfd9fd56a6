"""The fixtures of this room."""

from __future__ import annotations

from tests.fixtures import embedder, files, frames, make_corpus, moments, policy, tokenizer

__all__ = ["embedder", "files", "frames", "make_corpus", "moments", "policy", "tokenizer"]
