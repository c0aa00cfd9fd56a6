"""The words of the rendered world: what can be true of an event, how people say it, and the sentences they build.

An attribute value is named by its canonical word, which the rest of the system speaks; a query may use the common or
the rare synonym instead. `sentence` fills a template with words, `canonical_rewrite` says the same in eight fixed
words, `coarse_sentence` keeps three attributes; `all_words` lists every word any of them can produce, and a tokenizer
is trained on that list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Final

# value -> (canonical, common synonym, rare synonym); the 29 values and all 87 words are distinct.
WORDS: Final[dict[str, dict[str, tuple[str, str, str]]]] = {
    "size": {
        "small": ("small", "little", "dinky"),
        "large": ("large", "big", "hulking"),
    },
    "colour": {
        "red": ("red", "crimson", "vermilion"),
        "orange": ("orange", "tangerine", "apricot"),
        "yellow": ("yellow", "golden", "canary"),
        "green": ("green", "emerald", "viridian"),
        "cyan": ("cyan", "turquoise", "cerulean"),
        "blue": ("blue", "azure", "cobalt"),
        "purple": ("purple", "violet", "mauve"),
        "white": ("white", "ivory", "alabaster"),
    },
    "shape": {
        "circle": ("circle", "disc", "orb"),
        "bar": ("bar", "plank", "slab"),
        "pole": ("pole", "pillar", "stake"),
        "cross": ("cross", "plus", "crucifix"),
        "ring": ("ring", "hoop", "annulus"),
    },
    "motion": {
        "left": ("left", "leftward", "westward"),
        "right": ("right", "rightward", "eastward"),
        "up": ("up", "upward", "skyward"),
        "down": ("down", "downward", "earthward"),
        "still": ("still", "static", "inert"),
        "blink": ("blink", "flashing", "strobing"),
        "grow": ("grow", "swelling", "dilating"),
    },
    "background_colour": {
        "black": ("black", "ebony", "sable"),
        "gray": ("gray", "ashen", "slate"),
        "brown": ("brown", "chocolate", "umber"),
        "navy": ("navy", "indigo", "midnight"),
    },
    "texture": {
        "plain": ("plain", "flat", "unmarked"),
        "striped": ("striped", "lined", "banded"),
        "dotted": ("dotted", "spotted", "stippled"),
    },
}
ATTRIBUTES: Final = tuple(WORDS)
EVENT_ATTRIBUTES: Final = ("size", "colour", "shape", "motion")
BACKGROUND_ATTRIBUTES: Final = ("background_colour", "texture")
COARSE_ATTRIBUTES: Final = ("colour", "shape", "motion")

# A template is a row of phrases parted by "|". A phrase whose slots are all dropped falls away; in the others a
# dropped shape becomes "thing" and any other dropped word is left out, so what remains still reads as a sentence.
FINE_TEMPLATES: Final = (
    "a {size} {colour} {shape}|with {motion} motion|on a {texture} {background_colour} background",
    "on a {texture} {background_colour} background|a {size} {colour} {shape}|shows {motion} motion",
    "a {background_colour} {texture} background|and a {colour} {shape}|of {size} size|in {motion} motion",
    "in {motion} motion|a {size} {colour} {shape}|before a {background_colour} {texture} background",
    "a {shape}|in {colour} colour|and {size} size|in {motion} motion|on a {texture} {background_colour} background",
    "the {size} {shape}|in {colour} colour|has {motion} motion|before a {texture} {background_colour} background",
    "look for {motion} motion|on a {texture} {background_colour} background|of a {colour} {size} {shape}",
    "find a {background_colour} {texture} background|where a {size} {colour} {shape}|has {motion} motion",
)
COARSE_TEMPLATES: Final = (
    "a {colour} {shape}|with {motion} motion",
    "there is {motion} motion|of a {colour} {shape}",
    "find the {colour} {shape}|in {motion} motion",
)

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\ba (?=[aeiou])")


def values(attribute: str) -> tuple[str, ...]:
    """The canonical words an attribute can take."""
    return tuple(WORDS[attribute])


def canonical(word: str) -> tuple[str, str] | None:
    """The (attribute, canonical word) an attribute word stands for, None for any other word."""
    return _MEANING.get(word)


def canonical_rewrite(attributes: Mapping[str, str]) -> str:
    """Eight words in fixed order: size colour shape motion "on" background_colour texture "background"."""
    event = [attributes[name] for name in EVENT_ATTRIBUTES]
    background = [attributes[name] for name in BACKGROUND_ATTRIBUTES]
    return " ".join([*event, "on", *background, "background"])


def sentence(attributes: Mapping[str, str], rng: Random, rare_fraction: float = 0.0, drop: float = 0.0) -> str:
    """A fine sentence naming the attributes in one of the fine templates.

    Args:
        attributes: attribute -> canonical word, all six.
        rng: chooses template, synonyms and what is dropped.
        rare_fraction: probability that a word is its value's rare synonym; the other two share the rest equally.
        drop: probability that an attribute goes unmentioned; one always stays.
    """
    kept = [name for name in ATTRIBUTES if rng.random() >= drop] or [rng.choice(ATTRIBUTES)]
    return _fill(rng.choice(FINE_TEMPLATES), {name: _word(name, attributes[name], rng, rare_fraction) for name in kept})


def coarse_sentence(attributes: Mapping[str, str], rng: Random, rare_fraction: float = 0.0) -> str:
    """A coarse sentence: only colour, shape and motion."""
    words = {name: _word(name, attributes[name], rng, rare_fraction) for name in COARSE_ATTRIBUTES}
    return _fill(rng.choice(COARSE_TEMPLATES), words)


def all_words() -> tuple[str, ...]:
    """Every word that `sentence`, `coarse_sentence` and `canonical_rewrite` can produce, sorted."""
    template_words = {word for template in (*FINE_TEMPLATES, *COARSE_TEMPLATES) for word in _plain_words(template)}
    return tuple(sorted(template_words | set(_MEANING) | {"an", "thing", "on", "background"}))


def _word(attribute: str, value: str, rng: Random, rare_fraction: float) -> str:
    common, usual, rare = WORDS[attribute][value]
    return rare if rng.random() < rare_fraction else rng.choice((common, usual))


def _fill(template: str, words: Mapping[str, str]) -> str:
    phrases = []
    for phrase in template.split("|"):
        if any(name in words for name in _SLOT.findall(phrase)):
            phrases.append(_SLOT.sub(lambda slot: words.get(slot[1], "thing" if slot[1] == "shape" else ""), phrase))
    return _ARTICLE.sub("an ", " ".join(" ".join(phrases).split()))


def _plain_words(template: str) -> list[str]:
    return _SLOT.sub(" ", template).replace("|", " ").split()


_MEANING: Final = {
    word: (attribute, value)
    for attribute, table in WORDS.items()
    for value, synonyms in table.items()
    for word in synonyms
}
