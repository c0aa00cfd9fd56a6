"""The tokenizer trained on the spot: whole words, whole numbers, and every text back as it was."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vsr1.models.tokenizer import IM_END, REFINE, SPECIAL_TOKENS, TAGS, token_id, train_tokenizer

WORDS = ("small", "red", "circle", "matched", "not_matched", "background")


@pytest.fixture(scope="module")
def trained():
    numbers = [f"{second}.0 {second}.5" for second in range(100)]
    stamps = [f"<{second}.0 seconds><{second}.5 seconds>" for second in range(100)]  # no space before, as in a prompt
    return train_tokenizer(2 * [f" {' '.join(WORDS)}", *WORDS, *numbers, *stamps])


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["<0.5 seconds>", "<9.0 seconds>", "<63.5 seconds>", "<99.5 seconds>", "7.5", "42.0"])
def test_times_are_one_token_each(trained, text):
    assert len(ids(trained, text)) == 1
    assert len(ids(trained, f"<|vision_end|>{text}<|vision_start|>")) == 3


@pytest.mark.parametrize("word", WORDS)
def test_words_are_one_token_each_with_and_without_a_space(trained, word):
    assert len(ids(trained, word)) == len(ids(trained, f" {word}")) == 1


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, *TAGS, REFINE])
def test_special_tokens_and_tags_stay_whole_inside_a_text(trained, token):
    assert ids(trained, f"red{token}red").count(token_id(trained, token)) == 1
    assert ids(trained, token) == [token_id(trained, token)]


def test_markers_have_their_roles(trained):
    assert trained.eos_token == IM_END and trained.pad_token == "<|endoftext|>"
    said = ids(trained, f"<answer>matched</answer>{REFINE}{IM_END}")
    assert trained.decode(said, skip_special_tokens=True) == "<answer>matched</answer>"  # tags are words of the reply


@given(text=st.text(max_size=60))
@example(text="  two  spaces\n\tand  a tab ")
@example(text="naïve café 東京 🎬 12.5 <1000.5 seconds>")
@example(text="<think> a = b </think><|im_end|><REFINE>")
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(trained, text):
    assert trained.decode(ids(trained, text), skip_special_tokens=False) == text


def test_any_text_round_trips_through_disk(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a small 12.5 <3.5 seconds> ő", f"<think>x</think>{REFINE}{IM_END}"):
        assert ids(again, text) == ids(trained, text)
    assert (again.eos_token_id, again.pad_token_id) == (trained.eos_token_id, trained.pad_token_id)


def test_training_is_repeatable():
    texts = ["b a c a", "a small red circle", "<1.5 seconds>"] * 2
    assert train_tokenizer(texts).get_vocab() == train_tokenizer(texts).get_vocab()
