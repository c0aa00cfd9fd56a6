"""Templated descriptions and replies: what a careful judge would say about a rendered video, for the first stage of learning.

The rationale compares the video's closest event with the query one attribute at a time, in canonical words, so that every
word of it has to be read off the video or the query. "The closest event differs in .." was tried and teaches the policy to
copy the query and accept everything. A rejection ends with the query in canonical words: what to look for next.
"""

from __future__ import annotations

from vsr1.data.scene import Scene
from vsr1.data.vocabulary import ATTRIBUTES, canonical_rewrite
from vsr1.data.world import WorldQuery
from vsr1.records import Reply


def describe(scene: Scene) -> str:
    """Everything that happens in a scene, in canonical words."""
    events = [f"{one.start:g} to {one.end:g} s {one.size} {one.colour} {one.shape} {one.motion}" for one in scene.events]
    return " ; ".join([*events, f"{scene.background_colour} {scene.texture}"])


def judge(query: WorldQuery, scene: Scene) -> Reply:
    """The right reply when `scene` is shown for `query`."""
    wanted = query.attributes
    seen = [scene.attributes(number) for number in range(len(scene.events))]
    closest = max(range(len(seen)), key=lambda number: sum(seen[number][name] == wanted[name] for name in ATTRIBUTES))
    event, has = scene.events[closest], seen[closest]
    compared = " ".join(f"{has[name]} {'=' if has[name] == wanted[name] else '!='}" for name in ATTRIBUTES)
    think = f"{event.start:g} to {event.end:g} s {compared}"
    if has == wanted:
        return Reply("matched", float(event.start), float(event.end), think, True)
    return Reply("not_matched", None, None, f"{think} ; find {canonical_rewrite(wanted)}", True)
