// The rows of a tile of logits: read once on the way forward, turned into their gradient once on the way back.
// Contract: vsr1/ops/linear_logp.py.
#pragma once

#include <cstdint>

namespace vsr1 {

// Raw products of `rows` hidden states with the words [first, first + columns) of the vocabulary: element (i, j) at
// products[i * stride + j], float32 or bfloat16. The logit is products * scale + bias.
struct LogitTile {
    void* products;
    int64_t rows;
    int64_t columns;
    int64_t stride;  // in elements
    bool bfloat16;
    int64_t first;
    const int64_t* target;  // (rows) words
    const float* bias;      // (columns), already times scale; null: none
    float scale;            // 1 / temperature
    int threads;
};

// Of each row, over the words seen so far. `weighted` is null where no entropy is asked for.
struct RowSums {
    float* peak;      // (rows) the highest logit; -inf before the first tile
    float* total;     // (rows) sum of exp(logit - peak)
    float* weighted;  // (rows) sum of exp(logit - peak) (logit - peak)
    float* picked;    // (rows) the target's logit; written by the tile that holds it
};

// What the gradient of a row's logits is made of. `slope` and `entropy` are null where the entropy has no gradient.
struct RowGradient {
    const float* lse;
    const float* upstream;  // (rows) of the log-probability
    const float* slope;     // (rows) upstream of the entropy
    const float* entropy;
};

// Both give the same bits for any number of threads.
void add_logits(const LogitTile& tile, const RowSums& sums);
void logits_to_gradient(const LogitTile& tile, const RowGradient& gradient);

}  // namespace vsr1
