"""The DALI backend: NVDEC decodes a batch of excerpts, the GPU resizes them, torch gets the memory without a copy.

Which pictures to decode is settled on the CPU by `excerpt`; DALI only counts frames from an excerpt's start, so it gives the
frames that PyAV gives. The pipeline is built once for a batch size and kept; NVDEC's decoders are kept by DALI, one for each
codec and size. DALI fails a whole batch for one bad sample: then every sample of it runs alone, and only the bad one is lost.

Colours: DALI converts by BT.601 whatever the file says; files that say BT.709 or BT.2020 are put right by a 3 x 3 matrix.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video.excerpt import Excerpt, excerpt
from vsr1.video.frames import Frames
from vsr1.video.probe import quarter_turns, turned
from vsr1.video.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = {"h264": (48, 16), "hevc": (144, 144), "vp9": (128, 128)}
"""NVDEC's least width and height of each codec it is used for here. Not AV1: DALI finds it on few GPUs, not on an H100."""
FORMATS = ("yuv420p", "yuvj420p")
BT601 = (0.299, 0.114)
LUMA = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}
"""The weights of red and blue in the luma of the matrices other than BT.601, by FFmpeg's numbers: BT.709 and BT.2020."""


@functools.cache
def missing() -> str | None:
    """Why DALI cannot serve on this machine, or None."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "needs NVIDIA DALI: pip install 'vsr1[gpu]'"
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device, and torch sees none"


def refuses(cut: Excerpt) -> str | None:
    """Why NVDEC cannot decode this excerpt into the frames that PyAV gives, or None."""
    if cut.codec not in SMALLEST:
        return f"takes {', '.join(SMALLEST)}; this is {cut.codec}"
    frame, least = cut.first, SMALLEST[cut.codec]
    if frame.format.name not in FORMATS:
        return f"takes 8-bit 4:2:0 pictures; these are {frame.format.name}"
    if frame.width % 2 or frame.height % 2:
        return f"takes even sizes; this is {frame.width} x {frame.height}"
    if frame.width < least[0] or frame.height < least[1]:
        return f"takes {cut.codec} of at least {least[0]} x {least[1]} pixels; this is {frame.width} x {frame.height}"
    return None


class DaliDecoder:
    """Decodes batches of excerpts on one device; one thread at a time may use it.

    Args:
        device: number of the CUDA device, or None for DALI's CPU decoders (VP9 alone of ours; for tests of this graph).
        batch: at most this many videos in one run of the pipeline.
        size: (height, width) that every video is resized to as it is displayed (upright); None keeps each its own.
        threads: host threads that feed NVDEC, one a video.
        index: let DALI list an excerpt's frames first; then frames nobody wants are not converted.

    Raises:
        BackendUnavailable: DALI or the device is missing.
    """

    def __init__(
        self,
        device: int | None = 0,
        batch: int = 8,
        size: tuple[int, int] | None = None,
        threads: int = 8,
        index: bool = True,
    ) -> None:
        if device is not None and (reason := missing()):
            raise BackendUnavailable(f"video backend 'dali' {reason}")
        self.device, self.batch, self.size, self.threads, self.index = device, batch, size, threads, index
        self._pipeline: Any = None

    def decode(self, cuts: Sequence[Excerpt]) -> list[Frames | VideoError | BackendUnavailable]:
        """The wanted frames of every excerpt, in order; `pixels` lie on the device. What fails takes its error's place."""
        results: list[Frames | VideoError | BackendUnavailable | None] = [None] * len(cuts)
        served = []
        for index, cut in enumerate(cuts):
            reason = refuses(cut) if self.device is not None else None
            if reason is None:
                served.append(index)
            else:
                results[index] = BackendUnavailable(f"video backend 'dali' {reason}: '{cut.source}'")
        for first in range(0, len(served), self.batch):
            part = served[first : first + self.batch]
            for index, frames in zip(part, self._isolated([cuts[index] for index in part]), strict=True):
                results[index] = frames
        return [result for result in results if result is not None]

    def _isolated(self, cuts: list[Excerpt]) -> list[Frames | VideoError]:
        """One run for all of them, or where that fails one for each."""
        try:
            return list(self._run(cuts))
        except RuntimeError as error:
            self._pipeline = None  # what is left of it after an error is not used again
            if len(cuts) > 1:
                return [result for cut in cuts for result in self._isolated([cut])]
            return [VideoError(cuts[0].source, f"DALI cannot decode it: {_reason(error)}")]

    def _run(self, cuts: list[Excerpt]) -> Iterator[Frames]:
        import torch

        if self._pipeline is None:
            self._pipeline = self._built()
        inputs = {
            "encoded": [cut.data for cut in cuts],
            "frames": [np.array(cut.frames, np.int32) for cut in cuts],
        }
        if self.size is not None:
            inputs["size"] = [np.array(turned(self.size, quarter_turns(cut.first)), np.float32) for cut in cuts]
        (videos,) = self._pipeline.run(**inputs)
        for cut, video in zip(cuts, videos, strict=True):
            pixels = torch.utils.dlpack.from_dlpack(video)
            if pixels.shape[0] != len(cut.frames):
                raise RuntimeError(f"{pixels.shape[0]} frames came for {len(cut.frames)}")
            pixels = _coloured(pixels, cut)
            if len(cut.rows) > len(cut.frames):
                pixels = pixels[torch.tensor(cut.rows, device=pixels.device)]
            pixels = torch.rot90(pixels, quarter_turns(cut.first), (1, 2))
            yield Frames(pixels, torch.tensor(cut.seconds, dtype=torch.float64), cut.duration, cut.source)

    def _built(self) -> Any:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        cpu = self.device is None
        # A queue of one: the inputs are fed run by run, and a batch that fails must not take the next one with it.
        pipeline = Pipeline(self.batch, self.threads, self.device, prefetch_queue_depth=1, exec_dynamic=True)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            videos = fn.decoders.video(encoded, device="cpu" if cpu else "mixed", frames=frames, build_index=self.index)
            if self.size is not None:
                size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
                videos = fn.resize(videos, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            pipeline.set_outputs(videos)
        pipeline.build()
        return pipeline


@functools.lru_cache(4)
def _kept(device: int, size: tuple[int, int] | None) -> tuple[DaliDecoder, threading.Lock]:
    return DaliDecoder(device, batch=1, size=size), threading.Lock()


def decode_one(cut: Excerpt, device: int | None = None, size: tuple[int, int] | None = None) -> Frames:
    """One video on a device (None: torch's current one), by a decoder that is kept for the next; many go faster in batches.

    Raises:
        VideoError: NVDEC cannot decode it.
        BackendUnavailable: it is none of the videos that DALI takes.
    """
    import torch

    decoder, lock = _kept(torch.cuda.current_device() if device is None else device, size)
    with lock:
        (result,) = decoder.decode([cut])
    if not isinstance(result, Frames):
        raise result
    return result


def decode_batch(
    paths: Sequence[str | os.PathLike[str]],
    sampling: Sampling,
    decoder: DaliDecoder,
    workers: int = 4,
) -> list[Frames | VideoError | BackendUnavailable]:
    """Decode the wanted frames of many files; `workers` threads read them and cut out what is needed."""

    def cut(path: str | os.PathLike[str]) -> Excerpt | VideoError | BackendUnavailable:
        try:
            return excerpt(path, sampling)
        except (VideoError, BackendUnavailable) as error:
            return error

    with ThreadPoolExecutor(workers, thread_name_prefix="vsr1-excerpt") as executor:
        cuts = list(executor.map(cut, paths))
    decoded = iter(decoder.decode([item for item in cuts if isinstance(item, Excerpt)]))
    return [next(decoded) if isinstance(item, Excerpt) else item for item in cuts]


def _reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what it met; above it stands the pipeline's traceback, below its own."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else str(error).splitlines()[0]


def _coloured(pixels: Tensor, cut: Excerpt) -> Tensor:
    """Pixels converted by BT.601, as if they had been converted by the matrix that the file names."""
    weights = LUMA.get(int(cut.first.colorspace))
    if weights is None:
        return pixels
    import torch

    turned = _to_rgb(*weights) @ np.linalg.inv(_to_rgb(*BT601))
    matrix = torch.tensor(turned.T, dtype=torch.float32, device=pixels.device)
    # A few frames at a time: in float32 all of them would take four times the memory of what is kept.
    parts = [(part.float() @ matrix).round_().clamp_(0, 255).byte() for part in pixels.split(8)]
    return torch.cat(parts)


def _to_rgb(red: float, blue: float) -> np.ndarray:
    """From luma and the two colour differences to red, green and blue, for the weights of red and blue in the luma."""
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )
