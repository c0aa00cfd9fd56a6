"""The fixtures of this room."""

from __future__ import annotations

from tests.fixtures import embedder, tokenizer

__all__ = ["embedder", "tokenizer"]
