"""Templated descriptions and replies: what a careful judge would say about a rendered video, to learn from.

The rationale first says what the query means in canonical words, then everything that happens, then compares the closest
event with the query one attribute at a time: every step is something the policy can read off the query, the video or its
own words. The order matters: a meaning written behind the description is copied from it, and so is one that is only implied
("the closest event differs in .."), and naming the closest event first asks for the whole comparison before the first word.
"""

from __future__ import annotations

from collections.abc import Mapping

from vsr1.data.scene import Scene
from vsr1.data.vocabulary import ATTRIBUTES, canonical_rewrite
from vsr1.records import Reply


def describe(scene: Scene) -> str:
    """Everything that happens in a scene, in canonical words."""
    events = [
        f"{one.start:g} to {one.end:g} s {one.size} {one.colour} {one.shape} {one.motion}" for one in scene.events
    ]
    return " ; ".join([*events, f"{scene.background_colour} {scene.texture}"])


def judge(wanted: Mapping[str, str], scene: Scene) -> Reply:
    """The right reply when `scene` is shown for a query that means the attributes `wanted`."""
    seen = [scene.attributes(number) for number in range(len(scene.events))]
    closest = max(range(len(seen)), key=lambda number: sum(seen[number][name] == wanted[name] for name in ATTRIBUTES))
    event, has = scene.events[closest], seen[closest]
    compared = " ".join(f"{has[name]} {'=' if has[name] == wanted[name] else '!='}" for name in ATTRIBUTES)
    think = f"find {canonical_rewrite(wanted)} ; {describe(scene)} ; {event.start:g} to {event.end:g} s {compared}"
    if has == wanted:
        return Reply("matched", float(event.start), float(event.end), think, True)
    return Reply("not_matched", None, None, think, True)
