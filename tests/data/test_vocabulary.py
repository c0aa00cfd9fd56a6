"""The words of the world: distinct, closed under everything that makes sentences, and right in number."""

from __future__ import annotations

import re
from random import Random

import pytest

from vsr1.data.vocabulary import (
    ATTRIBUTES,
    COARSE_ATTRIBUTES,
    COARSE_TEMPLATES,
    FINE_TEMPLATES,
    WORDS,
    all_words,
    canonical,
    canonical_rewrite,
    coarse_sentence,
    sentence,
    values,
)


def random_attributes(rng: Random) -> dict[str, str]:
    return {name: rng.choice(values(name)) for name in ATTRIBUTES}


def meanings(text: str) -> dict[str, str]:
    return dict(found for word in text.split() if (found := canonical(word)))


def test_sizes_of_the_vocabulary() -> None:
    assert {name: len(values(name)) for name in ATTRIBUTES} == {
        "size": 2,
        "colour": 8,
        "shape": 5,
        "motion": 7,
        "background_colour": 4,
        "texture": 3,
    }
    assert len(FINE_TEMPLATES) >= 6
    assert len(COARSE_TEMPLATES) >= 3


def test_words_are_distinct_single_lowercase_words() -> None:
    words = [word for table in WORDS.values() for synonyms in table.values() for word in synonyms]
    assert len(words) == len(set(words)) == 87
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    plain = {
        word for template in (*FINE_TEMPLATES, *COARSE_TEMPLATES) for word in re.findall(r"(?<!\{)\b[a-z]+\b", template)
    }
    assert not plain & set(words)


def test_a_value_is_its_own_canonical_word() -> None:
    for attribute, table in WORDS.items():
        for value, synonyms in table.items():
            assert synonyms[0] == value
            assert {canonical(word) for word in synonyms} == {(attribute, value)}
    assert canonical("background") is None


def test_every_template_names_all_its_attributes_once() -> None:
    for template in FINE_TEMPLATES:
        assert sorted(re.findall(r"\{(\w+)\}", template)) == sorted(ATTRIBUTES)
    for template in COARSE_TEMPLATES:
        assert sorted(re.findall(r"\{(\w+)\}", template)) == sorted(COARSE_ATTRIBUTES)
    orders = {tuple(re.findall(r"\{(\w+)\}", template)) for template in FINE_TEMPLATES}
    assert len(orders) == len(FINE_TEMPLATES)


def test_sentences_say_what_they_were_given() -> None:
    rng = Random(0)
    known = set(all_words())
    for _ in range(500):
        attributes = random_attributes(rng)
        text = sentence(attributes, rng, rare_fraction=0.3)
        assert meanings(text) == attributes
        dropped = sentence(attributes, rng, rare_fraction=0.3, drop=0.5)
        assert meanings(dropped)
        assert meanings(dropped).items() <= attributes.items()
        coarse = coarse_sentence(attributes, rng)
        assert meanings(coarse) == {name: attributes[name] for name in COARSE_ATTRIBUTES}
        for words in (text, dropped, coarse, canonical_rewrite(attributes)):
            assert set(words.split()) <= known
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |[{}|]", words)


def test_every_word_listed_can_occur() -> None:
    rng = Random(0)
    seen: set[str] = set()
    for _ in range(4000):
        seen |= set(sentence(random_attributes(rng), rng, 0.3, rng.choice((0.0, 0.5))).split())
        seen |= set(coarse_sentence(random_attributes(rng), rng).split())
    assert seen == set(all_words())
    assert list(all_words()) == sorted(set(all_words()))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_share_of_rare_words(fraction: float) -> None:
    rng = Random(0)
    rare = {synonyms[2] for table in WORDS.values() for synonyms in table.values()}
    usual = {synonyms[1] for table in WORDS.values() for synonyms in table.values()}
    words = [word for _ in range(1000) for word in sentence(random_attributes(rng), rng, fraction).split()]
    named = [word for word in words if canonical(word)]
    assert sum(word in rare for word in named) / len(named) == pytest.approx(fraction, abs=0.03)
    assert sum(word in usual for word in named) / len(named) == pytest.approx((1 - fraction) / 2, abs=0.03)


def test_drop_probability() -> None:
    rng = Random(0)
    named = sum(len(meanings(sentence(random_attributes(rng), rng, drop=0.15))) for _ in range(2000))
    assert named / (2000 * len(ATTRIBUTES)) == pytest.approx(0.85, abs=0.02)


def test_canonical_rewrite_is_eight_words_in_order() -> None:
    attributes = {
        "texture": "dotted",
        "shape": "ring",
        "size": "small",
        "background_colour": "navy",
        "motion": "blink",
        "colour": "cyan",
    }
    assert canonical_rewrite(attributes) == "small cyan ring blink on navy dotted background"
