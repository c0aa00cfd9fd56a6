"""A prompt with its video in the form that vLLM's token-in, token-out endpoint reads.

The endpoint takes token ids and, apart from them, the multi-modal items behind their placeholders: for each its place, a
hash, and its tensors as base64 of a MessagePack map (vLLM's `MultiModalKwargsItem`). A prompt of ours becomes one item per
frame pair of the video: the placeholders between `<|vision_start|>` and `<|vision_end|>` are the item's place, and its
tensors are the vision tower's output for that pair, which the encoder here has already made. So the server reads exactly
our token ids, with our time stamps, and exactly our video tokens; it neither decodes the file nor runs a tower.

The items are of the kind "image", of which vLLM knows that it is one frame and that its place holds nothing but its tokens.
A "video" item's place includes the time stamps, and which of its tokens are pictures cannot be said over HTTP. To the
language model the two are the same: its rotary positions of a frame depend on where the frame begins and on its height and
width only, in transformers and in vLLM alike.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsr1.models.backbone import Row

RAW_VIEW = 3  # the MessagePack extension type under which vLLM sends a tensor's bytes


def _head(count: int, small: int, limit: int, codes: Sequence[tuple[int, str]]) -> bytes:
    """MessagePack's opening of a thing of `count` parts: in one byte below `limit`, else the shortest of `codes`."""
    if count < limit:
        return bytes([small | count])
    for code, layout in codes:
        if count < 1 << 8 * struct.calcsize(layout):
            return bytes([code]) + struct.pack(layout, count)
    raise ValueError(f"{count} is more than MessagePack can count")


def pack(value: Any) -> bytes:
    """`value` as MessagePack: None, bool, int from 0 on, str, list, dict with str keys, and bytes as a tensor's raw view."""
    if value is None or isinstance(value, bool):
        return bytes([0xC0 if value is None else 0xC2 + value])
    if isinstance(value, int):
        return _head(value, 0x00, 128, [(0xCC, ">B"), (0xCD, ">H"), (0xCE, ">I"), (0xCF, ">Q")])
    if isinstance(value, str):
        text = value.encode()
        return _head(len(text), 0xA0, 32, [(0xD9, ">B"), (0xDA, ">H"), (0xDB, ">I")]) + text
    if isinstance(value, bytes):
        return _head(len(value), 0, 0, [(0xC7, ">B"), (0xC8, ">H"), (0xC9, ">I")]) + bytes([RAW_VIEW]) + value
    if isinstance(value, list):
        return _head(len(value), 0x90, 16, [(0xDC, ">H"), (0xDD, ">I")]) + b"".join(map(pack, value))
    if isinstance(value, dict):
        parts = b"".join(pack(key) + pack(part) for key, part in value.items())
        return _head(len(value), 0x80, 16, [(0xDE, ">H"), (0xDF, ">I")]) + parts
    raise TypeError(f"cannot be packed: {type(value).__name__}")


def _tensor(tensor: Tensor) -> list[Any]:
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw]


def frame_item(embeds: Tensor, grid: tuple[int, int, int]) -> bytes:
    """One frame pair as vLLM's packed item. embeds (h*w, (1 + levels)*H): its tokens, deepstack levels behind them; grid:
    its time, height and width in patches, before merging."""
    whole = [0, embeds.shape[0], None]
    return pack(
        {
            "image_embeds": {
                "data": _tensor(embeds),
                "field": ["flat", {"keep_on_cpu": False, "slices": [whole], "dim": 0}],
            },
            "image_grid_thw": {
                "data": _tensor(torch.tensor(grid, dtype=torch.int64)),
                "field": ["batched", {"keep_on_cpu": True}],
            },
        }
    )


def features(row: Row, *, placeholder: int, merge: int) -> dict[str, Any]:
    """The `features` of a generate request for a prompt `row` with a video.

    placeholder: the id of `<|video_pad|>`. merge: patches along the side of one token. ValueError if the prompt's
    placeholders are not those of its video, frame by frame.
    """
    video = row.video
    assert video is not None
    frames, height, width = video.grid
    is_video = [token == placeholder for token in row.token_ids]
    starts = [index for index, here in enumerate(is_video) if here and not is_video[index - 1]]
    if len(starts) != frames or sum(is_video) != frames * height * width:
        raise ValueError(
            f"the prompt holds {sum(is_video)} video placeholders in {len(starts)} runs; its video has {frames} frames of "
            f"{height * width} tokens"
        )
    embeds = torch.cat([video.tokens, *video.deepstack], -1).detach().cpu().view(frames, height * width, -1)
    items = [frame_item(frame, (1, height * merge, width * merge)) for frame in embeds]
    return {
        "mm_hashes": {"image": [hashlib.sha256(item).hexdigest() for item in items]},
        "mm_placeholders": {"image": [{"offset": start, "length": height * width} for start in starts]},
        "kwargs_data": {"image": [base64.b64encode(item).decode() for item in items]},
    }
