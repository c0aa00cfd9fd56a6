"""A corpus of broken files through the loader: nothing hangs, nothing crashes, and what gave no frames is in the report."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.video.broken import write
from vsr1.errors import VideoError
from vsr1.video import Loader, Sampling, decode


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Path, bool], set[Path], dict[Path, str], int]:
    """The corpus; which files gave their frames; the reasons of the others; and how many processes it took."""
    files = write(tmp_path_factory.mktemp("broken"))
    logging.disable(logging.WARNING)  # one line a file
    try:
        with Loader(Sampling(fps=2), workers=2, seconds=5.0, memory=512 << 20, failures="skip") as loader:
            fine = {sample.frames.source for sample in loader.load(files)}
            started = sum(worker.started for worker in loader.workers)
    finally:
        logging.disable(logging.NOTSET)
    return files, fine, {failure.path: failure.reason for failure in loader.report.failures}, started


Outcomes = tuple[dict[Path, bool], set[Path], dict[Path, str], int]


def test_each_file_gives_frames_or_a_reason(outcomes: Outcomes) -> None:
    files, fine, reasons, _ = outcomes
    assert len(files) > 100
    assert fine | set(reasons) == set(files) and not fine & set(reasons)
    assert all(reasons.values())
    assert not [path.name for path, must_fail in files.items() if must_fail and path in fine]


def test_nothing_hangs_or_crashes(outcomes: Outcomes) -> None:
    _, _, reasons, started = outcomes
    assert not [path.name for path, reason in reasons.items() if "not decoded within" in reason or "crash" in reason]
    hungry = [path.name for path, reason in reasons.items() if "of memory" in reason]
    assert hungry == ["hungry.gif"]
    assert started <= 2 + len(hungry)  # no other file costs its process


def test_the_loader_says_what_decode_says(outcomes: Outcomes) -> None:
    """In this process, so not for the file that takes the memory."""
    files, fine, reasons, _ = outcomes
    for path in files:
        if path in fine:
            decode(path, fps=2)
        elif path.name != "hungry.gif":
            with pytest.raises(VideoError) as caught:
                decode(path, fps=2)
            assert caught.value.reason == reasons[path]


def test_a_list_of_files_is_no_video(tmp_path: Path, outcomes: Outcomes) -> None:
    """Else a file that somebody sends could have any other read, or itself without end."""
    files, *_ = outcomes
    film = next(path for path in files if path.name == "film.txt")
    (tmp_path / "film.mp4").write_bytes(film.read_bytes())
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile film.mp4\n")
    assert len(decode(tmp_path / "film.mp4", fps=2)) == 8
    with pytest.raises(VideoError):
        decode(tmp_path / "list.mp4", fps=2)
