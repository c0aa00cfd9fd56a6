// Attention over prefixes that rows share, and each row's own suffix: what goes in, what comes out. Contract: vsr1/ops/prefix.py.
#pragma once

#include <array>
#include <cstdint>

namespace vsr1 {

constexpr int64_t kWidestHead = 256;

// Keys and values of all sets (prefixes, or suffixes) where they lie. Strides are in elements: of sets, heads, keys; the components
// of a key lie side by side.
struct KeySets {
    const void* k;
    const void* v;
    std::array<int64_t, 3> k_strides;
    std::array<int64_t, 3> v_strides;
    int64_t keys;                         // of a set
    const bool* mask;                     // what may be seen; null: all
    std::array<int64_t, 3> mask_strides;  // of sets, queries, keys
};

struct PrefixTask {
    bool bfloat16;
    int64_t rows, query_heads, key_heads, queries, width, prefixes;
    const void* q;
    std::array<int64_t, 3> q_strides;  // of rows, heads, queries
    const int64_t* owner;              // (rows) the prefix of each; null: rows / prefixes of them in turn
    KeySets prefix, suffix;
    float scale;
    int threads;
};

struct PrefixOutput {
    void* out;   // (rows, query_heads, queries, width), of the inputs' type
    float* lse;  // (rows, query_heads, queries), 0 where nothing is seen; null: not asked
};

// Throws std::invalid_argument for an owner that is no prefix. The same bits for any number of threads.
void prefix_attention(const PrefixTask& task, const PrefixOutput& output);

}  // namespace vsr1
