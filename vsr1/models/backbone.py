"""One forward pass for every use: rows of token ids, videos and soft tokens through a Qwen3-VL language model.

Rows are padded on the left, so that the last column is the newest token of every row and a cache can be continued at
once for all of them. `run` makes the first pass and returns the hidden states with a `State`; `feed` continues its rows.
Where many rows continue one prompt, `State.branch` lets them share it: it is passed through the model once, in training
too, and its gradient comes from all of them. Positions are those of Qwen3-VL's M-RoPE, computed here for the whole batch
at once; the model's own `rope_deltas` state is never used, so passes of different batches may interleave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from vsr1.models.attention import Prefix
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
    """R rows that can be continued.

    cache: their own keys and values; mask (R, S): which of its columns are real; next_position (R,) on the M-RoPE axes;
    prefix: the prompts they share, if they were branched off.
    """

    cache: DynamicCache
    mask: Tensor
    next_position: Tensor
    prefix: Prefix | None = None

    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """The rows' own keys and values, one tensor (R, heads, S, size) a layer each."""
        layers: Any = self.cache.layers  # a DynamicCache's are all of one kind
        return [layer.keys for layer in layers], [layer.values for layer in layers]

    def branch(self, owner: Tensor) -> State:
        """Rows that continue these: row r continues row owner[r]. Keys and values are shared, not copied."""
        if self.prefix is not None:
            raise ValueError("these rows share a prefix already: branch the rows that hold it")
        keys, values = self.layers()
        prefix = Prefix(keys, values, None if bool(self.mask.all()) else self.mask, owner)
        return State(DynamicCache(), self.mask.new_zeros(len(owner), 0), self.next_position[owner], prefix)

    def select(self, rows: Tensor) -> State:
        """Only the rows with indices `rows` (n,) int64; this state is used up."""
        self.cache.batch_select_indices(rows)
        prefix = None if self.prefix is None else replace(self.prefix, owner=self.prefix.owner[rows])
        return State(self.cache, self.mask[rows], self.next_position[rows], prefix)


def parts(rows: Sequence[Row], most: int) -> Iterator[range]:
    """Places of neighbouring rows that go through the model together: padded, at most `most` tokens, unless one row is longer."""
    begin, longest = 0, 0
    for place, row in enumerate(rows):
        longest = max(longest, len(row))
        if place > begin and longest * (place + 1 - begin) > most:
            yield range(begin, place)
            begin, longest = place, len(row)
    if rows:
        yield range(begin, len(rows))


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
    model: Any, rows: Sequence[Row], *, soft: Tensor | None = None, keep_cache: bool = False, normed: bool = True
) -> tuple[Tensor, State | None]:
    """Pass `rows` through `model` (a `Qwen3VLModel`). Returns hidden states (B, L, H), left-padded, and a state.

    soft (B, n, H): what replaces each row's soft positions. The state is None unless `keep_cache`. normed: behind the
    model's final norm, or before it.
    """
    inputs, mask, next_position = _assemble(model, rows, soft)
    cache = DynamicCache() if keep_cache else None
    hidden = pass_through(
        model,
        normed,
        **inputs,
        attention_mask=mask.long(),
        past_key_values=cache,
        use_cache=keep_cache or None,
    )
    return hidden, State(cache, mask, next_position) if cache is not None else None


def pass_through(model: Any, normed: bool, **inputs: Any) -> Tensor:
    """The language model's last hidden states (B, L, H), behind its final norm or before it."""
    language_model = model.language_model
    if normed:
        return language_model(**inputs).last_hidden_state
    entering: list[Tensor] = []
    hook = language_model.norm.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0]))
    try:
        language_model(**inputs)
    finally:
        hook.remove()
    return entering[0]


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


def feed(model: Any, state: State, embeds: Tensor, real: Tensor | None = None, *, normed: bool = True) -> Tensor:
    """Continue every row of `state` by embeds (R, L, H); returns hidden states (R, L, H) and moves the state on.

    real (R, L) bool: which columns count, all by default; the others are padding, which nothing that follows sees.
    Differentiable, through the state too. normed as in `run`.
    """
    rows, length = embeds.shape[:2]
    if real is None:
        real = torch.ones(rows, length, dtype=torch.bool, device=embeds.device)
    before = state.mask.shape[1]
    state.mask = torch.cat([state.mask, real], 1)
    columns = torch.arange(before + length, device=embeds.device)
    visible = state.mask[:, None, None] & (columns <= columns[before:, None])
    steps = real.cumsum(1)
    positions = state.next_position[:, None] + steps - real.long()
    state.next_position = state.next_position + steps[:, -1]
    shared = {} if state.prefix is None else {"prefix": state.prefix}
    return pass_through(
        model,
        normed,
        inputs_embeds=embeds,
        attention_mask=visible,
        position_ids=positions.expand(3, -1, -1),
        past_key_values=state.cache,
        use_cache=True,
        **shared,
    )


def feed_tokens(
    model: Any, state: State, replies: Sequence[Sequence[int]], *, normed: bool = True
) -> tuple[Tensor, Tensor]:
    """`feed` for token ids, one ragged reply a row: hidden states (R, L, H) of right-padded replies, and those (R, H) at
    each reply's last token. No reply may be empty."""
    table = model.language_model.embed_tokens
    lengths = torch.tensor([len(ids) for ids in replies])
    ids = np.zeros((len(replies), int(lengths.max())), np.int64)
    for row, reply in enumerate(replies):
        ids[row, : len(reply)] = reply
    device = table.weight.device
    real = torch.arange(ids.shape[1])[None] < lengths[:, None]
    hidden = feed(model, state, table(torch.from_numpy(ids).to(device)), real.to(device), normed=normed)
    return hidden, hidden[torch.arange(len(replies)), lengths - 1]


def advance(model: Any, state: State, embeds: Tensor) -> Tensor:
    """`feed` for one vector a row: embeds (R, H) -> hidden states (R, H)."""
    return feed(model, state, embeds[:, None])[:, -1]
