"""How a language model attends over a prefix that several rows share.

transformers lets a model name its attention function; ours is called `vsr1`. Without a prefix it is torch's own scaled
dot product attention. Given one (`language_model(..., prefix=prefix)` hands it down to every layer) the row's own keys
and values come as usual, from its cache, and those of the prompt from the prefix, which is kept once however many rows
continue it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vsr1.ops.prefix import shared_prefix_attention

NAME = "vsr1"


@dataclass(frozen=True)
class Prefix:
    """N prompts that R rows continue.

    keys, values: one tensor a layer, (N, heads, P, size); mask (N, P) bool, True for real columns, None where all are;
    owner (R,) int64: the prompt each row continues.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor | None
    owner: Tensor


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    prefix: Prefix | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    assert attention_mask is not None, "rows that share a prefix need the mask of their own columns"
    mixed = shared_prefix_attention(
        query,
        prefix.keys[module.layer_idx],
        prefix.values[module.layer_idx],
        key,
        value,
        group=prefix.owner,
        prefix_mask=prefix.mask,
        suffix_mask=attention_mask[:, 0],
        scale=scaling,
    )
    return mixed.transpose(1, 2), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def share_prefixes(language_model: nn.Module) -> None:
    """Let `language_model` (a transformers text model) take `prefix=`; what it computes without one stays the same."""
    language_model.config._attn_implementation = NAME  # type: ignore[union-attr]
