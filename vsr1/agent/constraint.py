"""What a constrained reply may say, as a regular expression that structured-output engines take.

Up to `<answer>` the policy says what it likes; behind it stand one of the two answers and, for a match, its times, none later
than the video's end. Everything `protocol.render` writes for such a reply is accepted, but for the closing `<REFINE>`: that
is one token that stops the engine, and in the expression it would be letters, which other tokens could spell. Plain syntax
only (no look-around, no back-references), because these expressions become automata.
"""

from __future__ import annotations

from vsr1.agent.allowed import ANSWER_TAG

_PLACES = 9  # decimal places a time may have: what `render` writes of a time from 0.1 ms on


def _until(tag: str) -> tuple[str, str]:
    """(any text without `tag`, the tag itself where it ends such a text). Only the tag's first letter may be "<"."""
    heads = [tag[:length] for length in range(1, len(tag))]
    again = "(" + "|".join(["<", *(f"{head[1:]}<" for head in heads[1:])]) + ")*"  # the tag begins anew inside itself
    away = "|".join(f"{head[1:]}[^<{tag[length]}]" for length, head in enumerate(heads, 1))
    return f"([^<]|<{again}({away}))*", f"<{again}{tag[1:]}"


def at_most(limit: float) -> str:
    """A regular expression of the numbers from 0 to `limit`, whole or with a decimal point, without leading zeros."""
    whole, _, places = f"{limit:.{_PLACES}f}".rstrip("0").partition(".")
    below = [f"{digit}" for digit in range(min(int(whole), 10))]  # one-digit numbers below
    for length in range(2, len(whole) + 1):
        if length < len(whole):
            below.append(f"[1-9][0-9]{{{length - 1}}}")
            continue
        for index, digit in enumerate(whole):  # the same beginning, then a smaller digit, then any
            least = 1 if index == 0 else 0
            if int(digit) > least:
                rest = f"[0-9]{{{len(whole) - index - 1}}}" if index + 1 < len(whole) else ""
                below.append(f"{whole[:index]}[{least}-{int(digit) - 1}]{rest}")
    last = [f"0{{0,{_PLACES}}}"]
    for index, digit in enumerate(places):
        last.append(places[:index])
        if digit != "0":
            last.append(f"{places[:index]}[0-{int(digit) - 1}][0-9]{{0,{_PLACES - index - 1}}}")
    if places:
        last.append(f"{places}0{{0,{_PLACES - len(places)}}}")
    ends = "|".join(part for part in last if part)
    choices = [f"{whole}(\\.({ends}))?"]
    if below:
        choices.append(f"({'|'.join(below)})(\\.[0-9]{{1,{_PLACES}}})?")
    return f"({'|'.join(choices)})"


def reply_pattern(duration: float) -> str:
    """The regular expression of a reply, up to its closing token, about a video of `duration` seconds."""
    free, tag = _until(ANSWER_TAG)
    time = at_most(duration)
    span = f"(<start>{time}</start><end>{time}</end>)?"
    return f"{free}({tag}(not_matched</answer>|matched</answer>{span}))?"
