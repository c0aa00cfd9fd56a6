"""The command line: whatever a person can get wrong ends as one line on stderr and exit code 2, and harms nothing."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vsr1 import cli, config, job, presets
from vsr1.data import world
from vsr1.errors import ConfigError
from vsr1.train import checkpoint
from vsr1.train.loop import Interrupted
from vsr1.world_job import WorldJob


def contents(folder: Path) -> dict[str, Any]:
    """Everything under `folder`: bytes and times of the files."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail: exit code 2, one line on stderr, nothing on stdout, nothing changed on disk."""
    monkeypatch.chdir(tmp_path)

    def fails(*arguments: str) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert cli.main(list(arguments)) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert said.err.startswith("vsr1: ")
        assert said.err.endswith("\n")
        assert contents(tmp_path) == before
        return said.err

    return fails


def test_unknown_command(one_line: Callable[..., str]) -> None:
    said = one_line("dance")
    assert "'dance'" in said
    assert "train, ask, index, eval, data, plan, doctor" in said


def test_unknown_preset(one_line: Callable[..., str]) -> None:
    said = one_line("train", "--preset", "enormous")
    assert "'enormous'" in said
    assert "tiny, quick" in said


def test_preset_without_a_name(one_line: Callable[..., str]) -> None:
    assert "--preset" in one_line("train", "--preset")


def test_quick_and_another_preset(one_line: Callable[..., str]) -> None:
    assert "--preset tiny" in one_line("train", "--quick", "--preset", "tiny")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--colour", "red"], "--colour"),
        (["--sft.momentum", "0.9"], "--sft.momentum"),
        (["--seed", "one"], "seed"),
        (["--seed"], "seed"),
        (["--stage", "dessert"], "stage"),
        (["--sft.batch", "0"], "'sft.batch'"),
        (["--sft.optimisation.learning-rate", "-1"], "'sft.optimisation.learning_rate'"),
        (["--grpo.group", "1"], "'grpo.group'"),
        (["--grpo.loss-type", "ppo"], "loss-type"),
        (["--reward", "kindness"], "'kindness'; known: answer, verdicts"),
        (["--reward", "answer=much"], "'much'"),
        (["--reward", "answer=nan"], "'answer'"),
        (["--reward", "no_such_module:kindness"], "'no_such_module' does not import"),
        (["--reward", "math:kindness=2"], "no function 'kindness'"),
        (["--reward"], "--reward"),
        (["--world.pixels", "7"], "'world.pixels'"),
        (["--world.train-videos", "4"], "'world.train_videos'"),
        (["--device", "abacus"], "'abacus'"),
        (["--device", "cuda:99"], "CUDA devices here"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("preset", ["tiny", "quick"])
def test_unknown_or_bad_flag(one_line: Callable[..., str], preset: str, flags: list[str], named: str) -> None:
    assert named in one_line("train", "--preset", preset, *flags, "--run", "new")


def test_run_folder_that_holds_something_else(one_line: Callable[..., str]) -> None:
    Path("photos").mkdir()
    Path("photos/cat.jpg").write_bytes(b"cat")
    assert "'photos'" in one_line("train", "--quick", "--run", "photos")


def test_run_folder_that_is_a_file(one_line: Callable[..., str]) -> None:
    Path("notes.txt").write_text("mine")
    assert "'notes.txt'" in one_line("train", "--quick", "--run", "notes.txt")
    assert "notes.txt/run" in one_line("train", "--quick", "--run", "notes.txt/run")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where nobody may write")
def test_run_folder_that_cannot_be_made(one_line: Callable[..., str]) -> None:
    assert "'/proc/vsr1'" in one_line("train", "--quick", "--run", "/proc/vsr1")


def test_run_folder_that_cannot_be_written(one_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / "log.jsonl"))

    claimed("run")
    monkeypatch.setattr(job, "Monitor", refuse)
    said = one_line("train", "--quick", "--run", "run")
    assert "run/log.jsonl" in said
    assert "Permission denied" in said


def claimed(name: str) -> Path:
    """A quick run folder that was claimed and then left alone."""
    settings = presets.preset("quick")
    settings.run = Path(name)
    job.claim(settings)
    return settings.run


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--seed", "2"], "'seed'"),
        (["--sft.optimisation.steps", "99"], "'sft.optimisation.steps'"),
        (["--world.test-videos", "40"], "'world.test_videos'"),
    ],
    ids=["seed", "steps", "world"],
)
def test_run_folder_of_other_settings_names_the_key(one_line: Callable[..., str], flags: list[str], key: str) -> None:
    claimed("run")
    said = one_line("train", "--quick", "--run", "run", *flags)
    assert "'run'" in said
    assert key in said


def test_what_does_not_change_the_result_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(claimed("run"))
    settings = presets.preset("quick")
    settings.run, settings.stage, settings.workers, settings.checkpoint_every = Path("run"), "world", 1, 1.0
    job.claim(settings)
    assert contents(Path("run")) == before


def test_a_claim_that_was_killed_half_way_is_claimed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml.tmp").write_text("seed: 1\nsta")
    run = claimed("run")
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert config.load(run / "config.yaml").seed == 1


@pytest.mark.parametrize("text", ["", "seed: [", "seed: 1\nflavour: mint\n", "seed: one\n", "\x00"])
def test_damaged_config_of_a_run(one_line: Callable[..., str], text: str) -> None:
    (claimed("run") / "config.yaml").write_text(text)
    assert "run/config.yaml" in one_line("train", "--quick", "--run", "run")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere", "a red ring"], "'nowhere'"),
        ([], "run"),
        (["nowhere"], "text"),
        (["nowhere", "a red ring", "--turns", "many"], "--turns"),
        (["nowhere", "a red ring", "--turns", "0"], "--turns"),
        (["nowhere", "a red ring", "--louder"], "--louder"),
    ],
    ids=["missing run", "nothing", "no text", "bad turns", "no turns", "unknown flag"],
)
def test_ask_what_cannot_be_asked(one_line: Callable[..., str], arguments: list[str], named: str) -> None:
    assert named in one_line("ask", *arguments)


def test_ask_an_unfinished_run(one_line: Callable[..., str]) -> None:
    claimed("run")
    assert "'run/models/policy-grpo'" in one_line("ask", "run", "a red ring")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr()
    assert all(f"  {command}  " in said.out for command in cli.COMMANDS)
    assert said.err == ""
    assert cli.main([]) == 2


def test_help_of_train_lists_presets_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said.splitlines()[0] for name in presets.names())
    assert "--sft.optimisation.learning-rate" in said


def test_flags_change_single_settings_of_the_preset() -> None:
    found = cli.parse_train(["--preset", "quick", "--run", "there", "--sft.batch", "6", "--seed", "5"])
    expected = presets.preset("quick")
    expected.run, expected.sft.batch, expected.seed = Path("there"), 6, 5
    assert found == expected
    assert cli.parse_train([]) == presets.preset("tiny")


def test_rewards_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lie in the folder the command is called from, they join the preset's, and they are saved with the run."""
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_of_mine.py").write_text("def short(trajectory, context):\n    return 1.0\n")
    flags = ["--reward", "rewards_of_mine:short", "--reward", "answer=2.5", "--grpo.rewards.found", "0.25"]
    chosen = cli.parse_train(["--quick", *flags, "--run", "new"])
    before = presets.preset("quick").grpo.rewards
    assert chosen.grpo.rewards == before | {"rewards_of_mine:short": 1.0, "answer": 2.5, "found": 0.25}
    job.claim(chosen)
    assert config.load(Path("new/config.yaml")) == chosen
    with pytest.raises(ConfigError, match=r"another .grpo.rewards."):
        job.claim(cli.parse_train(["--quick", "--run", "new"]))


def test_interrupted_and_ctrl_c_tell_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (Interrupted("stopped in stage 'sft' after step 3 of 12; it is saved"), KeyboardInterrupt()):

        def stop(settings: config.RunConfig, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(job, "run", stop)
        assert cli.main(["train", "--quick"]) == 130
        said = capsys.readouterr().err
        assert "same command" in said
        assert "Traceback" not in said


def no_space(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_rendering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world, "encode", no_space)
    assert cli.main(["train", "--quick", "--run", "run", "--workers", "1"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "'run/world'" in said
    assert "disk is full" in said


@pytest.mark.parametrize("library", ["safetensors", "torch", "sqlite", "system"])
def test_a_full_disk_keeps_the_earlier_checkpoint(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    import sqlite3

    from safetensors import SafetensorError

    full = os.strerror(errno.ENOSPC)

    def torch_meets_it() -> None:
        try:
            no_space()
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904

    def raises(error: Exception) -> Callable[[], None]:
        def meet() -> None:
            raise error

        return meet

    meets: dict[str, Callable[[], None]] = {
        "safetensors": raises(SafetensorError(f"Error while serializing: I/O error: {full} (os error 28)")),
        "torch": torch_meets_it,
        "sqlite": raises(sqlite3.OperationalError("database or disk is full")),
        "system": no_space,
    }
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.AdamW(model.parameters())]

    def stage(self: job.Job) -> None:
        checkpoint.save(self.keeper.folder, "sft", 1, model, optimizers)
        monkeypatch.setattr(checkpoint, "save_model", lambda *_: meets[library]())
        checkpoint.save(self.keeper.folder, "sft", 2, model, optimizers)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WorldJob, "run_world", stage)
    assert cli.main(["train", "--quick", "--run", "run"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "disk of 'run' is full" in said
    monkeypatch.undo()
    with torch.no_grad():
        wanted = model.weight.clone()
        model.weight.zero_()
    assert checkpoint.resume(tmp_path / "run" / "checkpoints", "sft", model, optimizers) == 1
    assert torch.equal(model.weight, wanted)


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(self: job.Job) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WorldJob, "run_world", stage)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main(["train", "--quick", "--run", "run"])


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vsr1.doctor")
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(op in said for op in ("corpus_scan", "linear_logp", "patches", "prefix", "soft_query", "reference"))
