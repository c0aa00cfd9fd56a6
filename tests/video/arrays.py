"""Frame arrays in the public layout: `<video>.npy` and its row of meta.jsonl, with all the keys that public rows have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plain_frame(index: int) -> np.ndarray:
    """A frame (8, 12, 3) that says its number in all of its pixels."""
    return np.full((8, 12, 3), index, np.uint8)


def write_array(
    folder: Path,
    video: str,
    seconds: Sequence[float],
    duration: float,
    frame: Callable[[int], np.ndarray] = plain_frame,
    **changes: Any,
) -> Path:
    """Frame i was displayed at `seconds[i]`; an odd number of them gets the last one twice. `changes` are laid over the row."""
    odd = len(seconds) % 2 == 1
    times = [*seconds, seconds[-1]] if odd else list(seconds)
    indices = [round(time * 25) for time in times]
    pixels = np.stack([frame(min(index, len(seconds) - 1)) for index in range(len(times))])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{video}.npy"
    np.save(path, pixels)
    row = {
        "source_video_path": f"/videos/{video}.mp4",
        "source_total_frames": round(duration * 25),
        "source_duration_sec": duration,
        "raw_fps": 25.0,
        "target_sample_fps": 1.0,
        "target_max_frames": 64,
        "requested_indices_src": indices[: len(seconds)],
        "sampled_indices_src": indices,
        "sampled_timestamps_sec": times,
        "sampled_frames_before_even_pad": len(seconds),
        "even_pad_applied": odd,
        "output_num_frames": len(times),
        "output_height": pixels.shape[1],
        "output_width": pixels.shape[2],
        "output_dtype": "uint8",
        "extract_utc": "2025-11-03T08:15:00+00:00",
        "video_id": video,
        "output_npy_path": str(path),
    }
    with (folder / "meta.jsonl").open("a") as file:
        file.write(json.dumps(row | changes) + "\n")
    return path
