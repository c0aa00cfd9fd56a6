"""A decoder that does what a file's name says, for tests of the loader; its processes import this, so it imports little."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np

from vsr1.errors import VideoError
from vsr1.video.pyav import Allocate, Pictures
from vsr1.video.sampling import Sampling

SIDE = 64
BYTES = 4 * SIDE * SIDE * 3  # of the frames of every good file


def scripted(
    path: str, sampling: Sampling, *, size: tuple[int, int] | None, threads: int | None, allocate: Allocate
) -> Pictures:
    """Decode "<number>" or "<action>-<number>": four frames full of the number, unless the action prevents it.

    Who decoded what is noted in the file "log" beside it: process and name.
    """
    action, _, number = Path(path).name.rpartition("-")
    with open(Path(path).parent / "log", "a") as log:
        log.write(f"{os.getpid()} {Path(path).name}\n")
    if action == "broken":
        raise VideoError(path, "is broken")
    if action == "bug":
        raise TypeError("a bug of the decoder")
    if action == "hang":
        time.sleep(1000)
    if action == "spin":  # and never lets go of the interpreter
        re.match(r"(a+)+$", "a" * 64 + "b")
    if action == "segfault":
        faulthandler._sigsegv()
    if action == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "exit":
        os._exit(3)
    if action == "hungry":
        held = [np.ones(1 << 22) for _ in range(1 << 10)]  # 32 MiB each
        raise AssertionError(f"{len(held)} arrays were had")
    if action == "slow":
        time.sleep(0.3)
    pixels = allocate((1 << 14, 1 << 14, 1 << 14, 3) if action == "huge" else (4, SIDE, SIDE, 3))
    pixels[:] = ("torch" in sys.modules) if action == "torch" else int(number)
    if action == "late":  # after its frames have their room
        os.kill(os.getpid(), signal.SIGKILL)
    return Pictures(pixels, [0.0, 1.0, 2.0, 3.0], 4.0)


def interrupted(folder: str, signal_number: int) -> None:
    """Load two hanging files, and send this process a signal as soon as both hang."""
    import threading

    from vsr1.video.loader import Loader

    def send() -> None:
        log = Path(folder) / "log"
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal_number)

    threading.Thread(target=send, daemon=True).start()
    with Loader(Sampling(count=4), workers=2, seconds=1.0, decode=scripted) as loader:
        list(loader.load([f"{folder}/hang-1", f"{folder}/hang-2"]))
