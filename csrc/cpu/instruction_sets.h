// What the ops need from an instruction set, and the sets that are compiled in. The inner loops themselves are kernels.inl,
// compiled once for each set by the files in isa/.
#pragma once

#include <bit>
#include <cstdint>

namespace vsr1 {

constexpr int kTileQueries = 4;   // queries in a register tile
constexpr int kQueryGroup = 16;   // queries that matrix registers take together
constexpr int kBlockRows = 48;    // a multiple of every tile and register; 48 rows of 2048 bfloat16 are 192 KiB, within L2
constexpr int64_t kPanel = 1024;  // components of the queries and rows that are near at a time

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct BFloat16 {
    uint16_t bits;
};

inline float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }

// The nearest bfloat16, of two the even one; NaN stays NaN.
inline BFloat16 narrow(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return {0x7FFF};
    return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// `count` queries of `stride` components, behind them zeros up to a multiple of kQueryGroup. The stride is a multiple of 64.
template <typename Element>
struct Queries {
    const Element* data;
    int64_t count;
    int64_t stride;
};

// Some rows of the corpus; `stride` is the distance between them in elements, 0 if it differs.
struct Block {
    const void* rows[kBlockRows];
    int64_t ids[kBlockRows];
    int count;
    int64_t dim;
    int64_t stride;
    bool bfloat16;
};

struct BlockSummary {
    float highest;
    int64_t nan_count;
    int64_t greater;
};

// What the error of an approximate score is made of; see CorpusMatrix.quantize for the bound.
struct Bound {
    float scale;          // of the query's integers
    float per_residual;   // length of the query's integer part
    float per_scale;      // 127 x the sum of what the integers leave of the query
};

// Keys and values that queries meet one after the other, strides in elements; mask null: all may be seen.
struct KeyRun {
    const void* k;
    const void* v;
    int64_t k_stride;
    int64_t v_stride;
    int64_t count;
    int64_t width;
    bool bfloat16;
    const bool* mask;
    int64_t mask_stride;
};

struct LogitTile;
struct RowSums;
struct RowGradient;
struct Filter;

struct Kernels {
    int lanes = 0;  // floats in a register; how queries of bfloat16 rows are laid out depends on it (`position`)

    // out (queries, kBlockRows) = the scores of the block's rows.
    void (*score_block)(const Queries<float>&, const Block&, float* out) = nullptr;
    // The same of queries laid out for it (many.inl); the faster one from `many_queries` on.
    void (*score_many)(const Queries<float>&, const Block&, float* out) = nullptr;
    int64_t many_queries = 0;
    // The same of bfloat16 queries and rows; null where the set has no products of bfloat16.
    void (*score_pairs)(const Queries<BFloat16>&, const Block&, float* out) = nullptr;
    // One query's scores of a block: NaN becomes -inf and is counted, the rest is compared with the positive's.
    BlockSummary (*summarise)(float* scores, float positive_score) = nullptr;
    // scores[i] = exp((scores[i] - peak) / temperature); returns their sum.
    float (*soften)(float* scores, float peak, float temperature) = nullptr;
    // sums (columns, queries, 2 lanes) = scales (queries) x sums + weights (queries, kBlockRows) x rows, whose components are
    // cut into columns.
    void (*add_block)(int64_t queries, const float* scales, const float* weights, const Block&, float* sums) = nullptr;

    // out (queries, kBlockRows) = integer products with the block's rows, which are int8.
    void (*multiply_block)(const Queries<int16_t>&, const Block&, int32_t* out) = nullptr;
    // The same of queries laid out for it; null where multiply_block is as fast with many.
    void (*multiply_many)(const Queries<int16_t>&, const Block&, int32_t* out) = nullptr;
    // Rearranges queries, in their place, for score_pairs and multiply_block; null where these read them as they are.
    void (*arrange_pairs)(BFloat16* queries, int64_t count, int64_t stride) = nullptr;
    void (*arrange_integers)(int16_t* queries, int64_t count, int64_t stride) = nullptr;
    // Lower and upper bounds of a block's scores from one query's products; true if an upper bound is not <= bar.
    bool (*bound_block)(
        const int32_t* products, const float* scales, const float* residuals, const Bound&, float bar, float* lower,
        float* upper) = nullptr;
    // The score of one row in float64.
    double (*score_exactly)(const float* query, const void* row, int64_t dim, bool bfloat16) = nullptr;

    // One row of linear_logp's tile, forward and backward (vsr1/linear_logp.h).
    void (*add_logits)(const LogitTile&, const RowSums&, int64_t row) = nullptr;
    void (*differentiate_logits)(const LogitTile&, const RowGradient&, int64_t row) = nullptr;

    // Softmax over a run of keys, going on from what the queries have met before: the highest score, and relative to it the sum of
    // the weights and of the weighted values. Queries (width of a head, width lanes) and sums lie across the lanes of 1 or 2 registers;
    void (*meet_many)(int64_t width, const float* queries, const KeyRun&, float* peak, float* total, float* sums) = nullptr;
    // or one query along its components, filled up with zeros to a register.
    void (*meet_alone)(const float* query, const KeyRun&, float& peak, float& total, float* sum) = nullptr;

    // The byte resize of RGB lines (vsr1/patches.h), lanes / 4 of them at once across, which needs room for `lanes` words a pixel of
    // the source, of its taps and of 4 more; bytes behind the lines, as many as patches.cpp leaves there, are read and written too.
    void (*resize_across)(
        const uint8_t* lines, int64_t stride, const Filter&, int32_t* room, uint8_t* out, int64_t out_stride) = nullptr;
    // out = the `count` bytes of one line from `taps` lines.
    void (*resize_down)(
        const uint8_t* const* lines, const int16_t* weights, int64_t taps, int bits, int64_t count, uint8_t* out) = nullptr;

    // Where component d of a query, or of `expected`, lies: bfloat16 rows are read as even and odd components.
    int64_t position(int64_t d, bool bfloat16) const {
        if (!bfloat16) return d;
        const int64_t within = d % (2 * lanes);
        return d - within + within % 2 * lanes + within / 2;
    }
};

namespace portable {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_vnni {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace amx {
Kernels kernels();
}
namespace emulated {
Kernels kernels();
}

// Of the instruction set in use.
const Kernels& current_kernels();

}  // namespace vsr1
