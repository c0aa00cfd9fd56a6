"""The cache of decoded frames: exact, within its budget for any number of processes, and whole after any end."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.video.kept import noise, plain, same
from tests.video.scripted import scripted
from vsr1.errors import VideoError
from vsr1.video import FrameCache, Loader, Sampling
from vsr1.video.cache import cache_key

ROOT = Path(__file__).parents[2]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "lock")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_what_comes_back_is_what_was_put(tmp_path: Path, frames: int, height: int, width: int, seed: int) -> None:
    cache, pictures = FrameCache(tmp_path, 1 << 20), noise(seed, frames, height, width)
    assert cache.put("a", pictures)
    assert same(cache.get("a", plain), pictures)
    assert cache.get("b", plain) is None


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    one = noise(0, 2, 16, 16)
    FrameCache(tmp_path / "try", 1 << 20).put("a", one)
    size = size_of(tmp_path / "try")
    cache = FrameCache(tmp_path / "cache", 3 * size + size // 2)
    for age, key in enumerate("abc"):
        assert cache.put(key, one)
        os.utime(tmp_path / "cache" / f"{key}.frames", (1000 + age, 1000 + age))
    assert same(cache.get("a", plain), one)  # so now "b" is the one that was used longest ago
    assert cache.put("d", one)
    assert [key for key in "abcd" if cache.get(key, plain)] == ["a", "c", "d"]
    assert not cache.put("large", noise(0, 20, 16, 16))
    assert [key for key in "abcd" if cache.get(key, plain)] == ["a", "c", "d"]


def test_damage_is_found_and_goes(tmp_path: Path) -> None:
    cache, pictures = FrameCache(tmp_path, 1 << 20), noise(0, 2, 8, 8)
    rng = np.random.default_rng(0)
    for position in [0, 9, 13, 30, *rng.integers(0, 400, 20).tolist()]:
        cache.put("a", pictures)
        path = tmp_path / "a.frames"
        content = bytearray(path.read_bytes())
        content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        assert cache.get("a", plain) is None and not path.exists()
    cache.put("a", pictures)
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get("a", plain) is None


WRITER = """
import sys
from tests.video.kept import noise, plain, same
from vsr1.video import FrameCache
cache = FrameCache(sys.argv[1], int(sys.argv[2]))
print("ready", flush=True)
for index in range(int(sys.argv[3]), int(sys.argv[4])):
    cache.put(str(index % 40), noise(index % 40, 2, 16, 16))
    found = cache.get(str((index + 20) % 40), plain)
    assert found is None or same(found, noise((index + 20) % 40, 2, 16, 16))
"""


def writer(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_keep_the_budget(tmp_path: Path) -> None:
    budget, listings = 16_000, []
    writers = [writer(tmp_path, budget, start, start + 200) for start in (0, 13)]
    while any(process.poll() is None for process in writers):
        with open(tmp_path / "lock", "ab") as lock:  # what a process without the lock may see is no sum
            fcntl.flock(lock, fcntl.LOCK_EX)
            listings.append(size_of(tmp_path))
        time.sleep(0.001)
    assert [process.communicate() and process.returncode for process in writers] == [0, 0]
    assert budget // 2 < max(listings) <= budget
    assert budget // 2 < size_of(tmp_path) <= budget


def test_a_kill_leaves_a_cache_that_serves(tmp_path: Path) -> None:
    budget = 30_000
    for start in range(3):
        process = writer(tmp_path, budget, start, 1_000_000)
        process.stdout.readline()
        while not any(path.suffix == ".frames" for path in tmp_path.iterdir()):
            assert process.poll() is None
        process.kill()
        process.communicate()
    (tmp_path / "left.aside").write_bytes(bytes(50_000))  # by one that was killed while it wrote
    cache = FrameCache(tmp_path, budget)
    for index in range(40):
        found = cache.get(str(index), plain)
        assert found is None or same(found, noise(index, 2, 16, 16))
    assert cache.put("a", noise(0, 2, 16, 16))
    assert size_of(tmp_path) <= budget


def test_a_reader_finds_what_is_being_written_anew(tmp_path: Path) -> None:
    cache, pictures = FrameCache(tmp_path, 1 << 24), noise(0, 8, 128, 128)
    cache.put("a", pictures)
    thread = threading.Thread(target=lambda: [cache.put("a", pictures) for _ in range(50)])
    thread.start()
    while thread.is_alive():
        assert same(cache.get("a", plain), pictures)
    thread.join()


def test_the_loader_decodes_what_is_not_kept(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(6)]
    for path in paths:
        path.touch()

    def run(**options: object) -> tuple[Loader, list[int]]:
        with Loader(Sampling(count=4), workers=2, decode=scripted, **options) as loader:
            values = [int(sample.frames.pixels.unique()) for sample in loader.load(paths)]
        return loader, values

    for isolation in ("process", "thread"):
        cache = FrameCache(tmp_path / isolation, 1 << 20)
        first, values = run(cache=cache, isolation=isolation)
        assert (values, first.report.decoded, first.report.cached) == (list(range(6)), 6, 0)
        second, values = run(cache=cache, isolation=isolation)
        assert (values, second.report.decoded, second.report.cached) == (list(range(6)), 0, 6)
        assert not any(worker.started for worker in second.workers)
        other, _ = run(cache=cache, isolation=isolation, size=(2, 2))
        assert (other.report.decoded, other.report.cached) == (6, 0)
        paths[2].write_text("changed")
        third, _ = run(cache=cache, isolation=isolation)
        assert (third.report.decoded, third.report.cached) == (1, 5)
        narrow, values = run(cache=cache, isolation=isolation, queue_bytes=1)  # what is found waits for room, too
        assert (values, narrow.report.cached) == (list(range(6)), 6)


def test_keys_tell_files_and_wishes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).write_text("x")
    one = cache_key("a", Sampling(fps=1), None)
    assert one == cache_key(tmp_path / "a", Sampling(fps=1), None)
    others = [
        cache_key("b", Sampling(fps=1), None),
        cache_key("a", Sampling(fps=2), None),
        cache_key("a", Sampling(fps=1, span=(0, 1)), None),
        cache_key("a", Sampling(times=[1]), None),
        cache_key("a", Sampling(fps=1), (2, 2)),
    ]
    assert len({one, *others}) == 6
    assert cache_key("a", Sampling(times=[1, 2]), None) == cache_key("a", Sampling(times=(1.0, 2.0)), None)
    with pytest.raises(VideoError, match="No such file"):
        cache_key("c", Sampling(fps=1), None)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match="cannot hold a cache"):
        FrameCache(tmp_path / "file", 1)


def test_a_full_disk_costs_the_cache_and_not_the_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FrameCache, "put", full)
    (tmp_path / "7").touch()
    cache = FrameCache(tmp_path / "cache", 1 << 20)
    with Loader(Sampling(count=4), workers=1, isolation="thread", decode=scripted, cache=cache) as loader:
        (sample,) = loader.load([tmp_path / "7"])
    assert torch.all(sample.frames.pixels == 7) and "No space left" in caplog.text


def test_real_film_comes_back_exactly(tmp_path: Path, write_numbered: Callable[..., Path]) -> None:
    path = write_numbered("a.mp4", list(range(0, 4000, 40)))
    samples = []
    for _ in range(2):
        with Loader(
            Sampling(fps=5), workers=1, isolation="thread", cache=FrameCache(tmp_path / "c", 1 << 22)
        ) as loader:
            samples += list(loader.load([path]))
    assert loader.report.cached == 1
    assert torch.equal(samples[0].frames.pixels, samples[1].frames.pixels)
    assert torch.equal(samples[0].frames.seconds, samples[1].frames.seconds)
