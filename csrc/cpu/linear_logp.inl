// The row kernels of linear_logp: a row of a tile of logits, read forward and turned into its gradient on the way back.
//
// A row of a tile fits L1, so its two passes forward (the highest logit, then the sums) read it from memory once. A logit is made
// anew from its product wherever it is needed, by the same instructions: that costs less than writing it back, and the target's
// logit cannot exceed the highest one by a rounding.

VSR1_TARGET static inline Vector read(const float* p) { return load<Vector>(p); }

VSR1_TARGET static inline Vector read(const BFloat16* p) {
    return (Vector)(__builtin_convertvector(load<Halves>(p), Words) << 16);
}

VSR1_TARGET static inline void write(float* p, Vector v) { store(p, v); }

// To the nearest bfloat16, ties to even; a NaN stays one.
VSR1_TARGET static inline void write(BFloat16* p, Vector v) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector(v == v ? rounded : Words{} + 0x7FC0, Halves);
    store(p, halves);
}

// x, or -87 below it: its product with an exponential that is 0 there is then 0, also where x is -inf.
VSR1_TARGET static inline Vector bounded(Vector x) { return x < -87.0f ? splat(-87.0f) : x; }

VSR1_TARGET static inline float sum(Vector v) {
    float total = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
    return total;
}

// Calls body(first, products, bias, count) for every register of a row; the last one is filled up with products of -inf, which are
// words without probability.
template <typename Element, typename Body>
VSR1_TARGET static inline void for_each_register(const LogitTile& tile, const Element* row, const Body& body) {
    int64_t j = 0;
    for (; j + kLanes <= tile.columns; j += kLanes)
        body(j, read(row + j), tile.bias ? load<Vector>(tile.bias + j) : Vector{}, kLanes);
    if (const int64_t left = tile.columns - j; left > 0) {
        Element products[kLanes];
        float bias[kLanes] = {};
        write(products, splat(-kInfinity));
        std::memcpy(products, row + j, left * sizeof(Element));
        if (tile.bias) std::memcpy(bias, tile.bias + j, left * sizeof(float));
        body(j, read(products), load<Vector>(bias), left);
    }
}

// The target's product and bias in every lane; only where the tile holds the target.
template <typename Element>
VSR1_TARGET static inline Vector target_logit(const LogitTile& tile, const Element* row, int64_t column) {
    Element products[kLanes];
    std::fill_n(products, kLanes, row[column]);
    return multiply_add(read(products), splat(tile.scale), splat(tile.bias ? tile.bias[column] : 0.0f));
}

template <typename Element>
VSR1_TARGET static void add_row(const LogitTile& tile, const RowSums& sums, int64_t i) {
    const Element* row = static_cast<const Element*>(tile.products) + i * tile.stride;
    const Vector scale = splat(tile.scale);
    Vector highest = splat(-kInfinity);
    for_each_register(tile, row, [&](int64_t, Vector products, Vector bias, int64_t) VSR1_TARGET {
        const Vector logits = multiply_add(products, scale, bias);
        highest = logits > highest ? logits : highest;
    });
    float raised = sums.peak[i];
    for (int lane = 0; lane < kLanes; ++lane) raised = std::max(raised, highest[lane]);
    const float level = raised == -kInfinity ? 0.0f : raised;  // -inf - -inf would be NaN
    Vector total = {}, weighted = {};
    for_each_register(tile, row, [&](int64_t, Vector products, Vector bias, int64_t) VSR1_TARGET {
        const Vector below = multiply_add(products, scale, bias) - level;
        const Vector weight = exponential(below);
        total += weight;
        weighted = multiply_add(weight, bounded(below), weighted);
    });
    float old_total = sums.total[i], old_weighted = sums.weighted ? sums.weighted[i] : 0.0f;
    if (const float drop = sums.peak[i] - level; sums.peak[i] != -kInfinity && drop != 0.0f) {
        const float shrink = std::exp(drop);
        old_weighted = shrink == 0.0f ? 0.0f : shrink * (old_weighted + drop * old_total);
        old_total *= shrink;
    }
    sums.peak[i] = raised;
    sums.total[i] = old_total + sum(total);
    if (sums.weighted) sums.weighted[i] = old_weighted + sum(weighted);
    if (const int64_t column = tile.target[i] - tile.first; column >= 0 && column < tile.columns)
        sums.picked[i] = target_logit(tile, row, column)[0];
}

// p (level + slope log p) for log p = logit - lse, where level and slope hold all factors of the row.
VSR1_TARGET static inline Vector gradient_of(Vector log_p, float level, float slope) {
    return exponential(log_p) * multiply_add(bounded(log_p), splat(slope), splat(level));
}

template <typename Element>
VSR1_TARGET static void differentiate_row(const LogitTile& tile, const RowGradient& gradient, int64_t i) {
    Element* row = static_cast<Element*>(tile.products) + i * tile.stride;
    const float upstream = gradient.upstream[i], lse = gradient.lse[i];
    const float of_entropy = gradient.slope ? gradient.slope[i] : 0.0f;
    const float level = -tile.scale * (gradient.slope ? upstream + of_entropy * gradient.entropy[i] : upstream);
    const float slope = -tile.scale * of_entropy;
    const Vector scale = splat(tile.scale);
    const int64_t column = tile.target[i] - tile.first;
    const bool here = column >= 0 && column < tile.columns;
    Vector at_target = {};
    if (here)  // before its product is overwritten
        at_target = gradient_of(target_logit(tile, row, column) - lse, level, slope) + upstream * tile.scale;
    for_each_register(tile, row, [&](int64_t first, Vector products, Vector bias, int64_t count) VSR1_TARGET {
        Element written[kLanes];
        write(written, gradient_of(multiply_add(products, scale, bias) - lse, level, slope));
        std::memcpy(row + first, written, count * sizeof(Element));
    });
    if (here) {
        Element written[kLanes];
        write(written, at_target);
        row[column] = written[0];
    }
}

VSR1_TARGET static void add_logits(const LogitTile& tile, const RowSums& sums, int64_t row) {
    if (tile.bfloat16)
        add_row<BFloat16>(tile, sums, row);
    else
        add_row<float>(tile, sums, row);
}

VSR1_TARGET static void differentiate_logits(const LogitTile& tile, const RowGradient& gradient, int64_t row) {
    if (tile.bfloat16)
        differentiate_row<BFloat16>(tile, gradient, row);
    else
        differentiate_row<float>(tile, gradient, row);
}
