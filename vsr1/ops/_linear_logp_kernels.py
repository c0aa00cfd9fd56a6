"""What linear_logp does to a tile of logits between its matrix products: on a CPU in C++, on a GPU in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsr1.ops._linear_logp_tiles import Shape, Sums, Tile, Upstream

if TYPE_CHECKING:
    from vsr1._C import LogitTile


class CpuKernels:
    """csrc/cpu/linear_logp.cpp. A tile of 8 MiB stays in the last cache between its products."""

    shape = Shape(budget=8 << 20, per_logit=4, most_rows=2048, most_columns=2048)

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32

    def logit_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def add(self, tile: Tile, sums: Sums) -> None:
        from vsr1._C import add_logits

        add_logits(
            _described(tile),
            peak=sums.peak.data_ptr(),
            total=sums.total.data_ptr(),
            weighted=_address(sums.weighted),
            picked=sums.picked.data_ptr(),
        )

    def differentiate(self, tile: Tile, upstream: Upstream, dtype: torch.dtype) -> Tensor:
        from vsr1._C import logits_to_gradient

        logits_to_gradient(
            _described(tile),
            lse=upstream.lse.data_ptr(),
            upstream=upstream.logp.data_ptr(),
            slope=_address(upstream.entropy),
            entropy=_address(upstream.entropy_value),
        )
        return tile.products


class TritonKernels:
    """kernels/linear_logp.py. A tile is 8192 x 4096 logits in float32 and their gradient in the half type."""

    shape = Shape(budget=192 << 20, per_logit=6, most_rows=8192, most_columns=16384)

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def logit_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def add(self, tile: Tile, sums: Sums) -> None:
        from vsr1.kernels.linear_logp import add_logits

        add_logits(
            tile.products, tile.first, tile.target, tile.bias, tile.scale,
            sums.peak, sums.total, sums.weighted, sums.picked,
        )  # fmt: skip

    def differentiate(self, tile: Tile, upstream: Upstream, dtype: torch.dtype) -> Tensor:
        from vsr1.kernels.linear_logp import logits_to_gradient

        return logits_to_gradient(
            tile.products, tile.first, tile.target, tile.bias, tile.scale,
            upstream.lse, upstream.logp, upstream.entropy, upstream.entropy_value, dtype,
        )  # fmt: skip


def multiplies_bfloat16() -> bool:
    """Whether this processor has products of bfloat16; torch emulates them elsewhere, at a tenth of the speed of float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _described(tile: Tile) -> LogitTile:
    from vsr1._C import LogitTile

    products = tile.products
    return LogitTile(
        products=products.data_ptr(),
        rows=products.shape[0],
        columns=products.shape[1],
        stride=products.stride(0),
        bfloat16=products.dtype == torch.bfloat16,
        first=tile.first,
        target=tile.target.data_ptr(),
        bias=_address(tile.bias),
        scale=tile.scale,
        threads=torch.get_num_threads(),
    )
