"""A hundred files that are not what they should be: cut, flipped, mislabelled, endless, and lying about their size."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import av
import numpy as np

CUTS = (0.001, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
FLIPS = (1, 4, 16, 64)  # bits of a file, at random places
FORMATS = {
    "mp4": ("libx264", "mp4", {"bf": "0"}, {"movflags": "faststart"}),
    "mov": ("libx264", "mov", {}, {}),
    "mkv": ("libx264", "matroska", {"bf": "0"}, {}),
    "webm": ("libvpx-vp9", "webm", {"b": "2M", "deadline": "realtime"}, {}),
    "avi": ("mpeg4", "avi", {"b": "2M"}, {}),
    "ts": ("libx264", "mpegts", {}, {}),
    "gif": ("gif", "gif", {}, {}),
}
"""Codec, format, options of the codec, options of the format."""


def whole(folder: Path, suffix: str) -> bytes:
    """Four seconds of noise, so that the frames and not the headers make up the file."""
    codec, name, options, container_options = FORMATS[suffix]
    path = folder / "whole"
    with av.open(path, "w", format=name, options=container_options) as container:
        stream = container.add_stream(codec, rate=5, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "gray" if codec == "gif" else "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    path.unlink()
    return content


def box(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return struct.pack(">I", len(content) + 8 if size is None else size) + name + content


def write(folder: Path) -> dict[Path, bool]:
    """Write the files; for each whether it must fail (what is cut or flipped may by luck still give its frames)."""
    files: dict[str, tuple[bytes, bool]] = {}
    good = {suffix: whole(folder, suffix) for suffix in FORMATS}
    rng = np.random.default_rng(1)
    for suffix, content in good.items():
        promises = suffix not in ("ts", "gif")  # a length, so that what is missing is missed
        for share in CUTS:
            must = share < 0.01 or (promises and share < 0.8)
            files[f"cut-{share}.{suffix}"] = content[: int(share * len(content))], must
        for number in FLIPS:
            bits = np.unpackbits(np.frombuffer(content, np.uint8))
            bits[rng.integers(0, bits.size, number)] ^= 1
            files[f"flipped-{number}.{suffix}"] = np.packbits(bits).tobytes(), False
            front = np.unpackbits(np.frombuffer(content, np.uint8))
            front[rng.integers(0, 8 * 600, number)] ^= 1
            files[f"header-{number}.{suffix}"] = np.packbits(front).tobytes(), False
        files[f"zeroed.{suffix}"] = content[:100] + bytes(len(content) - 100), True
    mp4 = good["mp4"]
    files |= {
        "words.mp4": (b"just some words\n" * 500, True),
        "list.mp4": (b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n", True),
        "itself.mp4": (b"ffconcat version 1.0\nfile itself.mp4\n", True),
        "noise.mkv": (rng.integers(0, 256, 100_000, np.uint8).tobytes(), True),
        "empty.mp4": (b"", True),
        "header alone.mp4": (box(b"ftyp", b"isom\0\0\2\0isom"), True),
        "matroska.mp4": (good["mkv"], False),
        "film.txt": (mp4, False),
        "box without end.mp4": (box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", b"", 0xFFFFFFFF), True),
        "boxes in boxes.mp4": (b"".join(box(b"moov", b"", 1 << 30) for _ in range(50_000)), True),
        "boxes of no size.mp4": (box(b"ftyp", b"isom\0\0\2\0isom") + box(b"free", b"", 1) * 50_000, True),
        "unknown sizes.mkv": (
            good["mkv"][:4] + b"\x01" + b"\xff" * 7 + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 * 20_000,
            True,
        ),
        "samples without end.mp4": (_samples(mp4), True),
        "wide.y4m": (b"YUV4MPEG2 W60000 H30000 F25:1 C420\nFRAME\n" + bytes(1000), True),
        "wide.gif": (b"GIF89a" + struct.pack("<HH", 65535, 65535) + good["gif"][10:], True),
        "hungry.gif": (b"GIF89a" + struct.pack("<HH", 16000, 16000) + good["gif"][10:], True),  # a gigabyte to decode
        "wide.avi": (good["avi"].replace(struct.pack("<ii", 64, 64), struct.pack("<ii", 30000, 30000)), False),
    }
    written = {}
    for name, (content, must) in files.items():
        (folder / name).write_bytes(content)
        written[folder / name] = must
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    return written | {folder / name: True for name in ("pipe.mp4", "folder.mp4", "missing.mp4")}


def _samples(mp4: bytes) -> bytes:
    """An mp4 whose tables tell of a billion frames: of one size and one duration, so they take no room in the file."""
    place = mp4.index(b"stsz") + 4
    changed = mp4[:place] + struct.pack(">III", 0, 1, 1 << 30) + mp4[place + 12 :]
    place = changed.index(b"stts") + 4
    return changed[:place] + struct.pack(">IIII", 0, 1, 1 << 30, 1) + changed[place + 16 :]
