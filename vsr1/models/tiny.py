"""The embedded default's size: real Qwen3-VL classes with small numbers, for training from nothing on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase, Qwen3VLConfig

from vsr1.models.tokenizer import VIDEO_PAD, VISION_END, VISION_START, token_id
from vsr1.models.vision import VideoSettings


@dataclass
class TinyConfig:
    """Widths and depths of the small models. `pixels` is the side of the square frames they see."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    feed_forward: int = 256
    vision_hidden: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    patch: int = 8
    merge: int = 4
    pixels: int = 64
    frames_per_second: float = 1.0
    max_frames: int = 16
    soft_tokens: int = 8


def model_config(tokenizer: PreTrainedTokenizerBase, config: TinyConfig) -> Qwen3VLConfig:
    """The transformers configuration of a tiny model for this tokenizer (embeddings tied)."""
    head = config.hidden // config.heads
    third = head // 8  # M-RoPE splits half of the head's size over time, height and width
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": config.hidden,
            "intermediate_size": config.feed_forward,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads,
            "head_dim": head,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head // 2 - 2 * third, third, third],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": config.vision_layers,
            "hidden_size": config.vision_hidden,
            "intermediate_size": 2 * config.vision_hidden,
            "num_heads": config.vision_heads,
            "patch_size": config.patch,
            "spatial_merge_size": config.merge,
            "temporal_patch_size": 2,
            "out_hidden_size": config.hidden,
            "num_position_embeddings": (config.pixels // config.patch) ** 2,
            "deepstack_visual_indexes": [],
        },
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, VIDEO_PAD),
        vision_start_token_id=token_id(tokenizer, VISION_START),
        vision_end_token_id=token_id(tokenizer, VISION_END),
        tie_word_embeddings=True,
    )


def video_settings(config: TinyConfig) -> VideoSettings:
    """Every frame becomes `pixels` x `pixels`, whatever its own size."""
    area = config.pixels**2
    return VideoSettings(config.frames_per_second, config.max_frames, area, area)
