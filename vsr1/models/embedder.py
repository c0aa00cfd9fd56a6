"""The embedder: a text, a text with soft tokens, or a video becomes one unit vector.

It is a Qwen3-VL model read at its last token (as Qwen3-VL-Embedding is), frozen while the policy learns. Soft tokens
stand right after the query text; their place is known because the template's parts are tokenised apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3VLModel

from vsr1.models import backbone, checkpoints
from vsr1.models.backbone import Row
from vsr1.models.tokenizer import IM_END, IM_START
from vsr1.models.vision import VideoEncoder, VideoFeatures, VideoSettings, video_token_ids

INSTRUCTION = "Represent the user's input."


class Embedder(nn.Module):
    """Texts and videos -> unit vectors of `dimension` D.

    head maps the model's width to D (identity by default). soft_tail: how many tokens of the sequence at least stay behind soft
    tokens; by default only what follows the text does. Published policies were trained with 6.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        videos: VideoEncoder,
        *,
        head: nn.Module | None = None,
        instruction: str = INSTRUCTION,
        soft_tail: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.query_embedder_head = head if head is not None else nn.Identity()
        self.tokenizer = tokenizer
        self.videos = videos
        self.instruction = instruction
        self.soft_tail = soft_tail
        self._known_as: str | None = None
        self._before = self._ids(f"{IM_START}system\n{instruction}{IM_END}\n{IM_START}user\n")
        # with what this tokenizer ends every sequence with, if anything: that is then the token to be read
        self._after = self.tokenizer(f"{IM_END}\n{IM_START}assistant\n")["input_ids"]

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, settings: VideoSettings | None = None, dtype: torch.dtype | None = None
    ) -> Embedder:
        """Load a folder, or a repository of the Hub: one written by `save_pretrained`, a Qwen3-VL-Embedding checkpoint, or a
        policy's that holds its embedder in `query_embedder/`.

        dtype: of the model; by default as stored. CheckpointError lists what is missing, unknown or does not fit.
        """
        contents, stored = checkpoints.examine_embedder(path)
        saved = contents.saved
        head = checkpoints.load_embedder_head(stored, contents.width, f"'{contents.folder}'")
        tokenizer = checkpoints.load_tokenizer(contents.folder)
        model = checkpoints.load_model(contents, Qwen3VLModel)
        settings = settings or checkpoints.settings_from(VideoSettings, saved.get("video", {}), contents.folder)
        instruction, soft_tail = saved.get("instruction", INSTRUCTION), saved.get("soft_tail", 0)
        videos = VideoEncoder(model.visual, settings)
        embedder = cls(model, tokenizer, videos, head=head, instruction=instruction, soft_tail=soft_tail).eval()
        if dtype is not None:
            # whatever it computes in: a corpus that it made in another precision is its own, too
            embedder._known_as = embedder.identity
            model.to(dtype)
        return embedder

    @classmethod
    def tiny(
        cls, tokenizer: PreTrainedTokenizerBase, config: Any = None, settings: VideoSettings | None = None
    ) -> Embedder:
        """A small embedder with random weights; `config` is a `vsr1.models.tiny.TinyConfig`."""
        from vsr1.models import tiny

        config = config or tiny.TinyConfig()
        model = Qwen3VLModel(tiny.model_config(tokenizer, config)).eval()
        return cls(model, tokenizer, VideoEncoder(model.visual, settings or tiny.video_settings(config)))

    def save_pretrained(self, path: str | Path, *, layout: checkpoints.Layout = "vsr1") -> None:
        """Write weights, tokenizer and settings to the folder `path`; transformers loads the model from it too.

        layout "public": as the published checkpoints hold it in `query_embedder/`, as a Qwen3VLForConditionalGeneration; a head
        goes into the policy's file then (`Policy.save_pretrained(embedder=)`).
        """
        folder, video = Path(path), self.videos.settings
        if layout == "public":
            checkpoints.save_public(self.model, {}, self.tokenizer, video, folder)
        else:
            checkpoints.save_plain(self.model, self.tokenizer, video, folder)
            if isinstance(self.query_embedder_head, nn.Linear):
                save_file(self.query_embedder_head.state_dict(), folder / checkpoints.HEAD_FILE)
        template = {"instruction": self.instruction, "soft_tail": self.soft_tail}
        checkpoints.save_settings(folder, **template, video=vars(video))

    @property
    def dimension(self) -> int:
        head = self.query_embedder_head
        return head.out_features if isinstance(head, nn.Linear) else self.model.config.text_config.hidden_size

    @property
    def identity(self) -> str:
        """A short fingerprint of weights, as stored, and template: a corpus remembers it and refuses another embedder's
        queries."""
        if self._known_as is not None:
            return self._known_as
        digest = hashlib.sha256(self.instruction.encode())
        for name, parameter in sorted(self.named_parameters()):
            sample = parameter.detach().flatten()[:256].float().cpu().numpy()
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.tobytes())
        return digest.hexdigest()[:16]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text_row(self, text: str, soft_count: int = 0) -> Row:
        """The input row of a query, with room for `soft_count` soft tokens right behind the text (see `soft_tail`)."""
        words = self._ids(text)
        end = max(0, len(words) - max(0, self.soft_tail - len(self._after)))
        placeholder = [self.tokenizer.pad_token_id] * soft_count
        ids = (*self._before, *words[:end], *placeholder, *words[end:], *self._after)
        return Row(ids, soft_start=len(self._before) + end, soft_count=soft_count)

    def video_row(self, features: VideoFeatures) -> Row:
        """The input row of a video: its times and tokens in the place of the text."""
        return Row((*self._before, *video_token_ids(self.tokenizer, features), *self._after), features)

    def pool(self, hidden: Tensor) -> Tensor:
        """Hidden states of last tokens (B, H) -> unit vectors (B, D) fp32."""
        head = self.query_embedder_head
        if isinstance(head, nn.Linear):
            hidden = head(hidden.to(head.weight.dtype))
        return F.normalize(hidden.float(), dim=-1)

    def embed_rows(self, rows: Sequence[Row], soft: Tensor | None = None) -> Tensor:
        """Rows -> unit vectors (B, D) fp32, differentiable in `soft` (B, n, E) and, when trainable, in the weights."""
        if not rows:
            return torch.empty(0, self.dimension, device=self.videos.device)
        hidden, _ = backbone.run(self.model, rows, soft=soft)
        return self.pool(hidden[:, -1])

    def embed_texts(self, texts: Sequence[str], soft: Tensor | None = None) -> Tensor:
        """Query texts, each followed by its soft tokens `soft` (B, n, E) if given -> unit vectors (B, D) fp32."""
        count = 0 if soft is None else soft.shape[1]
        return self.embed_rows([self.text_row(text, count) for text in texts], soft if count else None)

    def embed_videos(self, features: Sequence[VideoFeatures]) -> Tensor:
        """Encoded videos -> unit vectors (B, D) fp32."""
        return self.embed_rows([self.video_row(video) for video in features])
