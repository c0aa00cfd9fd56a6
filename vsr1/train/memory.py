"""The bytes that a recipe needs on each GPU, by phase and by item: computed from shapes, before anything is loaded.

Weights, gradients and optimizer state are exact. Activations are what autograd keeps of transformers' decoder layer: the same
tensors counted one by one (tests compare them with what is really saved). Where bytes only pass by (the gradient of a layer, the
workspace of `linear_logp`), a bound stands for them. Logits do not appear: they are never held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vsr1.models.shape import ModelShape, TextShape, head_parameters
from vsr1.models.vision import GROUP_BYTES
from vsr1.train.work import PAIR, Work

FLOAT = 4
GIB = 1 << 30
LOGP_WORKSPACE = 320 << 20
"""Of `linear_logp` over 151,936 words: measured on an H100 with a frozen head."""
CONTEXT = 1 << 30
"""What CUDA and its libraries take before the first tensor: assumed."""
FRAGMENTED = 0.05
"""Share of everything allocated that the allocator cannot use: assumed."""
Trained = Literal["all", "adapters", "nothing"]


@dataclass(frozen=True)
class Item:
    """Something that takes memory in a phase."""

    phase: str
    name: str
    bytes: float


@dataclass(frozen=True)
class Models:
    """The shapes of a recipe: policy, embedder, refine head (parameters)."""

    policy: ModelShape
    embedder: ModelShape
    soft: int = 2048

    @property
    def head(self) -> int:
        return head_parameters(self.policy.text.hidden, self.soft, self.embedder.text.hidden)

    @property
    def embedder_parameters(self) -> int:
        """Without an output matrix: the embedder has none."""
        return self.embedder.text.parameters + self.embedder.vision.parameters

    def trained(self, rank: int) -> int:
        """Parameters of the policy's model that learn; its tower does not."""
        text = self.policy.text
        return text.adapters(rank) if rank else text.parameters + (0 if text.tied else text.table)


def training_state(parameters: int, element: int) -> dict[str, int]:
    """Bytes beside the weights: AdamW works in float32, on copies of weights whose numbers are shorter (`element` bytes)."""
    return {
        "gradients": parameters * FLOAT,
        "optimizer state": parameters * 2 * FLOAT,
        "float32 weights": parameters * FLOAT if element < FLOAT else 0,
    }


def layer_activations(text: TextShape, element: int, trained: Trained, rank: int = 0) -> int:
    """Bytes that autograd keeps of one token in one layer.

    A norm keeps its input in float32, a factor, and, where its weight learns, what that multiplies. A projection keeps its input,
    where it or its adapter learns; attention keeps queries, keys, values, its result and a factor; the feed forward's gate, its
    activation and what that multiplies.
    """
    width, queries, keys, inner = text.hidden, text.queries, text.keys, text.feed_forward
    norms = FLOAT * (2 * width + queries + keys) + FLOAT * (2 + text.heads + text.key_heads)
    if trained == "all":
        norms += element * (2 * width + queries + keys)
    inputs = element * (2 * width + inner) if trained != "nothing" else 0
    attention = element * (2 * queries + 2 * keys) + FLOAT * text.heads
    adapters = element * 7 * rank if trained == "adapters" else 0
    return norms + inputs + attention + adapters + element * 3 * inner


def activations(text: TextShape, tokens: float, element: int, trained: Trained, rank: int = 0) -> float:
    """Bytes that autograd keeps of a pass of `tokens` without checkpointing."""
    last = FLOAT * text.hidden + FLOAT + (element * text.hidden if trained == "all" else 0)
    rotation = 2 * element * text.head
    return tokens * (text.layers * layer_activations(text, element, trained, rank) + last + rotation)


def checkpointed(text: TextShape, tokens: float, element: int, trained: Trained, rank: int = 0) -> float:
    """The same with every layer computed again: each layer's input, its keys and values, and one layer's activations."""
    kept = text.layers * element * text.hidden + text.cache_bytes(element)
    return tokens * (kept + layer_activations(text, element, trained, rank))


def _masks(text: TextShape, rows: float, length: int, element: int, layers: int) -> float:
    """Of padded rows: a mask of numbers in each layer, and keys and values repeated for every query head."""
    repeated = 2 * element * (text.queries - text.keys) * length
    return rows * layers * (length**2 * element + repeated) if rows > 1 else 0.0


def _pass(text: TextShape, work: Work, tokens: float, prompts: float) -> Iterable[tuple[str, float]]:
    """Activations of a pass of `tokens`, with `prompts` padded rows among them."""
    trained: Trained = "adapters" if work.lora_rank else "all"
    element, rank = work.element, work.lora_rank
    keep = checkpointed if work.checkpointing else activations
    yield "activations", keep(text, tokens, element, trained, rank)
    layers = 1 if work.checkpointing else text.layers
    yield "masks of padded prompts", _masks(text, prompts, work.longest_prompt, element, layers)
    yield "a layer's gradients", tokens * layer_activations(text, element, "nothing")


def copied_bytes(text: TextShape, rows: float, length: int, steps: int, element: int) -> float:
    """Keys and values of rows that go on step by step behind `length` tokens: every step keeps all of them anew."""
    return rows * sum(length + step for step in range(1, steps + 1)) * text.cache_bytes(element)


def _soft(models: Models, work: Work, rows: float, length: int) -> Iterable[tuple[str, float]]:
    """Of the soft tokens of `rows` rows behind `length` tokens of their own, and of the embedder that reads them."""
    text, element, steps = models.policy.text, work.element, work.soft - 1
    trained: Trained = "adapters" if work.lora_rank else "all"
    yield "soft tokens: keys and values", copied_bytes(text, rows, length, steps, element)
    yield "soft tokens: activations", activations(text, rows * steps, element, trained, work.lora_rank)
    reader = models.embedder.text
    yield "embedder's activations", activations(reader, rows * (work.query + work.soft), element, "nothing")


def held(models: Models, work: Work) -> list[tuple[str, float]]:
    """What both stages hold all the time."""
    rank, element = work.lora_rank, work.element
    policy, trained = models.policy.parameters, models.trained(rank)
    state = training_state(trained, element)
    head = training_state(models.head, FLOAT)
    return [
        ("policy", policy * element + models.head * FLOAT),
        ("adapters", trained * element if rank else 0),
        ("embedder", models.embedder_parameters * element),
        *((name, size + head[name]) for name, size in state.items()),
        ("corpus", work.train.videos * work.dimension * FLOAT),
        ("video features", _features(models, work, work.train.videos)),
    ]


def _features(models: Models, work: Work, videos: int) -> float:
    most = models.policy.vision.feature_bytes(work.video.visual, work.element) * videos
    return min(float(work.cache_bytes), most)


def _encoding(models: Models, work: Work) -> float:
    """Of the vision tower over the longest videos that it takes together: a block's attention or its feed forward."""
    vision, element = models.policy.vision, work.element
    of_one = work.longest.pairs * PAIR * work.frame[0] * work.frame[1] * 3
    videos = min(32, math.ceil(GROUP_BYTES / of_one))
    patches = videos * work.longest.visual * vision.merge**2
    attention = element * 7 * vision.hidden + FLOAT * 4 * vision.hidden
    pixels = element * vision.pixels
    frames = videos * of_one
    return frames + patches * (pixels + max(attention, element * 2 * (vision.hidden + vision.feed_forward)))


def _spoken(models: Models, work: Work, rows: float, prompts: float, read: float) -> Iterable[tuple[str, float]]:
    """Of replies spoken at once: `rows` of them behind `prompts` prompts, `read` of which are read in one pass."""
    text, element = models.policy.text, work.element
    token = text.cache_bytes(element)
    yield "prompts' keys and values", prompts * work.longest_prompt * token
    yield "replies' keys and values", rows * (work.longest_reply + work.soft) * token
    width = FLOAT * 2 * text.hidden + element * (2 * text.hidden + 2 * text.queries + 3 * text.feed_forward)
    padded = _masks(text, read, work.longest_prompt, element, 1)
    yield "reading prompts", read * work.longest_prompt * (token + width) + padded
    features = models.policy.vision.feature_bytes(work.longest.visual, element)
    yield "videos shown", read * features


def phases(models: Models, work: Work) -> list[Item]:
    """Every item of every phase. Phases exclude one another in time; items of one phase stand beside one another."""
    text, element = models.policy.text, work.element
    items: list[Item] = []

    def add(phase: str, parts: Iterable[tuple[str, float]]) -> None:
        items.extend(Item(phase, name, size) for name, size in parts if size)

    longest = work.longest_row
    rows_here = max(1, -(-work.sft_rows // work.gpus))
    rows = min(rows_here, max(1, work.sft_pack // longest))
    step = [("optimizer's temporaries", float(models.trained(work.lora_rank) * FLOAT))]
    workspace = [("linear_logp", float(LOGP_WORKSPACE))]
    if not work.lora_rank:  # that of the output matrix and that of the words, before they are added up
        workspace.append(("gradients of the table", 2.0 * text.table * element))

    common = held(models, work)
    add("sft pass", common)
    add("sft pass", _pass(text, work, rows * longest, rows))
    refined = rows * work.sft_refined
    add("sft pass", _soft(models, work, refined, work.longest_reply if work.sft_branched else longest))
    add("sft pass", workspace)
    add("optimizer step", [*common, *step])

    twin = text.parameters + (0 if text.tied else text.table)
    common = [*common, *([] if work.lora_rank else [("reference", float(twin * element + models.head * FLOAT))])]
    add("videos", common)
    add("videos", [("vision tower", _encoding(models, work))])
    widest = max(range(work.turns), key=work.most_prompts)
    speaking = min(work.decoded_rows, work.replies(widest))
    add("grpo rollout", common)
    add("grpo rollout", _spoken(models, work, speaking, work.most_prompts(widest), work.most_read(widest)))

    tokens = max(work.pack, longest)
    prompts = tokens // longest
    # most replies stand behind prompts of the usual length that a whole group answers
    replies = max(1.0, tokens / (work.longest_reply + work.mean_prompt / work.group))
    add("grpo pass", common)
    add("grpo pass", _pass(text, work, tokens, prompts))
    add("grpo pass", [("reference's keys and values", tokens * text.cache_bytes(element))])
    add("grpo pass", _soft(models, work, replies, work.longest_reply))
    add("grpo pass", workspace)

    batch = min(work.test_batch, work.decoded_rows)
    for name, size in held(models, work):
        if name in ("policy", "embedder", "video features"):
            add("evaluation", [(name, size)])
    add("evaluation", _spoken(models, work, batch, min(work.test_batch, batch + 1), work.read_together(batch)))
    return items


def totals(items: list[Item]) -> dict[str, float]:
    """The bytes of each phase, with what CUDA and its allocator take."""
    sums: dict[str, float] = {}
    for item in items:
        sums[item.phase] = sums.get(item.phase, 0.0) + item.bytes
    return {phase: size * (1 + FRAGMENTED) + CONTEXT for phase, size in sums.items()}
