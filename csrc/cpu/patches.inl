// The byte resize of RGB lines: sums of int16 products, two pixels at a time, exact in any order (vsr1/ops/_patches_filter.py).
//
// Across a line, a register holds one pixel's three channels of as many lines as it has room for, with an empty fourth channel; every
// lane is a channel's byte and its right neighbour's, which meet two weights in one instruction. So lines are first laid out
// as such pairs, which costs a shuffle per pixel of the source and none per tap. Down a frame, two lines are interleaved and
// neighbours lie across the lanes.

constexpr int kGroup = kLanes / 4;  // lines side by side in a register
constexpr int kStep = 2 * kLanes;   // bytes that go down together

typedef uint8_t Pixels __attribute__((vector_size(kGroup * 16)));

#if VSR1_LANES > 4
// 16 bytes of each of two lines, and of kGroup.
VSR1_TARGET static inline __m256i gather_two(const uint8_t* lines, int64_t stride) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(lines)), load<__m128i>(lines + stride), 1);
}

VSR1_TARGET static inline Pixels gather(const uint8_t* lines, int64_t stride) {
    const __m256i two = gather_two(lines, stride);
#if VSR1_LANES == 16
    return (Pixels)_mm512_maskz_inserti64x4(kAll, _mm512_castsi256_si512(two), gather_two(lines + 2 * stride, stride), 1);
#else
    return (Pixels)two;
#endif
}

// The bytes of each 16 that `order` names, 0 where it is negative.
VSR1_TARGET static inline Pixels shuffle(Pixels bytes, __m128i order) {
#if VSR1_LANES == 16
    return (Pixels)_mm512_shuffle_epi8((__m512i)bytes, _mm512_maskz_broadcast_i32x4(0xFFFF, order));
#else
    return (Pixels)_mm256_shuffle_epi8((__m256i)bytes, _mm256_broadcastsi128_si256(order));
#endif
}
#endif

// pairs[x] = pixel x and its right neighbour of kGroup lines, for `count` pixels or up to three more; 16 bytes behind are read.
VSR1_TARGET static inline void lay_out_pairs(const uint8_t* lines, int64_t stride, int64_t count, Shorts* pairs) {
    for (int64_t x = 0; x < count; x += 4) {
#if VSR1_LANES > 4
        const Pixels pixels = gather(lines + 3 * x, stride);
        const __m128i first = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
        const __m128i used = _mm_setr_epi8(3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 0, 0, 0, 0);
        __m128i order = first;
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            store(pairs + x + q, shuffle(pixels, order));
            order = _mm_add_epi8(order, used);
        }
#else
        for (int q = 0; q < 4; ++q) {
            const uint8_t* pixel = lines + 3 * (x + q);  // of one line: kGroup is 1
            (void)stride;
            const Shorts pair = {pixel[0], pixel[3], pixel[1], pixel[4], pixel[2], pixel[5], 0, 0};
            store(pairs + x + q, pair);
        }
#endif
    }
}

#if VSR1_LANES == 4
VSR1_TARGET static inline Lanes clamp_bytes(Lanes sums) {
    const Lanes none = {}, full = none + 255;
    sums = sums < none ? none : sums;
    return sums > full ? full : sums;
}
#endif

// Four pixels of kGroup lines from their sums; 4 bytes behind them are written too.
VSR1_TARGET static inline void store_pixels(const Lanes* sums, uint8_t* out, int64_t stride) {
#if VSR1_LANES > 4
    const __m128i dense = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
#if VSR1_LANES == 16
    const __m512i low = _mm512_packs_epi32((__m512i)sums[0], (__m512i)sums[1]);
    const __m512i high = _mm512_packs_epi32((__m512i)sums[2], (__m512i)sums[3]);
    const Pixels pixels = shuffle((Pixels)_mm512_packus_epi16(low, high), dense);
#else
    const __m256i low = _mm256_packs_epi32((__m256i)sums[0], (__m256i)sums[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)sums[2], (__m256i)sums[3]);
    const Pixels pixels = shuffle((Pixels)_mm256_packus_epi16(low, high), dense);
#endif
    for (int i = 0; i < kGroup; ++i)
        std::memcpy(out + i * stride, reinterpret_cast<const char*>(&pixels) + 16 * i, 16);
#else
    (void)stride;
    for (int q = 0; q < 4; ++q) {
        const Lanes bytes = clamp_bytes(sums[q]);
        for (int c = 0; c < 3; ++c) out[3 * q + c] = uint8_t(bytes[c]);
    }
#endif
}

// The two weights from `weights` on in every lane.
VSR1_TARGET static inline Shorts weight_pair(const int16_t* weights) {
    return cast<Shorts>(load<int32_t>(weights) - Lanes{});
}

VSR1_TARGET static void resize_across(
    const uint8_t* lines, int64_t stride, const Filter& filter, int32_t* room, uint8_t* out, int64_t out_stride) {
    Shorts* pairs = reinterpret_cast<Shorts*>(room);
    lay_out_pairs(lines, stride, filter.source + filter.taps, pairs);
    const Lanes half = Lanes{} + (1 << filter.bits >> 1);
    const int64_t apart = filter.target >= 4;  // the four pixels of a shorter line are one and the same
    const int64_t made = apart ? 4 : 1;
    for (int64_t x = 0; x < filter.target; x += made) {
        const int64_t first = std::min(x, filter.target - made);
        const Shorts* pixel[4];
        Lanes sums[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            pixel[q] = pairs + filter.begin[first + q * apart];
            sums[q] = half;
        }
        const int16_t* weights = filter.weights + first * filter.taps;
        for (int64_t j = 0; j < filter.taps; j += 2)
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q)
                sums[q] = multiply_add_pairs(pixel[q][j], weight_pair(weights + q * apart * filter.taps + j), sums[q]);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) sums[q] >>= filter.bits;
        store_pixels(sums, out + 3 * first, out_stride);
    }
}

// low, high = kStep bytes of two lines, neighbours in a lane, in the order that store_bytes undoes.
VSR1_TARGET static inline void interleave(const uint8_t* a, const uint8_t* b, Shorts& low, Shorts& high) {
#if VSR1_LANES == 16
    const __m512i wide_a = _mm512_cvtepu8_epi16(load<__m256i>(a)), wide_b = _mm512_cvtepu8_epi16(load<__m256i>(b));
    low = (Shorts)_mm512_unpacklo_epi16(wide_a, wide_b);
    high = (Shorts)_mm512_unpackhi_epi16(wide_a, wide_b);
#elif VSR1_LANES == 8
    const __m256i wide_a = _mm256_cvtepu8_epi16(load<__m128i>(a)), wide_b = _mm256_cvtepu8_epi16(load<__m128i>(b));
    low = (Shorts)_mm256_unpacklo_epi16(wide_a, wide_b);
    high = (Shorts)_mm256_unpackhi_epi16(wide_a, wide_b);
#else
    low = Shorts{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]};
    high = Shorts{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
#endif
}

VSR1_TARGET static inline void store_bytes(Lanes low, Lanes high, uint8_t* out) {
#if VSR1_LANES == 16
    const __m512i shorts = _mm512_packs_epi32((__m512i)low, (__m512i)high);
    store(out, _mm512_maskz_cvtusepi16_epi8(~0U, _mm512_max_epi16(shorts, _mm512_setzero_si512())));
#elif VSR1_LANES == 8
    const __m256i shorts = _mm256_packs_epi32((__m256i)low, (__m256i)high);
    store(out, _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
#else
    low = clamp_bytes(low);
    high = clamp_bytes(high);
    for (int i = 0; i < kLanes; ++i) {
        out[i] = uint8_t(low[i]);
        out[kLanes + i] = uint8_t(high[i]);
    }
#endif
}

// out = the `count` bytes that `taps` lines make; up to kStep - 1 bytes behind are read and written too.
VSR1_TARGET static void resize_down(
    const uint8_t* const* lines, const int16_t* weights, int64_t taps, int bits, int64_t count, uint8_t* out) {
    const Lanes half = Lanes{} + (1 << bits >> 1);
    for (int64_t x = 0; x < count; x += 2 * kStep) {
        Lanes sums[4] = {half, half, half, half};
        const int64_t second = x + kStep < count ? x + kStep : x;
        for (int64_t j = 0; j < taps; j += 2) {
            const Shorts weight = weight_pair(weights + j);
            Shorts low, high;
            interleave(lines[j] + x, lines[j + 1] + x, low, high);
            sums[0] = multiply_add_pairs(low, weight, sums[0]);
            sums[1] = multiply_add_pairs(high, weight, sums[1]);
            interleave(lines[j] + second, lines[j + 1] + second, low, high);
            sums[2] = multiply_add_pairs(low, weight, sums[2]);
            sums[3] = multiply_add_pairs(high, weight, sums[3]);
        }
        store_bytes(sums[0] >> bits, sums[1] >> bits, out + x);
        store_bytes(sums[2] >> bits, sums[3] >> bits, out + second);
    }
}
