// The sweep for few queries (B <= 16) on Hopper: scores, group maxima, softmax and its weighted sum of the rows, all from one
// read of the corpus.
//
// One block of 16 warps a multiprocessor walks over tiles of 16 rows, which the bulk copy engine brings into a ring of shared
// memory two tiles ahead. Each warp owns a sixteenth of D, of the queries (as matrix fragments in registers) and of the
// accumulator `expected` (16 x D floats, spread over the registers of the whole block). A tile is used twice where it lies:
//   1. every warp multiplies its slice of queries and rows; the 16 partial scores are added in shared memory, always in the same
//      order, so a score depends on its query and row alone;
//   2. 256 threads, one a score, keep count, group maxima and the running softmax as in flash attention;
//   3. every warp adds weights x rows to its slice of the accumulator, shrunk first if the highest score rose.
// Two tiles make a group of 32 rows, whose best row, its number and the runner-up are what the top-k needs (kernels/corpus_scan.py).
// Tiles go to blocks by their number, so the result is the same in every run. What bounds it is reading the rows.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

struct Sweep {
    const void* query;         // (B, D), contiguous
    const void* rows;          // (N, D), 16-byte aligned
    const int64_t* exclude;    // (B, E)
    const int64_t* positive;   // (B,) or null
    const float* bar;          // (B,): what counts as above the positive
    float* maxima;             // (B, groups) or null
    int32_t* runner_up;        // (B, groups): runner-up's score, in the low 5 bits which row won
    int32_t* nan_count;        // (B,) or null, added to
    int32_t* greater;          // (B,) or null, added to
    float* peak;               // (blocks, B) or null
    float* mass;               // (blocks, B)
    float* partial;            // (blocks, B, D) or null: sum of exp((score - peak) / temperature) x row
    float* own;                // (B,) or null: the score of query b with row b, nothing else
    int64_t row_stride;
    int64_t row_count;
    int64_t exclude_width;
    float temperature;
    int32_t queries;
    int32_t dim;
    int32_t blocks;
    int32_t bfloat16;
};

namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;     // rows in a tile, and queries: one matrix fragment of each
constexpr int kGroup = 32;    // rows that share one maximum
constexpr int kStages = 3;    // tiles in shared memory
constexpr int kPad = 8;       // elements between rows: 16 bytes put the 8 rows of a fragment on different banks
constexpr int kWeightPitch = kTile + kPad;

template <typename T>
__device__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

__device__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ void load_fragments(uint32_t (&out)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

__device__ void load_transposed(uint32_t (&out)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

__device__ void wait_for(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n .reg .pred done;\n again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra again;\n}"
        ::"r"(barrier), "r"(parity)
        : "memory");
}

// The best of two sets of rows, the lower number first among equals, and the best of the rest.
struct Best {
    float score;
    int row;
    float second;

    __device__ void join(const Best& other) {
        if (other.score > score || (other.score == score && other.row < row)) {
            second = fmaxf(other.second, score);
            score = other.score;
            row = other.row;
        } else {
            second = fmaxf(second, other.score);
        }
    }
};

template <typename T, int kSlice>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(const Sweep s) {
    constexpr int kDim = kWarps * kSlice;
    constexpr int kPitch = kDim + kPad;
    constexpr int kSteps = kSlice / 16;
    extern __shared__ __align__(128) unsigned char memory[];
    T* const stages = reinterpret_cast<T*>(memory);
    float* const partials = reinterpret_cast<float*>(stages + kStages * kTile * kPitch);
    T* const weights = reinterpret_cast<T*>(partials + kWarps * kTile * kTile);
    float* const scales = reinterpret_cast<float*>(weights + kTile * kWeightPitch);
    uint64_t* const full = reinterpret_cast<uint64_t*>(scales + kTile);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T* const query = static_cast<const T*>(s.query);
    const T* const rows = static_cast<const T*>(s.rows);
    const int64_t groups = (s.row_count + kGroup - 1) / kGroup;
    const int tiles = 2 * static_cast<int>((groups - blockIdx.x + gridDim.x - 1) / gridDim.x);
    const auto first_row = [&](int tile) { return (blockIdx.x + int64_t{tile / 2} * gridDim.x) * kGroup + tile % 2 * kTile; };

    // The last warp, which has no score to look after, asks for tiles; rows past the end are the last one again.
    const auto ask = [&](int tile) {
        if (warp != kWarps - 1 || tile >= tiles) return;
        const uint32_t barrier = shared_address(full + tile % kStages);
        if (lane == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kTile * kDim * 2) : "memory");
        }
        __syncwarp();
        if (lane < kTile) {
            const int64_t row = min(first_row(tile) + lane, s.row_count - 1);
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(shared_address(stages + (tile % kStages * kTile + lane) * kPitch)), "l"(rows + row * s.row_stride),
                         "r"(kDim * 2), "r"(barrier)
                         : "memory");
        }
    };

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + stage)) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    for (int tile = 0; tile < kStages - 1; ++tile) ask(tile);

    uint32_t queries[kSteps][4];
    for (int step = 0; step < kSteps; ++step) {
        for (int part = 0; part < 4; ++part) {
            const int b = lane / 4 + part % 2 * 8, d = warp * kSlice + step * 16 + lane % 4 * 2 + part / 2 * 8;
            queries[step][part] = b < s.queries ? *reinterpret_cast<const uint32_t*>(query + b * kDim + d) : 0;
        }
    }
    float sum[2 * kSteps][4] = {};

    // Of the first 256 threads each looks after one query and every 16th row.
    const int b = threadIdx.x / kTile % kTile, member = threadIdx.x % kTile;
    const bool scores = threadIdx.x < kTile * kTile, real = b < s.queries;
    const float slope = 1.4426950408889634f / s.temperature;
    float peak = -INFINITY, mass = 0.0f;
    int greater = 0;
    Best group{};

    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kStages;
        T* const block = stages + stage * kTile * kPitch;
        wait_for(shared_address(full + stage), tile / kStages % 2);
        {
            float part[2][4] = {};
            const T* corner = block + (lane % 8 + lane / 16 * 8) * kPitch + warp * kSlice + lane / 8 % 2 * 8;
            for (int step = 0; step < kSteps; ++step) {
                uint32_t loaded[4];
                load_fragments(loaded, shared_address(corner + step * 16));
                multiply<T>(part[0], queries[step], loaded[0], loaded[1]);
                multiply<T>(part[1], queries[step], loaded[2], loaded[3]);
            }
            float* out = partials + warp * kTile * kTile + lane / 4 * kTile + lane % 4 * 2;
            for (int half = 0; half < 2; ++half) {
                *reinterpret_cast<float2*>(out + half * 8) = make_float2(part[half][0], part[half][1]);
                *reinterpret_cast<float2*>(out + half * 8 + 8 * kTile) = make_float2(part[half][2], part[half][3]);
            }
        }
        __syncthreads();      // partial scores are there; nobody reads the tile before this one any more
        ask(tile + kStages - 1);

        bool unclean = false;
        if (scores) {
            float score = 0.0f;
            for (int part = 0; part < kWarps; ++part) score += partials[part * kTile * kTile + threadIdx.x];
            const int64_t row = first_row(tile) + member;
            unclean = !(fabsf(score) < INFINITY);
            if (s.own && real && row == b) s.own[b] = score;
            bool counts = row < s.row_count;
            for (int64_t entry = 0; real && entry < s.exclude_width; ++entry) {
                counts = counts && s.exclude[b * s.exclude_width + entry] != row;
            }
            if (s.nan_count && real && counts && isnan(score)) atomicAdd(s.nan_count + b, 1);
            if (!counts || isnan(score)) score = -INFINITY;
            if (s.greater && real) greater += score > s.bar[b] && row != s.positive[b];

            Best best{score, static_cast<int>(row % kGroup), -INFINITY};
            for (int distance = 1; distance < kTile; distance *= 2) {
                best.join({__shfl_xor_sync(~0u, best.score, distance), __shfl_xor_sync(~0u, best.row, distance),
                           __shfl_xor_sync(~0u, best.second, distance)});
            }
            const float raised = fmaxf(peak, best.score), level = raised == -INFINITY ? 0.0f : raised;
            if (tile % 2 == 0) {
                group = best;
            } else {
                group.join(best);
                if (s.maxima && member == 0 && real) {
                    const int64_t out = b * groups + row / kGroup;
                    s.maxima[out] = group.score;
                    s.runner_up[out] = (__float_as_int(group.second) & -kGroup) | group.row;
                }
            }
            const float scale = peak == raised ? 1.0f : peak == -INFINITY ? 0.0f : exp2f((peak - level) * slope);
            const float weight = exp2f((score - level) * slope);
            mass = mass * scale + weight;
            peak = raised;
            weights[b * kWeightPitch + member] = static_cast<T>(weight);
            if (member == 0) scales[b] = scale;
        }
        // Rows with a NaN or an infinity weigh 0 or NaN; 0 x NaN must not spoil the other rows.
        if (__syncthreads_or(unclean)) {
            constexpr uint16_t kExponent = std::is_same_v<T, __half> ? 0x7C00 : 0x7F80;
            uint16_t* const bits = reinterpret_cast<uint16_t*>(block);
            for (int i = threadIdx.x; i < kTile * kPitch; i += kThreads) {
                if (i % kPitch < kDim && (bits[i] & kExponent) == kExponent) bits[i] = 0;
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncthreads();
        }
        if (s.partial) {
            const float low = scales[lane / 4], high = scales[lane / 4 + 8];
            if (low != 1.0f || high != 1.0f) {
                for (int n = 0; n < 2 * kSteps; ++n) {
                    sum[n][0] *= low, sum[n][1] *= low, sum[n][2] *= high, sum[n][3] *= high;
                }
            }
            uint32_t weight[4];
            const int line = lane % 8 + lane / 8 % 2 * 8, column = lane / 16 * 8;
            load_fragments(weight, shared_address(weights + line * kWeightPitch + column));
            const T* corner = block + line * kPitch + warp * kSlice + column;
            for (int step = 0; step < kSteps; ++step) {
                uint32_t loaded[4];
                load_transposed(loaded, shared_address(corner + step * 16));
                multiply<T>(sum[2 * step], weight, loaded[0], loaded[1]);
                multiply<T>(sum[2 * step + 1], weight, loaded[2], loaded[3]);
            }
        }
    }

    if (scores) {
        for (int distance = 1; distance < kTile; distance *= 2) {
            mass += __shfl_xor_sync(~0u, mass, distance);
            greater += __shfl_xor_sync(~0u, greater, distance);
        }
        if (member == 0 && real) {
            if (s.peak) s.peak[blockIdx.x * s.queries + b] = peak, s.mass[blockIdx.x * s.queries + b] = mass;
            if (s.greater) atomicAdd(s.greater + b, greater);
        }
    }
    if (s.partial) {
        for (int half = 0; half < 2; ++half) {
            const int line = lane / 4 + half * 8;
            if (line >= s.queries) continue;
            float* out = s.partial + (int64_t{blockIdx.x} * s.queries + line) * kDim + warp * kSlice + lane % 4 * 2;
            for (int n = 0; n < 2 * kSteps; ++n) {
                *reinterpret_cast<float2*>(out + n * 8) = make_float2(sum[n][half * 2], sum[n][half * 2 + 1]);
            }
        }
    }
}

template <typename T, int kSlice>
cudaError_t launch(const Sweep& s, cudaStream_t stream) {
    constexpr int kPitch = kWarps * kSlice + kPad;
    constexpr int kBytes = kStages * kTile * kPitch * 2 + kWarps * kTile * kTile * 4 + kTile * kWeightPitch * 2 + kTile * 4 + kStages * 8;
    const auto kernel = sweep_kernel<T, kSlice>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    kernel<<<s.blocks, kThreads, kBytes, stream>>>(s);
    return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Sweep& s, cudaStream_t stream) {
    switch (s.dim) {
        case 1024: return launch<T, 64>(s, stream);
        case 1536: return launch<T, 96>(s, stream);
        case 2048: return launch<T, 128>(s, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

// Starts the sweep on `stream`; null, or the CUDA error in words.
extern "C" const char* vsr1_corpus_scan(const Sweep* sweep, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const cudaError_t error = sweep->bfloat16 ? launch<__nv_bfloat16>(*sweep, on) : launch<__half>(*sweep, on);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
