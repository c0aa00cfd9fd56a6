"""What a recipe makes the machine do, as plain numbers: rows of stage 1, rollouts of stage 2, corpora, evaluation.

A `Work` says nothing of models or GPUs. From it `vsr1.train.memory` computes bytes and `vsr1.train.cost` seconds. What depends
on how a policy behaves (how often a loop goes on, how long replies are) stands here as a number too: argue with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vsr1.data.benchmarks import Split
from vsr1.models.vision import VideoSettings
from vsr1.ops.patches import smart_size
from vsr1.video import Sampling

STAMP = 10
"""Text tokens before and behind a pair of frames: `<12.5 seconds>` and the marks around the picture."""
PAIR = 2
"""Frames that the vision tower makes one picture of."""
ROWS = 128
"""Replies that the own engine has under way at once."""


@dataclass(frozen=True)
class VideoTokens:
    """What one video is to the models: pairs of frames, and the vision tower's tokens of a pair."""

    pairs: int
    of_pair: int

    @property
    def visual(self) -> int:
        """The vision tower's tokens."""
        return self.pairs * self.of_pair

    @property
    def tokens(self) -> int:
        """With the times that are written between them."""
        return self.pairs * (self.of_pair + STAMP)

    @classmethod
    def of(cls, settings: VideoSettings, seconds: float, size: tuple[int, int], factor: int = 32) -> VideoTokens:
        """Of a video of so many seconds whose frames are `size` (height, width); factor: side of a token in pixels."""
        wanted = Sampling(fps=settings.fps, max_frames=settings.max_frames).wanted(seconds)
        height, width = smart_size(*size, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels, factor=factor)
        return cls(math.ceil(len(wanted) / PAIR), height * width // factor**2)


@dataclass(frozen=True)
class Work:
    """A recipe in numbers. Rows, queries and steps are those of all GPUs together; every GPU holds all weights.

    train, test: the corpora and their queries. dimension: of their vectors. video: of the mean video, longest: of the longest,
    whose frames are decoded at `frame` (height, width). half: bfloat16 models. cores: processors that decode videos, all
    together. cache_bytes: what a GPU keeps of the vision tower's output.

    prompt: text tokens of a prompt beside its video; reply, query: tokens of a reply and of a query in the embedder's template.
    longest_reply: what memory must hold. soft: soft tokens of a refinement.

    sft_rows a step, in passes of at most sft_pack tokens; sft_refined: share of them that refine; sft_branched: whether their
    soft tokens share the row's keys and values, or carry copies of them.

    grpo_queries a step, group replies each, up to `turns` turns; updates of a rollout; pack: most tokens of a pass;
    decoded_rows: replies that are spoken at once; read_pack: most tokens of their prompts that are read in one pass (0: all).
    goes_on: share of the loops that go on after a turn; shared: replies to one prompt from the second turn on (in the first
    the whole group answers one).

    test_turns, test_batch: turns of the loop over the test queries, and how many queries go through it together.
    """

    train: Split
    test: Split
    video: VideoTokens
    longest: VideoTokens
    frame: tuple[int, int] = (480, 640)
    half: bool = True
    lora_rank: int = 0
    checkpointing: bool = True
    gpus: int = 1
    cores: int = 16
    cache_bytes: int = 1 << 30
    dimension: int = 2048
    prompt: int = 190
    reply: int = 130
    longest_reply: int = 256
    query: int = 48
    soft: int = 8
    sft_steps: int = 500
    sft_rows: int = 4
    sft_pack: int = 16384
    sft_refined: float = 1.0
    sft_branched: bool = False
    grpo_steps: int = 1000
    grpo_queries: int = 16
    group: int = 8
    turns: int = 3
    updates: int = 1
    pack: int = 16384
    decoded_rows: int = ROWS
    read_pack: int = 0
    goes_on: float = 0.6
    shared: float = 2.0
    test_turns: int = 3
    test_batch: int = 64

    @property
    def element(self) -> int:
        """Bytes of a number of the models' weights and activations."""
        return 2 if self.half else 4

    @property
    def row(self) -> int:
        """Tokens of the mean supervised row."""
        return self.mean_prompt + self.reply

    @property
    def mean_prompt(self) -> int:
        return self.prompt + self.video.tokens

    @property
    def longest_prompt(self) -> int:
        return self.prompt + self.longest.tokens

    @property
    def longest_row(self) -> int:
        return self.longest_prompt + self.longest_reply

    @property
    def rollouts(self) -> float:
        """Rollouts of stage 2."""
        return self.grpo_steps / self.updates

    @property
    def queries_here(self) -> int:
        """Queries of a rollout on one GPU."""
        return math.ceil(self.grpo_queries / self.gpus)

    def loops(self, turns: int) -> list[float]:
        """The share of the loops that reach each turn."""
        return [self.goes_on**turn for turn in range(turns)]

    def replies(self, turn: int) -> float:
        """Replies of a turn (from 0) in one rollout of one GPU."""
        return self.queries_here * self.group * self.goes_on**turn

    def prompts(self, turn: int) -> float:
        """The distinct prompts that they answer."""
        return self.queries_here if turn == 0 else self.replies(turn) / self.shared

    def most_prompts(self, turn: int) -> float:
        """Of the prompts, those that the own engine holds at once."""
        return min(self.decoded_rows + 1, self.prompts(turn))

    def most_read(self, turn: int) -> float:
        """Of these, those that it reads in one pass."""
        entering = self.decoded_rows * self.prompts(turn) / self.replies(turn)
        return self.read_together(min(self.prompts(turn), max(1.0, entering)))

    def read_together(self, prompts: float) -> float:
        """Of the longest prompts that are to be read, those of one pass."""
        return min(prompts, max(1, self.read_pack // self.longest_prompt)) if self.read_pack else prompts

    @property
    def refined(self) -> float:
        """Replies of one rollout of one GPU that refine: those after which the loop may go on."""
        return sum(self.replies(turn) * self.goes_on for turn in range(self.turns - 1))

    def misses(self, shown: float, videos: int, video_bytes: float) -> float:
        """Of `shown` videos drawn at random from `videos`, those that are not at hand and go through the vision tower."""
        kept = min(1.0, self.cache_bytes / max(video_bytes * videos, 1.0))
        first = min(shown, videos)
        return first + (shown - first) * (1 - kept)
