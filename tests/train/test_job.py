"""The whole job at `--quick` size: every stage and file, nothing done twice, and no kill that changes the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TRAINED = ("vision", "embedder", "sft", "grpo")
PATIENCE = 240.0  # seconds until a wait is given up; only a broken job waits so long

# Starts jobs without importing everything anew: for each line of stdin it forks a process that runs one command.
SERVER = """
import json, os, sys
import vsr1.job
from vsr1 import cli
for line in sys.stdin:
    arguments, output = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
        os.dup2(1, 2)
        code = cli.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Runs commands in forked processes, one at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, arguments: list[str], output: Path) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([arguments, str(output)]) + "\n")
        self.process.stdin.flush()
        return self._number()

    def finish(self) -> int:
        """The exit code of the process started last; minus the signal that killed it."""
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A finished quick run, made as a person would make it; meanwhile the server imports what it needs."""
    folder = tmp_path_factory.mktemp("job") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "vsr1.train", "--quick", "--run", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "[5/5] eval" in done.stdout
    assert "report: " in done.stdout
    return folder


def read(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{path} holds {word}, which is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def log_of(folder: Path, stage: str) -> list[str]:
    """A stage's lines in a log that may still be written."""
    path = folder / "log.jsonl"
    return [line for line in path.read_text().splitlines() if f'"stage": "{stage}"' in line] if path.is_file() else []


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stamps(folder: Path, *names: str) -> dict[str, tuple[int, int]]:
    """Time and size of every file below the given parts of a run folder."""
    files = [path for name in names for path in sorted((folder / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "models").rglob("*.safetensors"))
    }


# What an unbroken run leaves


def test_everything_is_written(run: Path) -> None:
    files = {path.name for path in run.iterdir()}
    assert files == {
        "checkpoints",
        "config.yaml",
        "corpus",
        "eval.json",
        "log.jsonl",
        "models",
        "report.html",
        "seconds.json",
        "tensorboard",
        "trajectories.jsonl",
        "world",
    }
    assert {path.name for path in (run / "models").iterdir()} == {"embedder", "policy-sft", "policy-grpo"}
    assert {path.name.split("-step-")[0] for path in (run / "checkpoints").iterdir()} == set(TRAINED)
    assert list((run / "tensorboard").glob("events.*"))
    assert not [path for path in run.rglob("*") if path.name.endswith((".tmp", ".aside"))]
    assert set(read(run / "seconds.json")) == {"world", "embedder", "sft", "grpo", "eval"}


def test_the_config_loads_back(run: Path) -> None:
    from vsr1 import config, presets

    expected = presets.preset("quick")
    expected.run = run
    assert config.load(run / "config.yaml") == expected


def test_every_stage_learns_to_its_last_step(run: Path) -> None:
    from vsr1 import config

    settings = config.load(run / "config.yaml")
    text = (run / "log.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    for stage in TRAINED:
        lines = [line for line in log(run) if line["stage"] == stage]
        steps = getattr(settings, stage).optimisation.steps
        assert lines[0]["step"] == 0
        assert lines[-1]["step"] == steps - 1
    last = {line["stage"]: line for line in log(run)}
    assert {"describe", "contrast", "accuracy"} <= set(last["embedder"])
    assert {"say", "distillation", "contrast"} <= set(last["sft"])
    assert {"reward", "reward_found", "groups_with_variance"} <= set(last["grpo"])
    assert settings.grpo.optimisation.steps >= 2


def interval(found: Any) -> bool:
    return set(found) == {"value", "low", "high"} and (
        found["value"] is None or found["low"] <= found["value"] <= found["high"]
    )


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_figures_of_both_policies(run: Path, stage: str) -> None:
    found = read(run / "eval.json")[stage]
    for when in ("before", "after"):
        assert {"R@1", "R@5", "R@10", "MRR"} <= set(found[when])
        assert all(interval(one) and one["value"] is not None for one in found[when].values())
    assert set(found["vcmr"]) == {"0.3", "0.5", "0.7"}
    assert all(interval(one) for one in found["vcmr"].values())
    assert all(interval(found[name]) for name in ("ver", "ver_turn1", "ver_final", "unparsable", "mean_iou"))
    assert set(found["tokens"]) == {"text", "soft", "hard"}
    assert all(interval(one) for one in found["tokens"].values())
    names = {
        "refinement + exclusion",
        "exclusion only",
        "refinement only",
        "no refinement",
        "random soft tokens",
        "blank video",
        "shuffled video",
        "refinement in words",
        "accumulated soft tokens",
        "rocchio",
        "one shot",
    }
    assert set(found["answered"]) == set(found["vcmr"]) and all(interval(one) for one in found["answered"].values())
    for key, value in found["vcmr"].items():
        assert found["answered"][key]["value"] >= value["value"]
    assert set(found["calibration"]) == {"scale", "offset", "brier", "ece"}
    assert [one["turn"] for one in found["refine_gain"]] == sorted(one["turn"] for one in found["refine_gain"])
    assert set(found["ablations"]) == names
    for name, one in found["ablations"].items():
        assert interval(one["R@1"])
        assert ("R@1 wrong" not in one) if name == "one shot" else interval(one["R@1 wrong"])
        assert all(interval(value) for value in one["vcmr"].values())
    assert set(found["refinement_gain"]) == names - {"refinement + exclusion", "one shot", "accumulated soft tokens"}
    assert found["compared"] == {"queries": 8, "measured": 8}
    assert all(interval(one) for one in found["refinement_gain"].values())
    assert [point["tokens"] for point in found["by_soft_tokens"]] == list(range(9))
    assert all({"R@1", "R@1 excluded", "vcmr"} <= set(point) for point in found["by_soft_tokens"])
    assert [set(one) for one in found["by_turns"]] == [{"turns", "R@1", "vcmr", "ver", "answered"}] * 2
    assert all(set(one) == {"tokens", "R@1", "seconds"} for one in found["refinements"].values())


def test_the_evaluation_as_a_whole(run: Path) -> None:
    found = read(run / "eval.json")
    assert (found["seed"], found["split"], found["queries"], found["corpus_size"]) == (1, "test", 8, 24)
    assert {"world", "embedder", "sft", "grpo"} <= set(found["stages_seconds"])
    assert {"before R@1", "after R@1", "vcmr 0.5", "ver"} <= set(found["difference"])
    assert all(interval(one) for one in found["difference"].values())
    assert found["sft"]["queries"] == found["grpo"]["queries"] == 8
    assert found["sft"]["failed"] == found["grpo"]["failed"] == 0
    for one in found["baselines"].values():
        assert set(one) == {"vcmr", "ver", "R@1", "R@5", "R@10", "R@100"} and interval(one["R@1"])
    tuned = found["baselines"]["fine-tuned one-shot"]
    assert (tuned["vcmr"], tuned["R@1"]) == (found["sft"]["vcmr_one_turn"], found["sft"]["before"]["R@1"])
    assert set(found["baselines"]) == {"zero-shot", "fine-tuned one-shot"}


def test_the_run_opens_as_it_was_evaluated(run: Path) -> None:
    from vsr1.eval import ablations
    from vsr1.job import reopened

    opened = reopened(run).opened()
    given = opened.embedder, opened.shelf, opened.moments, opened.settings, opened.seed
    baselines = read(run / "eval.json")["baselines"]
    work = ablations.Ablations(opened.policy(opened.stages[0]), *given)
    assert ablations.baseline(work) == baselines["fine-tuned one-shot"]
    base = opened.base()
    assert base is not None and ablations.baseline(ablations.Ablations(base.eval(), *given)) == baselines["zero-shot"]


def test_trajectories_and_report(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "trajectories.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert all(line["turns"] and line["video_id"].startswith("test-") for line in lines)
    page = (run / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert lines[0]["turns"][0]["video_id"] in page


def test_the_finished_run_answers_a_question(run: Path, server: Server, tmp_path: Path) -> None:
    server.start(
        ["ask", str(run), "a small red circle with left motion on a plain black background"], tmp_path / "said"
    )
    assert server.finish() == 0
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0].startswith("turn 1: test-")
    assert said[-1].startswith(("found: test-", "not found"))


def test_the_same_command_again_does_nothing_twice(run: Path, server: Server, tmp_path: Path) -> None:
    parts = (
        "models",
        "checkpoints",
        "corpus",
        "world",
        "eval.json",
        "trajectories.jsonl",
        "report.html",
        "config.yaml",
    )
    before = {**stamps(run, *parts), **{name: (run / name).stat().st_mtime_ns for name in parts}}
    lines = len(log(run))
    server.start(["train", "--quick", "--run", str(run)], tmp_path / "said")
    assert server.finish() == 0
    assert {**stamps(run, *parts), **{name: (run / name).stat().st_mtime_ns for name in parts}} == before
    assert len(log(run)) == lines


# Kills


def wait_for(what: Callable[[], bool], said: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until, said.read_text()
        time.sleep(0.02)


def rendering(folder: Path) -> bool:
    return len(list((folder / "world" / "videos").rglob("*.mp4"))) > 3


# What shows that a stage is under way, and what stages before it have finished.
UNDER_WAY: dict[str, tuple[Callable[[Path], bool], tuple[str, ...]]] = {
    "world": (rendering, ()),
    "vision": (lambda folder: bool(log_of(folder, "vision")), ("world",)),
    "embedder": (lambda folder: bool(log_of(folder, "embedder")), ("world",)),
    "sft": (lambda folder: bool(log_of(folder, "sft")), ("world", "models/embedder")),
    "grpo": (lambda folder: bool(log_of(folder, "grpo")), ("world", "models/embedder", "models/policy-sft")),
    "eval": (lambda folder: (folder / "corpus" / "test").is_dir(), ("world", "models")),
}


def test_a_job_killed_in_every_stage_ends_like_one_that_was_not(run: Path, server: Server, tmp_path: Path) -> None:
    """One job, killed as soon as each stage is under way and stopped once by Ctrl-C, always by the same command: it
    goes on, leaves finished stages alone, and its weights and figures equal those of the unbroken run."""
    folder, said = tmp_path / "run", tmp_path / "said"
    command = ["train", "--quick", "--run", str(folder), "--checkpoint-every", "0.001"]
    for stage, (under_way, finished) in UNDER_WAY.items():
        process = server.start(command, said)
        wait_for(lambda under_way=under_way: under_way(folder), said)
        before = stamps(folder, *finished)
        os.kill(process, signal.SIGKILL)
        assert server.finish() == -signal.SIGKILL, f"{stage}: {said.read_text()}"
        assert not finished or before
        if stage == "sft":
            steps = len(log_of(folder, "sft"))
            process = server.start(command, said)
            wait_for(lambda steps=steps: len(log_of(folder, "sft")) > steps or bool(log_of(folder, "grpo")), said)
            os.kill(process, signal.SIGINT)
            assert server.finish() == 128 + signal.SIGINT
            assert "vsr1: stopped" in said.read_text()
            assert "the same command" in said.read_text()
            assert "Traceback" not in said.read_text()
        assert stamps(folder, *finished) == before
    before = stamps(folder, "world", "models")
    server.start(command, said)
    assert server.finish() == 0, said.read_text()
    assert stamps(folder, "world", "models") == before

    assert weights(folder) == weights(run)
    figures, expected = read(folder / "eval.json"), read(run / "eval.json")
    for found in (figures, expected):
        del found["stages_seconds"]
        for stage in ("sft", "grpo"):
            assert [one.pop("seconds") for one in found[stage]["refinements"].values()]
    assert figures == expected
    assert (folder / "trajectories.jsonl").read_bytes() == (run / "trajectories.jsonl").read_bytes()
    assert (folder / "report.html").is_file()
    assert not [path for path in folder.rglob("*.tmp") if path.parent.name != "checkpoints"]
