// The products of queries and rows on matrix registers (AMX): a tile of 16 rows x 64 bytes, as the rows lie in memory, times a
// tile of 16 queries gives 16 x 16 sums. Queries are laid out beforehand the way their tile wants them: components in groups of 4
// bytes, side by side for 16 queries. Written for anything that has the registers' six operations, so that they can also be
// emulated, and the layout tested, on any processor. The file in isa/ that includes this
// defines VSR1_ISA, VSR1_TARGET, VSR1_REST (the set that does everything else) and, in the namespace VSR1_ISA, `Tiles`.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "instruction_sets.h"

namespace vsr1::VSR1_ISA {

constexpr int kTile = 16;                    // rows, queries and 4-byte groups of a tile
constexpr int kLine = 64;                    // bytes of a row in a tile
constexpr int kRowTiles = kBlockRows / kTile;
static_assert(kBlockRows % kTile == 0 && kQueryGroup == kTile);

// Where the rows of a block lie for one step of 64 bytes: the corpus itself or, at its edges and for scattered rows, a copy.
struct Step {
    const char* data;
    int64_t stride;  // in bytes
};

template <typename Element>
static inline Step step_rows(const Block& block, int64_t begin, char* copy) {
    constexpr int64_t kStep = kLine / sizeof(Element);
    const int64_t bytes = int64_t(sizeof(Element)) * std::min(kStep, block.dim - begin);
    if (block.stride && block.count == kBlockRows && bytes == kLine)
        return {static_cast<const char*>(block.rows[0]) + begin * int64_t(sizeof(Element)), block.stride * int64_t(sizeof(Element))};
    std::memset(copy, 0, kBlockRows * kLine);
    for (int i = 0; i < block.count; ++i)
        std::memcpy(copy + i * kLine, static_cast<const char*>(block.rows[i]) + begin * int64_t(sizeof(Element)), bytes);
    return {copy, kLine};
}

// Asks for the same bytes of the next block.
static inline void fetch_next(const Block& block, const Step& step, int64_t element_bytes) {
    if (!block.stride) return;
    for (int i = 0; i < kBlockRows; ++i)
        __builtin_prefetch(step.data + i * step.stride + kBlockRows * block.stride * element_bytes, 0, 2);
}

VSR1_TARGET static void score_pairs(const Queries<BFloat16>& queries, const Block& block, float* out) {
    constexpr int64_t kStep = kLine / sizeof(BFloat16);
    alignas(64) char copy[kBlockRows * kLine];
    alignas(64) float sums[kBlockRows][kTile];
    Tiles tiles;
    for (int64_t q = 0; q < queries.count; q += kTile) {
        const BFloat16* query = queries.data + q * queries.stride;
        for (int t = 0; t < kRowTiles; ++t) tiles.zero(t);
        for (int64_t begin = 0; begin < block.dim; begin += kStep) {
            const Step step = step_rows<BFloat16>(block, begin, copy);
            if (q == 0 && step.data != copy) fetch_next(block, step, sizeof(BFloat16));
            tiles.load_queries(query + begin * kTile);
            for (int t = 0; t < kRowTiles; ++t) {
                tiles.load_rows(step.data + t * kTile * step.stride, step.stride);
                tiles.add_pairs(t);
            }
        }
        for (int t = 0; t < kRowTiles; ++t) tiles.store(t, sums[t * kTile]);
        for (int j = 0; j < std::min<int64_t>(kTile, queries.count - q); ++j)
            for (int i = 0; i < kBlockRows; ++i) out[(q + j) * kBlockRows + i] = sums[i][j];
    }
}

// An integer of a query is 128 x its high part + its low part, each an int8, and so are the sums.
VSR1_TARGET static void multiply_block(const Queries<int16_t>& queries, const Block& block, int32_t* out) {
    constexpr int64_t kStep = kLine;
    alignas(64) char copy[kBlockRows * kLine];
    alignas(64) int32_t high[kBlockRows][kTile], low[kBlockRows][kTile];
    Tiles tiles;
    for (int64_t q = 0; q < queries.count; q += kTile) {
        const int16_t* query = queries.data + q * queries.stride;
        for (int t = 0; t < 2 * kRowTiles; ++t) tiles.zero(t);
        for (int64_t begin = 0; begin < block.dim; begin += kStep) {
            const Step step = step_rows<int8_t>(block, begin, copy);
            if (q == 0 && step.data != copy) fetch_next(block, step, 1);
            for (int part = 0; part < 2; ++part) {
                tiles.load_queries(query + begin * kTile + part * kLine * kTile / 2);
                for (int t = 0; t < kRowTiles; ++t) {
                    tiles.load_rows(step.data + t * kTile * step.stride, step.stride);
                    tiles.add_bytes(part * kRowTiles + t);
                }
            }
        }
        for (int t = 0; t < kRowTiles; ++t) {
            tiles.store(t, high[t * kTile]);
            tiles.store(kRowTiles + t, low[t * kTile]);
        }
        for (int j = 0; j < std::min<int64_t>(kTile, queries.count - q); ++j)
            for (int i = 0; i < kBlockRows; ++i)  // the high sums alone may not fit when the whole does
                out[(q + j) * kBlockRows + i] = int32_t(uint32_t(high[i][j]) * 128u + uint32_t(low[i][j]));
    }
}

// Tile after tile: 16 pairs of components, and of each pair those of 16 queries.
static void arrange_pairs(BFloat16* queries, int64_t count, int64_t stride) {
    std::vector<BFloat16> group(kTile * stride);
    for (int64_t first = 0; first < count; first += kTile) {
        BFloat16* out = queries + first * stride;
        std::copy_n(out, kTile * stride, group.data());
        for (int64_t q = 0; q < kTile; ++q)
            for (int64_t d = 0; d < stride; ++d)
                out[(d / 32 * 16 + d % 32 / 2) * 32 + q * 2 + d % 2] = group[q * stride + d];
    }
}

// The same with four bytes instead of a pair: first the tile of the high parts, then that of the low parts.
static void arrange_integers(int16_t* queries, int64_t count, int64_t stride) {
    std::vector<int16_t> group(kTile * stride);
    for (int64_t first = 0; first < count; first += kTile) {
        std::copy_n(queries + first * stride, kTile * stride, group.data());
        auto* out = reinterpret_cast<int8_t*>(queries + first * stride);
        for (int64_t q = 0; q < kTile; ++q) {
            for (int64_t d = 0; d < stride; ++d) {
                const int value = group[q * stride + d], high = (value + 64) >> 7;
                int8_t* place = out + d / 64 * 2048 + d % 64 / 4 * 64 + q * 4 + d % 4;
                place[0] = int8_t(high);
                place[1024] = int8_t(value - 128 * high);
            }
        }
    }
}

Kernels kernels() {
    Kernels kernels = VSR1_REST::kKernels;
    kernels.score_pairs = score_pairs;
    kernels.multiply_block = multiply_block;
    kernels.multiply_many = nullptr;
    kernels.arrange_pairs = arrange_pairs;
    kernels.arrange_integers = arrange_integers;
    return kernels;
}

}  // namespace vsr1::VSR1_ISA
