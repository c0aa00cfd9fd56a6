"""What the figures depend on: refinement and its controls, soft tokens, turns, refinement in words, the second stage.

Each function makes one section of the report from what `eval.json` (and `ablations.json`) holds of each stage, and nothing
where they hold nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from vsr1.eval import figures
from vsr1.eval.figures import STAGE_NAMES, is_defined, triple
from vsr1.eval.page import figure, note, percent, quantity, section, table
from vsr1.eval.tables import METRICS, THRESHOLDS, group

Json = dict[str, Any]
Stages = Mapping[str, Json]

METHOD = "refinement + exclusion"
_TURNED = "The same trajectories cut after 1, 2, .. turns: an accept counts only if it had come by then."


def difference(changes: Mapping[str, Json]) -> str:
    """What the second stage changed, paired."""
    shares = {title: changes[name] for name, title in METRICS.items() if is_defined(changes.get(name))}
    if not shares:
        return ""
    sure = sum(low > 0 or high < 0 for _, low, high in map(triple, shares.values()))
    return section(
        "What GRPO changed",
        figure(
            figures.differences(shares, "GRPO minus SFT"),
            "Paired differences over the same queries with 95 % intervals. Grey ones hold zero: no change that these "
            f"queries could prove. {sure} of {len(shares)} do not; by chance alone about one in twenty would not.",
            table(["", "points"], [[title, percent(share)] for title, share in shares.items()]),
        ),
    )


def ablations(stages: Stages) -> str:
    """Refinement beside its controls, and its paired gain over each of them."""
    tested = {stage: one["ablations"] for stage, one in stages.items() if one.get("ablations")}
    names = list(dict.fromkeys(name for found in tested.values() for name in found))
    if not names:
        return ""
    names.sort(key=lambda name: name != METHOD)
    columns = {"R@1": "R@1", "R@1 wrong": "right second video", "0.5": "VCMR, IoU ≥ 0.5"}
    rows: dict[str, dict[str, Json]] = {}
    for name in names:
        rows[name] = {}
        for stage, found in tested.items():
            one = group(found, name)
            flat = {**one, **group(one, "vcmr")}
            rows[name][stage] = {title: flat.get(key) for key, title in columns.items()}
    titles = [
        title
        for title in columns.values()
        if any(is_defined(one[title]) for named in rows.values() for one in named.values())
    ]
    if not titles:
        return ""
    numbers = table(
        ["", *(f"{title}, {STAGE_NAMES[stage]}" for title in titles for stage in tested)],
        [
            [escape(name), *(percent(rows[name][stage][title]) for title in titles for stage in tested)]
            for name in names
        ],
    )
    return section(
        "Does refinement earn it?",
        note(
            "Only queries whose first video was rejected get a second search, and any other video shown there can "
            "gain: a rise of R@1 proves nothing by itself. What refinement earns is its distance to <b>exclusion "
            f"only</b>, the next video of the first ranking.{_about_controls(names)}{_over(stages, 'ablations')}"
        ),
        _gain(stages),
        figure(
            figures.bars(dict.fromkeys(titles, ("percent", 100.0)), rows, first_is_method=names[0] == METHOD),
            "Full colour: the method; pale: its controls. Thin lines are 95 % intervals. <b>R@1</b>: of the last query, "
            "rejected videos left out where the condition excludes them. <b>Right second video</b>: how often the second "
            "video shown is the right one, of the queries whose first was not.",
            numbers,
        ),
    )


def _about_controls(names: Sequence[str]) -> str:
    meanings = {
        "random soft tokens": "<b>Random soft tokens</b> show what any disturbance of the query gains.",
        "blank video": "<b>Blank</b> and <b>shuffled video</b> show whether refinement looked at what it rejected.",
        "rocchio": "<b>Rocchio</b> moves the query without a policy that refines.",
    }
    return "".join(f" {meaning}" for name, meaning in meanings.items() if name in names)


def _over(stages: Stages, shown: str) -> str:
    """Over which queries these figures of each stage are, where they are not all that it was evaluated on."""
    said = []
    for stage, one in ((stage, one) for stage, one in stages.items() if one.get(shown)):
        measured, queries = group(one, "compared").get("measured"), one.get("queries")
        if measured is not None and measured != queries:
            whole = "" if queries is None else f" of {queries:,}"
            said.append(f"{measured:,}{whole} queries after {STAGE_NAMES[stage]}")
    return f" All conditions are over the same {', '.join(said)}." if said else ""


def _gain(stages: Stages) -> str:
    """The paired gain of refinement over each control, where the evaluation gives it."""
    gains = {
        f"over {name}, {STAGE_NAMES[stage]}": group(one, "refinement_gain")[name]
        for name in dict.fromkeys(name for one in stages.values() for name in group(one, "refinement_gain"))
        for stage, one in stages.items()
        if is_defined(group(one, "refinement_gain").get(name))
    }
    if not gains:
        return ""
    return figure(
        figures.differences(gains, "gain of refinement + exclusion"),
        "The method minus each control over the queries whose first video was wrong: how much more often the second "
        "video shown is the right one. Where the interval holds zero (grey) refinement earned nothing provable.",
        table(["", "points"], [[escape(name), percent(gain)] for name, gain in gains.items()]),
    )


def _lines(
    stages: Stages, rows: str, at: str, wanted: Mapping[str, Callable[[Json], Any]]
) -> dict[str, dict[str, Any]]:
    """For each panel the (x, figure) of each stage, where any is defined: `rows` is the list's key and `at` that of x."""
    panels: dict[str, dict[str, Any]] = {}
    for title, of in wanted.items():
        named = {stage: [(row[at], of(row)) for row in one.get(rows) or ()] for stage, one in stages.items()}
        named = {stage: points for stage, points in named.items() if any(is_defined(entry) for _, entry in points)}
        if named:
            panels[title] = named
    return panels


def _numbers(panels: Mapping[str, Mapping[str, Sequence[tuple[int, Any]]]], head: str) -> str:
    columns = {
        f"{title}, {STAGE_NAMES[stage]}": dict(points) for title, of in panels.items() for stage, points in of.items()
    }
    places = sorted({place for points in columns.values() for place in points})
    return table([head, *columns], [[str(at), *(percent(one.get(at)) for one in columns.values())] for at in places])


def _vcmr(threshold: str) -> Callable[[Json], Any]:
    return lambda row: group(row, "vcmr").get(threshold)


def soft_tokens(stages: Stages) -> str:
    """Figures when only the first soft tokens of a refinement are inserted."""
    wanted: dict[str, Callable[[Json], Any]] = {
        "R@1 over the whole corpus": lambda row: row.get("R@1"),
        "R@1, rejected videos excluded": lambda row: row.get("R@1 excluded"),
        "VCMR, IoU ≥ 0.5": _vcmr("0.5"),
    }
    panels = _lines(stages, "by_soft_tokens", "tokens", wanted)
    if not panels:
        return ""
    others = {f"VCMR, IoU ≥ {t}": _vcmr(t) for t in THRESHOLDS if t != "0.5"}
    return section(
        "Soft tokens",
        figure(
            figures.against(panels, "soft tokens inserted", "no soft tokens", shared=False),
            "Only the first n soft tokens of a refinement are inserted; n = 0 is the plain query. <b>R@1 over the whole "
            "corpus</b> is that of the first refinement alone, the others are of the whole loop, every refinement of it "
            "shortened. A line that rises steadily says that later tokens add something; bands are 95 % intervals of each "
            f"point alone.{_over(stages, 'by_soft_tokens')}",
            _numbers({**panels, **_lines(stages, "by_soft_tokens", "tokens", others)}, "soft tokens"),
        ),
    )


def turns(stages: Stages) -> str:
    """Figures of loops of 1, 2, .. turns."""
    moments = _lines(stages, "by_turns", "turns", {f"VCMR, IoU ≥ {t}": _vcmr(t) for t in THRESHOLDS})
    others: dict[str, Callable[[Json], Any]] = {
        "R@1, last query": lambda row: row.get("R@1"),
        "VER, all turns": lambda row: row.get("ver"),
        "Queries with a video accepted": lambda row: row.get("answered"),
    }
    rest = _lines(stages, "by_turns", "turns", others)
    if not moments and not rest:
        return ""
    parts = []
    if moments:
        parts.append(
            figure(
                figures.against(moments, "turns allowed"),
                f"{_TURNED} The rise after the first turn is what looking again brings, by exclusion and refinement "
                "together. Bands are 95 % intervals.",
                _numbers(moments, "turns"),
            )
        )
    if rest:
        said = (
            "Loops of that length: retrieval by their last query, right answers over their turns, and queries for which a "
            "video was accepted, right or wrong. Bands are 95 % intervals."
        )
        parts.append(figure(figures.against(rest, "turns allowed", shared=False), said, _numbers(rest, "turns")))
    return section("Turns", *parts)


def refinements(stages: Stages) -> str:
    """Soft refinement beside refinement in words: what each costs and what it finds."""
    columns = {
        "Tokens a refinement": ("tokens", 1.0),
        "R@1": ("percent", 100.0),
        "Time": ("seconds", 1.0),
    }
    keys = dict(zip(columns, ("tokens", "R@1", "seconds"), strict=True))
    names = {"soft": "soft tokens", "hard": "in words"}
    rows = {
        name: {
            stage: {title: group(one["refinements"], kind).get(key) for title, key in keys.items()}
            for stage, one in stages.items()
            if one.get("refinements")
        }
        for kind, name in names.items()
    }
    if not any(is_defined(entry) for named in rows.values() for one in named.values() for entry in one.values()):
        return ""
    stages_here = list(next(iter(rows.values())))
    numbers = table(
        ["", *(f"{title}, {STAGE_NAMES[stage]}" for title in columns for stage in stages_here)],
        [
            [name, *(quantity(named[stage][title], columns[title][1]) for title in columns for stage in stages_here)]
            for name, named in rows.items()
        ],
    )
    return section(
        "Soft or in words",
        figure(
            figures.bars(columns, rows),
            "The same loop with refinement by soft tokens, and with the policy's own words behind the query: tokens made for a "
            "refinement; R@1 of the last query, rejected videos excluded; seconds from the query and the rejected video to the "
            "new query's vector, the mean of at most four batches. Thin lines are 95 % intervals; those of so few batches only "
            f"say how steady the machine was.{_over(stages, 'refinements')}",
            numbers,
        ),
    )
