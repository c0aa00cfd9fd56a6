"""The engine in three lines: open a corpus with its models, ask a question, read the trajectory."""

from __future__ import annotations

from pathlib import Path

from vsr1.agent import rollout
from vsr1.agent.rollout import LoopSettings
from vsr1.corpus import Corpus
from vsr1.errors import ConfigError
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
            if not (Path(folder) / "config.json").is_file():
                raise ConfigError(f"{name} folder '{folder}' holds no model (no config.json)")
        loaded = Embedder.from_pretrained(embedder)
        return cls(Corpus.open(corpus, loaded.identity), Policy.from_pretrained(policy), loaded)

    @classmethod
    def open_run(cls, folder: str | Path) -> Engine:
        """Open the test corpus and the final models of a finished run of `vsr1 train`."""
        run = Path(folder)
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"'{folder}' is no run folder (no config.yaml in it)")
        return cls.open(run / "corpus" / "test", run / "models" / "policy-grpo", run / "models" / "embedder")

    def ask(self, text: str, *, turns: int = 3, settings: LoopSettings | None = None) -> Trajectory:
        """Search for `text`; the trajectory's `accepted` turn, if any, holds the video and the span in seconds. `settings`
        asks for more than the number of turns, and overrides it."""
        settings = settings or LoopSettings(turns=turns)
        (found,) = rollout.run(self.policy, self.embedder, self.corpus, [Moment("asked", text)], settings=settings)
        return found
