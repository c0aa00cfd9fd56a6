"""The videos a stage works with: a corpus on disk plus the vision features of its videos in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vsr1.corpus import Corpus
from vsr1.errors import Vsr1Error
from vsr1.models.vision import VideoEncoder, VideoFeatures
from vsr1.ops.corpus_scan import CorpusMatrix


class Shelf:
    """A `Corpus` whose vectors and videos' features are at hand on the models' device; usable wherever the loop asks for a
    corpus. It shows the corpus as it was when the shelf was made."""

    def __init__(self, corpus: Corpus, videos: VideoEncoder) -> None:
        self.corpus = corpus
        self._ids = list(corpus.video_ids)
        self._rows = {video_id: row for row, video_id in enumerate(self._ids)}
        self._videos = videos
        self._matrix = corpus.matrix().to(videos.device)

    @property
    def video_ids(self) -> list[str]:
        return self._ids

    def matrix(self) -> CorpusMatrix:
        return self._matrix

    def path(self, video_id: str) -> Path:
        return self.corpus.path(video_id)

    def row(self, video_id: str | None) -> int:
        """The corpus row of a video; Vsr1Error for one that it lacks."""
        if video_id is None:
            raise ValueError("this query has no known video")
        if video_id not in self._rows:
            raise Vsr1Error(f"video '{video_id}' is not in the corpus '{self.corpus.folder}', and a query asks for it")
        return self._rows[video_id]

    def holds(self, video_id: str) -> bool:
        """Whether the corpus has this video."""
        return video_id in self._rows

    def features(self, video_ids: Sequence[str]) -> list[VideoFeatures]:
        """The vision features of each video; raises VideoError for a file that cannot be read."""
        return self._videos.encode_all([self.path(video_id) for video_id in video_ids])

    def expect(self, video_ids: Sequence[str]) -> None:
        """These videos' features will be asked for next: decode meanwhile what is not at hand."""
        self._videos.expect([self.path(video_id) for video_id in video_ids])
