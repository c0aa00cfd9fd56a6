"""Errors a person can act on.

Everything the package raises on purpose about its *surroundings* (a file, a folder, a setting, a machine) derives from
`Vsr1Error`; the command line prints such an error as one line and exits with code 2. Wrong *arguments* of library
functions stay plain `ValueError` / `TypeError`, as in the rest of the ecosystem.
"""

from __future__ import annotations


class Vsr1Error(Exception):
    """A problem outside the code: the message names the thing, the value and the way out."""


class ConfigError(Vsr1Error):
    """An unknown preset or key, a bad value, or a run folder that belongs to something else."""


class VideoError(Vsr1Error):
    """A video that cannot be probed or decoded. `path` and `reason` are kept for reports."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"video '{path}': {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class CorpusError(Vsr1Error):
    """A corpus folder that is missing, damaged, or built by another embedder."""


class CheckpointError(Vsr1Error):
    """A model folder that is missing, damaged, or holds another model than its configuration says."""


class BackendUnavailable(Vsr1Error):
    """A backend named on purpose that cannot serve this call; the message says why."""
