"""An ingestion killed at any instant leaves a corpus that opens, and the next run finishes the work."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.ingest.conftest import Colours, film
from vsr1 import ingest
from vsr1.corpus import Corpus

FILES = 40
KILLS = 8
# Its processes are forks of one without threads, locks or open databases, unlike forks of the tests' own.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


class Slow(Colours):
    """Takes its time, so that kills fall between its batches."""

    def embed_videos(self, features):
        time.sleep(0.01)
        return super().embed_videos(features)


def run(folder: Path, films: Path, reports: Connection) -> None:
    torch.set_num_threads(1)
    ingest.add(folder, [films], Slow(), workers=1, batch=2, progress=lambda *_: reports.send(None))


def killed_run(folder: Path, films: Path, reports: int, after: float) -> bool:
    """Run `add` in a process that SIGKILL ends `after` seconds from its so-manieth report of progress, or from its start;
    whether that came before the end."""
    heard, telling = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=run, args=(folder, films, telling))
    process.start()
    telling.close()
    with heard:
        with suppress(EOFError):  # it may end before that many
            for _ in range(reports):
                heard.recv()
        process.join(after)
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_runs_lose_nothing_and_the_next_goes_on(tmp_path: Path) -> None:
    chance, folder, films = random.Random(1), tmp_path / "corpus", tmp_path / "films"
    for number in range(FILES):
        film(films / f"{number}.mp4", number % 12)
    killed, before, stages = 0, 0, set()
    for number in range(KILLS):
        killed += killed_run(folder, films, number % 4, chance.uniform(0, 0.03))  # the first report is of no batch yet
        if not (folder / "catalogue.sqlite").exists():
            continue  # killed before it had made the corpus
        corpus = Corpus.open(folder)
        assert len(corpus) >= before  # a batch that is in stays in
        assert corpus.marks().keys() == set(corpus.video_ids)  # a row and what its file was come together
        assert len(corpus.matrix()) == len(corpus)  # whose segments are whole
        before = len(corpus)
        stages.add(before)
    assert killed and stages - {0, FILES}  # otherwise the kills missed what they are for
    report = ingest.add(folder, [films], Colours(), workers=1, batch=2)
    assert (report.added, report.unchanged, report.failures) == (FILES - before, before, ())
    assert sorted(Corpus.open(folder).video_ids) == sorted(f"{number}.mp4" for number in range(FILES))
