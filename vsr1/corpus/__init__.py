"""What is searched: one vector a video, kept with its catalogue in one folder on disk (`Corpus`)."""

from __future__ import annotations

from vsr1.corpus.catalogue import FileMark
from vsr1.corpus.store import Corpus

__all__ = ["Corpus", "FileMark"]
