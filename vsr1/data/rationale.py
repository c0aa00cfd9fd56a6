"""Templated descriptions and replies: what a careful judge would say about a rendered video, to learn from.

The rationale first says what the query means in canonical words, then everything that happens, with a mark behind every
attribute: "=" where it is what the query asks for, "!=" where it is not. Every step is something the policy can read off
the query, the video or its own words. The order matters: a meaning written behind the description is copied from it, and
so is one that is only implied ("the closest event differs in .."); naming the closest event before comparing asks for the
whole comparison at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vsr1.data.scene import Scene
from vsr1.data.vocabulary import BACKGROUND_ATTRIBUTES, EVENT_ATTRIBUTES, canonical_rewrite
from vsr1.records import Reply


def describe(scene: Scene) -> str:
    """Everything that happens in a scene, in canonical words."""
    events = [
        f"{one.start:g} to {one.end:g} s {one.size} {one.colour} {one.shape} {one.motion}" for one in scene.events
    ]
    return " ; ".join([*events, f"{scene.background_colour} {scene.texture}"])


def judge(wanted: Mapping[str, str], scene: Scene) -> Reply:
    """The right reply when `scene` is shown for a query that means the attributes `wanted`."""

    def marked(seen: Mapping[str, str], names: Sequence[str]) -> str:
        return " ".join(f"{seen[name]} {'=' if seen[name] == wanted[name] else '!='}" for name in names)

    seen = [scene.attributes(number) for number in range(len(scene.events))]
    told = [
        f"{event.start:g} to {event.end:g} s {marked(has, EVENT_ATTRIBUTES)}"
        for event, has in zip(scene.events, seen, strict=True)
    ]
    think = " ; ".join([f"find {canonical_rewrite(wanted)}", *told, marked(seen[0], BACKGROUND_ATTRIBUTES)])
    for event, has in zip(scene.events, seen, strict=True):
        if has == wanted:
            return Reply("matched", float(event.start), float(event.end), think, True)
    return Reply("not_matched", None, None, think, True)
