"""The fixtures of this room."""

from __future__ import annotations

from tests.fixtures import embedder, files, frames, policy, tokenizer

__all__ = ["embedder", "files", "frames", "policy", "tokenizer"]
