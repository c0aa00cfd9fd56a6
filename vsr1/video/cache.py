"""Decoded frames on disk, within a budget of bytes, the least recently used leaving first.

One file a video and sampling: a check sum, shape and times as JSON, then every frame as differences of its rows, deflated. Of
what loses nothing this reads fastest: recorded film takes 0.3 to 0.5 of its pixels' bytes and comes back at 120 to 140 MB/s on
one core, where FFV1 takes half of that room but comes back at 15 to 50 MB/s, no faster than most videos decode.

Files are written aside and renamed, under a lock that processes share (the kernel lifts it when one is killed), so what
lies aside when the lock is held was left by the dead and goes. A damaged file is a video that is not here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import numpy as np

from vsr1.errors import VideoError
from vsr1.video.array import beside
from vsr1.video.probe import file_state
from vsr1.video.pyav import Allocate, Pictures
from vsr1.video.sampling import Sampling

FORMAT = 1
LEVEL = 1  # of deflation: the next ones take twice the time for a few percent
SUFFIX, ASIDE = ".frames", ".aside"
CHECK = 8  # bytes of check sum, of all that follows
HEADER = struct.Struct("<I")  # how many bytes of JSON follow


def cache_key(path: str | os.PathLike[str], sampling: Sampling, size: tuple[int, int] | None) -> str:
    """Names what decoding gives: the file as it is now, what is wanted of it, and the decoder's version.

    Raises:
        VideoError: the file is missing.
    """
    named = (FORMAT, av.__version__, *file_state(path), *beside(path), sampling, size)
    return hashlib.sha256(repr(named).encode()).hexdigest()


class FrameCache:
    """Decoded frames in a folder; any number of threads and processes may use it at a time.

    Args:
        folder: is made if it is missing; nothing else should lie there.
        budget: bytes that the files may take together.

    Raises:
        VideoError: the folder cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], budget: int) -> None:
        self.folder, self.budget = Path(folder), budget
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise VideoError(folder, f"cannot hold a cache of frames: {error.strerror or error}") from error

    def get(self, key: str, allocate: Allocate) -> Pictures | None:
        """What was put under the key, in memory that `allocate` gives; None if it is not (or no longer, or damaged) here."""
        path = self._path(key)
        try:
            content = memoryview(path.read_bytes())
        except OSError:
            return None
        if bytes(content[:CHECK]) != _check(content[CHECK:]):
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(path)  # now it is the last that was used
        begin = CHECK + HEADER.size + HEADER.unpack_from(content, CHECK)[0]
        header = json.loads(bytes(content[CHECK + HEADER.size : begin]))
        pixels = allocate(tuple(header["shape"]))
        for frame, size in zip(pixels, header["sizes"], strict=True):
            rows = np.frombuffer(zlib.decompress(content[begin : begin + size]), np.uint8)
            np.add.accumulate(rows.reshape(frame.shape), axis=0, dtype=np.uint8, out=frame)
            begin += size
        return Pictures(pixels, header["seconds"], header["duration"])

    def put(self, key: str, decoded: Pictures) -> bool:
        """Keep what was decoded; what was used longest ago goes until it fits. False if it is larger than the budget.

        Raises:
            OSError: it cannot be written.
        """
        frames = [zlib.compress(_differences(frame), LEVEL) for frame in decoded.pixels]
        header = {
            "shape": decoded.pixels.shape,
            "seconds": decoded.seconds,
            "duration": decoded.duration,
            "sizes": [len(frame) for frame in frames],
        }
        described = json.dumps(header).encode()
        body = b"".join([HEADER.pack(len(described)), described, *frames])
        content = _check(body) + body
        if len(content) > self.budget:
            return False
        path = self._path(key)
        aside = path.with_suffix(ASIDE)
        with self._locked():
            self._make_room(len(content), path)
            aside.write_bytes(content)
            os.replace(aside, path)
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, bytes: int, replaced: Path) -> None:
        kept = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(ASIDE):
                os.unlink(entry.path)
            elif entry.name.endswith(SUFFIX) and entry.name != replaced.name:
                with suppress(FileNotFoundError):  # a reader has found it damaged
                    status = entry.stat()
                    kept.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total + bytes <= self.budget:
                return
            path.unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _differences(frame: np.ndarray) -> bytes:
    """Each row less the one above it, modulo 256: pictures are smooth, and zeros deflate well."""
    rows = frame.copy()
    rows[1:] -= frame[:-1]
    return rows.tobytes()


def _check(body: bytes | memoryview) -> bytes:
    return b"%08x" % zlib.crc32(body)
