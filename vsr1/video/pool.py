"""The loader's side of its decoding processes, and the room that decoded frames may take while they wait.

A `Worker` is one process, started at its first job and again after it had to be ended. Its `decode` blocks, so a thread
drives it. Whatever happens to the process (a crash, a hang, too much memory) is the `VideoError` of the file it had, and
the next file gets a new process. Processes are started by `subprocess` and not by `multiprocessing`, which would run the
caller's main module in them, and with it mostly torch.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

import numpy as np

from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video.pyav import Pictures
from vsr1.video.sampling import Sampling
from vsr1.video.worker import OUT_OF_MEMORY, Decode

START_SECONDS = 120.0  # for imports from a cold network disk on a busy machine; mostly it takes a quarter of a second
GRACE_SECONDS = 5.0  # between the end of a process' connection and its own
PROGRAM = "from vsr1.video.worker import main; main()"
MIB = 1 << 20

Admit = Callable[[int], None]
"""Waits until there is room for so many bytes of frames."""


class Closed(Exception):
    """The loading that this frame was for has ended."""


class Room:
    """Bytes of decoded frames that may wait at a time; what the caller waits for is never held up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.most = 0
        self._due: object = None
        self._closed = False
        self._changed = threading.Condition()

    def take(self, owner: object, bytes: int) -> None:
        """Wait until there is room for `bytes` of `owner`, or until it is due. Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.used + bytes <= self.limit or self._due is owner)
            if self._closed:
                raise Closed
            self.used += bytes
            self.most = max(self.most, self.used)

    def free(self, bytes: int) -> None:
        with self._changed:
            self.used -= bytes
            self._changed.notify_all()

    def due(self, owner: object) -> None:
        """The caller waits for this one now."""
        with self._changed:
            self._due = owner
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Worker:
    """One decoding process.

    Args:
        decode: what decodes a file; a function of a module, which the process imports.
        seconds: a file may take so long, waiting for room not counted; then the process is killed.
        memory: bytes that the process may take beside the frames, and the frames themselves, each.
    """

    def __init__(self, decode: Decode, seconds: float, memory: int) -> None:
        self.decode_with, self.seconds, self.memory = decode, seconds, memory
        self.started = 0
        self.busy = False
        self._killed = False
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None

    def decode(self, path: str, sampling: Sampling, size: tuple[int, int] | None, admit: Admit) -> Pictures:
        """Decode one file into shared memory; `admit` is told how many bytes its frames take and returns when there is room.

        Raises:
            VideoError: the file cannot be decoded, or the process did not survive it.
            BackendUnavailable: no process can be started.
        """
        self.busy = True
        try:
            process, connection = self._ready()
            connection.send((os.path.abspath(path), sampling, size))  # the process stays where it was started
            return self._outcome(process, connection, path, admit)
        except (EOFError, ConnectionError) as error:
            raise VideoError(path, self._cause_of_death()) from error
        except (VideoError, BackendUnavailable):
            raise
        except BaseException:
            self.stop()  # it waits for an answer that will not come
            raise
        finally:
            self.busy = False

    def _outcome(self, process: subprocess.Popen[bytes], connection: Connection, path: str, admit: Admit) -> Pictures:
        pixels: np.ndarray | None = None
        deadline = time.monotonic() + self.seconds
        while True:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.stop()
                raise VideoError(path, f"not decoded within {self.seconds:g} s; its process was killed")
            kind, *content = connection.recv()
            if kind == "failed":
                raise VideoError(path, content[0])
            if kind == "done":
                assert pixels is not None
                return Pictures(pixels, *content)
            (shape,) = content
            if math.prod(shape) > self.memory:
                self.stop()
                raise VideoError(path, f"its frames {shape} take more than {self.memory / MIB:.0f} MiB; ask for a size")
            asked = time.monotonic()
            admit(math.prod(shape))
            descriptor, memory = _memory(math.prod(shape))
            try:
                send_handle(connection, descriptor, process.pid)
            finally:
                os.close(descriptor)
            deadline += time.monotonic() - asked
            pixels = np.frombuffer(memory, np.uint8).reshape(shape)

    def _ready(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._running is not None and self._running[0].poll() is None and not self._killed:
            return self._running
        self.stop()
        ours, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(self.seconds), str(self.memory)]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the loader, who ends its processes in order
                env=_environment(),
            )
        self._running = process, ours
        self.started += 1
        try:
            ours.send_bytes(pickle.dumps(self.decode_with))
            if ours.poll(START_SECONDS):
                ours.recv()
                return self._running
            cause = f"it is not ready after {START_SECONDS:g} s"
        except (EOFError, ConnectionError):
            cause = self._cause_of_death()
        self.stop()
        raise BackendUnavailable(f"a decoding process cannot be started: {cause}; isolation='thread' needs none")

    def _cause_of_death(self) -> str:
        """Why the process closed its end of the connection."""
        if self._running is None:
            return "its process was killed"
        process = self._running[0]
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        self.stop()
        code = process.returncode
        if code == OUT_OF_MEMORY:
            return f"decoding takes more than {self.memory / MIB:.0f} MiB of memory"
        if code < 0:
            return f"the decoder crashed ({signal.Signals(-code).name})"
        return f"the decoding process ended with code {code}"

    def kill(self) -> None:
        """End the process, from another thread: the one that waits for an answer gets an error, the next job a new process."""
        running, self._killed = self._running, True
        if running is not None:
            running[0].kill()

    def stop(self) -> None:
        """End the process and wait for its end; the next job starts a new one."""
        running, self._running, self._killed = self._running, None, False
        if running is not None:
            process, connection = running
            process.kill()
            process.wait()
            connection.close()


def _environment() -> dict[str, str]:
    """One thread for a numpy that multiplies nothing; and what the loader can import its processes can."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _memory(bytes: int) -> tuple[int, mmap.mmap]:
    """Memory to share, and its descriptor; without a name, so that it is gone when nobody holds it, however they ended."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("vsr1-frames")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, bytes)
        return descriptor, mmap.mmap(descriptor, bytes)
    except BaseException:
        os.close(descriptor)
        raise
