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
_JOINED = (*STAGE_NAMES, "baselines")  # what ablations.json adds; its head says what it is of
_LONGEST_CONFIG = 50_000  # characters

Json = dict[str, Any]


def write_report(run_folder: Path, video_path: Callable[[str], Path]) -> Path:
    """Writes `report.html` into a run folder and returns its path; `video_path` says where a video's file lies, and may
    raise KeyError for one that it does not know.

    The folder's `ablations.json` joins what `eval.json` holds of each stage. A video that cannot be decoded does not stop
    the report: its reason stands where its frames would be.

    Raises ConfigError where the folder has none of `PARTS`, or where one of them cannot be read.
    """
    found = {name: _text(run_folder / name) for name in (*PARTS, "ablations.json", "config.yaml")}
    if not any(found[name] for name in PARTS):
        raise ConfigError(f"run folder '{run_folder}' has none of {', '.join(PARTS)}: train or evaluate a run first")
    evaluation = _json(run_folder, "eval.json", found["eval.json"] or "{}")
    others = _json(run_folder, "ablations.json", found["ablations.json"] or "{}")
    _join(evaluation, {key: others[key] for key in _JOINED if key in others})
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
        tables.tiles(stages) if stages else "",
        tables.main_table(evaluation, stages),
        studies.difference(evaluation.get("difference") or {}),
        _other_queries(evaluation, others),
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


def _join(evaluation: Json, more: Mapping[str, Any]) -> None:
    """Puts into an evaluation what another file of the same shape holds: its figures are added condition by condition, and
    replace those of the same name."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(evaluation.get(key), dict) and "value" not in value:
            _join(evaluation[key], value)
        elif value is not None:
            evaluation[key] = value


def _other_queries(evaluation: Json, others: Json) -> str:
    """A warning where the ablations are over other queries than the evaluation."""
    here, there = evaluation.get("queries"), others.get("queries")
    if here is None or there is None or here == there:
        return ""
    said = f"What follows is partly of ablations.json, over {there:,} queries; eval.json is over {here:,}."
    return f'<p class="warning">{said}</p>'


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
