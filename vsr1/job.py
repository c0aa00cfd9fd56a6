"""The main job: train on what a configuration names, evaluate on held-out videos, write the report.

This module claims the run folder and tells a full disk from other errors; the stages are in `vsr1.stages`. The same command,
given again, always finishes the job. Under torchrun, several processes do one job together (`vsr1.train.parallel`).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console

from vsr1 import config as configuration
from vsr1.config import DatasetConfig, JobConfig, RunConfig
from vsr1.dataset_job import DatasetJob, need
from vsr1.errors import ConfigError, Vsr1Error
from vsr1.stages import POLICIES, Job, device_of
from vsr1.train import parallel
from vsr1.train.monitor import Monitor, Silent, Terminal
from vsr1.world_job import WorldJob

_FREE = ("run", "stage", "workers", "device", "checkpoint_every")  # may change between two calls on one folder


def run(config: JobConfig) -> Path:
    """Run `config` to the end of its stage; returns the run folder. Errors a person can mend are `Vsr1Error`s."""
    configuration.check(config)
    if isinstance(config, DatasetConfig):
        need(config)  # before a folder is claimed for settings that cannot be right
    with parallel.group(device_of(config.device)) as device:
        for name, count in (("sft.batch", config.sft.batch), ("grpo.queries", config.grpo.queries)):
            if count < parallel.size():
                raise ConfigError(
                    f"'{name}' is {count}, and {parallel.size()} processes share it: give each one at least"
                )
        if parallel.first():
            claim(config)
        parallel.wait()
        with _Disk(config.run), Monitor(config.run) if parallel.first() else Silent() as monitor:
            job_of(config, monitor, device).run()
    return config.run


def reopened(folder: Path) -> Job:
    """The job of a finished run folder, to ask more of what it has made; ConfigError where it is none, or not finished."""
    config = configuration.of_run(folder)
    config.run = folder  # it may have been moved
    for stage in POLICIES:
        if not (folder / "models" / f"policy-{stage}").is_dir():
            raise ConfigError(
                f"'{folder}' is not finished: it has no models/policy-{stage}; run vsr1 train on it again"
            )
    return job_of(config, Terminal(Console(quiet=True)), device_of(config.device))


def job_of(config: JobConfig, monitor: Terminal, device: torch.device) -> Job:
    """The stages of a run, by the kind of its configuration."""
    if isinstance(config, DatasetConfig):
        return DatasetJob(config, monitor, device)
    assert isinstance(config, RunConfig)
    return WorldJob(config, monitor, device)


class _Disk:
    """Tells a full or read-only disk from other errors; safetensors, torch and sqlite each raise their own for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Vsr1Error):
            return
        cause = error
        while cause is not None:
            if _full(cause):
                raise Vsr1Error(
                    f"the disk of '{self.folder}' is full; free some space and run the same command again (checkpoints are kept)"
                ) from error
            if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise Vsr1Error(f"run folder '{self.folder}': '{cause.filename}': {cause.strerror}") from error
            cause = cause.__cause__ or cause.__context__


def _full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "disk is full"))


def claim(config: JobConfig) -> None:
    """Make the run folder ours: new, or one of the same settings. Otherwise ConfigError says what differs."""
    saved = config.run / "config.yaml"
    if saved.is_file():
        before, now = (configuration.to_dict(one) for one in (configuration.load(saved), config))
        for key in _different(before, now):
            if key.split(".")[0] not in _FREE:
                raise ConfigError(
                    f"run folder '{config.run}' was made with another '{key}'; choose another --run or delete the folder"
                )
        return
    aside = config.run / "config.yaml.tmp"  # a call killed at once leaves this alone
    if config.run.exists() and (not config.run.is_dir() or {*config.run.iterdir()} - {aside}):
        raise ConfigError(f"'{config.run}' exists and is no run folder (no config.yaml in it); choose another --run")
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        configuration.save(config, aside)
        aside.rename(saved)
    except OSError as error:
        raise ConfigError(f"cannot write run folder '{config.run}': {error.strerror}") from error


def _different(one: object, other: object, where: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [name for key in keys for name in _different(one.get(key), other.get(key), f"{where}.{key}".strip("."))]
    return [] if one == other else [where]
