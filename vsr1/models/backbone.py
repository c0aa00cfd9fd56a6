"""One forward pass for every use: rows of token ids, videos and soft tokens through a Qwen3-VL language model.

Rows are padded on the left, so that the last column is the newest token of every row and a cache can be continued at
once for all of them. `run` makes the first pass and returns the hidden states with a `State`; `advance` feeds one more
vector a row over the cache. Positions are those of Qwen3-VL's M-RoPE, computed here for the whole batch at once; the
model's own `rope_deltas` state is never used, so passes of different batches may interleave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from vsr1.models.vision import VideoFeatures
from vsr1.ops.linear_logp import linear_logp


@dataclass(frozen=True)
class Row:
    """One input row: token ids, the video behind its placeholders, and where `soft_count` soft tokens stand (if any).

    The ids hold any valid id at the soft positions; their embeddings are replaced.
    """

    token_ids: tuple[int, ...]
    video: VideoFeatures | None = None
    soft_start: int = 0
    soft_count: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass
class State:
    """A cache that can be continued: mask (B, L) of real columns, next_position (B,) on the M-RoPE axes."""

    cache: DynamicCache
    mask: Tensor
    next_position: Tensor

    def repeat(self, times: int) -> State:
        """Each row `times` times, neighbours together: one prefill serves a group of continuations."""
        self.cache.batch_repeat_interleave(times)
        return State(self.cache, self.mask.repeat_interleave(times, 0), self.next_position.repeat_interleave(times, 0))

    def select(self, rows: Tensor) -> State:
        """Only the rows with indices `rows` (R,) int64."""
        self.cache.batch_select_indices(rows)
        return State(self.cache, self.mask[rows], self.next_position[rows])


def rope_positions(video: np.ndarray, real: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M-RoPE positions of a batch. video, real (B, L) bool; grids (B, 2): merged height and width of each row's frames.

    A text token takes one position on all three axes; a frame's tokens share their start on the time axis, count rows
    and columns on the other two, and occupy max(height, width) positions. Returns positions (3, B, L) and the next free
    position (B,). Equal to `Qwen3VLModel.get_rope_index`.
    """
    columns = np.arange(video.shape[1])
    before = np.pad(video, ((0, 0), (1, 0)))[:, :-1]
    after = np.pad(video, ((0, 0), (0, 1)))[:, 1:]
    height, width = grids[:, :1], np.maximum(grids[:, 1:], 1)
    step = np.where(video, np.where(after, 0, np.maximum(height, width)), real)
    base = np.cumsum(step, 1) - step
    first = np.maximum.accumulate(np.where(video & ~before, columns, 0), 1)
    inside = np.where(video, columns - first, 0)
    positions = np.stack([base, base + inside // width, base + inside % width])
    return positions, step.sum(1)


def _assemble(model: Any, rows: Sequence[Row], soft: Tensor | None) -> tuple[dict[str, Any], Tensor, Tensor]:
    device = model.language_model.embed_tokens.weight.device
    length = max(len(row) for row in rows)
    ids = np.full((len(rows), length), model.config.text_config.pad_token_id or 0)
    real = np.zeros(ids.shape, bool)
    soft_mask = np.zeros(ids.shape, bool)
    for index, row in enumerate(rows):
        pad = length - len(row)
        ids[index, pad:] = row.token_ids
        real[index, pad:] = True
        soft_mask[index, pad + row.soft_start : pad + row.soft_start + row.soft_count] = True
    # placeholders beyond the video's own tokens are words: a sampling policy may say anything
    own = np.array([row.video.tokens.shape[0] if row.video else 0 for row in rows])
    video_mask = (ids == model.config.video_token_id) & real
    video_mask &= np.cumsum(video_mask, 1) <= own[:, None]
    grids = np.array([row.video.grid[1:] if row.video else (0, 0) for row in rows])
    positions, next_position = rope_positions(video_mask, real, grids)

    embeds = model.language_model.embed_tokens(torch.from_numpy(ids).to(device))
    inputs: dict[str, Any] = {}
    videos = [row.video for row in rows if row.video is not None]
    if videos:
        tokens = torch.cat([video.tokens for video in videos]).to(embeds)
        visual = torch.from_numpy(video_mask).to(device)
        if tokens.shape[0] != int(video_mask.sum()):
            raise ValueError(f"rows hold {int(video_mask.sum())} video placeholders for {tokens.shape[0]} video tokens")
        embeds = embeds.masked_scatter(visual[..., None], tokens)
        if videos[0].deepstack.shape[0]:
            levels = torch.cat([video.deepstack for video in videos], 1).to(embeds)
            inputs |= {"visual_pos_masks": visual, "deepstack_visual_embeds": list(levels)}
    if soft is not None:
        embeds = embeds.masked_scatter(torch.from_numpy(soft_mask).to(device)[..., None], soft.to(embeds))
    inputs |= {
        "inputs_embeds": embeds,
        "position_ids": torch.from_numpy(positions).to(device),
    }
    return inputs, torch.from_numpy(real).to(device), torch.from_numpy(next_position).to(device)


def run(
    model: Any, rows: Sequence[Row], *, soft: Tensor | None = None, keep_cache: bool = False
) -> tuple[Tensor, State | None]:
    """Pass `rows` through `model` (a `Qwen3VLModel`). Returns normed hidden states (B, L, H), left-padded, and a state.

    soft (B, n, H): what replaces each row's soft positions. The state is None unless `keep_cache`.
    """
    inputs, mask, next_position = _assemble(model, rows, soft)
    cache = DynamicCache() if keep_cache else None
    output = model.language_model(
        **inputs, attention_mask=mask.long(), past_key_values=cache, use_cache=keep_cache or None
    )
    state = State(cache, mask, next_position) if cache is not None else None
    return output.last_hidden_state, state


def spoken_logps(
    hidden: Tensor,
    weight: Tensor,
    spoken: Sequence[Sequence[int]],
    *,
    last_is_fed: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities of the tokens each row ends with, all rows behind one another: (sum of lengths,).

    hidden (B, L, H) left-padded, weight (V, H) the output matrix. A token is read off the column before its own; where the
    last token of a row was not fed (`last_is_fed=False`), its column does not exist and that column is the last.
    """
    shift = 1 if last_is_fed else 0
    end = hidden.shape[1] - shift
    speaking = torch.cat([row[end - len(ids) : end] for row, ids in zip(hidden, spoken, strict=True)])
    target = torch.tensor([token for ids in spoken for token in ids], device=hidden.device)
    return linear_logp(speaking, weight, target, temperature=temperature).logp


def advance(model: Any, state: State, embeds: Tensor, active: Tensor | None = None) -> Tensor:
    """Feed one vector a row, embeds (B, H), over the cache; returns hidden states (B, H) and moves `state` on.

    Rows not in `active` (B,) bool are carried along, but their new column stays invisible to what follows.
    """
    if active is None:
        active = torch.ones_like(state.mask[:, 0])
    state.mask = torch.cat([state.mask, active[:, None]], 1)
    output = model.language_model(
        inputs_embeds=embeds[:, None],
        attention_mask=state.mask.long(),
        position_ids=state.next_position[None, :, None].expand(3, -1, -1),
        past_key_values=state.cache,
        use_cache=True,
    )
    state.next_position = state.next_position + active
    return output.last_hidden_state[:, -1]
