// What stands before the sweep where queries come from an embedder's hidden state: (hidden * weight) @ head.T, up to 16 of them.
//
// The head is as large as thousands of rows, so it is read once by all multiprocessors together, in a launch of its own; the sweep
// then normalises. The final norm divides a hidden state by one number, its root mean square, which that normalisation undoes:
// it is left out here. Each warp owns two outputs of all queries and adds up in float32, in the same order in every run.

#pragma once

#include "instructions.cuh"

namespace vsr1 {

struct Projection {
    const void* hidden;  // (B, H)
    const void* weight;  // (H,)
    const void* head;    // (D or more, H), 16-byte aligned
    float* out;          // (B, D)
    Id hidden_stride;
    Id head_stride;
    int width;    // H, a multiple of 8
    int outputs;  // D, a multiple of the 16 outputs of a block
    int queries;
};

constexpr int kOutputs = 2;  // of a warp
constexpr int kProjectionThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kProjectionThreads) projection_kernel(const __grid_constant__ Projection p) {
    const int lane = threadIdx.x % 32;
    const int first = (blockIdx.x * (kProjectionThreads / 32) + threadIdx.x / 32) * kOutputs;
    const T* const hidden = static_cast<const T*>(p.hidden);
    const T* const head = static_cast<const T*>(p.head) + first * p.head_stride;
    float sum[kTile][kOutputs] = {};
    for (int start = lane * 8; start < p.width; start += 256) {
        const auto weight = *reinterpret_cast<const Eight<T>*>(static_cast<const T*>(p.weight) + start);
        float factor[kOutputs][8];
#pragma unroll
        for (int output = 0; output < kOutputs; ++output) {
            const auto loaded = *reinterpret_cast<const Eight<T>*>(head + output * p.head_stride + start);
            for (int i = 0; i < 8; ++i) factor[output][i] = widen(loaded.at[i]) * widen(weight.at[i]);
        }
#pragma unroll
        for (int b = 0; b < kTile; ++b) {
            if (b >= p.queries) continue;
            const auto state = *reinterpret_cast<const Eight<T>*>(hidden + b * p.hidden_stride + start);
#pragma unroll
            for (int output = 0; output < kOutputs; ++output) {
                for (int i = 0; i < 8; ++i) sum[b][output] += widen(state.at[i]) * factor[output][i];
            }
        }
    }
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
        if (b >= p.queries) continue;
#pragma unroll
        for (int output = 0; output < kOutputs; ++output) {
            for (int distance = 1; distance < 32; distance *= 2) sum[b][output] += xor_lanes(sum[b][output], distance);
            if (lane == 0) p.out[b * p.outputs + first + output] = sum[b][output];
        }
    }
}

}  // namespace vsr1
