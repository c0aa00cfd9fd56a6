"""A writer killed at any instant: what it said is done is there, what it was doing is there whole or not at all."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import torch

from tests.corpus.shared import files
from vsr1.corpus import Corpus

KILLS = 50
D = 512  # wide enough for kills to fall into the writing of segments, not only of the catalogue
SEGMENT_BYTES = 64 * D * 4


def vectors(names: list[str]) -> torch.Tensor:
    """(M, D) float32, all numbers of a video unlike those of any other."""
    return torch.tensor([int(name[1:]) for name in names], dtype=torch.float32)[:, None] + torch.arange(D) / D


def write_for_ever(folder: Path, seed: int, pipe: int) -> None:
    """Changes the corpus at random; one line on the pipe before each change, "done" after it."""
    chance, corpus = random.Random(seed), Corpus.open(folder)
    for number in range(seed * 5000, (seed + 1) * 5000):
        what = chance.choice(["add", "delete", "compact"])
        names = [f"v{number * 30 + i}" for i in range(chance.randint(1, 30))]
        if what == "delete":
            names = chance.sample(corpus.video_ids, min(len(corpus), chance.randint(1, 40)))
        os.write(pipe, f"{what} {' '.join(names)}\n".encode())
        if what == "add":
            corpus.add(names, vectors(names))
        elif what == "delete":
            corpus.delete(names)
        else:
            corpus.compact(SEGMENT_BYTES)
        os.write(pipe, b"done\n")


def changed(ids: list[str], line: str) -> list[str]:
    what, *names = line.split()
    return {
        "add": ids + names,
        "delete": [video_id for video_id in ids if video_id not in names],
        "compact": ids,
    }[what]


def killed_writer(folder: Path, seed: int, after: float) -> list[str]:
    """What a writer wrote to its pipe before SIGKILL came, `after` seconds from its first line."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        write_for_ever(folder, seed, writing)
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = [pipe.readline()]
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        lines += pipe.readlines()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return [line.strip() for line in lines]


def test_fifty_killed_writers_lose_nothing(tmp_path: Path) -> None:
    chance, folder = random.Random(1), tmp_path / "corpus"
    first = [f"v{n}" for n in range(300)]
    corpus = Corpus.create(folder, D, "e")
    corpus.add(first, vectors(first))
    ids, interrupted = first, 0
    for seed in range(1, KILLS + 1):
        lines = killed_writer(folder, seed, chance.uniform(0, 0.025))
        for line, answer in zip(lines[::2], lines[1::2], strict=False):
            assert answer == "done"
            ids = changed(ids, line)
        again = Corpus.open(folder)
        if len(lines) % 2:  # the last change was never answered for
            interrupted += 1
            whole = changed(ids, lines[-1])
            assert again.video_ids in (ids, whole), lines[-1]
            ids = again.video_ids
        assert again.video_ids == ids
        assert torch.equal(again.matrix().rows, vectors(ids))  # reading compares the checksums
        again.add([f"v{seed + 1000}"], vectors([f"v{seed + 1000}"]))
        ids = [*ids, f"v{seed + 1000}"]
        assert files(again) == named(folder)
        assert {path.name for path in folder.iterdir()} == {"catalogue.sqlite", "vectors"}
    assert interrupted > KILLS // 2  # otherwise the kills missed what they are for


def named(folder: Path) -> list[str]:
    """The files the catalogue names."""
    connection = sqlite3.connect(folder / "catalogue.sqlite")
    try:
        return sorted(file for (file,) in connection.execute("SELECT file FROM segments"))
    finally:
        connection.close()
