"""The report of a run: `config.yaml`, `log.jsonl`, `eval.json` and `trajectories.jsonl` become one `report.html`.

The page needs nothing but itself: figures are inline SVG, frames inline JPEG. It says beside every figure how to read
it, and sets the controls of refinement (exclusion alone, random soft tokens, other videos) beside refinement itself.
What a run does not have yet, such as a second stage, is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vsr1.errors import ConfigError, Vsr1Error
from vsr1.eval import figures
from vsr1.eval.curves import STAGES, learning
from vsr1.eval.figures import STAGE_NAMES, triple
from vsr1.eval.page import figure, note, section, table
from vsr1.files import write_whole

FRAMES = 6
_RANKS = ("R@1", "R@5", "R@10", "R@100", "MRR")
_THRESHOLDS = ("0.3", "0.5", "0.7")
_FULL = "refinement + exclusion"
_METRICS = {
    **{f"after {name}": f"{name}, last query" for name in _RANKS},
    **{f"vcmr {t}": f"VCMR, IoU ≥ {t}" for t in _THRESHOLDS},
    "ver": "right answers, all turns",
    "ver_turn1": "right answers, first turn",
    "ver_final": "right answers, last turn",
    "unparsable": "unparsable answers",
    "mean_iou": "mean IoU, right video accepted",
    "R@1 excluded": "R@1, last query, rejected videos excluded",
}
# How many trajectories of each kind the gallery shows; a kind the run lacks gives its places to the others.
_GALLERY = {"won after refinement": 3, "won at once": 1, "false accept": 2, "never found": 2}
Json = dict[str, Any]


def write_report(run_folder: Path, video_path: Callable[[str], Path]) -> Path:
    """Writes `report.html` into a run folder and returns its path; `video_path` says where a video's file lies.

    Raises ConfigError where one of the four files is missing or cannot be read. A video that cannot be decoded does not
    stop the report: its reason stands where its frames would be.
    """
    config = _text(run_folder, "config.yaml", "train a run first")
    log, torn = _log(_text(run_folder, "log.jsonl", "train a run first"))
    evaluation = _json(run_folder, "eval.json", _text(run_folder, "eval.json", "evaluate the run first"))
    lines = _text(run_folder, "trajectories.jsonl", "evaluate the run first").splitlines()
    trajectories = [_json(run_folder, f"trajectories.jsonl line {n}", line) for n, line in enumerate(lines, start=1)]

    stages = {stage: evaluation[stage] for stage in STAGE_NAMES if evaluation.get(stage)}
    if not stages:
        raise ConfigError(f"'{run_folder / 'eval.json'}' holds neither 'sft' nor 'grpo': evaluate the run first")
    sections = [
        _tiles(stages),
        _results(stages),
        _difference(evaluation.get("difference") or {}),
        _ablations(stages),
        _soft_tokens(stages),
        _turns(stages),
        learning(log, torn),
        _gallery(trajectories, video_path),
        _settings(config, evaluation),
    ]
    page = _PAGE.format(
        title=escape(run_folder.resolve().name), head=_head(evaluation), body="\n".join(s for s in sections if s)
    )
    path = run_folder / "report.html"
    write_whole(path, page)
    return path


def _text(folder: Path, name: str, way_out: str) -> str:
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"run folder '{folder}' has no {name}: {way_out}")
    return path.read_text(encoding="utf-8")


def _json(folder: Path, name: str, text: str) -> Json:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"'{folder / name}' is not JSON ({error}): evaluate the run again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"'{folder / name}' holds a {type(value).__name__}, not an object: evaluate the run again")
    return value


def _log(text: str) -> tuple[list[Json], int]:
    """The log's records, and how many lines a killed run left torn."""
    records, torn = [], 0
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            torn += 1
    return records, torn


def _is_defined(figure: Json | None) -> bool:
    return not math.isnan(triple(figure)[0])


def _percent(figure: Json | None) -> str:
    value, low, high = triple(figure)
    if math.isnan(value):
        return '<span class="none">—</span>'
    return f'{value:.1f} <span class="interval">{low:.1f} to {high:.1f}</span>'


def _plain(figure: Json | float | None) -> str:
    """A figure that is no share, such as a number of tokens; with or without an interval."""
    value = figure.get("value") if isinstance(figure, dict) else figure
    return '<span class="none">—</span>' if value is None else f"{value:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _head(evaluation: Json) -> str:
    facts = [
        ("split", evaluation.get("split")),
        ("queries", evaluation.get("queries")),
        ("videos in the corpus", evaluation.get("corpus_size")),
        ("seed", evaluation.get("seed")),
        ("time", _duration(sum(evaluation["stages_seconds"].values())) if evaluation.get("stages_seconds") else None),
    ]
    return "".join(f"<span>{name} <b>{escape(str(value))}</b></span>" for name, value in facts if value is not None)


def _tiles(stages: Mapping[str, Json]) -> str:
    name, last = list(stages.items())[-1]
    tiles = [
        ("VCMR, IoU ≥ 0.5", last["vcmr"].get("0.5"), "right video accepted, right span, within the whole loop"),
        ("the same, one turn", last["vcmr_one_turn"].get("0.5"), "without a second look"),
        ("VR R@1, last query", last["after"].get("R@1"), f"first query {triple(last['before'].get('R@1'))[0]:.1f}"),
        ("Verification", last.get("ver"), "right answers over all turns"),
        ("Mean IoU", last.get("mean_iou"), "where the right video was accepted"),
    ]
    cells = []
    for label, share, hint in tiles:
        value, low, high = triple(share)
        shown = "—" if math.isnan(value) else f"{value:.1f}<small>%</small>"
        bounds = "" if math.isnan(value) else f"{low:.1f} to {high:.1f}"
        cells.append(
            f'<div class="tile"><h3>{label}</h3><div class="big">{shown}</div><div class="interval">{bounds}</div>'
            f"<p>{hint}</p></div>"
        )
    return (
        f'<section><div class="tiles">{"".join(cells)}</div>'
        + note(f"Figures after {STAGE_NAMES[name]}, in percent; small numbers are 95 % bootstrap intervals.")
        + "</section>"
    )


def _results(stages: Mapping[str, Json]) -> str:
    rows: list[Sequence[str]] = [["Video retrieval, first query → last query"]]
    for metric in _RANKS:
        cells = [
            f'{_percent(s["before"].get(metric))} <span class="arrow">→</span> {_percent(s["after"].get(metric))}'
            for s in stages.values()
        ]
        rows.append([metric, *cells])
    for title, key in (("Moment retrieval (VCMR, R@1)", "vcmr"), ("Moment retrieval, one turn", "vcmr_one_turn")):
        rows.append([title])
        rows += [[f"IoU ≥ {t}", *(_percent(s[key].get(t)) for s in stages.values())] for t in _THRESHOLDS]
    rows.append(["Verification and localisation"])
    for key in ("ver", "ver_turn1", "ver_final", "unparsable", "mean_iou"):
        rows.append([_METRICS[key], *(_percent(s.get(key)) for s in stages.values())])
    rows.append(["Counts"])
    for name, key in (("text tokens a reply", "text"), ("soft tokens a refinement", "soft")):
        rows.append([name, *(_plain((s.get("tokens") or {}).get(key)) for s in stages.values())])
    rows.append(["failed queries, left out", *(str(s.get("failed", "—")) for s in stages.values())])
    return section(
        "Results",
        table(["", *(f"after {STAGE_NAMES[s]}" for s in stages)], rows),
        note(
            "Percent with 95 % bootstrap intervals over queries. A rank is one more than the number of videos that "
            "score strictly higher than the right one. VCMR counts a query only if the right video was accepted with a "
            "span of that IoU; accepting a wrong video ends the loop with nothing. An unparsable answer is a wrong one."
        ),
    )


def _difference(difference: Mapping[str, Json]) -> str:
    shares = {title: difference[name] for name, title in _METRICS.items() if _is_defined(difference.get(name))}
    if not shares:
        return ""
    sure = sum(low > 0 or high < 0 for _, low, high in map(triple, shares.values()))
    return section(
        "What GRPO changed",
        figure(
            figures.differences(shares, "GRPO minus SFT"),
            "Paired differences over the same queries with 95 % intervals. Grey ones hold zero: no change that these "
            f"queries could prove. {sure} of {len(shares)} do not; by chance alone about one in twenty would not.",
        ),
    )


def _ablations(stages: Mapping[str, Json]) -> str:
    tested = {stage: s["ablations"] for stage, s in stages.items() if s.get("ablations")}
    names = list(dict.fromkeys(name for ablations in tested.values() for name in ablations))
    if not names:
        return ""
    names.sort(key=lambda name: name != _FULL)
    columns = {"R@1": "R@1", "R@1 wrong": "R@1, first answer wrong", "0.5": "VCMR, IoU ≥ 0.5"}
    rows: dict[str, dict[str, Json]] = {}
    for name in names:
        rows[name] = {}
        for stage, ablations in tested.items():
            found = {**ablations.get(name, {}), **(ablations.get(name, {}).get("vcmr") or {})}
            rows[name][stage] = {title: found.get(key) for key, title in columns.items()}
    as_table = table(
        ["", *(f"{title}, {STAGE_NAMES[stage]}" for title in columns.values() for stage in tested)],
        [
            [escape(name), *(_percent(rows[name][stage][title]) for title in columns.values() for stage in tested)]
            for name in names
        ],
    )
    return section(
        "Does refinement earn it?",
        note(
            "Only queries whose first video was rejected get a second search, and any other video shown there can "
            "gain: a rise of R@1 proves nothing by itself. What refinement earns is its distance to <b>exclusion "
            "only</b>, the next video of the first ranking. <b>Random soft tokens</b> show what any disturbance of "
            "the query gains, <b>blank</b> and <b>shuffled video</b> whether refinement looked at what it rejected."
        ),
        _gain(stages),
        figure(
            figures.ablations(list(columns.values()), rows),
            "Full colour: the method; pale: its controls"
            + (f" ({' above '.join(STAGE_NAMES[s] for s in tested)} in each pair)." if len(tested) > 1 else ".")
            + " Black lines are 95 % intervals. The middle panel looks only at queries whose first video was wrong.",
        ),
        f"<details><summary>The same as a table</summary>{as_table}</details>",
    )


def _gain(stages: Mapping[str, Json]) -> str:
    """The paired gain of refinement over each control, where the evaluation gives it."""
    gains = {
        f"over {name}, {STAGE_NAMES[stage]}": s["refinement_gain"][name]
        for name in dict.fromkeys(name for s in stages.values() for name in s.get("refinement_gain") or {})
        for stage, s in stages.items()
        if _is_defined((s.get("refinement_gain") or {}).get(name))
    }
    if not gains:
        return ""
    return figure(
        figures.differences(gains, "gain of refinement + exclusion"),
        "The method minus each control over the queries whose first video was wrong: how much more often the second "
        "video shown is the right one. Where the interval holds zero (grey) refinement earned nothing provable.",
    )


def _soft_tokens(stages: Mapping[str, Json]) -> str:
    lines = {
        stage: [(row["tokens"], row.get("R@1")) for row in s["by_soft_tokens"]]
        for stage, s in stages.items()
        if s.get("by_soft_tokens")
    }
    if not lines:
        return ""
    return section(
        "Soft tokens",
        figure(
            figures.against({"R@1 over the whole corpus": lines}, "soft tokens inserted", "no soft tokens"),
            "R@1 when only the first n soft tokens of a refinement are inserted; n = 0 is the plain query. A line that "
            "rises steadily says that later tokens add something; bands are 95 % intervals of each point alone.",
        ),
    )


def _turns(stages: Mapping[str, Json]) -> str:
    panels = {
        f"VCMR after {STAGE_NAMES[stage]}": {
            f"IoU ≥ {t}": [(row["turns"], row["vcmr"].get(t)) for row in s["by_turns"]] for t in _THRESHOLDS
        }
        for stage, s in stages.items()
        if s.get("by_turns")
    }
    if not panels:
        return ""
    return section(
        "Turns",
        figure(
            figures.against(panels, "turns allowed"),
            "The same trajectories cut after 1, 2, .. turns: an accept counts only if it had come by then. The rise "
            "after the first turn is what looking again brings, by exclusion and refinement together.",
        ),
    )


def _kind(trajectory: Json) -> str:
    if trajectory["stop"] != "matched":
        return "never found"
    if trajectory["turns"][-1]["video_id"] != trajectory["video_id"]:
        return "false accept"
    return "won at once" if len(trajectory["turns"]) == 1 else "won after refinement"


def _chosen(trajectories: Sequence[Json]) -> list[tuple[str, Json]]:
    """The first trajectories of each kind in the file's order, and others while there are places left."""
    kinds: dict[str, list[Json]] = {kind: [] for kind in _GALLERY}
    for trajectory in trajectories:
        if trajectory["stop"] != "failed":
            kinds[_kind(trajectory)].append(trajectory)
    taken = {kind: min(count, len(kinds[kind])) for kind, count in _GALLERY.items()}
    for kind in _GALLERY:
        left = sum(_GALLERY.values()) - sum(taken.values())
        taken[kind] += min(left, len(kinds[kind]) - taken[kind])
    return [(kind, trajectory) for kind in _GALLERY for trajectory in kinds[kind][: taken[kind]]]


def _gallery(trajectories: Sequence[Json], video_path: Callable[[str], Path]) -> str:
    chosen = _chosen(trajectories)
    if not chosen:
        return ""
    strips: dict[str, tuple[str, float | None]] = {}
    counts = {kind: sum(t["stop"] != "failed" and _kind(t) == kind for t in trajectories) for kind in _GALLERY}
    cards = []
    for kind, trajectory in chosen:
        for turn in trajectory["turns"]:
            if turn["video_id"] not in strips:
                strips[turn["video_id"]] = _strip(video_path, turn["video_id"])
        turns = "".join(_turn(n, turn, trajectory, strips) for n, turn in enumerate(trajectory["turns"], 1))
        ranks = " → ".join(str(rank) for rank in [*(t["rank"] for t in trajectory["turns"]), trajectory["final_rank"]])
        cards.append(
            f'<article><header><span class="kind {kind.split()[0]}">{kind}</span>'
            f"<h3>{escape(trajectory['text'])}</h3>"
            f"<p>right video <b>{escape(trajectory['video_id'])}</b>, "
            f"{trajectory['start']:.1f} to {trajectory['end']:.1f} s of {trajectory['duration']:.1f} s; "
            f"its rank: {ranks} (last query)</p></header>"
            f"{turns}</article>"
        )
    return section(
        "Trajectories",
        note(
            f"The first of each kind in the order of the test file, not the prettiest. Of {sum(counts.values())}: "
            f"{', '.join(f'{count} {kind}' for kind, count in counts.items())}. Under the frames: "
            '<i class="true">the true span</i> where the right video is shown, and <i class="said">the span the policy '
            "gave</i> where it accepted."
        ),
        *cards,
    )


def _turn(number: int, turn: Json, trajectory: Json, strips: Mapping[str, tuple[str, float | None]]) -> str:
    strip, duration = strips[turn["video_id"]]
    is_true = turn["video_id"] == trajectory["video_id"]
    right = turn["answer"] == ("matched" if is_true else "not_matched")
    spans = {
        "true": (trajectory["start"], trajectory["end"]) if is_true else None,
        "said": (turn["start"], turn["end"]),
    }
    bar = figures.span_bar(spans, trajectory["duration"] if is_true or duration is None else duration)
    answer = {"matched": "accepted", "not_matched": "rejected", None: "no readable answer"}[turn["answer"]]
    rank = "unknown" if turn["rank"] is None else turn["rank"]
    return (
        f'<div class="turn"><div class="said"><p><b>Turn {number}</b> {escape(turn["video_id"])}'
        f"{' (the right one)' if is_true else ''}<br>score {turn['score']:.3f}, right video at rank {rank}</p>"
        f'<p class="answer {"yes" if right else "no"}">{"✓" if right else "✗"} {answer}</p>'
        f'</div><div class="seen">{strip}{bar}<pre>{escape(turn["text"].strip())}</pre></div></div>'
    )


def _strip(video_path: Callable[[str], Path], video_id: str) -> tuple[str, float | None]:
    """Frames of a video as images, and its duration in seconds; the reason and None where it cannot be decoded."""
    from vsr1.video import decode  # a report without trajectories needs no decoder

    try:
        frames = decode(video_path(video_id), count=FRAMES)
    except Vsr1Error as error:
        return f'<p class="broken">{escape(str(error))}</p>', None
    return figures.strip(list(frames.pixels.numpy()), frames.seconds.tolist()), frames.duration


def _settings(config: str, evaluation: Json) -> str:
    seconds = evaluation.get("stages_seconds") or {}
    rows = [[escape(STAGES.get(stage, stage)), _duration(spent)] for stage, spent in seconds.items()]
    times = table(["stage", "time"], rows) if rows else ""
    return section(
        "Settings", times, f"<details><summary>config.yaml</summary><pre>{escape(config.strip())}</pre></details>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · vsr1</title><style>
:root {{ --ink: #1f2430; --muted: #667085; --line: #e4e7ec; --blue: #2f6db5; --orange: #d3722c; --green: #2e8b62; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f7f8fa; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, Ubuntu,
  Cantarell, "Noto Sans", "DejaVu Sans", sans-serif; }}
main {{ max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }}
h2 {{ font-size: 20px; margin: 0 0 14px; }} h3 {{ font-size: 15px; margin: 18px 0 6px; }}
.facts {{ color: var(--muted); margin: 0 0 28px; }} .facts span {{ margin-right: 20px; }}
.facts b, .note b, article header b {{ color: var(--ink); font-weight: 600; }}
section {{ background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 24px 28px; margin: 0 0 20px }}
.note, figcaption {{ color: var(--muted); font-size: 14px; margin: 12px 0 0; max-width: 82ch; }}
h2 + .note {{ margin: 0 0 16px; }}
figure {{ margin: 0; }} section > figure + figure {{ margin-top: 32px; }}
figure > svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font-family: inherit !important; }}
.tiles {{ display: grid; grid-template-columns: repeat(5, 1fr); gap: 20px; }}
.tile h3 {{ margin: 0; font-size: 13px; color: var(--muted); font-weight: 600; }}
.tile p {{ margin: 4px 0 0; font-size: 13px; line-height: 1.35; color: var(--muted); }}
.big {{ font-size: 36px; font-weight: 650; line-height: 1.25; letter-spacing: -.02em; }}
.big small {{ font-size: 18px; font-weight: 500; color: var(--muted); margin-left: 2px; }}
.interval {{ color: var(--muted); font-size: .8em; white-space: nowrap; }} .none, .arrow {{ color: var(--muted); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }}
tbody th {{ font-weight: 400; }} th:first-child {{ text-align: left; padding-left: 0; }}
thead th {{ color: var(--muted); font-weight: 600; font-size: 13px; }}
tr.group th {{ font-weight: 600; padding-top: 18px; }}
details {{ margin-top: 14px; }} summary {{ cursor: pointer; color: var(--blue); font-size: 14px; }}
pre {{ font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: #f7f8fa; border-radius: 8px; padding: 10px 14px; margin: 10px 0 0; }}
article {{ border-top: 1px solid var(--line); padding: 22px 0 8px; }}
article header h3 {{ font-size: 18px; margin: 6px 0 2px; }}
article header p {{ margin: 0; font-size: 14px; color: var(--muted); }}
.kind {{ font-size: 12px; font-weight: 600; padding: 2px 10px; border-radius: 99px; }}
.kind, .broken {{ background: #fdeceb; color: #b3372f; }}
.kind.won {{ background: #e6f4ed; color: #1f7450; }} .kind.never {{ background: #eef0f3; color: #555f6e; }}
.turn {{ display: grid; grid-template-columns: 210px 1fr; gap: 20px; margin: 16px 0; font-size: 14px; }}
.turn p {{ margin: 0 0 6px; }} .answer {{ font-weight: 600; }} .yes {{ color: #1f7450; }} .no {{ color: #b3372f; }}
.strip {{ display: grid; grid-template-columns: repeat(6, 1fr); gap: 6px; }}
.strip img {{ display: block; width: 100%; border-radius: 4px; }}
.strip figcaption {{ font-size: 11px; margin: 1px 0 0; text-align: center; }}
.bar {{ display: block; width: 100%; height: 18px; margin-top: 4px; }}
i.true, i.said {{ font-style: normal; font-weight: 600; color: var(--green); }} i.said {{ color: var(--orange); }}
.broken {{ padding: 10px 14px; border-radius: 8px; }}
@media (max-width: 760px) {{ .tiles {{ grid-template-columns: 1fr 1fr; }} .turn {{ grid-template-columns: 1fr; }} }}
</style></head><body><main><h1>{title}</h1><p class="facts">{head}</p>
{body}
</main></body></html>
"""
