"""The report of a run: `eval.json`, `log.jsonl`, `trajectories.jsonl` and `config.yaml` become one `report.html`.

The page needs nothing but itself: figures are inline SVG, frames inline JPEG, and it holds at most some megabytes. It says
beside every figure how to read it, and sets the controls of refinement (exclusion alone, random soft tokens, other videos)
beside refinement itself. What a run does not have, such as a second stage, is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from vsr1.errors import ConfigError
from vsr1.eval import queries, studies, tables
from vsr1.eval.curves import STAGES, learning
from vsr1.eval.figures import STAGE_NAMES
from vsr1.eval.gallery import filters, gallery
from vsr1.eval.page import cut, document, fold, note, section, table
from vsr1.files import write_whole

PARTS = ("eval.json", "log.jsonl", "trajectories.jsonl")  # a report can be made of any of them
_CONDITIONS = ("compared", "ablations", "refinement_gain", "by_soft_tokens", "refinements")  # of a stage, over one set
_FEW = 30  # queries, below which a bootstrap over them says too little
_LONGEST_CONFIG = 50_000  # characters

Json = dict[str, Any]


def write_report(run_folder: Path, video_path: Callable[[str], Path]) -> Path:
    """Writes `report.html` into a run folder and returns its path; `video_path` says where a video's file lies, and may
    raise KeyError for one that it does not know.

    The folder's `ablations.json` joins what `eval.json` holds of each stage, see `_joined`. A video that cannot be decoded
    does not stop the report: its reason stands where its frames would be.

    Raises ConfigError where the folder has none of `PARTS`, or where one of them cannot be read.
    """
    found = {name: _text(run_folder / name) for name in (*PARTS, "ablations.json", "config.yaml")}
    if not any(found[name] for name in PARTS):
        raise ConfigError(f"run folder '{run_folder}' has none of {', '.join(PARTS)}: train or evaluate a run first")
    evaluation = _json(run_folder, "eval.json", found["eval.json"] or "{}")
    others = _json(run_folder, "ablations.json", found["ablations.json"] or "{}")
    evaluation, warnings = _joined(evaluation, others)
    log, torn = _log(found["log.jsonl"])
    lines = found["trajectories.jsonl"].splitlines()
    records = [_json(run_folder, f"trajectories.jsonl line {n}", line) for n, line in enumerate(lines, start=1)]

    stages = {stage: evaluation[stage] for stage in STAGE_NAMES if evaluation.get(stage)}
    if found["eval.json"] and not stages and not evaluation.get("baselines"):
        raise ConfigError(
            f"'{run_folder / 'eval.json'}' holds none of {', '.join(STAGE_NAMES)}: evaluate the run first"
        )
    missing = [name for name in PARTS if not found[name]]
    sections = [
        _warned(evaluation, warnings),
        tables.tiles(stages) if stages else "",
        tables.main_table(evaluation, stages),
        studies.difference(evaluation.get("difference") or {}),
        studies.soft_tokens(stages),
        studies.turns(stages),
        studies.refinements(stages),
        studies.ablations(stages),
        queries.single_queries(records),
        learning(log, torn),
        gallery(records, video_path),
        tables.results(stages),
        _settings(found["config.yaml"], evaluation, missing),
    ]
    title = run_folder.resolve().name
    path = run_folder / "report.html"
    write_whole(path, document(title, _facts(evaluation), [one for one in sections if one], filters()))
    return path


def _joined(evaluation: Json, others: Json) -> tuple[Json, list[str]]:
    """An evaluation with what `ablations.json` adds to it, and what must be said of that.

    Conditions over as many queries join one by one, those of `ablations.json` replacing others of their name. Figures over
    different queries never stand side by side: of a stage's conditions those over more queries are shown.
    """
    if not evaluation or not others:
        return evaluation or others, []
    warnings = []
    for stage in (name for name in STAGE_NAMES if others.get(name)):
        mine = dict(evaluation.get(stage) or {})
        theirs = {key: others[stage][key] for key in _CONDITIONS if others[stage].get(key)}
        here, there = _compared(evaluation, stage), _compared(others, stage)
        if here == there:
            _join(mine, theirs)
        elif there > here:
            mine = {key: value for key, value in mine.items() if key not in _CONDITIONS} | theirs
        else:
            warnings.append(
                f"Not shown: ablations.json after {STAGE_NAMES[stage]}, over {there:,} queries and not {here:,}."
            )
        evaluation[stage] = {"by_turns": others[stage].get("by_turns")} | mine
    whole, part = evaluation.get("queries"), others.get("queries")
    baselines, more = dict(evaluation.get("baselines") or {}), others.get("baselines") or {}
    if whole == part:
        evaluation["baselines"] = baselines | more
    elif added := {name: one for name, one in more.items() if name not in baselines}:
        warnings.append(f"Of ablations.json, over {part:,} queries and not {whole:,}: {', '.join(added)}.")
        evaluation["baselines"] = baselines | added
    return evaluation, warnings


def _compared(evaluation: Json, stage: str) -> int:
    """How many queries a stage's conditions were run on; 0 where it has none."""
    figures = evaluation.get(stage) or {}
    if not any(figures.get(key) for key in _CONDITIONS):
        return 0
    return int((figures.get("compared") or evaluation).get("queries") or 0)


def _join(evaluation: Json, more: Mapping[str, Any]) -> None:
    """Puts into an evaluation what another of the same shape holds, figure by figure."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(evaluation.get(key), dict) and "value" not in value:
            _join(evaluation[key], value)
        elif value is not None:
            evaluation[key] = value


def _warned(evaluation: Json, warnings: list[str]) -> str:
    """What a reader has to know of all figures."""
    queries = evaluation.get("queries")
    if queries is not None and queries < _FEW:
        few = (
            f"{queries} queries are few: resampling them makes intervals too narrow, and none where all of them agree."
        )
        warnings = [few, *warnings]
    return "".join(f'<p class="warning">{escape(one)}</p>' for one in warnings)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _facts(evaluation: Json) -> list[tuple[str, str]]:
    seconds = evaluation.get("stages_seconds")
    facts = {
        "data": evaluation.get("dataset"),
        "split": evaluation.get("split"),
        "queries": evaluation.get("queries"),
        "videos in the corpus": evaluation.get("corpus_size"),
        "seed": evaluation.get("seed"),
        "time": _duration(sum(seconds.values())) if seconds else None,
    }
    counted = ("queries", "videos in the corpus")
    return [
        (name, f"{value:,}" if name in counted else str(value)) for name, value in facts.items() if value is not None
    ]


def _settings(config: str, evaluation: Json, missing: list[str]) -> str:
    seconds = evaluation.get("stages_seconds") or {}
    rows = [[escape(STAGES.get(stage, stage)), _duration(spent)] for stage, spent in seconds.items()]
    parts = [
        table(["stage", "time"], rows) if rows else "",
        fold("config.yaml", f"<pre>{cut(config.strip(), _LONGEST_CONFIG)}</pre>") if config.strip() else "",
        note(f"Not in this folder, and so not in this report: {', '.join(missing)}.") if missing else "",
    ]
    return section("Settings", *parts) if any(parts) else ""
