"""Folders in the published layout (VideoSearch-R1), written from its description alone: names are spelt out here, and nothing of
the package's own saving is used. The models are the real transformers classes with small widths and random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vsr1.models.tiny import TinyConfig, model_config


@dataclass(frozen=True)
class Public:
    """What to write. width: of the policy; soft: of the soft tokens; embedder: of the query embedder, None for none."""

    width: int = 96
    soft: int = 64
    embedder: int | None = 64
    files: int = 1
    kind: Literal["safetensors", "bin"] = "safetensors"
    prefixes: Literal["new", "old"] = "new"
    tied: bool = True
    gate: bool = True
    dtype: torch.dtype = torch.bfloat16


def small_config(tokenizer: PreTrainedTokenizerBase, width: int, tied: bool = True) -> Qwen3VLConfig:
    """The configuration of a Qwen3-VL of this width, with deepstack."""
    config = model_config(tokenizer, TinyConfig(hidden=width, layers=2, feed_forward=80, vision_hidden=32))
    config.vision_config.deepstack_visual_indexes = [0, 1]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    return config


def write(folder: Path, tokenizer: PreTrainedTokenizerBase, public: Public = Public()) -> dict[str, Tensor]:
    """Write the folder; returns the policy's tensors by the names they have in it."""
    torch.manual_seed(1)
    state = write_model(folder, tokenizer, small_config(tokenizer, public.width, public.tied), public)
    state |= refine_modules(public)
    save(folder, state, public)
    if public.embedder is not None:
        plain = Public(dtype=public.dtype)
        inner = write_model(folder / "query_embedder", tokenizer, small_config(tokenizer, public.embedder), plain)
        save(folder / "query_embedder", inner, plain)
    return state


def refine_modules(public: Public) -> dict[str, Tensor]:
    """They were made in float32 beside a bfloat16 model."""
    width, soft, embedder = public.width, public.soft, public.embedder or public.soft
    shapes = {
        "refine_projector.0.weight": (soft, width),
        "refine_projector.0.bias": (soft,),
        "refine_projector.1.weight": (soft,),
        "refine_projector.1.bias": (soft,),
        "refine_projector.3.weight": (soft, soft),
        "refine_projector.3.bias": (soft,),
        "refine_latent_input_projector.0.weight": (soft,),
        "refine_latent_input_projector.0.bias": (soft,),
        "refine_latent_input_projector.1.weight": (width, soft),
        "refine_latent_input_projector.1.bias": (width,),
        "refine_append_input_projector.0.weight": (soft,),
        "refine_append_input_projector.0.bias": (soft,),
        "refine_append_input_projector.1.weight": (embedder, soft),
        "refine_append_input_projector.1.bias": (embedder,),
    }
    if public.gate:
        shapes |= {"refine_gate.weight": (1, width), "refine_gate.bias": (1,)}
    if embedder != soft:
        shapes |= {"query_embedder_head.weight": (soft, embedder), "query_embedder_head.bias": (soft,)}
    return {name: torch.randn(shape) / 8 for name, shape in shapes.items()}


def write_model(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config: Qwen3VLConfig, public: Public
) -> dict[str, Tensor]:
    """Everything of a Qwen3-VL but its weights, which are returned under the names they are saved by."""
    folder.mkdir(parents=True)
    model = Qwen3VLForConditionalGeneration(config).to(public.dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
                module.weight.add_(0.1 * torch.randn_like(module.weight))
    said: dict[str, Any] = config.to_dict()
    rope = dict(said["text_config"].pop("rope_parameters"))
    said["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    said["vision_config"].pop("rope_parameters")
    said |= {"architectures": ["Qwen3VLForConditionalGeneration"], "transformers_version": "4.57.1"}
    said["dtype"] = str(public.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(said))
    tokenizer.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    if public.prefixes == "old":
        old = {"model.visual.": "visual.", "model.language_model.": "model."}
        for before, after in old.items():
            state = {
                after + name.removeprefix(before) if name.startswith(before) else name: state[name] for name in state
            }
    return state


def save(folder: Path, state: dict[str, Tensor], public: Public = Public()) -> None:
    """The weights, in one file or in several with an index."""
    stem, end = ("model", "safetensors") if public.kind == "safetensors" else ("pytorch_model", "bin")
    names = list(state)
    where = {}
    for number in range(public.files):
        file = f"{stem}.{end}" if public.files == 1 else f"{stem}-{number + 1:05}-of-{public.files:05}.{end}"
        part = {name: state[name] for name in names[number :: public.files]}
        if public.kind == "safetensors":
            save_file(part, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    if public.files > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
