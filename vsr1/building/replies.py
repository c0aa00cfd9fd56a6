"""From a pair with its rationale to the reply that stage 1 learns: verdict and span are the truth's, never a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vsr1.agent import protocol
from vsr1.data.pairs import Pair
from vsr1.data.rationales import unfit
from vsr1.data.rows import SftRow
from vsr1.models.policy import SYSTEM
from vsr1.records import Reply


def matching(found: Sequence[Pair]) -> dict[str, int]:
    """Counts of the pairs that match and that do not."""
    right = sum(pair.matched for pair in found)
    return {"matched": right, "not matched": len(found) - right}


def told(text: str | None, error: str | None, finish: str | None) -> dict[str, Any]:
    """The public fields of a rationale."""
    return {"model_reasoning": text or "", "model_error": error, "model_finish_reason": finish, "parsed_ok": bool(text)}


def reason_of(pair: Pair) -> str | None:
    """The pair's rationale, if it can be learned from."""
    text, error = pair.extra.get("model_reasoning"), pair.extra.get("model_error")
    return text if isinstance(text, str) and not error and unfit(text) is None else None


def sft_row(pair: Pair) -> SftRow:
    moment, reason = pair.moment, reason_of(pair)
    if reason is None or moment.video_id is None:
        raise ValueError(f"pair '{pair.pair_id}' has no rationale, or no right video")
    span = (moment.start, moment.end) if pair.matched else (None, None)
    reply = Reply("matched" if pair.matched else "not_matched", *span, reason, True)
    meta = {
        "source": str(pair.extra.get("model_name", "")),
        "pair_id": pair.pair_id,
        "episode_type": "T1",
        "num_negs": 0,
        "top1_video_id": pair.shown,
        "top1_gold_label": "match" if pair.matched else "not_match",
    }
    return SftRow(
        moment.query_id, moment.text, pair.shown, pair.matched, moment.video_id, protocol.render(reply), SYSTEM, meta
    )
