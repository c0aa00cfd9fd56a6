"""The memory of continuous batching: keys and values of the prompts and of their continuations, in places that are reused.

A prompt takes a place when it is read and gives it back when its last continuation is done; a continuation takes a row,
writes one column a token and gives the row back the moment it ends, whatever the others do. Places and rows stay dense
(the last one moves into a hole), so that every step works on exactly the rows that are alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsr1.models import backbone
from vsr1.models.attention import Prefix
from vsr1.models.backbone import Row

_COLUMNS = 32  # own columns are added by so many at a time


class Slots:
    """Places for `places` prompts of at most `longest` tokens, and rows for `rows` continuations of `model`
    (a `Qwen3VLModel`).

    Alive are the first `used_places` places and the first `used_rows` rows; owner holds each row's place, length how many
    columns it has written, position its next position. Prompts are read in passes of at most `read_tokens` tokens.
    """

    def __init__(self, model: Any, *, places: int, longest: int, rows: int, read_tokens: int) -> None:
        self.model = model
        self._read_tokens = read_tokens
        weight = model.language_model.embed_tokens.weight
        text = model.config.text_config
        self._sizes = (text.num_hidden_layers, 2, text.num_key_value_heads, text.head_dim)
        # zeros, not whatever memory holds: a masked column has weight 0, and 0 times NaN is NaN
        layers, two, heads, size = self._sizes
        self._prompts = weight.new_zeros(layers, two, places, heads, longest, size)
        self._own = weight.new_zeros(layers, two, rows, heads, _COLUMNS, size)
        self._real = torch.zeros(places, longest, dtype=torch.bool, device=weight.device)
        self._next = torch.zeros(places, dtype=torch.int64, device=weight.device)
        self.places, self.rows = places, rows
        self.used_places = self.used_rows = 0
        self.owner = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.length = torch.zeros_like(self.owner)
        self.position = torch.zeros_like(self.owner)
        self._lengths: list[int] = []  # of the living rows, known without asking the device
        self._ends = weight.new_zeros(places, text.hidden_size)
        self._columns = 0

    def read(self, prompts: Sequence[Row]) -> None:
        """Pass `prompts` through the model into the next places."""
        for part in backbone.parts(prompts, self._read_tokens):
            self._read([prompts[place] for place in part])

    def _read(self, prompts: Sequence[Row]) -> None:
        hidden, state = backbone.run(self.model, prompts, keep_cache=True)
        assert state is not None
        here = slice(self.used_places, self.used_places + len(prompts))
        width = state.mask.shape[1]
        for layer, (keys, values) in enumerate(zip(*state.layers(), strict=True)):
            self._prompts[layer, 0, here, :, -width:] = keys
            self._prompts[layer, 1, here, :, -width:] = values
        self._real[here] = False
        self._real[here, -width:] = state.mask
        self._next[here] = state.next_position
        self._ends[here] = hidden[:, -1]
        self.used_places += len(prompts)

    def open(self, places: Sequence[int]) -> Tensor:
        """Begin one continuation of each of these places, in the next rows; returns the hidden states (n, H) that its
        first token is read off."""
        here = slice(self.used_rows, self.used_rows + len(places))
        self.owner[here] = torch.tensor(places, device=self.owner.device)
        self.length[here] = 0
        self.position[here] = self._next[self.owner[here]]
        self.used_rows += len(places)
        self._lengths += [0] * len(places)
        return self._ends[self.owner[here]]

    def close(self, row: int) -> int:
        """End a row; returns the row that takes its number (the last one)."""
        last = self.used_rows - 1
        if row != last:
            written = self._lengths[last]
            self._own[:, :, row, :, :written] = self._own[:, :, last, :, :written]
            for values in (self.owner, self.length, self.position):
                values[row] = values[last]
            self._lengths[row] = written
        self._lengths.pop()
        self.used_rows = last
        return last

    def leave(self, place: int) -> int:
        """Free a place that no row continues; returns the place that takes its number (the last one)."""
        last = self.used_places - 1
        if place != last:
            self._prompts[:, :, place] = self._prompts[:, :, last]
            for values in (self._real, self._next, self._ends):
                values[place] = values[last]
            rows = self.owner[: self.used_rows]
            rows[rows == last] = place
        self.used_places = last
        return last

    def step(self, embeds: Tensor, *, normed: bool = True) -> Tensor:
        """Feed one vector to every living row, embeds (R, H); returns the hidden states (R, H)."""
        rows = self.used_rows
        self._columns = max(self._lengths) + 1
        if self._columns > self._own.shape[4]:
            layers, two, heads, size = self._sizes
            more = self._own.new_zeros(layers, two, self.rows, heads, max(_COLUMNS, self._own.shape[4] // 2), size)
            self._own = torch.cat([self._own, more], 4)
        real = self._real[: self.used_places]
        prefix = Prefix(
            [layer[0, : self.used_places] for layer in self._prompts],
            [layer[1, : self.used_places] for layer in self._prompts],
            real,
            self.owner[:rows],
        )
        columns = torch.arange(self._columns, device=embeds.device)
        hidden = backbone.pass_through(
            self.model,
            normed,
            inputs_embeds=embeds[:, None],
            attention_mask=(columns <= self.length[:rows, None])[:, None, None],
            position_ids=self.position[None, :rows, None].expand(3, -1, -1),
            past_key_values=self,
            use_cache=True,
            prefix=prefix,
        )
        self.length[:rows] += 1
        self._lengths = [length + 1 for length in self._lengths]
        self.position[:rows] += 1
        return hidden[:, -1]

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What transformers' layers ask of a cache: keep a row's new key and value, return all it has of its own."""
        rows = torch.arange(self.used_rows, device=key.device)
        kept = self._own[layer, :, : self.used_rows]
        kept[0, rows, :, self.length[: self.used_rows]] = key[:, :, 0]
        kept[1, rows, :, self.length[: self.used_rows]] = value[:, :, 0]
        return kept[0, :, :, : self._columns], kept[1, :, :, : self._columns]
