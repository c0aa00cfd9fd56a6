// Scores for many queries. The tiles of kernels.inl run along a vector's components; here a register holds one component of kLanes
// queries, and the row's component is copied into all its lanes. Then nothing is left to sum within a register, a tile of six rows
// x two registers keeps the multipliers busy, and what a row costs of its own, widening and copying it into a panel that stays near,
// is shared by all queries. It pays once two registers are filled (`many_queries`).
//
// Queries are laid out for this beforehand: kLanes at a time, component after component, or pair after pair where two make a word of
// 32 bits (Rows::kPack). Every score is the sum of its panels' sums, each in the order of the components, so here too it depends on
// its row and its query alone.

constexpr int kTallRows = kRegisters == 32 ? 24 : 12;  // rows of a tile one register wide; two wide, it has half of them
constexpr int64_t kNear = 256;                         // components of a panel; two registers' queries take 16 or 32 KiB for them
constexpr int64_t kNearStride = kNear + 16;            // not a power of two: rows would share their place in L1
constexpr int64_t kNearQueries = 256;                  // queries whose sums are kept beside each other

// Writes `size` components of a row as the queries' type, in the order of Kernels::position, and zeros up to a multiple of 2 kLanes.
template <typename Rows>
VSR1_TARGET static inline void widen_panel(const typename Rows::Element* row, int64_t size, typename Rows::Query* out) {
    constexpr int kPart = Rows::kStep / Rows::kParts;
    using Raw = typename Rows::Raw;
    for (int64_t d = 0; d < round_up(size, 2 * kLanes); d += Rows::kStep) {
        const Raw raw = d + Rows::kStep <= size ? load<Raw>(row + d) : load_tail<Raw>(row + d, size - d);
#pragma GCC unroll 2
        for (int part = 0; part < Rows::kParts; ++part) store(out + d + part * kPart, Rows::part(raw, part));
    }
}

// A panel's rows: widened, and where the rows lie that are wanted next (null if nowhere), `stride` bytes apart.
template <typename Rows>
struct Panel {
    const typename Rows::Query* values;
    int64_t size;  // whole steps
    const char* next;
    int64_t stride;

    const auto* row(int i) const { return values + i * kNearStride; }
    const char* next_row(int i) const { return next + i * stride; }
};

// sums (rows, kNearQueries) += the products of Count rows of the panel, from `first` on, and Width x kLanes queries.
template <typename Rows, int Count, int Width, bool Fetch>
VSR1_TARGET static inline void add_products(
    const typename Rows::Query* query, int64_t query_stride, const Panel<Rows>& panel, int first, typename Rows::Out* sums) {
    using Sum = typename Rows::Sum;
    using Word = decltype(Rows::query(query, 0));
    constexpr int64_t kBytes = sizeof(typename Rows::Element);
    const auto* values = panel.row(first);
    Sum total[Count][Width] = {};
    for (int64_t begin = 0; begin < panel.size; begin += Rows::kStep) {
        if (Fetch && begin * kBytes % 64 == 0)  // a cache line at a time
            for (int i = 0; i < Count; ++i) __builtin_prefetch(panel.next_row(first + i) + begin * kBytes, 0, 2);
#pragma GCC unroll 4
        for (int64_t d = begin; d < begin + Rows::kStep; d += Rows::kPack) {
            Word component[Width];
#pragma GCC unroll 2
            for (int w = 0; w < Width; ++w) {
                Word loaded = load<Word>(query + w * query_stride + d * kLanes);
                VSR1_IN_REGISTER(loaded);
                component[w] = loaded;
            }
#pragma GCC unroll 24
            for (int i = 0; i < Count; ++i) {
                const Word value = Rows::copies(values + i * kNearStride + d);
#pragma GCC unroll 2
                for (int w = 0; w < Width; ++w) total[i][w] = Rows::step(component[w], value, total[i][w]);
            }
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < Count; ++i)
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) {
            auto* sum = sums + (first + i) * kNearQueries + w * kLanes;
            store(sum, load<Sum>(sum) + total[i][w]);
        }
}

// The same for all `count` rows of the panel.
template <typename Rows, int Width, bool Fetch>
VSR1_TARGET static void add_products(
    const typename Rows::Query* query, int64_t query_stride, const Panel<Rows>& panel, int count, typename Rows::Out* sums) {
    constexpr int kRows = kTallRows / Width;
    int i = 0;
    for (; i + kRows <= count; i += kRows) add_products<Rows, kRows, Width, Fetch>(query, query_stride, panel, i, sums);
    for (; i < count; ++i) add_products<Rows, 1, Width, Fetch>(query, query_stride, panel, i, sums);
}

template <typename Rows>
VSR1_TARGET static void score_many(
    const Queries<typename Rows::Query>& queries, const Block& block, typename Rows::Out* out) {
    using Element = typename Rows::Element;
    alignas(64) typename Rows::Query values[kBlockRows * kNearStride];
    alignas(64) typename Rows::Out sums[kBlockRows * kNearQueries];
    // Where the queries' panels take no time to pass, rows are best read a few at a time, in the order of memory.
    const int group = queries.count <= 2 * kLanes ? kTallRows : kBlockRows;
    const int64_t stride = block.stride * int64_t(sizeof(Element));
    for (int64_t first_query = 0; first_query < queries.count; first_query += kNearQueries) {
        const int64_t end_query = std::min(first_query + kNearQueries, queries.count);
        std::fill(sums, sums + kBlockRows * kNearQueries, 0);
        for (int first = 0; first < block.count; first += group) {
            const int count = std::min(group, block.count - first);
            for (int64_t begin = 0; begin < block.dim; begin += kNear) {
                const int64_t size = std::min(kNear, block.dim - begin);
                const auto row = [&](int i) { return static_cast<const Element*>(block.rows[first + i]) + begin; };
                for (int i = 0; i < count; ++i) widen_panel<Rows>(row(i), size, values + i * kNearStride);
                const char* next = stride ? reinterpret_cast<const char*>(row(0)) + group * stride : nullptr;
                const Panel<Rows> panel{values, round_up(size, Rows::kStep), next, stride};
                for (int64_t q = first_query; q < end_query; q += 2 * kLanes) {
                    const bool wide = end_query - q > kLanes, fetch = q == 0 && next;
                    const auto run = wide ? (fetch ? add_products<Rows, 2, true> : add_products<Rows, 2, false>)
                                          : add_products<Rows, 1, false>;
                    auto* sum = sums + first * kNearQueries + (q - first_query);
                    run(queries.data + q * queries.stride + begin * kLanes, queries.stride * kLanes, panel, count, sum);
                }
            }
        }
        for (int64_t q = first_query; q < end_query; ++q)
            for (int i = 0; i < kBlockRows; ++i) out[q * kBlockRows + i] = sums[i * kNearQueries + (q - first_query)];
    }
}

VSR1_TARGET static void score_many_block(const Queries<float>& queries, const Block& block, float* out) {
    if (block.bfloat16)
        score_many<BFloat16Rows>(queries, block, out);
    else
        score_many<FloatRows>(queries, block, out);
}

VSR1_TARGET static void multiply_many(const Queries<int16_t>& queries, const Block& block, int32_t* out) {
    score_many<Int8Rows>(queries, block, out);
}
