"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text aside and rename it, so that a kill leaves the old file or the new one."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, target)
