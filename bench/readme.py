"""The parts of the README that programs write: each lies between two markers, `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def replace(name: str, text: str, readme: Path = README) -> None:
    """Put `text` between the README's markers of that name; ValueError where they are missing."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = readme.read_text()
    if begin not in whole or end not in whole:
        raise ValueError(f"'{readme}' has no {begin} .. {end}")
    head, tail = whole.split(begin)[0], whole.split(end)[1]
    readme.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
