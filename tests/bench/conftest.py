"""The fixtures of this room."""

from __future__ import annotations

from tests.fixtures import embedder, frames, policy, tokenizer

__all__ = ["embedder", "frames", "policy", "tokenizer"]
