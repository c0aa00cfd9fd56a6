"""The engine in three lines: open a corpus with its models, ask a question, read the trajectory."""

from __future__ import annotations

import re
from pathlib import Path

from vsr1 import config as configuration
from vsr1.agent import rollout
from vsr1.agent.rollout import LoopSettings
from vsr1.config import DatasetConfig
from vsr1.corpus import Corpus
from vsr1.data.layout import Layout, dataset
from vsr1.errors import ConfigError, CorpusError
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.records import Moment, Trajectory


class Engine:
    """A corpus, the policy that judges its videos and the embedder that finds them."""

    def __init__(self, corpus: Corpus, policy: Policy, embedder: Embedder) -> None:
        self.corpus = corpus
        self.policy = policy
        self.embedder = embedder

    @classmethod
    def open(cls, corpus: str | Path, policy: str | Path, embedder: str | Path) -> Engine:
        """Open folders; CorpusError if the corpus was built with another embedder."""
        for name, folder in (("policy", policy), ("embedder", embedder)):
            _check_model(name, folder)
        loaded = Embedder.from_pretrained(embedder)
        return cls(Corpus.open(corpus, loaded.identity), Policy.from_pretrained(policy), loaded)

    @classmethod
    def open_run(cls, folder: str | Path, corpus: str | Path | None = None) -> Engine:
        """Open the final models of a finished run of `vsr1 train`, with its test corpus or the `corpus` given."""
        run = Path(folder)
        embedder, tested = _given(run)
        return cls.open(corpus or tested, run / "models" / "policy-grpo", embedder)

    def ask(self, text: str, *, turns: int = 3, settings: LoopSettings | None = None) -> Trajectory:
        """Search for `text`; the trajectory's `accepted` turn, if any, holds the video and the span in seconds. `settings`
        asks for more than the number of turns, and overrides it. CorpusError for a corpus that holds nothing."""
        if not len(self.corpus):
            raise CorpusError(f"corpus '{self.corpus.folder}' is empty: add videos to it first (vsr1 index add)")
        settings = settings or LoopSettings(turns=turns)
        (found,) = rollout.run(self.policy, self.embedder, self.corpus, [Moment("asked", text)], settings=settings)
        return found


def open_embedder(folder: str | Path, *, run: bool = False) -> Embedder:
    """The embedder in a model folder, or that of a `run` of `vsr1 train`; ConfigError where there is none."""
    place = _given(Path(folder))[0] if run else folder
    _check_model("embedder", place)
    return Embedder.from_pretrained(place)


def _given(run: Path) -> tuple[str | Path, Path]:
    """The embedder of a run, which it made or was given, and the corpus it was tested on."""
    config = configuration.of_run(run)
    if isinstance(config, DatasetConfig):
        return config.embedder, Layout(config.root).corpus(dataset(config.dataset).test)
    return run / "models" / "embedder", run / "corpus" / "test"


def _check_model(name: str, folder: str | Path) -> None:
    if isinstance(folder, str) and not Path(folder).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
        return  # perhaps a repository of the Hub: who loads it will say
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{name} folder '{folder}' holds no model (no config.json)")
