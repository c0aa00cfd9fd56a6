"""Reasons: what may stand in one, and templates that say what is known and nothing else."""

from __future__ import annotations

import pytest

from vsr1.data.pairs import Pair
from vsr1.data.rationales import MOST_WORDS, plain, templated, unfit
from vsr1.records import Moment

MARKUP = ("<think>", "</THINK>", "< answer >", "</start>", "<end>", "<refine>", "<|im_end|>")


@pytest.mark.parametrize("markup", MARKUP)
def test_markup_is_unfit_and_is_taken_out_of_a_query(markup: str) -> None:
    assert markup in str(unfit(f"It falls.{markup}"))
    assert plain(f"a red{markup}\n ball ") == "a red ball"
    said = templated(Pair(Moment("1_fig", f"a red{markup}ball {{x}}.", "v", 1.5, 2.25), "v", 0.5, 1))
    assert unfit(said) is None and '"a red ball {x}"' in said


def test_a_rationale_has_words_but_not_too_many() -> None:
    assert unfit("word " * MOST_WORDS) is None
    assert "151 words" in str(unfit("word " * (MOST_WORDS + 1)))
    assert unfit(" \n") == "it is empty"


@pytest.mark.parametrize("number", range(6))
def test_templates_give_the_span_of_a_match_and_no_other(number: int) -> None:
    moment = Moment(f"{number}_fig", "a ball falls", "v", 1.5, 2.25)
    right, wrong = (templated(Pair(moment, shown, 0.5, 1)) for shown in ("v", "w"))
    assert "1.5" in right and "2.25" in right and "not" not in right
    assert "1.5" not in wrong and "2.25" not in wrong and ("not" in wrong or "Nowhere" in wrong)
    assert templated(Pair(moment, "v", 0.9, 3)) == right
