"""The sizes of a Qwen3-VL model as plain numbers: what it holds and what it computes, without building it.

A `ModelShape` comes from a `config.json` or from the built-in ones of the published sizes. Its parameter counts are those of
transformers' classes and of `RefineHead`, to the last one. Floating point operations are those of the matrix products, two for
each multiply and add; norms, activations and softmax are left out, which is below 2 % of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vsr1.errors import ConfigError


@dataclass(frozen=True)
class TextShape:
    """The language model. heads read `key_heads` keys and values, all of size `head`; tied: the output matrix is the table."""

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    head: int
    tied: bool

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.key_heads * self.head

    @property
    def table(self) -> int:
        """Parameters of the embedding table."""
        return self.vocabulary * self.hidden

    @property
    def matrices(self) -> int:
        """Parameters of a layer's seven projections."""
        return 2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.feed_forward

    @property
    def parameters(self) -> int:
        """Of the language model, without an output matrix."""
        norms = 2 * self.hidden + 2 * self.head
        return self.table + self.layers * (self.matrices + norms) + self.hidden

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters on all projections (`vsr1.train.lora`)."""
        inputs = 3 * self.hidden + self.queries + 2 * self.hidden + self.feed_forward
        outputs = self.queries + 2 * self.keys + self.hidden + 2 * self.feed_forward + self.hidden
        return self.layers * rank * (inputs + outputs)

    def cache_bytes(self, element: int) -> int:
        """Keys and values of one token in all layers, in bytes, `element` of them a number."""
        return 2 * self.layers * self.keys * element

    def flops(self, tokens: float, pairs: float, rank: int = 0) -> float:
        """One forward pass. pairs: of a query and a key that it may see; rank: of adapters beside the projections."""
        return 2 * tokens * (self.layers * self.matrices + self.adapters(rank)) + 4 * pairs * self.queries * self.layers

    def head_flops(self, tokens: float) -> float:
        """Of the logits of `tokens`."""
        return 2 * tokens * self.table


@dataclass(frozen=True)
class VisionShape:
    """The vision tower. out: width of what it gives; levels: outputs of earlier blocks that it gives too; positions: entries of
    its position table; merge: a token is merge x merge patches of patch x patch pixels of `temporal` frames."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    out: int
    levels: int
    positions: int
    patch: int = 16
    merge: int = 2
    temporal: int = 2
    channels: int = 3

    @property
    def merged(self) -> int:
        """Width of the patches of one token side by side."""
        return self.hidden * self.merge**2

    @property
    def pixels(self) -> int:
        """Values of one patch."""
        return self.channels * self.temporal * self.patch**2

    @property
    def parameters(self) -> int:
        """Of the whole tower with its mergers."""
        width, inner = self.hidden, self.feed_forward
        block = 4 * width * width + 2 * width * inner + 4 * width + (inner + width) + 4 * width
        merger = self.merged * (self.merged + 1) + self.out * (self.merged + 1)
        norms = 2 * width + self.levels * 2 * self.merged
        embedding = (self.pixels + 1) * width + self.positions * width
        return embedding + self.layers * block + (1 + self.levels) * merger + norms

    def flops(self, tokens: float, pair_tokens: float) -> float:
        """Of a video of `tokens` merged tokens, `pair_tokens` of which belong to one pair of frames (which sees only itself)."""
        patches, seen = tokens * self.merge**2, pair_tokens * self.merge**2
        width, inner = self.hidden, self.feed_forward
        linear = self.pixels * width + self.layers * (4 * width * width + 2 * width * inner)
        merging = (1 + self.levels) * (self.merged**2 + self.merged * self.out)
        return 2 * patches * linear + 4 * patches * seen * width * self.layers + 2 * tokens * merging

    def feature_bytes(self, tokens: float, element: int) -> float:
        """What is kept of a video for the language model (`VideoFeatures`)."""
        return tokens * self.out * (1 + self.levels) * element


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3-VL model."""

    text: TextShape
    vision: VisionShape

    @property
    def parameters(self) -> int:
        """Of a `Qwen3VLForConditionalGeneration` of this shape."""
        return self.text.parameters + self.vision.parameters + (0 if self.text.tied else self.text.table)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
        """From the values of a `config.json`. ConfigError names what is missing."""
        try:
            text, vision = config["text_config"], config["vision_config"]
            heads = text["num_attention_heads"]
            return cls(
                TextShape(
                    vocabulary=text["vocab_size"],
                    hidden=text["hidden_size"],
                    feed_forward=text["intermediate_size"],
                    layers=text["num_hidden_layers"],
                    heads=heads,
                    key_heads=text.get("num_key_value_heads") or heads,
                    head=text.get("head_dim") or text["hidden_size"] // heads,
                    tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
                ),
                VisionShape(
                    hidden=vision["hidden_size"],
                    feed_forward=vision["intermediate_size"],
                    layers=vision["depth"],
                    heads=vision["num_heads"],
                    out=vision["out_hidden_size"],
                    levels=len(vision["deepstack_visual_indexes"]),
                    positions=vision["num_position_embeddings"],
                    patch=vision.get("patch_size", 16),
                    merge=vision.get("spatial_merge_size", 2),
                    temporal=vision.get("temporal_patch_size", 2),
                    channels=vision.get("in_channels", 3),
                ),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"'{where}' is no configuration of a Qwen3-VL model: {error} is missing") from error

    @classmethod
    def from_folder(cls, folder: Path) -> ModelShape:
        """From the `config.json` of a checkpoint's folder; its weights are not touched."""
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"'{path}' cannot be read: {error}") from error
        return cls.from_config(values, str(path))


def head_parameters(hidden: int, soft: int, embedder: int, *, gate: bool = False) -> int:
    """Of a `RefineHead`; the widths of policy, soft token and embedder."""
    projector = (hidden + 1) * soft + 2 * soft + (soft + 1) * soft
    inputs = 2 * soft + (soft + 1) * hidden + 2 * soft + (soft + 1) * embedder
    return projector + inputs + (hidden + 1 if gate else 0)


def _published(hidden: int, feed_forward: int, layers: int, heads: int) -> ModelShape:
    """What the published sizes have in common: the vocabulary, eight key heads of 128, and the tower."""
    return ModelShape(
        TextShape(151936, hidden, feed_forward, layers, heads, key_heads=8, head=128, tied=True),
        VisionShape(1024, 4096, 24, heads=16, out=hidden, levels=3, positions=2304),
    )


# From the config.json of Qwen3-VL-2B-Instruct, Qwen3-VL-4B-Instruct and Qwen3-VL-Embedding-2B (which has the shape of the first).
SHAPES = {
    "2b": _published(2048, 6144, 28, 16),
    "4b": _published(2560, 9728, 36, 32),
    "embedding-2b": _published(2048, 6144, 28, 16),
}
