// The weighted sums of rows that `expected` is made of. A tile of sums stays in registers while all rows of a block pass. Sums are kept
// column by column, two registers of components for every query, so that tiles lie side by side in memory in the order in which
// they are visited.

constexpr int kColumn = 2 * kLanes;

// The components of a row in a column, of which `left` are in the row.
template <typename Rows, bool Tail>
VSR1_TARGET static inline void read_column(const typename Rows::Element* row, int64_t left, Vector (&value)[2]) {
    using Raw = typename Rows::Raw;
#pragma GCC unroll 2
    for (int d = 0; d < kColumn; d += Rows::kStep) {
        const Raw raw = Tail ? load_tail<Raw>(row + d, left - d) : load<Raw>(row + d);
#pragma GCC unroll 2
        for (int part = 0; part < Rows::kParts; ++part) value[d / kLanes + part] = Rows::part(raw, part);
    }
}

// Scales the sums of Tile queries in Columns columns, whose first holds component d, and adds weights x rows to them.
template <typename Rows, int Tile, int Columns, bool Tail>
VSR1_TARGET static inline void add_tile(
    const float* scales, const float* weights, const Block& block, int64_t d, float* sums, int64_t column_stride) {
    Vector total[Tile][Columns][2];
    const auto place = [&](int q, int c, int half) { return sums + c * column_stride + q * kColumn + half * kLanes; };
#pragma GCC unroll 12
    for (int q = 0; q < Tile; ++q)
#pragma GCC unroll 12
        for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) total[q][c][half] = load<Vector>(place(q, c, half)) * scales[q];
    for (int i = 0; i < block.count; ++i) {
        const auto* row = static_cast<const typename Rows::Element*>(block.rows[i]) + d;
        Vector value[Columns][2];
#pragma GCC unroll 12
        for (int c = 0; c < Columns; ++c) read_column<Rows, Tail>(row + c * kColumn, block.dim - d - c * kColumn, value[c]);
#pragma GCC unroll 12
        for (int q = 0; q < Tile; ++q) {
            Vector weight = splat(weights[q * kBlockRows + i]);
            VSR1_IN_REGISTER(weight);
#pragma GCC unroll 12
            for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) total[q][c][half] = multiply_add(weight, value[c][half], total[q][c][half]);
        }
    }
#pragma GCC unroll 12
    for (int q = 0; q < Tile; ++q)
#pragma GCC unroll 12
        for (int c = 0; c < Columns; ++c)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) store(place(q, c, half), total[q][c][half]);
}

// The same in all columns, for few queries: rows are widened as they are read.
template <typename Rows, int Tile>
VSR1_TARGET static void add_few(
    const float* scales, const float* weights, const Block& block, float* sums, int64_t column_stride) {
    constexpr int kColumns = kTallRows / (2 * Tile);
    int64_t d = 0;
    const auto at = [&] { return sums + d / kColumn * column_stride; };
    for (; d + kColumns * kColumn <= block.dim; d += kColumns * kColumn)
        add_tile<Rows, Tile, kColumns, false>(scales, weights, block, d, at(), column_stride);
    for (; d + kColumn <= block.dim; d += kColumn) add_tile<Rows, Tile, 1, false>(scales, weights, block, d, at(), column_stride);
    if (d < block.dim) add_tile<Rows, Tile, 1, true>(scales, weights, block, d, at(), column_stride);
}

// Calls `run` for one tile of queries after another.
template <int Largest, typename Run>
static inline void each_tile(int64_t queries, const Run& run) {
    int64_t q = 0;
    const auto next = [&](auto tile) {
        run(q, tile);
        q += tile;
    };
    // A tile of four is as fast per query as one of six, and one of two half as fast.
    while (queries - q >= Largest && queries - q != 8) next(std::integral_constant<int, Largest>{});
    while (queries - q >= 4) next(std::integral_constant<int, 4>{});
    while (queries - q >= 2) next(std::integral_constant<int, 2>{});
    if (q < queries) next(std::integral_constant<int, 1>{});
}

template <typename Rows>
VSR1_TARGET static void add(
    int64_t queries, const float* scales, const float* weights, const Block& block, float* sums) {
    constexpr int kTile = kTallRows / 2;
    const int64_t column_stride = queries * kColumn;
    if (queries < 6) {  // too few to share the cost of a panel
        each_tile<4>(queries, [&](int64_t q, auto tile) VSR1_TARGET {
            add_few<Rows, tile>(scales + q, weights + q * kBlockRows, block, sums + q * kColumn, column_stride);
        });
        return;
    }
    alignas(64) float values[kBlockRows * kNearStride];
    Block near;
    near.count = block.count;
    for (int i = 0; i < block.count; ++i) near.rows[i] = values + i * kNearStride;
    for (int64_t begin = 0; begin < block.dim; begin += kNear) {
        const int64_t size = std::min(kNear, block.dim - begin);
        for (int i = 0; i < block.count; ++i)
            widen_panel<Rows>(static_cast<const typename Rows::Element*>(block.rows[i]) + begin, size, values + i * kNearStride);
        for (int64_t d = 0; d < size; d += kColumn) {
            float* column = sums + (begin + d) / kColumn * column_stride;
            each_tile<kTile>(queries, [&](int64_t q, auto tile) VSR1_TARGET {
                add_tile<FloatRows, tile, 1, false>(scales + q, weights + q * kBlockRows, near, d, column + q * kColumn, 0);
            });
        }
    }
}

VSR1_TARGET static void add_block(
    int64_t queries, const float* scales, const float* weights, const Block& block, float* sums) {
    if (block.bfloat16)
        add<BFloat16Rows>(queries, scales, weights, block, sums);
    else
        add<FloatRows>(queries, scales, weights, block, sums);
}
