"""What an ingestion did, for a program (`IngestReport`), for a reader, and as the list of failures beside the vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vsr1.files import write_whole
from vsr1.ingest.listing import Failure

FAILURES = "failures.jsonl"  # in the corpus folder: what did not go in, the last time
_SHOWN = 50  # failures printed; the file has all


@dataclass
class IngestReport:
    """What became of the files.

    added: videos that are new. replaced: whose content had changed. renamed: whose content the corpus knew under a name
    or at a place where it no longer is. unchanged: left alone. failures: what did not go in. decoded, embedded: videos
    that were. missing: videos of the corpus that should lie below the folders given, and do not.

    seconds of it all; decode_seconds: the part in which frames were being waited for; embed_seconds: that of the model.
    """

    corpus: Path
    added: int = 0
    replaced: int = 0
    renamed: int = 0
    unchanged: int = 0
    decoded: int = 0
    embedded: int = 0
    missing: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()
    seconds: float = 0.0
    decode_seconds: float = 0.0
    embed_seconds: float = 0.0

    def rates(self) -> str:
        """Videos a second: all in all, and what decoding and embedding would do alone."""
        overall, decode, embed = (
            per_second(count, seconds)
            for count, seconds in (
                (self.embedded, self.seconds),
                (self.decoded, self.decode_seconds),
                (self.embedded, self.embed_seconds),
            )
        )
        return f"{overall} videos/s (decode {decode}/s, embed {embed}/s)"

    def __str__(self) -> str:
        counts = ", ".join(f"{getattr(self, name)} {name}" for name in ("added", "replaced", "renamed", "unchanged"))
        lines = [f"{counts}, {len(self.failures)} failed"]
        if self.embedded:
            lines[0] += f"; {self.rates()}"
        if self.missing:
            lines.append(
                f"{len(self.missing)} videos of the corpus have no file any more, the first is '{shown(self.missing[0])}'"
            )
        if self.failures:
            first = self.failures[:_SHOWN]
            width = min(60, max(len(shown(one.path)) for one in first))
            lines += ["", f"{'path':<{width}}  reason"]
            lines += [f"{shown(one.path):<{width}}  {shown(one.reason)}" for one in first]
            more = len(self.failures) - len(first)
            lines.append(f"{f'and {more} more; ' if more else ''}all of them: {self.corpus / FAILURES}")
        return "\n".join(lines)


def per_second(count: int, seconds: float) -> str:
    """A rate to three digits."""
    return f"{count / seconds:.3g}" if seconds > 0 and count else "0"


def shown(text: str) -> str:
    """Text from a file name, on one line and without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def keep(failures: Sequence[Failure], corpus: Path) -> None:
    """Write the list of failures, one JSON object (path, reason) a line; without failures there is no such file."""
    path = corpus / FAILURES
    if not failures:
        path.unlink(missing_ok=True)
        return
    write_whole(path, "".join(json.dumps(vars(one)) + "\n" for one in failures))
