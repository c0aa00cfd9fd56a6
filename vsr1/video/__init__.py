"""From a file to frames and back: `probe` describes a file, `decode` samples it by time, `encode` writes one.

Frame arrays (`vsr1.video.array`: frames that were sampled before, with their times) are videos like any file. `Loader` decodes
many files ahead of its caller, each out of harm's way; `FrameCache` keeps what it decoded on disk.

Importing this folder loads PyAV and numpy; torch loads with the first decoded frame, so processes that only encode
never pay for it.
"""

from __future__ import annotations

from vsr1.video.cache import FrameCache
from vsr1.video.decode import decode
from vsr1.video.encode import encode
from vsr1.video.frames import Frames
from vsr1.video.loader import Loader, Loading
from vsr1.video.probe import VideoInfo
from vsr1.video.sampling import Sampling
from vsr1.video.sources import probe

__all__ = ["FrameCache", "Frames", "Loader", "Loading", "Sampling", "VideoInfo", "decode", "encode", "probe"]
