// The soft-token step in one launch.
//
// What it costs is reading three weight matrices once, 25 MB at H = D = 2048, and between the matrices stand sums over whole rows,
// which all blocks must wait for. Launches of their own would start each matrix anew, its first bytes far away. Here the matrices are
// cut into lines for 128 blocks of one multiprocessor each, and a block's lines of all three fit its shared memory (195 KiB). So
// every block asks for all of them at once, at the start, and the memory is read without a pause from the first byte to the last; the
// sums and the meetings of the grid happen behind that, while later lines are still on their way. Five phases:
//   0  state x first layer            every block its 16 outputs
//   1  LayerNorm, GELU                a block a row
//   2  x second layer
//   3  gate, noise, action, its log-probability, LayerNorm
//   4  x input layer
// A launch runs the phases from `begin` to `end`; with more than one all blocks must run at the same time (a cooperative launch).
//
// The 8 warps of a block share out a product's components, 32 at a time. A lane reads 8 consecutive components where the matrix
// instruction wants two pairs from each half of 16: components come in another order, the same on both sides, which a sum does not mind.
// Partial sums are added in the order of the warps. The noise: noise.cuh.

#pragma once

#include "instructions.cuh"
#include "noise.cuh"

namespace vsr1 {

struct SoftStep {
    const void* state;  // (B, H), of the weights' type; all arrays contiguous and 16-byte aligned
    const void *first, *first_bias;  // (D, H), (D)
    const void *norm, *norm_bias;    // (D)
    const void *second, *second_bias;
    const void *read_norm, *read_norm_bias;
    const void *read, *read_bias;  // (H, D), (H)
    const void *gate, *gate_bias;  // (H), (1) or null
    float* mean;                   // (B, D)
    float* action;                 // (B, D)
    float* logp;                   // (B)
    void* policy_input;            // (B, H)
    float* wide;                   // (B, D): what a product leaves for the row work
    void* narrow;                  // (B, D): what that leaves for the next product
    unsigned long long* meetings;  // how often blocks have met so far; a multiple of their number between launches
    unsigned long long seed;
    Id offset;
    float epsilon, read_epsilon;
    float sigma;        // 0: the action is the mean
    float log_density;  // of an action at its mean
    int rows, width, query_width;  // B, H, D; H and D multiples of 32
    int begin, end;
};

constexpr int kSoftWarps = 8;
constexpr int kSoftThreads = 32 * kSoftWarps;
constexpr int kSlicePad = 32;  // elements between lines: 64 bytes put two lines that are read together on different banks

// One block's part of the step.
template <typename T>
struct SoftBlock {
    const SoftStep& s;
    T* slices;        // 16 lines of each matrix
    float* partials;  // (8 warps, 16 rows, 16 outputs)
    float* sums;      // of the warps

    __device__ SoftBlock(const SoftStep& step, unsigned char* memory) : s(step) {
        slices = reinterpret_cast<T*>(memory);
        partials = reinterpret_cast<float*>(slices + kTile * (s.width + 2 * s.query_width + 3 * kSlicePad));
        sums = partials + kSoftWarps * kTile * kTile;
    }

    __device__ T* second() const { return slices + kTile * (s.width + kSlicePad); }
    __device__ T* read() const { return second() + kTile * (s.query_width + kSlicePad); }

    // Asks for this block's lines of a matrix (outputs, width) as one group of copies.
    __device__ void ask(T* slice, const void* matrix, int outputs, int width, bool wanted) const {
        const int begin = blockIdx.x * kTile;
        if (wanted && begin < outputs) {
            for (int line = 0; line < kTile; ++line) {
                const T* from = static_cast<const T*>(matrix) + static_cast<Id>(begin + line) * width;
                for (int k = threadIdx.x * 8; k < width; k += kSoftThreads * 8) copy_16(slice + line * (width + kSlicePad) + k, from + k);
            }
        }
        close_copies();
    }

    // store(row, output, value) for this block's 16 outputs of left (rows, width) x matrix, the bias added.
    template <typename Store>
    __device__ void multiply_all(const void* left, const T* slice, const void* bias, int outputs, int width, const Store& store) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = blockIdx.x * kTile;
        if (begin >= outputs) return;
        const T* const column = slice + lane / 4 * (width + kSlicePad) + lane % 4 * 8;
        for (int first = 0; first < s.rows; first += kTile) {
            const int low = first + lane / 4, high = low + 8;
            const T* const line = static_cast<const T*>(left) + lane % 4 * 8;
            float sum[2][4] = {};
#pragma unroll 4
            for (int k = warp * 32; k < width; k += kSoftThreads) {
                const Four a = low < s.rows ? load_four(line + static_cast<Id>(low) * width + k) : Four{};
                const Four c = high < s.rows ? load_four(line + static_cast<Id>(high) * width + k) : Four{};
                for (int half = 0; half < 2; ++half) {
                    const Four b = load_four(column + half * 8 * (width + kSlicePad) + k);
                    multiply(T{}, sum[half], {a.at[0], c.at[0], a.at[1], c.at[1]}, b.at[0], b.at[1]);
                    multiply(T{}, sum[half], {a.at[2], c.at[2], a.at[3], c.at[3]}, b.at[2], b.at[3]);
                }
            }
            float* const out = partials + warp * kTile * kTile + lane / 4 * kTile + lane % 4 * 2;
            for (int half = 0; half < 2; ++half) {
                out[half * 8] = sum[half][0], out[half * 8 + 1] = sum[half][1];
                out[half * 8 + 8 * kTile] = sum[half][2], out[half * 8 + 8 * kTile + 1] = sum[half][3];
            }
            __syncthreads();
            const int row = first + threadIdx.x / kTile, output = begin + threadIdx.x % kTile;
            if (row < s.rows) {
                float value = 0.0f;
                for (int part = 0; part < kSoftWarps; ++part) value += partials[part * kTile * kTile + threadIdx.x];
                store(row, output, value + widen(static_cast<const T*>(bias)[output]));
            }
            __syncthreads();
        }
    }

    // The sum over all threads, the same for each of them.
    __device__ float sum_all(float value) const {
        for (int distance = 1; distance < 32; distance *= 2) value += xor_lanes(value, distance);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
        __syncthreads();
        float total = 0.0f;
        for (int warp = 0; warp < kSoftWarps; ++warp) total += sums[warp];
        __syncthreads();
        return total;
    }

    // narrow = finish(LayerNorm of one row of D numbers); a thread's numbers are four in a row, as the noise comes.
    template <typename Finish>
    __device__ void normalise(const float* row, const void* weight, const void* bias, float epsilon, T* out, const Finish& finish) const {
        const int D = s.query_width;
        float sum = 0.0f, squares = 0.0f;
        for (int d = threadIdx.x * 4; d < D; d += kSoftThreads * 4) {
            for (int i = 0; i < 4; ++i) sum += row[d + i];
        }
        const float mean = sum_all(sum) / static_cast<float>(D);
        for (int d = threadIdx.x * 4; d < D; d += kSoftThreads * 4) {
            for (int i = 0; i < 4; ++i) squares += (row[d + i] - mean) * (row[d + i] - mean);
        }
        const float scale = 1.0f / sqrtf(sum_all(squares) / static_cast<float>(D) + epsilon);
        for (int d = threadIdx.x * 4; d < D; d += kSoftThreads * 4) {
            for (int i = 0; i < 4; ++i) {
                const float factor = widen(static_cast<const T*>(weight)[d + i]), shift = widen(static_cast<const T*>(bias)[d + i]);
                narrow(finish((row[d + i] - mean) * scale * factor + shift), out[d + i]);
            }
        }
    }

    __device__ void activate(int b) const {
        const Id begin = static_cast<Id>(b) * s.query_width;
        normalise(s.wide + begin, s.norm, s.norm_bias, s.epsilon, static_cast<T*>(s.narrow) + begin, [](float x) { return gelu(x); });
    }

    __device__ float opened(int b) const {
        if (!s.gate) return 1.0f;
        const T *const gate = static_cast<const T*>(s.gate), *const state = static_cast<const T*>(s.state) + static_cast<Id>(b) * s.width;
        float sum = 0.0f;
        for (int h = threadIdx.x; h < s.width; h += kSoftThreads) sum += widen(gate[h]) * widen(state[h]);
        return sigmoid(sum_all(sum) + widen(*static_cast<const T*>(s.gate_bias)));
    }

    __device__ void act(int b) const {
        const float gate = opened(b);
        const Id begin = static_cast<Id>(b) * s.query_width;
        float squares = 0.0f;
        for (int d = threadIdx.x * 4; d < s.query_width; d += kSoftThreads * 4) {
            Normals noise{};
            if (s.sigma > 0.0f) noise = normals(s.seed, s.offset + (begin + d) / 4);
            for (int i = 0; i < 4; ++i) {
                const float mean = gate * s.wide[begin + d + i], action = mean + s.sigma * noise.at[i];
                s.mean[begin + d + i] = mean;
                s.action[begin + d + i] = action;
                if (s.sigma > 0.0f) squares += (action - mean) / s.sigma * ((action - mean) / s.sigma);
            }
        }
        const float total = sum_all(squares);
        if (threadIdx.x == 0) s.logp[b] = s.log_density - 0.5f * total / static_cast<float>(s.query_width);
        normalise(
            s.action + begin, s.read_norm, s.read_norm_bias, s.read_epsilon, static_cast<T*>(s.narrow) + begin, [](float x) { return x; });
    }
};

template <typename T>
__global__ void __launch_bounds__(kSoftThreads, 1) soft_step_kernel(const __grid_constant__ SoftStep s) {
    extern __shared__ __align__(128) unsigned char memory[];
    const SoftBlock<T> block(s, memory);
    const int H = s.width, D = s.query_width;
    const auto keep = [&](int row, int output, float value) { s.wide[static_cast<Id>(row) * D + output] = value; };
    const auto hand_out = [&](int row, int output, float value) {
        narrow(value, static_cast<T*>(s.policy_input)[static_cast<Id>(row) * H + output]);
    };
    const auto runs = [&](int phase) { return s.begin <= phase && phase < s.end; };

    block.ask(block.slices, s.first, D, H, runs(0));
    block.ask(block.second(), s.second, D, D, runs(2));
    block.ask(block.read(), s.read, H, D, runs(4));
    for (int phase = s.begin; phase < s.end; ++phase) {
        if (phase > s.begin) meet_grid(s.meetings);
        if (phase == 0) {
            wait_for_copies<2>();
            block.multiply_all(s.state, block.slices, s.first_bias, D, H, keep);
        } else if (phase == 2) {
            wait_for_copies<1>();
            block.multiply_all(s.narrow, block.second(), s.second_bias, D, D, keep);
        } else if (phase == 4) {
            wait_for_copies<0>();
            block.multiply_all(s.narrow, block.read(), s.read_bias, H, D, hand_out);
        } else {
            for (int b = blockIdx.x; b < s.rows; b += gridDim.x) phase == 1 ? block.activate(b) : block.act(b);
        }
    }
    wait_for_copies<0>();
}

}  // namespace vsr1
