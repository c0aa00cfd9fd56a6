"""What the plan is compared with: configurations of the published models, small models, and what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig

from vsr1.agent import protocol
from vsr1.models.backbone import Row
from vsr1.models.embedder import INSTRUCTION, Embedder
from vsr1.models.policy import SYSTEM, Policy
from vsr1.models.shape import ModelShape
from vsr1.models.tiny import TinyConfig
from vsr1.models.tokenizer import train_tokenizer
from vsr1.video import Frames

TEXT = "a small red circle moves to the right while the user compares them"
SIZES = {
    "tiny": TinyConfig(),
    # in the proportions of Qwen3-VL-2B: a tower half as wide as the language model
    "mid": TinyConfig(
        hidden=256, layers=8, heads=8, feed_forward=1024, vision_hidden=128, vision_layers=6, merge=2, max_frames=32
    ),
}


def small(size: str) -> tuple[Policy, Embedder, Row]:
    """A policy and an embedder with random weights, and a prompt before a video of random pixels."""
    torch.manual_seed(0)
    config = SIZES[size]
    stamps = [f"<{second}.5 seconds>" for second in range(config.max_frames)]
    tokenizer = train_tokenizer([SYSTEM, INSTRUCTION, TEXT, "system user assistant", 'Query: ""', *stamps] * 2)
    embedder = Embedder.tiny(tokenizer, config).eval().requires_grad_(False)
    policy = Policy.tiny(embedder, soft_tokens=config.soft_tokens).eval()
    policy.settings = replace(policy.settings, system=SYSTEM)
    pixels = torch.randint(0, 256, (config.max_frames, config.pixels, config.pixels, 3), dtype=torch.uint8)
    seconds = torch.arange(config.max_frames, dtype=torch.float64)
    frames = Frames(pixels=pixels, seconds=seconds, duration=float(config.max_frames), source=Path("made up"))
    (video,) = policy.videos.encode_frames([frames])
    return policy, embedder, protocol.prompt(tokenizer, TEXT, video, system=SYSTEM)


def shape_of(model: Any) -> ModelShape:
    return ModelShape.from_config(model.config.to_dict())


def configuration(shape: ModelShape) -> Qwen3VLConfig:
    """What transformers builds a published model from."""
    text, vision = shape.text, shape.vision
    return Qwen3VLConfig(
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.hidden,
            "intermediate_size": text.feed_forward,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.key_heads,
            "head_dim": text.head,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
            "tie_word_embeddings": text.tied,
        },
        vision_config={
            "depth": vision.layers,
            "hidden_size": vision.hidden,
            "intermediate_size": vision.feed_forward,
            "num_heads": vision.heads,
            "out_hidden_size": vision.out,
            "deepstack_visual_indexes": list(range(vision.levels)),
            "num_position_embeddings": vision.positions,
        },
        tie_word_embeddings=text.tied,
    )


def kept(call: Callable[[], Any], *modules: torch.nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps of a call, the modules' own weights left out."""
    weights = {one.untyped_storage().data_ptr() for module in modules for one in module.parameters()}
    found: dict[int, int] = {}
    held: list[Any] = []  # a storage that is freed meanwhile would hand its address to another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(call())
    return sum(found.values())
