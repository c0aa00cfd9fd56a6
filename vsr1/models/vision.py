"""From a video file to the vision tower's tokens: decode, cut into patches, encode, remember.

A `VideoEncoder` owns the frozen tower and the sampling settings. It answers with `VideoFeatures`, the tower's output for
one video plus the true time of every frame pair, and keeps them in memory within a byte budget, because a video is shown
to the policy many times and the tower does not change. Videos are decoded by a `Loader` while the tower works on the ones
before them; who knows early which ones come next says so (`expect`), and they are decoded beside whatever else is done.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from vsr1.errors import VideoError
from vsr1.models.tokenizer import VIDEO_PAD, VISION_END, VISION_START
from vsr1.ops.patches import frames_to_patches, smart_size
from vsr1.video import Frames, Loader, Loading, Sampling

GROUP_BYTES = 512 << 20  # of frames encoded together, unless one video has more


@dataclass(frozen=True)
class VideoSettings:
    """How a video is sampled for the models. fps in frames per second, pixels per frame as height x width."""

    fps: float = 1.0
    max_frames: int = 64
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 256 * 32 * 32

    def limited(self, pixels: int) -> VideoSettings:
        """The same with frames of at most so many pixels (0: as they are)."""
        most = min(self.max_pixels, pixels or self.max_pixels)
        return replace(self, min_pixels=min(self.min_pixels, most), max_pixels=most)


@dataclass(frozen=True)
class VideoFeatures:
    """The vision tower's output for one video.

    tokens (t*h*w, H); deepstack (levels, t*h*w, H); grid (t, h, w) after merging; seconds: t true times, the mean of
    each pair of frames; duration in seconds.
    """

    tokens: Tensor
    deepstack: Tensor
    grid: tuple[int, int, int]
    seconds: tuple[float, ...]
    duration: float

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.tokens, self.deepstack))


def pair_seconds(seconds: Tensor, temporal: int = 2) -> tuple[float, ...]:
    """Frame times (T,) in seconds -> the mean time of each temporal patch; a short last patch repeats its last frame."""
    short = -len(seconds) % temporal
    padded = torch.cat([seconds, seconds[-1:].expand(short)])
    return tuple(padded.view(-1, temporal).mean(1).tolist())


def video_token_ids(tokenizer: PreTrainedTokenizerBase, features: VideoFeatures) -> list[int]:
    """Qwen3-VL's text for a video: before each frame pair its time, then the placeholders of its tokens."""
    frames, height, width = features.grid
    frame = VISION_START + VIDEO_PAD * (height * width) + VISION_END
    text = "".join(f"<{second:.1f} seconds>{frame}" for second in features.seconds[:frames])
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class VideoEncoder:
    """Encodes video files with a frozen vision tower.

    Results are kept in memory by path and by how the video is sampled (frames, resolution), up to `cache_bytes`, the least
    recently used leaving first; `hits` and `misses` count what was asked for. `workers` (0: one per core) and `isolation`
    are those of the `Loader`, and count from the first file on.
    """

    def __init__(
        self,
        visual: Any,
        settings: VideoSettings,
        *,
        cache_bytes: int = 1 << 30,
        workers: int = 0,
        isolation: str = "process",
    ) -> None:
        self.visual = visual  # a Qwen3VLVisionModel
        self.settings = settings
        self.cache_bytes = cache_bytes
        self.hits = self.misses = 0
        self.workers, self.isolation = workers, isolation
        self._cache: OrderedDict[tuple[str, VideoSettings], VideoFeatures] = OrderedDict()
        self._cached_bytes = 0
        self._loaders: dict[str, Loader] = {}
        self._coming: tuple[list[str], Loading[tuple[Path, Frames | VideoError]]] | None = None
        attend_equal_frames_at_once(visual)

    @property
    def device(self) -> torch.device:
        return next(self.visual.parameters()).device

    def frames_to_rows(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (T, H, W, 3) uint8 of one video -> the tower's patch rows and its (1, 3) grid."""
        config = self.visual.config
        height, width = smart_size(
            frames.shape[-3],
            frames.shape[-2],
            min_pixels=self.settings.min_pixels,
            max_pixels=self.settings.max_pixels,
            factor=config.patch_size * config.spatial_merge_size,
        )
        return frames_to_patches(
            frames,
            (height, width),
            patch=config.patch_size,
            merge=config.spatial_merge_size,
            temporal=config.temporal_patch_size,
        )

    @torch.no_grad()
    def encode_frames(self, videos: Sequence[Frames]) -> list[VideoFeatures]:
        """Run the tower over decoded videos, one batch; frames of any size and number."""
        rows, grids = zip(*(self.frames_to_rows(video.pixels.to(self.device)) for video in videos), strict=True)
        grid = torch.cat(grids)
        parameter = next(self.visual.parameters())
        output = self.visual(torch.cat(rows).to(parameter.dtype), grid_thw=grid)
        merge = self.visual.config.spatial_merge_size
        sizes = (grid.prod(-1) // merge**2).tolist()
        tokens = output.pooler_output.split(sizes)
        levels = [level.split(sizes) for level in output.deepstack_features]
        features = []
        for index, video in enumerate(videos):
            t, h, w = grid[index].tolist()
            deepstack = [level[index] for level in levels]
            features.append(
                VideoFeatures(
                    tokens=tokens[index].clone(),
                    deepstack=torch.stack(deepstack) if deepstack else tokens[index].new_empty(0, *tokens[index].shape),
                    grid=(t, h // merge, w // merge),
                    seconds=pair_seconds(video.seconds, self.visual.config.temporal_patch_size),
                    duration=video.duration,
                )
            )
        return features

    def encode(
        self,
        paths: Sequence[Path],
        *,
        batch: int = 32,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[VideoFeatures | VideoError]:
        """Features of each path, in order; a file that cannot be decoded gives its `VideoError` in place."""
        keys = [str(path) for path in paths]
        results: dict[str, VideoFeatures | VideoError] = {}
        for key in keys:
            if (key, self.settings) in self._cache:
                self._cache.move_to_end((key, self.settings))
                results[key] = self._cache[key, self.settings]
        missing = [key for key in dict.fromkeys(keys) if key not in results]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        waiting: list[tuple[str, Frames]] = []
        held = 0
        for count, (path, frames) in enumerate(self._decoded(missing), 1):
            if isinstance(frames, VideoError):
                results[str(path)] = frames
            else:
                waiting.append((str(path), frames))
                held += frames.pixels.numel()
            if len(waiting) == batch or held >= GROUP_BYTES or (waiting and count == len(missing)):
                for (key, _), features in zip(waiting, self.encode_frames([f for _, f in waiting]), strict=True):
                    results[key] = features
                    self._remember(key, features)
                waiting.clear()
                held = 0
            if progress is not None:
                progress(count, len(missing))
        return [results[key] for key in keys]

    def expect(self, paths: Sequence[Path]) -> None:
        """Begin to decode what a later `encode` will ask for, beside whatever is done until then; it asks for all of these, or
        what it leaves is lost. What was expected before and never asked for is given up."""
        if self._coming is not None:
            self._coming[1].close()
        keys = [key for key in dict.fromkeys(map(str, paths)) if (key, self.settings) not in self._cache]
        self._coming = (keys, self._load("expected", keys)) if keys else None

    def frames(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Frames | VideoError]]:
        """Each path with the frames that the tower would be given, first those that were expected; nothing is remembered."""
        return self._decoded([str(path) for path in paths])

    def _decoded(self, keys: Sequence[str]) -> Iterator[tuple[Path, Frames | VideoError]]:
        """Frames of each file, first those that were expected."""
        if self._coming is None or not set(keys) & set(self._coming[0]):
            return self._load("asked", keys)
        (expected, coming), self._coming = self._coming, None
        wanted = set(keys)
        rest = self._load("asked", [key for key in keys if key not in set(expected)])
        return chain((found for found in coming if str(found[0]) in wanted), rest)

    def _load(self, name: str, keys: Sequence[str]) -> Loading[tuple[Path, Frames | VideoError]]:
        sampling = Sampling(fps=self.settings.fps, max_frames=self.settings.max_frames)
        if name not in self._loaders:
            self._loaders[name] = Loader(sampling, workers=self.workers, isolation=self.isolation)
        return self._loaders[name].results([(key, sampling) for key in keys])

    def __getstate__(self) -> dict[str, Any]:
        """Copies decode for themselves."""
        return {**vars(self), "_loaders": {}, "_coming": None}

    def encode_all(self, paths: Sequence[Path], **options: Any) -> list[VideoFeatures]:
        """As `encode` (same options), but a file that cannot be decoded raises its `VideoError`."""
        features = []
        for found in self.encode(paths, **options):
            if isinstance(found, VideoError):
                raise found
            features.append(found)
        return features

    def _remember(self, key: str, features: VideoFeatures) -> None:
        if features.bytes > self.cache_bytes:
            return
        self._cache[key, self.settings] = features
        self._cached_bytes += features.bytes
        while self._cached_bytes > self.cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].bytes

    def forget(self) -> None:
        """Drop every cached feature: call it when the tower's weights change."""
        self._cache.clear()
        self._cached_bytes = 0


def blank(features: VideoFeatures) -> VideoFeatures:
    """The same video with its content removed (all tokens zero): the control that shows what the pixels are worth."""
    return VideoFeatures(
        torch.zeros_like(features.tokens),
        torch.zeros_like(features.deepstack),
        features.grid,
        features.seconds,
        features.duration,
    )


def _equal_frames_attention(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any
) -> Tensor:
    """Stock vision attention, but frames of equal size go through one batched call instead of a loop over frames."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    if self.config._attn_implementation != "sdpa" or not bool((lengths == lengths[0]).all()):
        return type(self).forward(self, hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
    total, frame = hidden_states.shape[0], int(lengths[0])
    query, key, value = self.qkv(hidden_states).reshape(total, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (x.view(-1, frame, self.num_heads, x.shape[-1]).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)
    return self.proj(mixed.transpose(1, 2).reshape(total, -1))


def attend_equal_frames_at_once(visual: Any) -> None:
    """Replace the per-frame attention loop of a Qwen3-VL vision tower by one batched call (same numbers, faster)."""
    for block in visual.blocks:
        block.attn.forward = MethodType(_equal_frames_attention, block.attn)
