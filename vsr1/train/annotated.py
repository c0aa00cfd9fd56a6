"""What the first stage of the policy learns from in an annotated data set: the replies of its SFT file.

A row names a query, a video that the search found for it (or the right one), and the reply to that pair. The rows of an epoch
are shuffled anew; what a step holds depends on its number alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vsr1.agent import protocol
from vsr1.data.rows import SftRow
from vsr1.errors import ConfigError
from vsr1.models.backbone import Row
from vsr1.models.policy import Policy
from vsr1.train import parallel
from vsr1.train.library import Shelf
from vsr1.train.sft import Example, SftTraining, reply_tokens


class Annotated:
    """Draws the rows of a step from `rows`; a `vsr1.train.sft.Source`.

    negatives: by query id, videos that resemble the right one, the likest first; asked for only where the settings want
    hard negatives. Random videos of the corpus fill up what is missing. ConfigError where nothing can be drawn.
    """

    def __init__(
        self,
        policy: Policy,
        rows: Sequence[SftRow],
        shelf: Shelf,
        settings: SftTraining,
        seed: int,
        negatives: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.policy, self.shelf, self.settings, self.seed = policy, shelf, settings, seed
        self._negatives = negatives or {}
        known = set(shelf.video_ids)
        self.rows = [row for row in rows if row.shown in known and row.video_id in known]
        self.left_out = len(rows) - len(self.rows)
        if not self.rows:
            raise ConfigError(
                f"none of the {len(rows)} SFT rows speaks of videos of the corpus: were both made together?"
            )
        if settings.negatives >= len(known):
            raise ConfigError(
                f"sft.negatives is {settings.negatives}, and the corpus has {len(known)} videos: lower it"
            )
        answers: dict[str, set[str]] = {}
        for row in self.rows:
            answers.setdefault(row.query, set()).add(row.video_id)
        self._answers = {text: len(videos) for text, videos in answers.items()}
        self._drawn: dict[int, list[SftRow]] = {}

    def draw(self, index: int) -> list[Example]:
        """The rows of step `index`."""
        rows = self._drawn.pop(index, None) or self.ask(index)
        videos = self.shelf.features([row.shown for row in rows])
        rng = np.random.default_rng((self.seed, 6, index))
        found = []
        for row, video in zip(rows, videos, strict=True):
            prompt = protocol.prompt(self.policy.tokenizer, row.query, video, system=self.policy.settings.system)
            ids, weights = reply_tokens(self.policy, row.reply, self.settings)
            asked = Row((*prompt.token_ids, *ids[:-1]), video)
            negatives = self._hard(row, rng)
            found.append(Example(asked, ids, weights, row.matched, row.query, row.video_id, negatives))
        return found

    def expect(self, index: int) -> None:
        """Step `index` is the next one: have its videos decoded meanwhile."""
        self._drawn[index] = self.ask(index)
        self.shelf.expect([row.shown for row in self._drawn[index]])

    def ask(self, index: int) -> list[SftRow]:
        """The rows of the file that are this process' share of step `index`."""
        batch = self.settings.batch
        places = range(index * batch, (index + 1) * batch)
        orders = {epoch: self._order(epoch) for epoch in {place // len(self.rows) for place in places}}
        asked = [self.rows[orders[place // len(self.rows)][place % len(self.rows)]] for place in places]
        return parallel.share(asked)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 5, epoch)).permutation(len(self.rows))

    def has_one_answer(self, example: Example) -> bool:
        """Whether no other row asks the same of another video."""
        return self._answers[example.text] == 1

    def meanings(self, examples: Sequence[Example]) -> None:
        """Not known: nobody says in canonical words what a sentence means."""

    def _hard(self, row: SftRow, rng: np.random.Generator) -> tuple[int, ...]:
        """Corpus rows of the negatives: the shown video if it is wrong, the listed ones, then random ones."""
        count = self.settings.negatives
        if not count:
            return ()
        listed = (row.shown, *self._negatives.get(row.query_id, ()))
        chosen = [name for name in dict.fromkeys(listed) if name != row.video_id and self.shelf.holds(name)][:count]
        taken = {self.shelf.row(name) for name in (*chosen, row.video_id)}
        others = [other for other in rng.permutation(len(self.shelf.video_ids)).tolist() if other not in taken]
        return (*map(self.shelf.row, chosen), *others[: count - len(chosen)])
