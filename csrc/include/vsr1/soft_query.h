// The soft-token step: what goes in, what comes out. Contract: vsr1/ops/soft_query.py.
#pragma once

#include <cstdint>

namespace vsr1 {

// All arrays are contiguous; those of the head and `hidden` are float32, or bfloat16 all of them.
struct SoftTask {
    bool bfloat16;
    int64_t rows, width, query_width;  // B, H, D
    const void* hidden;                // (B, H)
    const void *first, *first_bias;    // (D, H), (D)
    const void *norm, *norm_bias;      // (D)
    const void *second, *second_bias;  // (D, D), (D)
    const void *input_norm, *input_norm_bias;  // (D)
    const void *input, *input_bias;            // (H, D), (H)
    const void *gate, *gate_bias;              // (H), (1); null: no gate
    double norm_epsilon, input_norm_epsilon;
    float sigma;  // 0: the action is the mean
    uint64_t seed;
    int64_t offset;
    int threads;
};

// Every array is written whole.
struct SoftOutput {
    float* mean;    // (B, D)
    float* action;  // (B, D)
    float* logp;    // (B)
    void* policy_input;  // (B, H), of the head's type
};

// Bitwise the same for any number of threads; a row's numbers do not depend on the other rows, but for the noise's place.
void soft_token_step(const SoftTask& task, const SoftOutput& output);

// The noise alone: normals (count) of the stream, and pairs of normals from pairs of words, (count) each.
void noise_normals(uint64_t seed, int64_t offset, int64_t count, float* out);
void noise_pairs(const uint32_t* radius_words, const uint32_t* angle_words, int64_t count, float* first, float* second);

}  // namespace vsr1
