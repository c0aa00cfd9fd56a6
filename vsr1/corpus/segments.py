"""Vectors on disk: append-only segment files, each written once and never changed.

A segment is one safetensors file with one tensor, `vectors` (M, D). It is written beside its final name, flushed to the
disk and renamed; only the catalogue makes it part of the corpus. A file the catalogue does not name is what a killed
writer left behind: readers never look at it, the next writer removes it. Many vectors are written in parts, so that the
memory they need does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vsr1.errors import CorpusError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SEGMENT_BYTES = 1 << 28  # of one part: large files read fast, and a few such parts fit in any memory
_ASIDE = ".aside"
# What a writer may leave behind; safetensors itself writes to .tmpXXXXXX first.
_OURS = re.compile(r"\d{6,}\.safetensors(\.aside)?|\.tmp\w{6}")


class SegmentMissing(CorpusError):
    """A segment's file is gone: lost, or replaced by a compaction since the catalogue was read."""


@dataclass(frozen=True)
class Segment:
    """One committed file of vectors: its number, file name, rows and the SHA-256 of the whole file in hex."""

    number: int
    file: str
    rows: int
    sha256: str


def write_segment(folder: Path, number: int, vectors: torch.Tensor) -> Segment:
    """Writes vectors (M, D) as segment `number` of `folder`, durable when this returns."""
    file = f"{number:06d}.safetensors"
    aside = folder / (file + _ASIDE)
    save_file({"vectors": vectors.contiguous()}, aside)
    flush(aside)
    digest = _sha256(aside)
    aside.rename(folder / file)
    flush(folder)
    return Segment(number, file, len(vectors), digest)


def read_segment(folder: Path, segment: Segment, dimension: int, dtype: torch.dtype, verify: bool) -> torch.Tensor:
    """The vectors (M, D) of a segment; `verify` compares the file with its checksum first.

    Raises SegmentMissing without the file, CorpusError where it was changed or holds something else.
    """
    path = folder / segment.file
    way_out = "restore the folder from a copy, or build the corpus again"
    try:
        if verify:
            found = _sha256(path)
            if found != segment.sha256:
                raise CorpusError(
                    f"segment '{path}' is damaged: its SHA-256 is {found[:12]}.., the catalogue has "
                    f"{segment.sha256[:12]}..: {way_out}"
                )
        vectors = load_file(path)["vectors"]
    except (OSError, RuntimeError, SafetensorError, KeyError) as error:
        # safetensors opens the file twice, and says of a file that vanishes in between (a compaction's) RuntimeError.
        if isinstance(error, FileNotFoundError) or not path.exists():
            raise SegmentMissing(f"segment '{path}' with {segment.rows} vectors is missing: {way_out}") from error
        raise CorpusError(f"segment '{path}' cannot be read ({error}): {way_out}") from error
    if vectors.shape != (segment.rows, dimension) or vectors.dtype != dtype:
        raise CorpusError(
            f"segment '{path}' holds {tuple(vectors.shape)} {vectors.dtype}, the catalogue says "
            f"{(segment.rows, dimension)} {dtype}: {way_out}"
        )
    return vectors


def remove_leftovers(folder: Path, committed: Collection[str]) -> None:
    """Deletes segment files that no commit names. Only for the one who holds the catalogue's write lock."""
    for path in folder.iterdir():
        if path.name not in committed and _OURS.fullmatch(path.name):
            path.unlink()


def storable(video_ids: Sequence[str], vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Vectors (M, D) as they are stored: on the CPU, in `dtype`. Raises CorpusError, naming the video, for numbers that
    are not finite there; TypeError for vectors that are not floating point."""
    if not vectors.is_floating_point():
        raise TypeError(f"vectors must be floating point, got {vectors.dtype}")
    stored = vectors.detach().to("cpu", dtype)
    bad = (~stored.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise CorpusError(
            f"the vector of video '{video_ids[int(bad[0])]}' is not finite in {dtype} ({len(bad)} such of "
            f"{len(video_ids)}): embed it again, or leave it out"
        )
    return stored


def in_parts(rows: int, row_bytes: int, what: str, part_bytes: int = SEGMENT_BYTES) -> Iterator[slice]:
    """Slices of `rows` rows, each of at most `part_bytes` (but one row at least); a bar named `what` where a terminal
    watches and there are several."""
    from rich.console import Console
    from rich.progress import track

    step = max(1, part_bytes // row_bytes)
    parts = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    console = Console(stderr=True)
    silent = len(parts) < 2 or not console.is_terminal
    yield from track(parts, what, console=console, transient=True, disable=silent)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
