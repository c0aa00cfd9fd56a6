"""The refine head: small maps between the policy's hidden state, the soft-token space and the embedder's input.

`refine_projector` makes a soft token from a hidden state, `refine_latent_input_projector` feeds it back into the
policy, `refine_append_input_projector` writes it into the embedder's input sequence. Names and shapes are those of the
published checkpoints, so their weights load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RefineHead(nn.Module):
    """Maps of soft query refinement. H: policy width, D: soft-token width, E: embedder width.

    Source: VideoSearch-R1 (arXiv 2607.00446), soft query refinement; initialisation differs on purpose: the last
    projector layer is not zero, because behind a LayerNorm a zero start is neither soft nor an identity.
    """

    def __init__(self, hidden_size: int, soft_size: int, embedder_size: int, *, gate: bool = False) -> None:
        super().__init__()
        self.refine_projector = nn.Sequential(
            nn.Linear(hidden_size, soft_size), nn.LayerNorm(soft_size), nn.GELU(), nn.Linear(soft_size, soft_size)
        )
        self.refine_gate = nn.Linear(hidden_size, 1) if gate else None
        self.refine_latent_input_projector = nn.Sequential(nn.LayerNorm(soft_size), nn.Linear(soft_size, hidden_size))
        self.refine_append_input_projector = nn.Sequential(nn.LayerNorm(soft_size), nn.Linear(soft_size, embedder_size))
        with torch.no_grad():
            for projector in (self.refine_latent_input_projector, self.refine_append_input_projector):
                linear = projector[1]
                assert isinstance(linear, nn.Linear)
                # Token embeddings have a standard deviation near 0.02-0.1; an identity after LayerNorm would be 10x louder.
                linear.weight.copy_(0.1 * torch.eye(linear.out_features, linear.in_features))
                linear.bias.zero_()

    def soft_tokens(self, actions: Tensor) -> Tensor:
        """`actions` (..., D) of any precision -> vectors (..., E) for the embedder's input sequence."""
        return self.refine_append_input_projector(actions.to(self.dtype))

    def policy_inputs(self, actions: Tensor) -> Tensor:
        """`actions` (..., D) of any precision -> vectors (..., H) for the policy's own input sequence."""
        return self.refine_latent_input_projector(actions.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
