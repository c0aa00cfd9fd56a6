// The inner loops of the sweep, written once with compiler vectors and compiled once for each instruction set: the includer
// defines VSR1_ISA (a namespace), VSR1_TARGET (a function attribute), VSR1_LANES (floats in a register) and VSR1_TILE_ROWS.
//
// A tile of 4 queries x VSR1_TILE_ROWS rows lives in registers while both stream by along the vector's components, so a row
// loaded serves four queries. Components are cut into panels: four queries' panels (16 KiB) stay in L1 while a block's rows
// pass. Every score is summed in the same order wherever its row and query fall and however many there are, so equal rows
// have equal scores. Queries come padded with zeros to whole registers and to a multiple of 4.

namespace vsr1::VSR1_ISA {

typedef float Vector __attribute__((vector_size(VSR1_LANES * 4)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t Lanes __attribute__((vector_size(VSR1_LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(VSR1_LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(VSR1_LANES * 2)));

constexpr int kLanes = VSR1_LANES;
constexpr int kTileRows = VSR1_TILE_ROWS;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

VSR1_TARGET static inline Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

VSR1_TARGET static inline Vector load(const BFloat16* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Vector v;
    std::memcpy(&v, &words, sizeof v);
    return v;
}

VSR1_TARGET static inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

VSR1_TARGET static inline Vector splat(float c) { return Vector{} + c; }

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

// The last `count` < kLanes components of a row, zeros behind them: nothing past the row's end is read.
template <typename Element>
VSR1_TARGET static inline Vector load_tail(const Element* p, int64_t count) {
    Element padded[kLanes] = {};
    std::memcpy(padded, p, count * sizeof(Element));
    return load(padded);
}

// A vector folded to four lanes, halves onto each other.
VSR1_TARGET static inline Quad fold(Vector v) {
    Quad quads[kLanes / 4];
    std::memcpy(quads, &v, sizeof v);
    for (int width = kLanes / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) quads[i] += quads[i + width];
    return quads[0];
}

// The sums of four vectors.
VSR1_TARGET static inline Quad sums(Vector a, Vector b, Vector c, Vector d) {
    const Quad p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    const Quad pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    const Quad rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

// exp(x) for x <= 0 to 2 units in the last place (Cephes' polynomial); 0 below -87, NaN stays NaN.
VSR1_TARGET static inline Vector exp_nonpositive(Vector x) {
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
    const Lanes scale_bits = (exponent + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &scale_bits, sizeof scale);
    return underflow ? Vector{} : y * scale;
}

// Where the components [begin, end) of a block's rows are read from: the corpus itself or, when many queries are to read them,
// a copy widened to float32 once.
template <typename Element>
struct Panel {
    const Element* row[kBlockRows];
    int count;
    int64_t size;
};

template <typename Element>
VSR1_TARGET static inline Panel<Element> panel_in_place(const void* const* rows, int count, int64_t begin, int64_t end) {
    Panel<Element> panel;
    panel.count = count;
    panel.size = end - begin;
    for (int i = 0; i < count; ++i) panel.row[i] = static_cast<const Element*>(rows[i]) + begin;
    return panel;
}

VSR1_TARGET static Panel<float> panel_widened(const void* const* rows, int count, int64_t begin, int64_t end, float* wide) {
    Panel<float> panel;
    panel.count = count;
    panel.size = end - begin;
    for (int i = 0; i < count; ++i) {
        const BFloat16* from = static_cast<const BFloat16*>(rows[i]) + begin;
        float* to = wide + i * kWidePitch;
        int64_t d = 0;
        for (; d + kLanes <= panel.size; d += kLanes) store(to + d, load(from + d));
        if (d < panel.size) store(to + d, load_tail(from + d, panel.size - d));
        panel.row[i] = to;
    }
    return panel;
}

// out[q * kBlockRows + i] += query q . row first + i, over the panel, for Tile queries and Rows rows.
template <int Tile, int Rows, typename Element>
VSR1_TARGET static inline void score_tile(
    const float* query, int64_t query_stride, const Panel<Element>& panel, int first, float* out) {
    Vector total[kTileQueries][Rows] = {};
    const Element* const* row = panel.row + first;
    int64_t d = 0;
    for (; d + kLanes <= panel.size; d += kLanes) {
        Vector value[Rows];
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) value[i] = load(row[i] + d);
#pragma GCC unroll 4
        for (int q = 0; q < Tile; ++q) {
            const Vector component = load(query + q * query_stride + d);
#pragma GCC unroll 8
            for (int i = 0; i < Rows; ++i) total[q][i] = multiply_add(component, value[i], total[q][i]);
        }
    }
    if (d < panel.size) {
        for (int i = 0; i < Rows; ++i) {
            const Vector value = load_tail(row[i] + d, panel.size - d);
            for (int q = 0; q < Tile; ++q)
                total[q][i] = multiply_add(load(query + q * query_stride + d), value, total[q][i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
        const Quad score = sums(total[0][i], total[1][i], total[2][i], total[3][i]);
        for (int q = 0; q < Tile; ++q) out[q * kBlockRows + first + i] += score[q];
    }
}

template <int Tile, typename Element>
VSR1_TARGET static void score_tiles(const float* query, int64_t query_stride, const Panel<Element>& panel, float* out) {
    // A lone query needs more rows at a time to keep the multipliers busy.
    constexpr int kRows = Tile == 1 ? 2 * kTileRows : kTileRows;
    int i = 0;
    for (; i + kRows <= panel.count; i += kRows) score_tile<Tile, kRows>(query, query_stride, panel, i, out);
    for (; i < panel.count; ++i) score_tile<Tile, 1>(query, query_stride, panel, i, out);
}

template <typename Element>
VSR1_TARGET static void score_panel(const Queries& queries, int64_t begin, const Panel<Element>& panel, float* out) {
    for (int64_t q = 0; q < queries.count; q += kTileQueries) {
        const float* query = queries.data + q * queries.stride + begin;
        float* scores = out + q * kBlockRows;
        if (queries.count - q == 1)
            score_tiles<1>(query, queries.stride, panel, scores);
        else if (queries.count - q == 2)
            score_tiles<2>(query, queries.stride, panel, scores);
        else
            score_tiles<4>(query, queries.stride, panel, scores);
    }
}

template <typename Element>
VSR1_TARGET static void score_rows(const Queries& queries, const Block& block, float* wide, float* out) {
    // Few queries are all near at once, and rows are best read as they lie in memory.
    const int group = queries.count <= kFewQueries ? 2 * kTileRows : block.count;
    for (int first = 0; first < block.count; first += group) {
        const int count = std::min(group, block.count - first);
        for (int64_t begin = 0; begin < block.dim; begin += kPanel) {
            const int64_t end = std::min(begin + kPanel, block.dim);
            if (std::is_same_v<Element, BFloat16> && queries.count > kFewQueries)
                score_panel(queries, begin, panel_widened(block.rows, count, begin, end, wide), out);
            else
                score_panel(
                    queries, begin, panel_in_place<Element>(block.rows + first, count, begin, end), out + first);
        }
    }
}

// out (queries, kBlockRows) = the scores of the block's rows.
VSR1_TARGET static void score_block(const Queries& queries, const Block& block, float* wide, float* out) {
    std::fill(out, out + queries.count * kBlockRows, 0.0f);
    if (block.bfloat16)
        score_rows<BFloat16>(queries, block, wide, out);
    else
        score_rows<float>(queries, block, wide, out);
}

// One query's scores of a block, kBlockRows of them: NaN becomes -inf and is counted, the rest is compared with the positive's.
VSR1_TARGET static BlockSummary summarise(float* scores, float positive_score) {
    Vector highest = Vector{} - kInfinity;
    Lanes nan_count = {}, greater = {};
    for (int i = 0; i < kBlockRows; i += kLanes) {
        Vector v = load(scores + i);
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

// scores[i] = exp((scores[i] - peak) / temperature); returns their sum.
VSR1_TARGET static float soften(float* scores, float peak, float temperature) {
    Vector total = {};
    for (int i = 0; i < kBlockRows; i += kLanes) {
        const Vector weight = exp_nonpositive((load(scores + i) - peak) / temperature);
        store(scores + i, weight);
        total += weight;
    }
    return sums(total, total, total, total)[0];
}

// direction[q] += sum_i weights[q * kBlockRows + i] * row i, for Tile queries and Width registers of components from d on.
template <int Tile, int Width, typename Element>
VSR1_TARGET static inline void add_tile(
    const float* weights, const Panel<Element>& panel, int64_t d, float* direction, int64_t stride) {
    Vector total[Tile][Width];
#pragma GCC unroll 4
    for (int q = 0; q < Tile; ++q)
#pragma GCC unroll 4
        for (int w = 0; w < Width; ++w) total[q][w] = load(direction + q * stride + d + w * kLanes);
    for (int i = 0; i < panel.count; ++i) {
        Vector value[Width];
#pragma GCC unroll 4
        for (int w = 0; w < Width; ++w) {
            const int64_t at = d + w * kLanes;
            value[w] = Width > 1 || at + kLanes <= panel.size ? load(panel.row[i] + at)
                                                              : load_tail(panel.row[i] + at, panel.size - at);
        }
#pragma GCC unroll 4
        for (int q = 0; q < Tile; ++q)
#pragma GCC unroll 4
            for (int w = 0; w < Width; ++w)
                total[q][w] = multiply_add(splat(weights[q * kBlockRows + i]), value[w], total[q][w]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Tile; ++q)
#pragma GCC unroll 4
        for (int w = 0; w < Width; ++w) store(direction + q * stride + d + w * kLanes, total[q][w]);
}

template <int Tile, typename Element>
VSR1_TARGET static void add_tiles(
    const float* weights, const Panel<Element>& panel, float* direction, int64_t stride) {
    constexpr int kWidth = 3;
    int64_t d = 0;
    for (; d + kWidth * kLanes <= panel.size; d += kWidth * kLanes)
        add_tile<Tile, kWidth>(weights, panel, d, direction, stride);
    for (; d < panel.size; d += kLanes) add_tile<Tile, 1>(weights, panel, d, direction, stride);
}

template <typename Element>
VSR1_TARGET static void add_panel(
    const Queries& queries, const float* weights, const Panel<Element>& panel, float* direction) {
    for (int64_t q = 0; q < queries.count; q += kTileQueries) {
        const float* weight = weights + q * kBlockRows;
        float* to = direction + q * queries.stride;
        if (queries.count - q == 1)
            add_tiles<1>(weight, panel, to, queries.stride);
        else if (queries.count - q == 2)
            add_tiles<2>(weight, panel, to, queries.stride);
        else
            add_tiles<4>(weight, panel, to, queries.stride);
    }
}

// direction (queries, stride) += weights (queries, kBlockRows) x rows.
VSR1_TARGET static void add_block(
    const Queries& queries, const float* weights, const Block& block, float* wide, float* direction) {
    for (int64_t begin = 0; begin < block.dim; begin += kPanel) {
        const int64_t end = std::min(begin + kPanel, block.dim);
        float* to = direction + begin;
        if (!block.bfloat16)
            add_panel(queries, weights, panel_in_place<float>(block.rows, block.count, begin, end), to);
        else if (queries.count > kFewQueries)
            add_panel(queries, weights, panel_widened(block.rows, block.count, begin, end, wide), to);
        else
            add_panel(queries, weights, panel_in_place<BFloat16>(block.rows, block.count, begin, end), to);
    }
}

constexpr Kernels kKernels = {score_block, summarise, soften, add_block};

}  // namespace vsr1::VSR1_ISA
