"""`vsr1 eval`: what it prints and writes is what the library says, and every mistake is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.eval import shared
from tests.eval.test_tvr import random_files, save
from vsr1 import cli
from vsr1.eval import exchange, metrics, public, tvr
from vsr1.records import Trajectory


def run_folder(folder: Path, found: list[Trajectory]) -> Path:
    folder.mkdir()
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(exchange.as_json(one)) + "\n" for one in found))
    return folder


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[str]:
    capsys.readouterr()
    assert cli.main(["eval", *map(str, arguments)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out.splitlines()


def numbers(line: str) -> list[float]:
    return [float(word) for word in line.replace(" to ", " ").split()[-3:]]


def test_a_run_is_shown_written_and_exchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shared.trajectories(120, seed=1, failures=0.05)
    run = run_folder(tmp_path / "run", found)
    out, theirs = tmp_path / "eval.json", tmp_path / "public.jsonl"
    said = lines_of(capsys, run, "--resamples", 100, "--out", out, "--public", theirs)
    failed = sum(one.stop == "failed" for one in found)
    assert said[0] == f"{run}: 120 queries, {failed} failed and left out" and failed > 0
    expected = metrics.summary(found, 3, 100)
    line = next(line for line in said if line.startswith("VCMR, IoU >= 0.5"))
    assert numbers(line) == [round(100 * expected["vcmr"]["0.5"][bound], 2) for bound in ("value", "low", "high")]
    line = next(line for line in said if line.startswith("tokens a reply"))
    assert numbers(line)[0] == round(expected["tokens"]["text"]["value"], 2)
    assert len(said) > 20

    written = json.loads(out.read_text())
    assert {key: value for key, value in written.items() if key in expected} == expected
    assert written["public"] == public.result(found, 3)
    again = lines_of(capsys, theirs, "--resamples", 100)
    assert again[1:] == [line for line in said[1:] if not line.startswith("written: ")]


def test_two_runs_are_compared_over_the_queries_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = shared.trajectories(80, seed=2)
    second = [replace(b, moment=a.moment) for a, b in zip(first, shared.trajectories(80, seed=3), strict=True)]
    second[3] = replace(second[3], stop="failed")
    runs = run_folder(tmp_path / "a", first[:-1]), run_folder(tmp_path / "b", second[1:])
    out = tmp_path / "difference.json"
    said = lines_of(capsys, *runs, "--out", out, "--seed", 5)
    assert said[2] == "differences over the 77 queries that both hold and that failed in neither, of 79 and 79"
    both = [i for i in range(1, 79) if i != 3]
    expected = metrics.difference([first[i] for i in both], [second[i] for i in both], seed=5)
    written = json.loads(out.read_text())
    assert written["queries"] == 77
    assert written["difference"] == {name: one.as_dict() for name, one in expected.items()}
    line = next(line for line in said if line.startswith("VR R@1, last query"))
    assert numbers(line)[0] == round(100 * expected["after R@1"].value, 2)
    assert "+" in line or "-" in line


def test_tvr_files_are_evaluated_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submission, truths = random_files(1, queries=60)
    predictions, annotations = save(tmp_path, submission, truths)
    out = tmp_path / "out.json"
    said = lines_of(capsys, predictions, "--truth", annotations, "--out", out, "--resamples", 50)
    expected = tvr.evaluate(tvr.read_submission(predictions), tvr.read_truths(annotations))
    written = json.loads(out.read_text())
    assert {key: written[key] for key in expected} == expected
    line = next(line for line in said if line.startswith("VCMR 0.5-r100"))
    assert numbers(line)[0] == expected["VCMR"]["0.5-r100"]
    other = tmp_path / "other.json"
    better = [{**entry, "predictions": entry["predictions"][:1]} for entry in submission["VR"]]
    other.write_text(json.dumps({"video2idx": submission["video2idx"], "VR": better}))
    said = lines_of(capsys, predictions, other, "--truth", annotations)
    assert said[2].startswith("differences over the 60 queries")
    assert [line.split()[:2] for line in said[4:]] == [["VR", f"r{k}"] for k in (1, 5, 10, 100)]
    assert numbers(said[4])[0] == 0 and numbers(said[7])[0] < 0


def test_what_a_person_can_get_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shared.trajectories(5, seed=4)
    run = run_folder(tmp_path / "run", found)
    elsewhere = [replace(one, moment=replace(one.moment, query_id=f"other {one.moment.query_id}")) for one in found]
    other = run_folder(tmp_path / "other", elsewhere)
    moved = run_folder(tmp_path / "moved", [replace(one, moment=replace(one.moment, video_id="v7")) for one in found])
    theirs = tmp_path / "public.jsonl"
    exchange.write_public(theirs, map(exchange.as_json, found), 3)
    torn = tmp_path / "torn.jsonl"
    torn.write_text(theirs.read_text()[:-20])
    old = tmp_path / "old.jsonl"
    records = [exchange.as_json(one) for one in found]
    for record in records:
        for turn in record["turns"]:
            del turn["soft_tokens"]
    old.write_text("".join(json.dumps(record) + "\n" for record in records))
    predictions, annotations = save(tmp_path, *random_files(2, queries=3))
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ([], "results"),
        (["nowhere"], "'nowhere' does not exist"),
        ([run, "--turns", 0], "--turns must be at least 1, got 0"),
        ([run, "--out", theirs], "exists; choose another file"),
        ([run, "--out", tmp_path / "no" / "x.json"], "there is no folder"),
        ([run, other, "--public", tmp_path / "x"], "--public writes the queries of one run"),
        ([theirs, "--public", tmp_path / "x"], "has the public field names already"),
        ([old, "--public", tmp_path / "x"], "does not hold the field 'soft_tokens'"),
        ([run, other], "no query is in both results"),
        ([run, moved], "query 'q0' is about v0"),
        ([torn], f"'{torn}' line 5 is not JSON"),
        ([predictions], "is a TVR prediction file: it needs its annotations (vsr1 eval --truth)"),
        ([predictions, "--truth", annotations, "--turns", 2], "--turns is for results of the loop"),
        ([theirs, "--truth", annotations], "cannot be read as JSON"),
        ([predictions, "--truth", theirs], "line 1 is no TVR annotation"),
    ):
        assert cli.main(["eval", *map(str, arguments)]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, (arguments, said)
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluating_a_file_loads_no_model_library(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", shared.trajectories(3, seed=5))
    code = (
        "import sys; from vsr1 import cli; code = cli.main(['eval', sys.argv[1], '--resamples', '5']);"
        "print(code, [name for name in ('torch', 'transformers', 'triton') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "0 []"
