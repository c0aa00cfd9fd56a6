// The inner loops of shared-prefix attention: queries meet a run of keys, a block at a time, and their softmax runs along.
//
// Many queries of the same keys lie across the lanes of registers, and every component of a key or value is copied into all lanes,
// as in many.inl: products, maximum and exponentials of a query then stay in its lane. A lone query lies along its components
// instead. A block that ends early is filled up with its last key, whose scores there are put to -inf.

constexpr int kDeepRows = kRegisters == 32 ? 12 : 6;  // keys of a tile two registers wide

// The first `count` components at p as float32, zeros behind them.
template <typename Element>
VSR1_TARGET static inline Vector read_some(const Element* p, int64_t count) {
    if (count >= kLanes) return read(p);
    Element padded[kLanes] = {};
    std::memcpy(padded, p, count * sizeof(Element));
    return read(padded);
}

// `count` rows as float32: where they lie, or widened into `room`.
VSR1_TARGET static inline const float* wide_rows(const float* rows, int64_t& stride, int, int64_t, float*) {
    (void)stride;
    return rows;
}

VSR1_TARGET static inline const float* wide_rows(const BFloat16* rows, int64_t& stride, int count, int64_t width, float* room) {
    const int64_t wide = round_up(width, kLanes);
    for (int i = 0; i < count; ++i)
        for (int64_t d = 0; d < width; d += kLanes) store(room + i * wide + d, read_some(rows + i * stride + d, width - d));
    stride = wide;
    return room;
}

// scores (kBlockRows, Width kLanes) of `count` keys and of queries (width, Width kLanes).
template <int Width>
VSR1_TARGET static inline void score_lanes(
    const float* queries, const float* keys, int64_t stride, int count, int64_t width, float* scores) {
    constexpr int kRows = 2 * kDeepRows / Width;
    for (int first = 0; first < count; first += kRows) {
        const float* key[kRows];
        for (int i = 0; i < kRows; ++i) key[i] = keys + std::min(first + i, count - 1) * stride;
        Vector total[kRows][Width] = {};
        for (int64_t d = 0; d < width; ++d) {
            Vector component[Width];
#pragma GCC unroll 2
            for (int w = 0; w < Width; ++w) component[w] = load<Vector>(queries + (d * Width + w) * kLanes);
#pragma GCC unroll 24
            for (int i = 0; i < kRows; ++i) {
                const Vector value = splat(key[i][d]);
#pragma GCC unroll 2
                for (int w = 0; w < Width; ++w) total[i][w] = multiply_add(component[w], value, total[i][w]);
            }
        }
#pragma GCC unroll 24
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int w = 0; w < Width; ++w) store(scores + ((first + i) * Width + w) * kLanes, total[i][w]);
    }
}

// sums (width, Width kLanes) = shrink x sums + values^T weights, for Count components from d on.
template <int Width, int Count>
VSR1_TARGET static inline void add_lanes(
    const Vector* shrink, const float* weights, const float* values, int64_t stride, int count, int64_t d, float* sums) {
    Vector total[Count][Width] = {};  // of this block alone: many small sums round less than one long one
    for (int key = 0; key < count; ++key) {
        Vector weight[Width];
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) weight[w] = load<Vector>(weights + (key * Width + w) * kLanes);
#pragma GCC unroll 24
        for (int i = 0; i < Count; ++i) {
            const Vector value = splat(values[key * stride + d + i]);
#pragma GCC unroll 2
            for (int w = 0; w < Width; ++w) total[i][w] = multiply_add(weight[w], value, total[i][w]);
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < Count; ++i)
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) {
            float* place = sums + ((d + i) * Width + w) * kLanes;
            store(place, multiply_add(load<Vector>(place), shrink[w], total[i][w]));
        }
}

template <int Width, typename Element>
VSR1_TARGET static void meet_lanes(const float* queries, const KeyRun& run, float* peak, float* total, float* sums) {
    alignas(64) float room[(std::is_same_v<Element, float> ? 1 : kBlockRows) * kWidestHead];
    alignas(64) float scores[kBlockRows * Width * kLanes];
    constexpr int kDims = kRegisters / 2 / Width;
    for (int64_t first = 0; first < run.count; first += kBlockRows) {
        const int count = std::min<int64_t>(kBlockRows, run.count - first);
        int64_t stride = run.k_stride;
        const float* keys = wide_rows(static_cast<const Element*>(run.k) + first * stride, stride, count, run.width, room);
        score_lanes<Width>(queries, keys, stride, count, run.width, scores);
        if (run.mask)
            for (int i = 0; i < count; ++i)
                if (!run.mask[(first + i) * run.mask_stride])
                    std::fill_n(scores + i * Width * kLanes, Width * kLanes, -kInfinity);
        Vector shrink[Width];
        for (int w = 0; w < Width; ++w) {
            Vector highest = load<Vector>(peak + w * kLanes);
            const Vector before = highest;
            for (int i = 0; i < count; ++i) {
                const Vector score = load<Vector>(scores + (i * Width + w) * kLanes);
                highest = score > highest ? score : highest;
            }
            const Vector level = highest == -kInfinity ? Vector{} : highest;  // -inf less -inf would be NaN
            shrink[w] = exponential(before - level);
            Vector mass = {};
            for (int i = 0; i < count; ++i) {
                float* place = scores + (i * Width + w) * kLanes;
                const Vector weight = exponential(load<Vector>(place) - level);
                store(place, weight);
                mass += weight;
            }
            store(peak + w * kLanes, highest);
            store(total + w * kLanes, multiply_add(load<Vector>(total + w * kLanes), shrink[w], mass));
        }
        stride = run.v_stride;
        const float* values = wide_rows(static_cast<const Element*>(run.v) + first * stride, stride, count, run.width, room);
        int64_t d = 0;
        for (; d + kDims <= run.width; d += kDims) add_lanes<Width, kDims>(shrink, scores, values, stride, count, d, sums);
        for (; d < run.width; ++d) add_lanes<Width, 1>(shrink, scores, values, stride, count, d, sums);
    }
}

VSR1_TARGET static void meet_many(
    int64_t width, const float* queries, const KeyRun& run, float* peak, float* total, float* sums) {
    if (width == 1)
        (run.bfloat16 ? meet_lanes<1, BFloat16> : meet_lanes<1, float>)(queries, run, peak, total, sums);
    else
        (run.bfloat16 ? meet_lanes<2, BFloat16> : meet_lanes<2, float>)(queries, run, peak, total, sums);
}

// out[i] = the product of the query, whose end is filled up with zeros, and key first + i, for four keys.
template <typename Element>
VSR1_TARGET static inline Quad score_four(const float* query, const Element* const* key, int64_t width) {
    Vector total[4] = {};
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
        const Vector component = load<Vector>(query + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) total[i] = multiply_add(component, read(key[i] + d), total[i]);
    }
    if (d < width)
        for (int i = 0; i < 4; ++i)
            total[i] = multiply_add(load<Vector>(query + d), read_some(key[i] + d, width - d), total[i]);
    return sums<Quad>(total[0], total[1], total[2], total[3]);
}

// sum = shrink x sum + the weighted values, for `Parts` registers of components; even and odd keys apart, to keep the adders busy.
template <int Parts, typename Element>
VSR1_TARGET static inline void add_parts(
    float shrink, const float* weights, const Element* values, int64_t stride, int count, float* sum) {
    Vector total[2][Parts] = {};
    for (int key = 0; key < count; key += 2) {
        const Element* row[2] = {values + key * stride, values + std::min(key + 1, count - 1) * stride};
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            const Vector weight = splat(weights[key + odd]);  // 0 behind the last key
#pragma GCC unroll 8
            for (int part = 0; part < Parts; ++part)
                total[odd][part] = multiply_add(weight, read(row[odd] + part * kLanes), total[odd][part]);
        }
    }
#pragma GCC unroll 8
    for (int part = 0; part < Parts; ++part) {
        float* place = sum + part * kLanes;
        store(place, multiply_add(load<Vector>(place), splat(shrink), total[0][part] + total[1][part]));
    }
}

template <typename Element>
VSR1_TARGET static void meet_lone(const float* query, const KeyRun& run, float& peak, float& total, float* sum) {
    static_assert(kBlockRows % kLanes == 0);
    alignas(64) float weights[kBlockRows];
    for (int64_t first = 0; first < run.count; first += kBlockRows) {
        const int count = std::min<int64_t>(kBlockRows, run.count - first);
        const Element* keys = static_cast<const Element*>(run.k) + first * run.k_stride;
        for (int i = 0; i < count; i += 4) {
            const Element* key[4];
            for (int j = 0; j < 4; ++j) key[j] = keys + std::min(i + j, count - 1) * run.k_stride;
            store(weights + i, score_four(query, key, run.width));
        }
        const int filled = round_up(count, kLanes);
        std::fill(weights + count, weights + filled, -kInfinity);
        if (run.mask)
            for (int i = 0; i < count; ++i)
                if (!run.mask[(first + i) * run.mask_stride]) weights[i] = -kInfinity;
        Vector highest = splat(peak);
        for (int i = 0; i < filled; i += kLanes) {
            const Vector score = load<Vector>(weights + i);
            highest = score > highest ? score : highest;
        }
        float raised = highest[0];
        for (int lane = 1; lane < kLanes; ++lane) raised = std::max(raised, highest[lane]);
        const float level = raised == -kInfinity ? 0.0f : raised;
        const float shrink = exponential(splat(peak - level))[0];
        Vector mass = {};
        for (int i = 0; i < filled; i += kLanes) {
            const Vector weight = exponential(load<Vector>(weights + i) - level);
            store(weights + i, weight);
            mass += weight;
        }
        peak = raised;
        total = total * shrink + vsr1::VSR1_ISA::sum(mass);
        const Element* values = static_cast<const Element*>(run.v) + first * run.v_stride;
        int64_t d = 0;
        for (; d + 4 * kLanes <= run.width; d += 4 * kLanes)
            add_parts<4>(shrink, weights, values + d, run.v_stride, count, sum + d);
        for (; d + kLanes <= run.width; d += kLanes) add_parts<1>(shrink, weights, values + d, run.v_stride, count, sum + d);
        for (; d < run.width; ++d) {
            float ends = 0.0f;
            for (int i = 0; i < count; ++i) {
                if constexpr (std::is_same_v<Element, float>)
                    ends += weights[i] * values[i * run.v_stride + d];
                else
                    ends += weights[i] * vsr1::widen(values[i * run.v_stride + d]);
            }
            sum[d] = sum[d] * shrink + ends;
        }
    }
}

VSR1_TARGET static void meet_alone(const float* query, const KeyRun& run, float& peak, float& total, float* sum) {
    (run.bfloat16 ? meet_lone<BFloat16> : meet_lone<float>)(query, run, peak, total, sum);
}
