"""What stands already, and what it was made from: a step whose files are there is not done again.

`build.json` in the folder that is built keeps for each artefact the inputs it was made from: digests of files, names of
models, settings. It is written before the artefact, and files appear whole, so an artefact that is there was made from
what the record says. If the inputs are others by now, that is an error, unless they are artefacts that were made anew since:
then this one follows, in the same run or, where that was ended, in the next. Files without a record are somebody else's, and
used as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from vsr1.errors import ConfigError
from vsr1.files import write_whole

RECORD: Final = "build.json"
State = Literal["made", "stands", "not ours", "read"]
Counts = Mapping[str, Any]
Inputs = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class Outcome:
    """What became of an artefact: its name, file and state, and the counts its maker gave."""

    name: str
    path: Path
    state: State
    counts: Counts = field(default_factory=dict)


class Standing:
    """The artefacts of one folder. With `force` those that stand are made again."""

    def __init__(self, folder: Path, force: bool = False) -> None:
        self.force = force
        self._path = folder / RECORD
        try:
            self._record: dict[str, dict[str, Any]] = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            self._record = {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"'{self._path}' cannot be read ({error}): delete it, and give --force once") from error

    def changed(self, name: str) -> None:
        """The artefact `name`, which is kept elsewhere, was changed: what was made from it may follow."""
        self._tell(name)
        self._write()

    def make(
        self,
        name: str,
        files: Sequence[Path],
        inputs: Inputs,
        write: Callable[[], Counts],
    ) -> Outcome:
        """See to it that `files` are there and made from `inputs`; `write` makes them and gives counts to remember. Where
        those have `again` set, the next run makes the artefact again.

        An input that is an artefact itself goes by that artefact's name. Raises ConfigError where the files were made from
        something else, or where only some of them are there and nobody knows whose they are.
        """
        there = [path for path in files if path.exists()]
        known = self._record.get(name)
        if known is None and there and not self.force:
            if len(there) == len(files):
                return Outcome(name, files[0], "not ours")
            raise ConfigError(
                f"'{there[0]}' is there and belongs to something that was not built here: move it, or give --force to build "
                "it anew"
            )
        if known is not None and len(there) == len(files) and not self.force:
            old = known["inputs"]
            other = [key for key in (*inputs, *old) if old.get(key) != inputs.get(key)]
            if not other and not known["counts"].get("again"):
                return Outcome(name, files[0], "stands", known["counts"])
            if stale := [key for key in dict.fromkeys(other) if key not in known.get("follows", ())]:
                changes = ", ".join(
                    f"{key} (was {_short(old.get(key))}, is {_short(inputs.get(key))})" for key in stale
                )
                raise ConfigError(
                    f"'{files[0]}' was built from something else: {changes}; give --force to build it anew "
                    "(--only STEP --force: it alone), or another --out"
                )
        for path in files:
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
        self._tell(name)
        self._keep(name, inputs, {"again": True})  # until its counts are known: they may ask for it, too
        counts = write()
        self._keep(name, inputs, counts)
        return Outcome(name, files[0], "made", counts)

    def _tell(self, name: str) -> None:
        """Let what was made from an artefact follow it; the record keeps this, so that a kill in between loses nothing."""
        for entry in self._record.values():
            if name in entry["inputs"]:
                entry["follows"] = sorted({*entry.get("follows", ()), name})

    def _keep(self, name: str, inputs: Inputs, counts: Counts) -> None:
        self._record[name] = {"inputs": dict(inputs), "counts": dict(counts)}
        self._write()

    def _write(self) -> None:
        write_whole(self._path, json.dumps(self._record, ensure_ascii=False, indent=1))


def _short(value: object) -> str:
    return "not said" if value is None else f"'{str(value)[:40]}'"


def digest(*parts: bytes) -> str:
    """A short fingerprint of bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]


def digest_of(path: Path) -> str:
    """A short fingerprint of a file; ConfigError if it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ConfigError(
            f"'{path}' cannot be read ({error.strerror}): the step that makes it has to come first (leave out --only)"
        ) from error
