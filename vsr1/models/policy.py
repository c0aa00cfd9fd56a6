"""The policy: a Qwen3-VL model that judges one video against a query, with the head that refines the query.

This module only holds and stores the parts; how the policy is prompted is `agent.protocol`, how it speaks is
`agent.generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from vsr1.errors import CheckpointError
from vsr1.models import checkpoints
from vsr1.models.attention import share_prefixes
from vsr1.models.embedder import Embedder
from vsr1.models.recompute import recompute_layers
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
        self.kept: dict[str, Tensor] = {}  # of the checkpoint's refine modules, what is not used; saved again
        self._pieces: dict[int, str] = {}
        self._checkpointing = False
        share_prefixes(model.model.language_model)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        settings: PolicySettings | Mapping[str, Any] | None = None,
        video: VideoSettings | None = None,
        videos: VideoEncoder | None = None,
        dtype: torch.dtype | None = None,
    ) -> Policy:
        """Load a folder, or a repository of the Hub: one written by `save_pretrained`, one in the published layout, or a plain
        Qwen3-VL checkpoint, which gets a fresh refine head.

        settings: instead of the folder's; a mapping changes only what it names. A published checkpoint's say what it was
        trained with (docs/checkpoints.md). `videos`: share this encoder (and its tower) instead of loading a second one.
        dtype: of the model; by default as stored. The refine head keeps the precision it is stored in. CheckpointError
        lists what is missing, unknown or does not fit.
        """
        contents = checkpoints.examine(path)
        if not isinstance(settings, PolicySettings):
            known = checkpoints.refine_sizes(contents) | (checkpoints.PUBLIC_POLICY if contents.public else {})
            changed = known | contents.saved.get("policy", {}) | dict(settings or {})
            settings = cast(PolicySettings, checkpoints.settings_from(PolicySettings, changed, contents.folder))
        head: RefineHead | None = None
        kept: dict[str, Tensor] = {}
        if contents.refine:
            head, kept = checkpoints.load_head(contents, settings.soft_size, settings.embedder_size, settings.gate)
        tokenizer = checkpoints.load_tokenizer(contents.folder)
        known_token = tokenizer.convert_tokens_to_ids(REFINE) not in (None, tokenizer.unk_token_id)
        if contents.refine and not known_token:
            raise CheckpointError(f"'{contents.folder}' holds refine modules, but its tokenizer does not know {REFINE}")
        model = checkpoints.load_model(contents, Qwen3VLForConditionalGeneration, dtype)
        if not known_token:
            _teach_refine(model, tokenizer)
        if videos is None:
            default = checkpoints.PUBLIC_VIDEO if contents.public else VideoSettings()
            said = vars(default) | contents.saved.get("video", {})
            video = video or checkpoints.settings_from(VideoSettings, said, contents.folder)
            videos = VideoEncoder(model.model.visual, video)
        else:
            model.model.visual = videos.visual
        policy = cls(model, tokenizer, videos, settings, head)
        policy.kept = kept
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

    def save_pretrained(
        self,
        path: str | Path,
        *,
        layout: checkpoints.Layout = "vsr1",
        embedder: Embedder | None = None,
        shard_size: int | str = "5GB",
    ) -> None:
        """Write weights, refine head, tokenizer and settings to the folder `path`.

        layout "vsr1": transformers and vLLM load the model from it, the refine head has a file of its own; "public": that of
        the published checkpoints, with all in one, files of at most `shard_size`. `embedder`: write it too, into the folder's
        `query_embedder/`; `Embedder.from_pretrained` finds it there.
        """
        folder = Path(path)
        model, tokenizer, video = self.model, self.tokenizer, self.videos.settings
        kept = dict(self.kept)
        if layout == "public":
            if embedder is not None:
                kept |= {f"query_embedder_head.{k}": v for k, v in embedder.query_embedder_head.state_dict().items()}
            state = self.head.state_dict() | kept
            checkpoints.save_public(model, state, tokenizer, video, folder, shard_size)
        else:
            checkpoints.save_plain(model, tokenizer, video, folder)
            checkpoints.save_refine(self.head, kept, folder)
        checkpoints.save_settings(folder, policy=asdict(self.settings), video=vars(video))
        if embedder is not None:
            embedder.save_pretrained(folder / checkpoints.EMBEDDER_FOLDER, layout=layout)

    @property
    def checkpointing(self) -> bool:
        """Whether training keeps only what enters each layer of the language model, and computes the rest again: less memory,
        a third more work, the same gradients."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self._checkpointing = on
        recompute_layers(self.model.model.language_model.layers, on)

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


@torch.no_grad()
def _teach_refine(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the token `<REFINE>`. It starts as the mean of the tokens that spelled it until now: the row that a padded table has
    for it was never trained, and adapters alone could not make the model say it."""
    pieces = tokenizer(REFINE, add_special_tokens=False)["input_ids"]
    tokenizer.add_special_tokens({"additional_special_tokens": [REFINE]}, replace_extra_special_tokens=False)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
        table.weight[token_id(tokenizer, REFINE)] = table.weight[pieces].float().mean(0).to(table.weight.dtype)
