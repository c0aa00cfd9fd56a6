"""From a file to frames and back: `probe` describes a file, `decode` samples it by time, `encode` writes one.

Importing this folder loads PyAV and numpy; torch loads with the first decoded frame, so processes that only encode
never pay for it.
"""

from __future__ import annotations

from vsr1.video.decode import decode, decode_many
from vsr1.video.encode import encode
from vsr1.video.frames import Frames
from vsr1.video.probe import VideoInfo, probe

__all__ = ["Frames", "VideoInfo", "decode", "decode_many", "encode", "probe"]
