"""The policy: a Qwen3-VL model that judges one video against a query, with the head that refines the query.

This module only holds and stores the parts; how the policy is prompted is `agent.protocol`, how it speaks is
`agent.generate`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from vsr1.models.attention import share_prefixes
from vsr1.models.embedder import Embedder
from vsr1.models.refine import RefineHead
from vsr1.models.tokenizer import REFINE, token_id
from vsr1.models.vision import VideoEncoder, VideoSettings

SYSTEM = (
    "You check one retrieved video against a query. Compare them step by step between <think> and </think>. "
    "If the video shows what the query asks for, write <answer>matched</answer> and the moment in seconds as "
    "<start>s</start><end>s</end>; otherwise write <answer>not_matched</answer>. Always finish with <REFINE>."
)
SHORT_SYSTEM = "Does the video show it?"  # for models that learn the format by example


@dataclass(frozen=True)
class PolicySettings:
    """What a policy was trained with.

    soft_tokens a refinement, their width soft_size, the embedder's input width; gate of the refine head; the system turn of
    its prompts. first_latent: whether the first soft token is made from the hidden state behind the model's last norm, as
    the others are, or before it, as the published checkpoints do. calibration: scale and offset that turn the log-odds of
    "matched" into those of the video being right.
    """

    soft_tokens: int = 8
    soft_size: int = 2048
    embedder_size: int = 2048
    gate: bool = False
    system: str = SYSTEM
    first_latent: Literal["normed", "unnormed"] = "normed"
    calibration: tuple[float, float] = (1.0, 0.0)
    rewriting: tuple[str, str] = ("<think>In other words:", "\n")


class Policy(nn.Module):
    """model (Qwen3VLForConditionalGeneration), refine head, tokenizer and the encoder of the videos it is shown."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        videos: VideoEncoder,
        settings: PolicySettings,
        head: RefineHead | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.videos = videos
        self.settings = settings
        self.head = head or RefineHead(
            model.config.text_config.hidden_size, settings.soft_size, settings.embedder_size, gate=settings.gate
        )
        self.refine_id = token_id(tokenizer, REFINE)
        self.eos_id: int = tokenizer.eos_token_id
        self._pieces: dict[int, str] = {}
        share_prefixes(model.model.language_model)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        settings: PolicySettings | None = None,
        video: VideoSettings | None = None,
        videos: VideoEncoder | None = None,
    ) -> Policy:
        """Load a folder written by `save_pretrained`, or start from a plain Qwen3-VL checkpoint with a fresh refine head.

        `videos`: share this encoder (and its tower) instead of loading a second one.
        """
        folder = Path(path)
        model = Qwen3VLForConditionalGeneration.from_pretrained(str(path), dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        extra: dict[str, Any] = {}
        if (folder / "vsr1.json").is_file():
            extra = json.loads((folder / "vsr1.json").read_text())
        if tokenizer.convert_tokens_to_ids(REFINE) in (None, tokenizer.unk_token_id):
            tokenizer.add_special_tokens({"additional_special_tokens": [REFINE]}, replace_extra_special_tokens=False)
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
        saved: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in extra.get("policy", {}).items()
        }
        settings = settings or PolicySettings(**saved)
        if videos is None:
            videos = VideoEncoder(model.model.visual, video or VideoSettings(**extra.get("video", {})))
        else:
            model.model.visual = videos.visual
        policy = cls(model, tokenizer, videos, settings)
        if (folder / "refine.safetensors").is_file():
            policy.head.load_state_dict(load_file(folder / "refine.safetensors"))
        return policy.eval()

    @classmethod
    def tiny(cls, embedder: Embedder, *, soft_tokens: int = 8) -> Policy:
        """A policy of the embedder's size that starts from its weights and shares its vision tower."""
        config = embedder.model.config
        model = Qwen3VLForConditionalGeneration(config).eval()
        model.model.language_model.load_state_dict(embedder.model.language_model.state_dict())
        model.model.visual = embedder.videos.visual
        width = config.text_config.hidden_size
        settings = PolicySettings(
            soft_tokens, embedder.dimension, width, system=SHORT_SYSTEM, rewriting=("<think>find", ";")
        )
        return cls(model, embedder.tokenizer, embedder.videos, settings)

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights, refine head, tokenizer and settings to the folder `path`."""
        folder = Path(path)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, folder / "refine.safetensors")
        extra = {"policy": asdict(self.settings), "video": vars(self.videos.settings)}
        (folder / "vsr1.json").write_text(json.dumps(extra, indent=1))

    def piece(self, token: int) -> str:
        """The text of one token, special ones included."""
        if token not in self._pieces:
            self._pieces[token] = self.text([token])
        return self._pieces[token]

    def text(self, token_ids: Sequence[int]) -> str:
        """Token ids as text, special ones included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def token_embeddings(self, token_ids: Tensor) -> Tensor:
        """Token ids (...) -> input embeddings (..., H)."""
        return self.model.get_input_embeddings()(token_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (..., H) -> logits (..., V) fp32."""
        return self.model.lm_head(hidden).float()
