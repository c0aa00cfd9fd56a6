// What the sweep computes with a score, a row number or a component of a query, without any instruction that only a GPU has: the
// same functions are compiled by the host's compiler for the tests.

#pragma once

#ifdef __CUDACC__
#define VSR1_ANYWHERE __host__ __device__ inline
#else
#define VSR1_ANYWHERE inline
#endif
#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
#define INFINITY __int_as_float(0x7F800000)
#else
#include <cmath>
#include <cstring>
#endif

namespace vsr1 {

using Id = long long;  // 64 bits everywhere

constexpr int kTile = 16;   // rows in a tile, and queries: one matrix fragment of each
constexpr int kGroup = 32;  // rows that share one maximum: two tiles

VSR1_ANYWHERE bool is_finite(float value) { return fabsf(value) < INFINITY; }

// The best of two sets of rows, the lower number first among equals, and the best of the rest.
struct Best {
    float score;
    int row;
    float second;

    VSR1_ANYWHERE void join(const Best& other) {
        if (other.score > score || (other.score == score && other.row < row)) {
            second = fmaxf(other.second, score);
            score = other.score;
            row = other.row;
        } else {
            second = fmaxf(second, other.score);
        }
    }

    // The runner-up's score with the winner's number in place of its low bits, as kernels/corpus_scan.py reads it.
    VSR1_ANYWHERE int packed() const {
        int bits;
        memcpy(&bits, &second, sizeof(bits));
        return (bits & -kGroup) | row;
    }
};

// Which rows a block sees: groups go to blocks by their number, a group is two tiles, rows past the end are the last one again.
struct Walk {
    Id row_count;
    int block, blocks;

    VSR1_ANYWHERE Id groups() const { return (row_count + kGroup - 1) / kGroup; }
    VSR1_ANYWHERE int tiles() const { return 2 * static_cast<int>((groups() - block + blocks - 1) / blocks); }
    VSR1_ANYWHERE Id group(int tile) const { return block + static_cast<Id>(tile / 2) * blocks; }
    VSR1_ANYWHERE Id row(int tile, int line) const { return group(tile) * kGroup + tile % 2 * kTile + line; }
    VSR1_ANYWHERE Id readable_row(int tile, int line) const {
        const Id wanted = row(tile, line);
        return wanted < row_count ? wanted : row_count - 1;
    }
};

// One bit for every so many groups of a block's walk, set where one of them has an excluded row: the list is searched only there.
struct Exclusions {
    static constexpr int kWords = 64;

    VSR1_ANYWHERE static int bit(int turn) { return turn % (32 * kWords); }
    VSR1_ANYWHERE static bool marked(const unsigned* words, int turn) { return words[bit(turn) / 32] >> bit(turn) % 32 & 1u; }
    // The turn at which the block meets this row, -1 if it never does.
    VSR1_ANYWHERE static int turn(const Walk& walk, Id row) {
        const Id group = row / kGroup;
        return row < 0 || group % walk.blocks != walk.block ? -1 : static_cast<int>(group / walk.blocks);
    }
    VSR1_ANYWHERE static bool listed(const Id* list, Id width, Id row) {
        bool found = false;
        for (Id entry = 0; entry < width; ++entry) found = found || list[entry] == row;
        return found;
    }
};

// The running softmax: mass is the sum of exp((score - peak) / temperature); slope is log2(e) / temperature.
struct Softmax {
    float peak, mass;

    // Takes the score of this thread; highest is that of all that share the peak. Gives the row's weight relative to the new peak
    // and what everything summed up before must be multiplied by.
    VSR1_ANYWHERE float add(float score, float highest, float slope, float& scale) {
        const float raised = fmaxf(peak, highest), level = raised == -INFINITY ? 0.0f : raised;
        scale = peak == raised ? 1.0f : peak == -INFINITY ? 0.0f : exp2f((peak - level) * slope);
        const float weight = exp2f((score - level) * slope);
        mass = mass * scale + weight;
        peak = raised;
        return weight;
    }
};

// The soft-query update base + gate * mean(soft): what one soft token counts, and the length that normalises the sum, as torch's
// normalize has it.
VSR1_ANYWHERE float share(float gate, int soft_count) { return soft_count > 0 ? gate / static_cast<float>(soft_count) : 0.0f; }
VSR1_ANYWHERE float length(float sum_of_squares) { return fmaxf(sqrtf(sum_of_squares), 1e-12f); }

VSR1_ANYWHERE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
VSR1_ANYWHERE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

}  // namespace vsr1
