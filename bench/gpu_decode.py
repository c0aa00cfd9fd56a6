"""64 uniform frames of 60 s films on NVDEC (DALI) beside PyAV on all cores: 480p and 1080p H.264, 16 files at a time.

    python -m bench.gpu_decode

The files are made here (x264, 30 frames/s, key pictures every 10 s, moving noise). Every answer is checked before it is timed:
the frames are numbered. Told beside the times: frames/s wanted and decoded, how much of the time goes into reading and cutting
out (CPU), NVDEC's utilisation by NVML, and what the decoders take of the device's memory.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from bench.harness import Measurement
from vsr1.video import Frames, decode
from vsr1.video.dali import DaliDecoder, decode_batch, missing
from vsr1.video.sampling import Sampling

_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "video"
TESTS = [str(_FOLDER / "test_dali_gpu.py"), str(_FOLDER / "test_dali.py")]
SANITIZED = [f"{_FOLDER / 'test_dali.py'}::test_what_nvdec_would_get_wrong_is_refused"]
SIZES = {"480p": (480, 848), "1080p": (1080, 1920)}
FILES, SECONDS, RATE, WANTED = 16, 60, 30, 64
COUNT = 2 * len(SIZES)


def film(path: Path, height: int, width: int) -> Path:
    """A film of moving noise; the brightness of its left upper quarter, 2 + 4 x the second, says where it is."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 256, (height // 8, width // 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": str(10 * RATE)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(SECONDS * RATE):
            picture = np.ascontiguousarray(texture[:, 2 * (index % (width // 2)) :][:height, :width])
            picture = np.pad(picture, ((0, height - picture.shape[0]), (0, 0), (0, 0)))
            picture[: height // 2, : width // 2] = 2 + 4 * (index // RATE)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def check(results: list[object], who: str) -> None:
    for frames in results:
        if not isinstance(frames, Frames):
            raise RuntimeError(f"{who}: {frames}")
        height, width = frames.pixels.shape[1:3]
        corner = frames.pixels[:, height // 8 : height // 4, width // 8 : width // 4].float().mean((1, 2, 3)).cpu()
        expected = 2 + 4 * torch.floor(frames.seconds + 1e-6)
        if (corner - expected).abs().max() > 2 or len(frames) != WANTED:
            raise RuntimeError(f"{who}: frames of other times: {corner.tolist()}, not {expected.tolist()}")


class Utilisation:
    """The mean of what NVML says about NVDEC while the block runs, in percent; None without NVML."""

    def __enter__(self) -> Utilisation:
        self.samples: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            import pynvml
        except ImportError:
            return
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        while not self._over.wait(0.1):
            self.samples.append(pynvml.nvmlDeviceGetDecoderUtilization(handle)[0])

    def __str__(self) -> str:
        if not self.samples:
            return "NVDEC's utilisation is not known (no pynvml)"
        return f"NVDEC busy {np.mean(self.samples):.0f} % (at most {max(self.samples)} %)"


def seconds_of(call: Callable[[], object], least: float = 3.0) -> float:
    """The best time of a call among those of `least` seconds, two or more; the first one warms up and does not count."""
    call()
    times, began = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - began < least:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measurements() -> Iterator[Measurement]:
    """Both sizes, as they are and resized to 224 lines; told as they come."""
    cores = os.cpu_count() or 1
    sampling = Sampling(count=WANTED)
    with tempfile.TemporaryDirectory() as folder:
        for name, (height, width) in SIZES.items():
            path = film(Path(folder) / f"{name}.mp4", height, width)
            paths = [path] * FILES
            print(f"{name}: {path.stat().st_size / 2**20:.1f} MiB a file, {FILES} files, {cores} cores", flush=True)

            def by_cpu(paths: list[Path] = paths) -> list[object]:
                with ThreadPoolExecutor(cores) as pool:
                    return list(pool.map(partial(decode, count=WANTED, threads=1), paths))

            def cutting(paths: list[Path] = paths) -> list[object]:
                return decode_batch(paths, sampling, Nothing(), cores)

            check(by_cpu(), "PyAV")
            cpu, cut = seconds_of(by_cpu), seconds_of(cutting)
            print(
                f"  PyAV {FILES * WANTED / cpu:.0f} wanted frames/s; reading and cutting alone takes {cut:.3f} s",
                flush=True,
            )

            def single(backend: str, path: Path = path) -> float:
                return 1000 * seconds_of(lambda: decode(path, count=WANTED, backend=backend), least=1.0)

            one = {who: single(who) for who in ("pyav", "dali")}
            print("  a single file: " + ", ".join(f"{who} {ms:.0f} ms" for who, ms in one.items()), flush=True)
            for size in (None, (224, 400)):
                free = torch.cuda.mem_get_info()[0]
                decoder = DaliDecoder(batch=FILES, size=size, threads=cores)

                def by_gpu(paths: list[Path] = paths, decoder: DaliDecoder = decoder) -> list[object]:
                    return decode_batch(paths, sampling, decoder, cores)

                check(by_gpu(), "DALI")
                with Utilisation() as utilisation:
                    gpu = seconds_of(by_gpu)
                taken = (free - torch.cuda.mem_get_info()[0]) / 2**20
                decoded = FILES * SECONDS * RATE / gpu
                print(
                    f"  DALI {FILES * WANTED / gpu:.0f} wanted frames/s (about {decoded:.0f} decoded/s), {utilisation}",
                    flush=True,
                )
                case = f"{name}, {WANTED} of {SECONDS * RATE} frames, {FILES} files" + (f", to {size}" if size else "")
                yield Measurement(
                    case, 1000 * gpu, backend="dali", mib=taken, peers={f"PyAV, {cores} cores": 1000 * cpu}
                )


class Nothing(DaliDecoder):
    """Takes excerpts and decodes nothing: what is left is the CPU's part."""

    def __init__(self) -> None:
        pass

    def decode(self, cuts: object) -> list[Frames]:
        return list(cuts)


def main() -> int:
    """Prints the lines; loud where NVDEC cannot be used."""
    if reason := missing():
        print(f"NVDEC IS NOT MEASURED: DALI {reason}")
        return 1
    print(torch.cuda.get_device_name(), flush=True)
    for line in measurements():
        peers = ", ".join(f"{peer} {ms:.0f} ms" for peer, ms in line.peers.items())
        print(f"{line.case}: DALI {line.ms:.0f} ms ({line.mib:.0f} MiB), {peers}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
