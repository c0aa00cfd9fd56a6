"""The process that decodes for a loader: one file after another, frames written straight into memory the loader lends.

It is started by `vsr1.video.pool` with one end of a pair of sockets, and imports PyAV and numpy but no torch, so that a new
one is ready in a quarter of a second of computing. Over the sockets go jobs and outcomes, never pixels: once the first
wanted frame is known the process asks for memory of that shape, and gets a descriptor of it when the loader has room.

It ends when the loader does (the socket closes), when a file takes too long (an alarm that the kernel keeps, in case
the loader is gone too), and when a file takes too much memory (`OUT_OF_MEMORY` is then its exit code).
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Protocol

import numpy as np

from vsr1.errors import VideoError
from vsr1.video.pyav import Allocate, Pictures
from vsr1.video.sampling import Sampling

OUT_OF_MEMORY = 77
LATE = 2.0  # the alarm rings after so many times the limit: ending the process is the loader's business first


class Decode(Protocol):
    """What decodes one file, as `vsr1.video.sources.pictures` does; a loader's processes import it by its module and name."""

    def __call__(
        self,
        path: str,
        sampling: Sampling,
        *,
        size: tuple[int, int] | None,
        threads: int | None,
        allocate: Allocate,
    ) -> Pictures: ...


def main() -> None:
    """Serve the loader on descriptor `sys.argv[1]` until it closes: at most `argv[2]` seconds and `argv[3]` bytes a file."""
    connection, seconds, memory = Connection(int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(EOFError, ConnectionError):  # the loader has gone
        decode: Decode = pickle.loads(connection.recv_bytes())
        limit_memory(memory)
        connection.send("ready")
        while True:
            path, sampling, size = connection.recv()
            _serve(connection, decode, path, sampling, size, LATE * seconds)


def limit_memory(bytes: int) -> None:
    """Let this process take so many bytes more than it has now; only Linux counts what is really taken."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as statm:
            data = int(statm.read().split()[5]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = data + bytes
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _serve(
    connection: Connection,
    decode: Decode,
    path: str,
    sampling: Sampling,
    size: tuple[int, int] | None,
    seconds: float,
) -> None:
    def allocate(shape: tuple[int, int, int, int]) -> np.ndarray:
        signal.setitimer(signal.ITIMER_REAL, 0)  # to wait for room is no fault of the file
        connection.send(("room", shape))
        descriptor = recv_handle(connection)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return np.frombuffer(mmap.mmap(descriptor, math.prod(shape)), np.uint8).reshape(shape)
        finally:
            os.close(descriptor)

    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        decoded = decode(path, sampling, size=size, threads=1, allocate=allocate)
        outcome: tuple[object, ...] = "done", decoded.seconds, decoded.duration
    except (VideoError, MemoryError) as error:
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            os._exit(OUT_OF_MEMORY)  # whatever half of the work is left in this process goes with it
        outcome = "failed", error.reason
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    connection.send(outcome)
