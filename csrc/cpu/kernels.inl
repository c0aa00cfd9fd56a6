// The inner loops of the CPU ops, written once with compiler vectors and compiled once for each instruction set, by the files in isa/.
// Each defines VSR1_ISA (a namespace), VSR1_TARGET (a function attribute), VSR1_LANES (floats in a register) and VSR1_REGISTERS; and,
// where the set has them, VSR1_VNNI (sums of int16 products) and VSR1_BF16 (sums of bfloat16 products).
//
// A tile of 4 queries x a few rows lives in registers while both stream by along the vector's components, so a row
// loaded serves four queries. Components are cut into panels: four queries' panels (16 KiB) stay in L1 while a block's rows
// pass. Every score is summed in the same order wherever its row and query fall and however many there are, so equal rows
// have equal scores. Queries come padded with zeros to 64 components and to a multiple of 4.
//
// A bfloat16 row is read as 32-bit words, each two components: a shift leaves the even one as a float32, a mask the odd one. So
// widening costs one instruction a register and no shuffle; the queries are laid out to match (Kernels::position).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "instruction_sets.h"
#include "vsr1/linear_logp.h"
#include "vsr1/patches.h"
#include "vsr1/prefix.h"

// Keeps the compiler from reading a value again and again from memory, where the loads of a tile would outnumber its products.
#if defined(__x86_64__)
#define VSR1_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define VSR1_IN_REGISTER(v)
#endif

namespace vsr1::VSR1_ISA {

constexpr int kLanes = VSR1_LANES;
constexpr int kRegisters = VSR1_REGISTERS;
constexpr int kLoneRows = kRegisters / 2;            // rows in a tile with one query
constexpr int kFewRows = kRegisters == 32 ? 12 : 6;  // rows that are read side by side for a few
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t Lanes __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));
typedef int8_t Bytes __attribute__((vector_size(kLanes * 2)));
typedef double Doubles __attribute__((vector_size(kLanes * 4)));
typedef float HalfVector __attribute__((vector_size(kLanes * 2)));

template <typename V>
VSR1_TARGET static inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// The first `count` elements at p, zeros behind them: nothing past the row's end is read.
template <typename V, typename Element>
VSR1_TARGET static inline V load_tail(const Element* p, int64_t count) {
    Element padded[sizeof(V) / sizeof(Element)] = {};
    std::memcpy(padded, p, std::clamp<int64_t>(count * int64_t(sizeof(Element)), 0, sizeof(V)));
    return load<V>(padded);
}

template <typename V>
VSR1_TARGET static inline void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

VSR1_TARGET static inline Vector splat(float c) { return c - Vector{}; }

template <typename To, typename From>
VSR1_TARGET static inline To cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    return load<To>(&from);
}

// a * b + c, rounded once where the instruction set can. Said explicitly, because a compiler that fuses as it likes does so in one
// shape of tile and not in another, and then a score would depend on which tile its row fell into.
VSR1_TARGET static inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if VSR1_LANES == 16
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VSR1_LANES == 8
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Lane i of the result is c[i] + a[2i] b[2i] + a[2i+1] b[2i+1].
VSR1_TARGET static inline Lanes multiply_add_pairs(Shorts a, Shorts b, Lanes c) {
#if defined(VSR1_VNNI)
    return (Lanes)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif VSR1_LANES == 16
    return (Lanes)_mm512_madd_epi16((__m512i)a, (__m512i)b) + c;
#elif VSR1_LANES == 8
    return (Lanes)_mm256_madd_epi16((__m256i)a, (__m256i)b) + c;
#else
    const Words wa = cast<Words>(a), wb = cast<Words>(b);
    const Lanes even = (cast<Lanes>(wa << 16) >> 16) * (cast<Lanes>(wb << 16) >> 16);
    const Lanes odd = (cast<Lanes>(wa) >> 16) * (cast<Lanes>(wb) >> 16);
    return even + odd + c;
#endif
}

// A vector folded to four lanes, halves onto each other.
template <typename Four, typename V>
VSR1_TARGET static inline Four fold(V v) {
    Four quads[kLanes / 4];
    std::memcpy(quads, &v, sizeof v);
    for (int width = kLanes / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) quads[i] += quads[i + width];
    return quads[0];
}

// The sums of four vectors.
template <typename Four, typename V>
VSR1_TARGET static inline Four sums(V a, V b, V c, V d) {
    const Four p = fold<Four>(a), q = fold<Four>(b), r = fold<Four>(c), s = fold<Four>(d);
    const Four pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    const Four rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

// exp(x) to 2 units in the last place for x in [-87, 88) (Cephes' polynomial); 0 below, NaN stays NaN.
VSR1_TARGET static inline Vector exponential(Vector x) {
    const Vector low = Vector{} - 87.0f;
    const Lanes underflow = x < low;
    x = underflow ? low : x;
    const Lanes exponent = __builtin_convertvector(x * 1.44269504f - 0.5f, Lanes);
    const Vector n = __builtin_convertvector(exponent, Vector);
    Vector r = multiply_add(n, splat(-0.693359375f), x);
    r = multiply_add(n, splat(2.12194440e-4f), r);
    Vector y = splat(1.9875691500e-4f);
    y = multiply_add(y, r, splat(1.3981999507e-3f));
    y = multiply_add(y, r, splat(8.3334519073e-3f));
    y = multiply_add(y, r, splat(4.1665795894e-2f));
    y = multiply_add(y, r, splat(1.6666665459e-1f));
    y = multiply_add(y, r, splat(5.0000001201e-1f));
    y = multiply_add(y * r, r, r + 1.0f);
    const Vector scale = cast<Vector>((exponent + 127) << 23);
    return underflow ? Vector{} : y * scale;
}

// How a tile reads rows of each type: a step of kStep components becomes kParts registers that match as many of the query's, in which
// kPack components share a lane.
struct FloatRows {
    using Element = float;
    using Query = float;
    using Sum = Vector;
    using Four = Quad;
    using Out = float;
    static constexpr int kStep = kLanes, kParts = 1, kTileRows = kRegisters == 32 ? 6 : 3, kPack = 1;

    using Raw = Vector;
    VSR1_TARGET static inline Vector part(Raw raw, int) { return raw; }
    VSR1_TARGET static inline Vector query(const float* q, int) { return load<Vector>(q); }
    VSR1_TARGET static inline Vector step(Vector q, Vector v, Vector sum) { return multiply_add(q, v, sum); }
    VSR1_TARGET static inline Vector copies(const float* value) { return splat(*value); }
};

struct BFloat16Rows {
    using Element = BFloat16;
    using Query = float;
    using Sum = Vector;
    using Four = Quad;
    using Out = float;
    static constexpr int kStep = 2 * kLanes, kParts = 2, kTileRows = kRegisters == 32 ? 4 : 2, kPack = 1;

    using Raw = Words;
    VSR1_TARGET static inline Vector part(Raw raw, int odd) {
        return odd ? cast<Vector>(raw & 0xFFFF0000u) : cast<Vector>(raw << 16);
    }
    VSR1_TARGET static inline Vector query(const float* q, int odd) { return load<Vector>(q + odd * kLanes); }
    VSR1_TARGET static inline Vector step(Vector q, Vector v, Vector sum) { return multiply_add(q, v, sum); }
    VSR1_TARGET static inline Vector copies(const float* value) { return splat(*value); }
};

// bfloat16 queries too: pairs of components are multiplied and added as they lie.
struct PairRows {
    using Element = BFloat16;
    using Query = BFloat16;
    using Sum = Vector;
    using Four = Quad;
    using Out = float;
    static constexpr int kStep = 2 * kLanes, kParts = 1, kTileRows = kRegisters == 32 ? 6 : 3;

    using Raw = Words;
    VSR1_TARGET static inline Words part(Raw raw, int) { return raw; }
    VSR1_TARGET static inline Words query(const BFloat16* q, int) { return load<Words>(q); }
    VSR1_TARGET static inline Vector step(Words q, Words v, Vector sum) {
#if defined(VSR1_BF16)
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)q, (__m512bh)v);
#else
        sum = multiply_add(BFloat16Rows::part(q, 0), BFloat16Rows::part(v, 0), sum);
        return multiply_add(BFloat16Rows::part(q, 1), BFloat16Rows::part(v, 1), sum);
#endif
    }
};

struct Int8Rows {
    using Element = int8_t;
    using Query = int16_t;
    using Sum = Lanes;
    using Four = int32_t __attribute__((vector_size(16)));
    using Out = int32_t;
    static constexpr int kStep = 2 * kLanes, kParts = 1, kTileRows = kRegisters == 32 ? 6 : 3, kPack = 2;

    using Raw = Bytes;
    VSR1_TARGET static inline Shorts part(Raw raw, int) {  // in one instruction, which compilers do not find
#if VSR1_LANES == 16
        return (Shorts)_mm512_cvtepi8_epi16((__m256i)raw);
#elif VSR1_LANES == 8
        return (Shorts)_mm256_cvtepi8_epi16((__m128i)raw);
#else
        return __builtin_convertvector(raw, Shorts);
#endif
    }
    VSR1_TARGET static inline Shorts query(const int16_t* q, int) { return load<Shorts>(q); }
    VSR1_TARGET static inline Lanes step(Shorts q, Shorts v, Lanes sum) { return multiply_add_pairs(q, v, sum); }
    VSR1_TARGET static inline Shorts copies(const int16_t* pair) { return cast<Shorts>(load<int32_t>(pair) - Lanes{}); }
};

// Adds to out[q * kBlockRows + i] the product of query q and row i over `size` components, for Tile queries and Count rows.
// With Fetch, the rows `ahead` bytes on are asked for meanwhile.
template <typename Rows, int Tile, int Count, bool Fetch>
VSR1_TARGET static inline void score_tile(
    const typename Rows::Query* query, int64_t query_stride, const typename Rows::Element* const* row, int64_t size,
    int64_t ahead, typename Rows::Out* out) {
    using Sum = typename Rows::Sum;
    using Raw = typename Rows::Raw;
    Sum total[kTileQueries][Count] = {};
    int64_t d = 0;
    for (; d + Rows::kStep <= size; d += Rows::kStep) {
        if (Fetch && d % (64 / sizeof(*row[0])) == 0) {  // a cache line at a time
#pragma GCC unroll 16
            for (int i = 0; i < Count; ++i) __builtin_prefetch(reinterpret_cast<const char*>(row[i] + d) + ahead, 0, 2);
        }
#pragma GCC unroll 2
        for (int part = 0; part < Rows::kParts; ++part) {
            decltype(Rows::part(Raw{}, 0)) value[Count];
#pragma GCC unroll 16
            for (int i = 0; i < Count; ++i) value[i] = Rows::part(load<Raw>(row[i] + d), part);
#pragma GCC unroll 4
            for (int q = 0; q < Tile; ++q) {
                auto component = Rows::query(query + q * query_stride + d, part);
                VSR1_IN_REGISTER(component);
#pragma GCC unroll 16
                for (int i = 0; i < Count; ++i) total[q][i] = Rows::step(component, value[i], total[q][i]);
            }
        }
    }
    if (d < size) {
        for (int i = 0; i < Count; ++i) {
            const Raw raw = load_tail<Raw>(row[i] + d, size - d);
            for (int part = 0; part < Rows::kParts; ++part)
                for (int q = 0; q < Tile; ++q)
                    total[q][i] = Rows::step(Rows::query(query + q * query_stride + d, part), Rows::part(raw, part), total[q][i]);
        }
    }
    if constexpr (Tile == 1 && Count % 4 == 0) {
#pragma GCC unroll 4
        for (int i = 0; i < Count; i += 4) {
            const auto score = sums<typename Rows::Four>(total[0][i], total[0][i + 1], total[0][i + 2], total[0][i + 3]);
            for (int j = 0; j < 4; ++j) out[i + j] += score[j];
        }
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < Count; ++i) {
            const auto score = sums<typename Rows::Four>(total[0][i], total[1][i], total[2][i], total[3][i]);
            for (int q = 0; q < Tile; ++q) out[q * kBlockRows + i] += score[q];
        }
    }
}

// The same for `count` rows in groups that fit the registers.
template <typename Rows, int Tile, bool Fetch>
VSR1_TARGET static inline void score_rows(
    const typename Rows::Query* query, int64_t query_stride, const typename Rows::Element* const* row, int count, int64_t size,
    int64_t ahead, typename Rows::Out* out) {
    // A lone query needs more rows at a time to keep the multipliers busy.
    constexpr int kRows = Tile == 1 ? kLoneRows : Rows::kTileRows;
    int i = 0;
    for (; i + kRows <= count; i += kRows)
        score_tile<Rows, Tile, kRows, Fetch>(query, query_stride, row + i, size, ahead, out + i);
    for (; i < count; ++i) score_tile<Rows, Tile, 1, Fetch>(query, query_stride, row + i, size, ahead, out + i);
}

// The same for all queries.
template <typename Rows, bool Fetch>
VSR1_TARGET static void score_panel(
    const typename Rows::Query* query, int64_t queries, int64_t query_stride, const typename Rows::Element* const* row,
    int count, int64_t size, int64_t ahead, typename Rows::Out* out) {
    if (queries == 1)
        score_rows<Rows, 1, Fetch>(query, query_stride, row, count, size, ahead, out);
    else if (queries == 2)
        score_rows<Rows, 2, Fetch>(query, query_stride, row, count, size, ahead, out);
    else
        score_rows<Rows, 4, Fetch>(query, query_stride, row, count, size, ahead, out);
}

template <typename Rows>
VSR1_TARGET static void score(const Queries<typename Rows::Query>& queries, const Block& block, typename Rows::Out* out) {
    using Element = typename Rows::Element;
    std::fill(out, out + queries.count * kBlockRows, 0);
    // Few queries are all near at once, and then rows are best read a group at a time, in the order of memory.
    constexpr int kFewQueries = 8;
    const bool few = queries.count <= kFewQueries;
    const int group = queries.count == 1 ? kLoneRows : few ? kFewRows : kBlockRows;
    const int64_t ahead = block.stride * int64_t(sizeof(Element)) * (few ? group : Rows::kTileRows);
    const Element* row[kBlockRows];
    for (int first = 0; first < block.count; first += group) {
        const int count = std::min(group, block.count - first);
        for (int64_t begin = 0; begin < block.dim; begin += kPanel) {
            const int64_t size = std::min(kPanel, block.dim - begin);
            for (int i = 0; i < count; ++i) row[i] = static_cast<const Element*>(block.rows[first + i]) + begin;
            for (int64_t q = 0; q < queries.count; q += kTileQueries) {
                const auto* query = queries.data + q * queries.stride + begin;
                const auto run = q == 0 && ahead ? score_panel<Rows, true> : score_panel<Rows, false>;
                run(query, queries.count - q, queries.stride, row, count, size, ahead, out + q * kBlockRows + first);
            }
        }
    }
}

VSR1_TARGET static void score_block(const Queries<float>& queries, const Block& block, float* out) {
    if (block.bfloat16)
        score<BFloat16Rows>(queries, block, out);
    else
        score<FloatRows>(queries, block, out);
}

[[maybe_unused]] VSR1_TARGET static void score_pairs(const Queries<BFloat16>& queries, const Block& block, float* out) {
    score<PairRows>(queries, block, out);
}

VSR1_TARGET static void multiply_block(const Queries<int16_t>& queries, const Block& block, int32_t* out) {
    score<Int8Rows>(queries, block, out);
}

VSR1_TARGET static BlockSummary summarise(float* scores, float positive_score) {
    Vector highest = Vector{} - kInfinity;
    Lanes nan_count = {}, greater = {};
    for (int i = 0; i < kBlockRows; i += kLanes) {
        Vector v = load<Vector>(scores + i);
        const Lanes nan = v != v;
        v = nan ? Vector{} - kInfinity : v;
        store(scores + i, v);
        nan_count -= nan;
        greater -= v > positive_score;
        highest = v > highest ? v : highest;
    }
    BlockSummary summary{-kInfinity, 0, 0};
    for (int i = 0; i < kLanes; ++i) {
        summary.highest = std::max(summary.highest, highest[i]);
        summary.nan_count += nan_count[i];
        summary.greater += greater[i];
    }
    return summary;
}

VSR1_TARGET static float soften(float* scores, float peak, float temperature) {
    Vector total = {};
    for (int i = 0; i < kBlockRows; i += kLanes) {
        const Vector weight = exponential((load<Vector>(scores + i) - peak) / temperature);
        store(scores + i, weight);
        total += weight;
    }
    return sums<Quad>(total, total, total, total)[0];
}

VSR1_TARGET static bool bound_block(
    const int32_t* products, const float* scales, const float* residuals, const Bound& bound, float bar, float* lower,
    float* upper) {
    Lanes reached = {};
    for (int i = 0; i < kBlockRows; i += kLanes) {
        const Vector scale = load<Vector>(scales + i);
        const Vector score = __builtin_convertvector(load<Lanes>(products + i), Vector) * (scale * bound.scale);
        const Vector size = score < 0.0f ? -score : score;
        // Every term of this is rounded a few times, each by less than 1e-7 of itself; the constant is for what underflows.
        const Vector error =
            (load<Vector>(residuals + i) * bound.per_residual + scale * bound.per_scale) * 1.00001f + size * 1e-6f + 1e-37f;
        store(lower + i, score - error);
        store(upper + i, score + error);
        reached |= ~(score + error <= bar);
    }
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any |= reached[i] != 0;
    return any;
}

#if VSR1_LANES == 16
constexpr __mmask8 kAll = 0xFF;  // the form without a mask makes GCC warn of a register that nothing reads
#endif

// Half a register of numbers as float64, in as few instructions as there are, which compilers do not find.
VSR1_TARGET static inline Doubles widen(const float* p) {
#if VSR1_LANES == 16
    return (Doubles)_mm512_maskz_cvtps_pd(kAll, _mm256_loadu_ps(p));
#elif VSR1_LANES == 8
    return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    return __builtin_convertvector(load<HalfVector>(p), Doubles);
#endif
}

VSR1_TARGET static inline Doubles widen(const BFloat16* p) {
#if VSR1_LANES == 16
    const __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
    return (Doubles)_mm512_maskz_cvtps_pd(kAll, (__m256)words);
#elif VSR1_LANES == 8
    const __m128i words = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16);
    return (Doubles)_mm256_cvtps_pd((__m128)words);
#else
    float widened[kLanes / 2];
    for (int i = 0; i < kLanes / 2; ++i) widened[i] = vsr1::widen(p[i]);
    return widen(widened);
#endif
}

// The products of two float32 are exact in float64, so all that is rounded is their sum.
template <typename Element>
VSR1_TARGET static double exact_score(const float* query, const Element* row, int64_t dim) {
    constexpr int kSums = 4, kStep = kLanes / 2;
    Doubles total[kSums] = {};
    int64_t d = 0;
    for (; d + kSums * kStep <= dim; d += kSums * kStep)
        for (int s = 0; s < kSums; ++s) total[s] += widen(query + d + s * kStep) * widen(row + d + s * kStep);
    Element row_end[kSums * kStep] = {};
    float query_end[kSums * kStep] = {};
    std::copy(row + d, row + dim, row_end);
    std::copy(query + d, query + dim, query_end);
    for (int s = 0; s < kSums; ++s) total[s] += widen(query_end + s * kStep) * widen(row_end + s * kStep);
    const Doubles sum = (total[0] + total[1]) + (total[2] + total[3]);
    double score = 0.0;
    for (int i = 0; i < kStep; ++i) score += sum[i];
    return score;
}

VSR1_TARGET static double score_exactly(const float* query, const void* row, int64_t dim, bool bfloat16) {
    return bfloat16 ? exact_score(query, static_cast<const BFloat16*>(row), dim)
                    : exact_score(query, static_cast<const float*>(row), dim);
}

#include "many.inl"
#include "weighted_sum.inl"
#include "linear_logp.inl"
#include "prefix.inl"
#include "patches.inl"

const Kernels kKernels = {
    .lanes = kLanes,
    .score_block = score_block,
    .score_many = score_many_block,
    .many_queries = 2 * kLanes,
#if defined(VSR1_BF16)
    .score_pairs = score_pairs,
#endif
    .summarise = summarise,
    .soften = soften,
    .add_block = add_block,
    .multiply_block = multiply_block,
    .multiply_many = multiply_many,
    .bound_block = bound_block,
    .score_exactly = score_exactly,
    .add_logits = add_logits,
    .differentiate_logits = differentiate_logits,
    .meet_many = meet_many,
    .meet_alone = meet_alone,
    .resize_across = resize_across,
    .resize_down = resize_down,
};

}  // namespace vsr1::VSR1_ISA
