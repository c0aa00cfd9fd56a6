// The six operations of matrix registers in plain C++, so that what is built on them can be tested on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "instruction_sets.h"

namespace vsr1::emulated {

class Tiles {
   public:
    void zero(int t) { std::memset(sums_[t], 0, sizeof sums_[t]); }
    void load_rows(const void* data, int64_t stride) { load(rows_, data, stride); }
    void load_queries(const void* data) { load(queries_, data, 64); }

    // sums[t] (row, query) += products of bfloat16, in float32.
    void add_pairs(int t) {
        for (int m = 0; m < 16; ++m) {
            for (int n = 0; n < 16; ++n) {
                float sum;
                std::memcpy(&sum, &sums_[t][m][n], 4);
                for (int k = 0; k < 32; ++k) sum += number(rows_[m] + 2 * k) * number(queries_[k / 2] + 4 * n + k % 2 * 2);
                std::memcpy(&sums_[t][m][n], &sum, 4);
            }
        }
    }

    // sums[t] (row, query) += products of int8, in int32.
    void add_bytes(int t) {
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 16; ++n)
                for (int k = 0; k < 64; ++k)
                    sums_[t][m][n] += uint32_t(int32_t(int8_t(rows_[m][k])) * int8_t(queries_[k / 4][4 * n + k % 4]));
    }

    void store(int t, void* out) const { std::memcpy(out, sums_[t], sizeof sums_[t]); }

   private:
    static void load(char (&tile)[16][64], const void* data, int64_t stride) {
        for (int i = 0; i < 16; ++i) std::memcpy(tile[i], static_cast<const char*>(data) + i * stride, 64);
    }

    static float number(const char* bfloat16) {
        uint32_t bits = 0;
        std::memcpy(reinterpret_cast<char*>(&bits) + 2, bfloat16, 2);
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }

    char rows_[16][64], queries_[16][64];
    uint32_t sums_[6][16][16];
};

}  // namespace vsr1::emulated
