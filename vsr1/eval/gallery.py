"""Trajectories one can look at: what was shown, what the policy said, where the moment is; failures first.

Each query is of one kind: what first went wrong for it, or how it was found. The page shows a few of every kind, the first
of the file and not the prettiest, and filters them by kind without a script.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from vsr1.eval.page import cut, note, section
from vsr1.eval.spans import Span, iou
from vsr1.eval.stills import Stills, complete

Json = dict[str, Any]

NEAR, HIT = 0.3, 0.5  # IoU of a near miss, and of a success
_MOST_TURNS, _MOST_TEXT = 8, 2000  # turns of a card, characters of a reply: a page is read by people


class Kind(NamedTuple):
    """A name for reading, its class (failure, near, success), what it means, and how many cards the page has of it."""

    name: str
    group: str
    meaning: str
    places: int


KINDS = {
    "failed": Kind("failed to decode", "failure", "the loop broke off, as by a video that cannot be read", 2),
    "rejected": Kind("right video rejected", "failure", "the right video was shown and not accepted", 4),
    "false-accept": Kind("wrong video accepted", "failure", "the loop ended with another video", 4),
    "unparsable": Kind("unparsable", "failure", "what was said of the right video cannot be read", 3),
    "moment": Kind("wrong moment", "failure", f"right video accepted, no span or an IoU below {NEAR}", 4),
    "never": Kind("never found", "failure", "the right video was not shown in any turn", 4),
    "near": Kind("near miss", "near", f"right video accepted, {NEAR} ≤ IoU < {HIT}", 3),
    "later": Kind("found later", "success", f"right video in a later turn, IoU ≥ {HIT}", 3),
    "at-once": Kind("found at once", "success", f"right video in the first turn, IoU ≥ {HIT}", 2),
}


def kind_of(record: Json) -> str:
    """The key in `KINDS` of a query's record: what first went wrong, or how it was found."""
    turns = record["turns"]
    if record["stop"] == "failed" or not turns:
        return "failed"
    for turn in turns:
        if turn["video_id"] == record["video_id"]:
            if turn["answer"] is None:
                return "unparsable"
            if turn["answer"] == "not_matched":
                return "rejected"
    if record["stop"] != "matched":
        return "never"
    if turns[-1]["video_id"] != record["video_id"]:
        return "false-accept"
    overlap = _overlap(complete(record["start"], record["end"]), complete(turns[-1]["start"], turns[-1]["end"]))
    if overlap < HIT:
        return "near" if overlap >= NEAR else "moment"
    return "at-once" if len(turns) == 1 else "later"


def _overlap(true: Span | None, said: Span | None) -> float:
    return 0.0 if true is None or said is None else float(iou(said, true))


def gallery(records: Sequence[Json], video_path: Callable[[str], Path]) -> str:
    """The section of the report, nothing without an annotated record; `video_path` says where a video's file lies."""
    by_kind: dict[str, list[Json]] = {kind: [] for kind in KINDS}
    for record in records:
        if record["video_id"] is not None:
            by_kind[kind_of(record)].append(record)
    if not any(by_kind.values()):
        return ""
    stills = Stills(video_path)
    chosen = [(place, kind) for kind, found in by_kind.items() for place in range(min(len(found), KINDS[kind].places))]
    # the first card of every kind is drawn before the second of any, so that the budget of frames serves all kinds
    cards = {one: _card(one[1], by_kind[one[1]][one[0]], stills) for one in sorted(chosen, key=lambda one: one[0])}
    present = {kind: len(found) for kind, found in by_kind.items() if found}
    names = "".join(_choice(kind, KINDS[kind].name, count) for kind, count in present.items())
    return section(
        "Trajectories",
        note(
            f"{sum(present.values()):,} queries of the last stage by what first went wrong, failures first. Shown are the "
            f"first few of each kind in the order of the test file, {len(chosen)} in all, not the prettiest. On the time lines: "
            '<i class="true">the true span</i> where the right video is shown, <i class="said">the span the policy '
            "gave</i>, and the frames above as dots. ✓ and ✗ say whether the answer was right."
        ),
        _shares(present),
        f'<div class="gallery">{_choice("all", "all", sum(present.values()), checked=True)}{names}'
        f'<div class="cards">{"".join(cards[one] for one in chosen)}</div></div>',
    )


def filters() -> str:
    """The style that hides the cards of all kinds but the chosen one."""
    return "".join(f"#kind-{kind}:checked~.cards>:not(.is-{kind}){{display:none}}\n" for kind in KINDS)


def _choice(kind: str, name: str, count: int, checked: bool = False) -> str:
    title = "" if kind == "all" else f' title="{escape(KINDS[kind].meaning)}"'
    return (
        f'<input type="radio" name="kind" id="kind-{kind}"{" checked" if checked else ""}>'
        f'<label for="kind-{kind}"{title}>{escape(name)} <b>{count:,}</b></label>'
    )


def _shares(present: dict[str, int]) -> str:
    """The kinds as parts of one bar."""
    parts = "".join(
        f'<i class="{KINDS[kind].group}" style="flex:{count}" title="{escape(KINDS[kind].name)}: {count:,}"></i>'
        for kind, count in present.items()
    )
    said = ", ".join(f"{KINDS[kind].name} {count:,}" for kind, count in present.items())
    return f'<div class="shares" role="img" aria-label="{escape(said)}">{parts}</div>'


def _card(kind: str, record: Json, stills: Stills) -> str:
    turns, known = record["turns"], KINDS[kind]
    ranks = [turn["rank"] for turn in turns] + [record["final_rank"]]
    shown = " → ".join("?" if rank is None else f"{rank:,}" for rank in ranks)
    facts = [f"right video <b>{escape(record['video_id'])}</b>"]
    true = complete(record["start"], record["end"])
    if true is not None:
        whole = "" if record["duration"] is None else f" of {record['duration']:.1f} s"
        facts.append(f"{true[0]:.1f} to {true[1]:.1f} s{whole}")
    if turns:
        facts.append(f"its rank by turn, and under the last query: <b>{shown}</b>")
    if record["stop"] == "matched" and turns[-1]["video_id"] == record["video_id"]:
        overlap = _overlap(true, complete(turns[-1]["start"], turns[-1]["end"]))
        facts.append(f"IoU <b>{overlap:.2f}</b>")
    parts = [_turn(place, turn, record, stills) for place, turn in enumerate(turns[:_MOST_TURNS], 1)]
    if len(turns) > _MOST_TURNS:
        parts.append(note(f"{len(turns) - _MOST_TURNS} more turns."))
    if record.get("failure"):
        parts.append(f'<p class="broken">{cut(str(record["failure"]), 400)}</p>')
    if record.get("fallback"):
        parts.append(note(_fallback(record["fallback"], record)))
    return (
        f'<article class="is-{kind}"><header><span class="kind {known.group}" title="{escape(known.meaning)}">'
        f"{escape(known.name)}</span><h3>{cut(record['text'], 400)}</h3><p>{'; '.join(facts)}</p></header>"
        f"{''.join(parts)}</article>"
    )


def _fallback(fallback: Json, record: Json) -> str:
    right = "right" if fallback["video_id"] == record["video_id"] else "wrong"
    span = complete(fallback["start"], fallback["end"])
    where = "" if span is None else f", {span[0]:.1f} to {span[1]:.1f} s"
    return f"Nothing was accepted; the answer fallen back on: <b>{escape(fallback['video_id'])}</b>{where} (the {right} video)."


def _turn(place: int, turn: Json, record: Json, stills: Stills) -> str:
    is_true = turn["video_id"] == record["video_id"]
    right = turn["answer"] == ("matched" if is_true else "not_matched")
    true = complete(record["start"], record["end"]) if is_true else None
    said = complete(turn["start"], turn["end"])
    strip = stills.strip(turn["video_id"], true, said, record["duration"] if is_true else None)
    length = strip.duration or (record["duration"] if is_true else None)
    answer = {"matched": "accepted", "not_matched": "rejected", None: "no readable answer"}[turn["answer"]]
    facts = {
        "score": f"{turn['score']:.3f}",
        "right video at rank": "unknown" if turn["rank"] is None else f"{turn['rank']:,}",
    }
    chance = turn.get("probability")
    meter = ""
    if chance is not None:
        facts["P(matched)"] = f"{chance:.2f}"
        meter = f'<dd class="meter"><i style="width:{100 * min(max(chance, 0.0), 1.0):.0f}%"></i></dd>'
    for key, name in (("soft_tokens", "soft tokens"), ("hard_tokens", "tokens in words")):
        if turn.get(key) is not None:
            facts[name] = str(turn[key])
    listed = "".join(
        f"<dt>{name}</dt><dd>{value}</dd>{meter if name == 'P(matched)' else ''}" for name, value in facts.items()
    )
    return (
        f'<div class="turn"><div><p><b>Turn {turn.get("number", place)}</b> {escape(turn["video_id"])}'
        f"{' (the right one)' if is_true else ''}</p>"
        f'<p class="answer {"yes" if right else "no"}">{"✓" if right else "✗"} {answer}</p><dl>{listed}</dl></div>'
        f"<div>{strip.html}{time_line(true, said, length, strip.seconds)}<pre>{_reply(turn['text'].strip())}</pre></div></div>"
    )


def _reply(text: str) -> str:
    """A reply as HTML, its tags set off."""
    return re.sub(r"&lt;/?[A-Za-z_]+&gt;", lambda found: f"<b>{found[0]}</b>", cut(text, _MOST_TEXT))


def time_line(true: Span | None, said: Span | None, duration: float | None, frames: Sequence[float] = ()) -> str:
    """Spans in seconds on a line as long as the video: the true one above, the policy's below it, frames as dots; nothing
    where there is no span or the duration is not known."""
    if not (true or said) or not duration or duration <= 0 or not math.isfinite(duration):
        return ""

    def at(second: float) -> float:
        return 100 * min(max(second / duration, 0.0), 1.0)

    step = _step(duration)
    drawn = ['<line class="axis" x1="0" x2="100%" y1="22" y2="22"/>']
    spoken = []
    for place in range(math.floor(duration / step + 1e-9) + 1):
        x, anchor = at(place * step), "start" if place == 0 else "end" if at(place * step) > 97 else "middle"
        drawn.append(f'<line class="axis" x1="{x:.2f}%" x2="{x:.2f}%" y1="20" y2="25"/>')
        drawn.append(f'<text x="{x:.2f}%" y="37" text-anchor="{anchor}">{place * step:g} s</text>')
    for name, title, span, y in (("true", "true span", true, 2), ("said", "span given", said, 11)):
        if span is None:
            continue
        left, right = at(span[0]), at(span[1])
        width = max(right - left, 0.4)  # an empty span still shows where it is
        left = min(left, 100 - width)
        words = f"{title}: {span[0]:.1f} to {span[1]:.1f} s"
        spoken.append(words)
        drawn.append(
            f'<rect class="{name}" x="{left:.2f}%" y="{y}" width="{width:.2f}%" height="7" rx="2">'
            f"<title>{words}</title></rect>"
        )
    drawn += [f'<circle class="frame" cx="{at(second):.2f}%" cy="22" r="2"/>' for second in frames]
    return f'<svg class="line" role="img"><title>{"; ".join(spoken)}, of {duration:.1f} s</title>{"".join(drawn)}</svg>'


def _step(duration: float) -> float:
    """Seconds from one mark to the next, so that there are at most eight."""
    rough = duration / 8
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
