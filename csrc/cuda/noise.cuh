// The noise of soft tokens, number for number as vsr1/ops/_noise.py has it; its head says why every backend gives the same bits.
// For CUDA and, included by csrc/cpu/soft_query.cpp, for the CPU.

#pragma once

#ifdef __CUDACC__
#define VSR1_ANYWHERE __host__ __device__ inline
#else
#define VSR1_ANYWHERE inline
#endif
#ifndef __CUDACC_RTC__
#include <cmath>
#include <cstring>
#endif

namespace vsr1 {

struct Words {
    unsigned at[4];
};

struct Normals {
    float at[4];
};

VSR1_ANYWHERE Words philox(Words counter, unsigned long long seed) {
    unsigned* c = counter.at;
    unsigned low_key = static_cast<unsigned>(seed), high_key = static_cast<unsigned>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long first = 0xD2511F53ull * c[0], second = 0xCD9E8D57ull * c[2];
        c[0] = static_cast<unsigned>(second >> 32) ^ c[1] ^ low_key;
        c[1] = static_cast<unsigned>(second);
        c[2] = static_cast<unsigned>(first >> 32) ^ c[3] ^ high_key;
        c[3] = static_cast<unsigned>(first);
        low_key += 0x9E3779B9u, high_key += 0xBB67AE85u;
    }
    return counter;
}

// One step of Horner's rule; the product is exact, so it may be fused or not.
VSR1_ANYWHERE float horner(float value, double x, float coefficient) {
    return static_cast<float>(static_cast<double>(value) * x + static_cast<double>(coefficient));
}

VSR1_ANYWHERE void box_muller(unsigned radius_word, unsigned angle_word, float& first, float& second) {
    const double count = static_cast<double>(radius_word) + 1.0;
    long long bits;
    memcpy(&bits, &count, 8);
    const long long exponent = (bits - 0x3FE6A09E00000000ll) >> 52;
    bits -= exponent * (1ll << 52);
    double wide;
    memcpy(&wide, &bits, 8);
    const float above_one = static_cast<float>(wide - 1.0);
    wide = above_one;
    float value = -0.07638683915138245f;
    value = horner(value, wide, 0.12914301455020905f);
    value = horner(value, wide, -0.13240870833396912f);
    value = horner(value, wide, 0.14180061221122742f);
    value = horner(value, wide, -0.1660912185907364f);
    value = horner(value, wide, 0.20002073049545288f);
    value = horner(value, wide, -0.25001585483551025f);
    value = horner(value, wide, 0.33333325386047363f);
    value = horner(value, wide, -0.49999988079071045f);
    value = horner(value, wide, 1.0f);
    const double turns = static_cast<double>(exponent - 32);
    const double log = turns * 0.6931471824645996 + (turns * -1.9046542121259336e-09 + wide * static_cast<double>(value));
    const float squared = static_cast<float>(-2.0 * log);
    const float radius = static_cast<float>(sqrt(static_cast<double>(squared)));

    const long long angle = angle_word, quarter = (angle + (1ll << 29)) >> 30;
    const float x = static_cast<float>(angle - quarter * (1ll << 30)) * 1.862645149230957e-09f;
    const float square = x * x;
    wide = square;
    value = horner(-3.5954399209003896e-05f, wide, 0.0024900068528950214f);
    value = horner(value, wide, -0.08074543625116348f);
    const float sine = x * horner(value, wide, 0.7853981852531433f);
    value = horner(3.529804189383867e-06f, wide, -0.0003259385994169861f);
    value = horner(value, wide, 0.015854325145483017f);
    value = horner(value, wide, -0.3084251284599304f);
    const float cosine = horner(value, wide, 1.0f);
    first = quarter & 1 ? sine : cosine;
    second = quarter & 1 ? cosine : sine;
    first = radius * ((quarter + 1) & 2 ? -first : first);
    second = radius * (quarter & 2 ? -second : second);
}

// Numbers 4i to 4i + 3 of the stream, where i is `block` less the stream's offset.
VSR1_ANYWHERE Normals normals(unsigned long long seed, long long block) {
    const Words words = philox({{static_cast<unsigned>(block), static_cast<unsigned>(block >> 32), 0u, 0u}}, seed);
    Normals found;
    box_muller(words.at[0], words.at[1], found.at[0], found.at[1]);
    box_muller(words.at[2], words.at[3], found.at[2], found.at[3]);
    return found;
}

}  // namespace vsr1
