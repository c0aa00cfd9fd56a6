"""A tokenizer trained on the spot, for models that start from nothing.

It has Qwen's special tokens and chat markers, so that everything built on it (templates, video placeholders, stop
tokens) is the same as with a released Qwen3-VL tokenizer. It is a byte-level BPE: any text can be written in it, and
the words and numbers it was trained on become one token each.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
REFINE = "<REFINE>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, "<|vision_pad|>", "<|image_pad|>", VIDEO_PAD)
TAGS = tuple(f"<{slash}{name}>" for name in ("think", "answer", "start", "end") for slash in ("", "/"))

# Words keep their leading space; a frame's time stamp, and a number with at most one decimal, stay whole: one token each.
_PIECES = r"<\d{1,3}\.\d seconds>| ?[A-Za-z_]+|\d{1,3}(?:\.\d)?| ?[^\sA-Za-z\d]+|\s+"


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `texts`; returns a transformers tokenizer with Qwen's special tokens and our tags."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    tokenizer.add_special_tokens([AddedToken(REFINE, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[*SPECIAL_TOKENS[1:], REFINE],
    )
