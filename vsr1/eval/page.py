"""Pieces of a report's page, all of them HTML text: sections, notes, figures with a caption and their numbers, tables,
and the page around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from vsr1.eval.figures import is_defined, triple
from vsr1.eval.style import STYLE

_HEADING = re.compile(r'<section id="([^"]*)"><h2>([^<]*)</h2>')
NOTHING = '<span class="none">—</span>'


def section(title: str, *parts: str) -> str:
    name = escape(title.lower().replace(" ", "-").replace("?", ""))
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def figure(svg: str, note: str, numbers: str = "") -> str:
    """A drawing with its caption, and the same as a table (`numbers`) behind a fold."""
    folded = fold("The same as a table", numbers) if numbers else ""
    return f"<figure>{svg}<figcaption>{note}</figcaption>{folded}</figure>"


def fold(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; the first of each row is its heading, and a row of one cell is the heading of those below it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr class="group"><th scope="rowgroup" colspan="{len(head)}">{row[0]}</th></tr>'
        if len(row) == 1
        else f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def percent(entry: Mapping[str, Any] | None) -> str:
    """A share with its interval, in percent."""
    return quantity(entry, 100.0)


def quantity(entry: Mapping[str, Any] | float | None, scale: float = 1.0) -> str:
    """A figure with its interval, or a number without one; a dash where it is undefined."""
    if isinstance(entry, int | float):
        entry = {"value": entry}
    if not is_defined(entry):
        return NOTHING
    value, low, high = triple(entry, scale)
    digits = 1 if scale != 1 or abs(value) >= 1 else 3
    if low == high == value:
        return f"{value:.{digits}f}"
    return f'{value:.{digits}f} <span class="interval">{low:.{digits}f} to {high:.{digits}f}</span>'


def cut(text: str, most: int) -> str:
    """A text as HTML, its end left out where it is longer than `most` characters."""
    left_out = len(text) - most
    return escape(text) if left_out <= 0 else f"{escape(text[:most])} … ({left_out:,} more characters)"


def document(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[str], style: str) -> str:
    """The whole page. `facts` stand under the title; `style` is what sections need besides the style of all pages."""
    body = "\n".join(sections)
    # spaces, since lines only break there
    head = " ".join(f"<span>{escape(name)} <b>{escape(value)}</b></span>" for name, value in facts)
    links = " ".join(f'<a href="#{name}">{title}</a>' for name, title in _HEADING.findall(body))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · vsr1</title><style>{STYLE}{style}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="facts">{head}</p><nav>{links}</nav>\n{body}\n</main></body></html>\n'
    )
