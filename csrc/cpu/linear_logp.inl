// The row kernels of linear_logp with compiler vectors, once for each instruction set that linear_logp.cpp includes it for. It
// defines VSR1_ISA (a namespace), VSR1_TARGET (a function attribute) and VSR1_LANES (floats in a register).
//
// A row of a tile fits L1, so its two passes forward (the highest logit, then the sums) read it from memory once. A logit is made
// anew from its product wherever it is needed, by the same instructions: that costs less than writing it back, and the target's
// logit cannot exceed the highest one by a rounding.

namespace vsr1::VSR1_ISA {
namespace {

constexpr int64_t kLanes = VSR1_LANES;

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Lanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

template <typename V>
VSR1_TARGET inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

VSR1_TARGET inline Vector splat(float c) { return c - Vector{}; }

VSR1_TARGET inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if VSR1_LANES == 16
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VSR1_LANES == 8
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

VSR1_TARGET inline Vector read(const float* p) { return load<Vector>(p); }

VSR1_TARGET inline Vector read(const uint16_t* p) {
    return (Vector)(__builtin_convertvector(load<Halves>(p), Words) << 16);
}

VSR1_TARGET inline void write(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// To the nearest bfloat16, ties to even; a NaN stays one.
VSR1_TARGET inline void write(uint16_t* p, Vector v) {
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector(v == v ? rounded : Words{} + 0x7FC0, Halves);
    std::memcpy(p, &halves, sizeof halves);
}

// exp(x) to 2 units in the last place for x in [-87, 88) (Cephes' polynomial); 0 below, NaN stays NaN.
VSR1_TARGET inline Vector exponential(Vector x) {
    const Vector low = splat(-87.0f);
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
    return underflow ? Vector{} : y * (Vector)((exponent + 127) << 23);
}

// x, or -87 below it: its product with an exponential that is 0 there is then 0, also where x is -inf.
VSR1_TARGET inline Vector bounded(Vector x) { return x < -87.0f ? splat(-87.0f) : x; }

VSR1_TARGET inline float sum(Vector v) {
    float total = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += v[lane];
    return total;
}

// Calls body(first, products, bias, count) for every register of a row; the last one is filled up with products of -inf, which are
// words without probability.
template <typename Element, typename Body>
VSR1_TARGET inline void for_each_register(const LogitTile& tile, const Element* row, const Body& body) {
    int64_t j = 0;
    for (; j + kLanes <= tile.columns; j += kLanes)
        body(j, read(row + j), tile.bias ? load<Vector>(tile.bias + j) : Vector{}, kLanes);
    if (const int64_t left = tile.columns - j; left > 0) {
        Element products[kLanes];
        float bias[kLanes] = {};
        write(products, splat(-std::numeric_limits<float>::infinity()));
        std::memcpy(products, row + j, left * sizeof(Element));
        if (tile.bias) std::memcpy(bias, tile.bias + j, left * sizeof(float));
        body(j, read(products), load<Vector>(bias), left);
    }
}

// The target's product and bias in every lane; only where the tile holds the target.
template <typename Element>
VSR1_TARGET inline Vector target_logit(const LogitTile& tile, const Element* row, int64_t column) {
    Element products[kLanes];
    std::fill_n(products, kLanes, row[column]);
    return multiply_add(read(products), splat(tile.scale), splat(tile.bias ? tile.bias[column] : 0.0f));
}

template <typename Element>
VSR1_TARGET void add_row(const LogitTile& tile, const RowSums& sums, int64_t i) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Element* row = static_cast<const Element*>(tile.products) + i * tile.stride;
    const Vector scale = splat(tile.scale);
    Vector highest = splat(-kInfinity);
    for_each_register(tile, row, [&](int64_t, Vector products, Vector bias, int64_t) VSR1_TARGET {
        const Vector logits = multiply_add(products, scale, bias);
        highest = logits > highest ? logits : highest;
    });
    float raised = sums.peak[i];
    for (int64_t lane = 0; lane < kLanes; ++lane) raised = std::max(raised, highest[lane]);
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
VSR1_TARGET inline Vector gradient_of(Vector log_p, float level, float slope) {
    return exponential(log_p) * multiply_add(bounded(log_p), splat(slope), splat(level));
}

template <typename Element>
VSR1_TARGET void differentiate_row(const LogitTile& tile, const RowGradient& gradient, int64_t i) {
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

const RowKernels kKernels = {
    add_row<float>, add_row<uint16_t>, differentiate_row<float>, differentiate_row<uint16_t>,
};

}  // namespace
}  // namespace vsr1::VSR1_ISA

#undef VSR1_ISA
#undef VSR1_TARGET
#undef VSR1_LANES
