// The sweep for few queries (B <= 16): the queries are made, scored against every row, and of the scores group maxima, counts,
// softmax and its weighted sum of the rows are kept, all in one launch and from one read of the corpus.
//
// One block of 16 warps a multiprocessor walks over tiles of 16 rows, which come into a ring of shared memory while earlier ones
// are used. Each warp owns a sixteenth of D, of the queries (as matrix fragments in registers) and of the accumulator `expected`
// (16 x D floats, spread over the registers of the whole block). A tile is used twice where it lies:
//   1. every warp multiplies its slice of queries and rows; the 16 partial scores are added in shared memory, always in the same
//      order, so a score depends on its query and row alone;
//   2. 256 threads, one a score, keep count, group maxima and the running softmax as in flash attention;
//   3. every warp adds weights x rows to its slice of the accumulator, shrunk first if the highest score rose.
// Before all that, behind the first copies, every block makes all queries: a warp each, in the same order everywhere, so all blocks
// have the same bits. Where a positive is known its row goes first, as line b of a tile of its own: a copy of it ties.
// Two tiles make a group of 32 rows, whose best row, its number and the runner-up are what the top-k needs (kernels/corpus_scan.py).
// Tiles go to blocks by their number, so the result is the same in every run. What bounds it is reading the rows.

#pragma once

#include "instructions.cuh"

namespace vsr1 {

struct Sweep {
    const void* query;      // (B, D) to score, or what to refine; unused with `projected`
    const void* rows;       // (N, D), 16-byte aligned
    const Id* exclude;      // (B, E) or null
    const Id* positive;     // (B,) or null
    void* refined;          // (B, D) or null: the refined query, of length 1; null scores `query` as it is
    const float* projected; // (B, D) or null: refined in place of `query`
    const void* weight;     // (D,) or null: components are multiplied by it before they are refined
    const void* soft;       // (B, n, D) or null
    const float* gate;      // (B,) or (1,), or null for gate_value
    float* maxima;          // (B, groups)
    int* runner_up;         // (B, groups): runner-up's score, in the low 5 bits which row won
    int* nan_count;         // (B,), added to
    int* greater;           // (B,), added to; with positive
    float* positive_score;  // (B,): NaN where positive is -1
    float* peak;            // (blocks, B) or null
    float* mass;            // (blocks, B)
    float* partial;         // (blocks, B, D) or null: sum of exp((score - peak) / temperature) x row
    Id query_stride;
    Id row_stride;
    Id row_count;
    Id exclude_width;
    float slope;            // log2(e) / temperature
    float gate_value;
    int gate_stride;        // 1, or 0 where one gate serves all
    int soft_count;
    int queries;
};

constexpr int kWeightPitch = kTile + kPad;

template <typename T, int kDim, int kStages>
struct SharedMemory {
    alignas(128) T stages[kStages * kTile * (kDim + kPad)];
    float partials[kWarps * kTile * kTile];
    T weights[kTile * kWeightPitch];
    float scales[kTile];
    float bars[kTile];  // what counts as above the positive
    float peaks[kTile];
    float masses[kTile * kTile];
    int greater[kTile];
    Best groups[kTile];
    unsigned excluded[Exclusions::kWords];
    unsigned long long full[kStages];
};

// Writes the queries to a tile of shared memory, zeros behind the last; block 0 also hands out what was refined. A warp a query.
template <typename T, int kDim>
__device__ __noinline__ void make_query(const Sweep& s, T* tile) {
    constexpr int kChunks = kDim / 256;
    const int lane = threadIdx.x % 32, b = threadIdx.x / 32;
    T* const line = tile + b * (kDim + kPad) + lane * 8;
    const T* const query = static_cast<const T*>(s.query) + b * s.query_stride + lane * 8;
    if (b >= s.queries || !s.refined) {
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            *reinterpret_cast<Eight<T>*>(line + chunk * 256) =
                b < s.queries ? *reinterpret_cast<const Eight<T>*>(query + chunk * 256) : Eight<T>{};
        }
        return;
    }
    const T* const soft = static_cast<const T*>(s.soft) + static_cast<Id>(b) * s.soft_count * kDim + lane * 8;
    const float weight = share(s.gate ? s.gate[b * s.gate_stride] : s.gate_value, s.soft_count);  // of a soft token
    float values[kChunks][8], squares = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        float sum[8] = {};
#pragma unroll 2
        for (int token = 0; token < s.soft_count; ++token) {
            const auto loaded = *reinterpret_cast<const Eight<T>*>(soft + token * kDim + chunk * 256);
            for (int i = 0; i < 8; ++i) sum[i] += widen(loaded.at[i]);
        }
        const int component = lane * 8 + chunk * 256;
        float base[8];
        if (s.projected) {
            const auto loaded = *reinterpret_cast<const Eight<float>*>(s.projected + b * kDim + component);
            for (int i = 0; i < 8; ++i) base[i] = loaded.at[i];
        } else {
            const auto loaded = *reinterpret_cast<const Eight<T>*>(query + chunk * 256);
            for (int i = 0; i < 8; ++i) base[i] = widen(loaded.at[i]);
        }
        if (s.weight) {
            const auto loaded = *reinterpret_cast<const Eight<T>*>(static_cast<const T*>(s.weight) + component);
            for (int i = 0; i < 8; ++i) base[i] *= widen(loaded.at[i]);
        }
        for (int i = 0; i < 8; ++i) {
            values[chunk][i] = base[i] + weight * sum[i];
            squares += values[chunk][i] * values[chunk][i];
        }
    }
    for (int distance = 1; distance < 32; distance *= 2) squares += xor_lanes(squares, distance);
    const float shrink = 1.0f / length(squares);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        Eight<T> rounded;
        for (int i = 0; i < 8; ++i) narrow(values[chunk][i] * shrink, rounded.at[i]);
        *reinterpret_cast<Eight<T>*>(line + chunk * 256) = rounded;
        if (blockIdx.x == 0) {
            *reinterpret_cast<Eight<T>*>(static_cast<T*>(s.refined) + b * kDim + lane * 8 + chunk * 256) = rounded;
        }
    }
}

// Where a thread stands: in its block, in its warp, and at which corner of a 16 x 16 left factor of a product.
struct Place {
    int thread, lane, warp, line, column;

    __device__ static Place of_this_thread() {
        const int thread = fresh_thread(), lane = thread % 32;
        return {thread, lane, thread / 32, lane % 8 + lane / 8 % 2 * 8, lane / 16 * 8};
    }
};

template <typename T, int kSlice, int kStages>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(const __grid_constant__ Sweep s) {
    constexpr int kDim = kWarps * kSlice;
    constexpr int kPitch = kDim + kPad;
    constexpr int kSteps = kSlice / 16;
    using Shared = SharedMemory<T, kDim, kStages>;
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Ring<T, kDim, kStages> ring{shared.stages, shared.full};

    const Walk walk{s.row_count, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
    // Step 0 may be the tile of the positives, which is tile -1.
    const int lead = s.positive ? 1 : 0, steps = walk.tiles() + lead;
    const auto address = [&](int step, int line) {
        Id row;
        if (step < lead) {
            row = line < s.queries && s.positive[line] >= 0 ? s.positive[line] : 0;
        } else {
            row = walk.readable_row(step - lead, line);
        }
        return static_cast<const T*>(s.rows) + row * s.row_stride;
    };

    ring.open();
    for (int step = 0; step < kStages - 1; ++step) ring.ask(step, step < steps, address);

    if (threadIdx.x < Exclusions::kWords) shared.excluded[threadIdx.x] = 0;
    if (threadIdx.x < kTile * kTile) shared.masses[threadIdx.x] = 0.0f;
    if (threadIdx.x < kTile) {
        shared.bars[threadIdx.x] = INFINITY;
        shared.peaks[threadIdx.x] = -INFINITY;
        shared.greater[threadIdx.x] = 0;
    }
    make_query<T, kDim>(s, ring.stage(kStages - 1));
    ring.hand_over();
    __syncthreads();
    for (Id entry = threadIdx.x; s.exclude && entry < s.queries * s.exclude_width; entry += kThreads) {
        const int turn = Exclusions::turn(walk, s.exclude[entry]);
        if (turn >= 0) atomicOr(shared.excluded + Exclusions::bit(turn) / 32, 1u << Exclusions::bit(turn) % 32);
    }
    unsigned queries[kSteps][4];
    {
        const Place at = Place::of_this_thread();
        const T* corner = ring.stage(kStages - 1) + at.line * kPitch + at.warp * kSlice + at.column;
#pragma unroll
        for (int slice = 0; slice < kSteps; ++slice) load_fragments(queries[slice], corner + slice * 16);
    }
    float sum[2 * kSteps][4] = {};
    __syncthreads();

    for (int step = 0; step < steps; ++step) {
        const Place at = Place::of_this_thread();
        const int tile = step - lead;
        T* const block = ring.stage(step);
        ring.wait(step);
        if (ring.kAsksBehindWait) ring.ask(step + kStages - 1, step + kStages - 1 < steps, address);
        {
            float part[2][4] = {};
            const T* corner = block + (at.lane % 8 + at.lane / 16 * 8) * kPitch + at.warp * kSlice + at.lane / 8 % 2 * 8;
#pragma unroll
            for (int slice = 0; slice < kSteps; ++slice) {
                unsigned loaded[4];
                load_fragments(loaded, corner + slice * 16);
                multiply(T{}, part[0], queries[slice], loaded[0], loaded[1]);
                multiply(T{}, part[1], queries[slice], loaded[2], loaded[3]);
            }
            float* out = shared.partials + at.warp * kTile * kTile + at.lane / 4 * kTile + at.lane % 4 * 2;
            for (int half = 0; half < 2; ++half) {
                *reinterpret_cast<float2*>(out + half * 8) = make_float2(part[half][0], part[half][1]);
                *reinterpret_cast<float2*>(out + half * 8 + 8 * kTile) = make_float2(part[half][2], part[half][3]);
            }
        }
        __syncthreads();  // partial scores are there; nobody reads the tile before this one any more
        if (!ring.kAsksBehindWait) ring.ask(step + kStages - 1, step + kStages - 1 < steps, address);

        // Of the first 256 threads each looks after one query and every 16th row.
        bool unclean = false;
        if (at.thread < kTile * kTile) {
            const int b = at.thread / kTile, member = at.thread % kTile;
            const bool real = b < s.queries;
            float score = 0.0f;
#pragma unroll 8
            for (int part = 0; part < kWarps; ++part) score += shared.partials[part * kTile * kTile + at.thread];
            unclean = !is_finite(score);
            if (tile < 0 && real && member == b) {
                const bool known = s.positive[b] >= 0;
                shared.bars[b] = known && score == score ? score : -INFINITY;
                if (blockIdx.x == 0) s.positive_score[b] = known ? score : INFINITY - INFINITY;
            }
            const Id row = walk.row(tile, member);
            bool counts = real && tile >= 0 && row < s.row_count;
            if (s.exclude && counts && Exclusions::marked(shared.excluded, tile / 2)) {
                counts = !Exclusions::listed(s.exclude + b * s.exclude_width, s.exclude_width, row);
            }
            if (counts && score != score) atomicAdd(s.nan_count + b, 1);
            if (!counts || score != score) score = -INFINITY;
            if (s.positive && counts && score > shared.bars[b] && row != s.positive[b]) atomicAdd(shared.greater + b, 1);

            Best best{score, static_cast<int>(row % kGroup), -INFINITY};
            for (int distance = 1; distance < kTile; distance *= 2) {
                best.join({xor_lanes(best.score, distance), xor_lanes(best.row, distance), xor_lanes(best.second, distance)});
            }
            Softmax running{shared.peaks[b], shared.masses[at.thread]};
            float scale;
            const float weight = running.add(score, best.score, s.slope, scale);
            shared.masses[at.thread] = running.mass;
            __syncwarp();  // all have read the peak
            narrow(weight, shared.weights[b * kWeightPitch + member]);
            if (member == 0) {
                shared.peaks[b] = running.peak;
                shared.scales[b] = scale;
                if (tile % 2 == 0) {
                    shared.groups[b] = best;
                } else if (tile > 0 && real) {
                    best.join(shared.groups[b]);
                    const Id out = b * walk.groups() + walk.group(tile);
                    s.maxima[out] = best.score;
                    s.runner_up[out] = best.packed();
                }
            }
        }
        // Rows with a NaN or an infinity weigh 0 or NaN; 0 x NaN must not spoil the other rows.
        if (__syncthreads_or(unclean && s.partial)) {
#pragma unroll 1
            for (int i = at.thread; i < kTile * kDim; i += kThreads) {
                T& value = block[i / kDim * kPitch + i % kDim];
                if ((value.bits & T::kExponent) == T::kExponent) value.bits = 0;
            }
            ring.hand_over();
            __syncthreads();
        }
        if (s.partial) {
            const float low = shared.scales[at.lane / 4], high = shared.scales[at.lane / 4 + 8];
            if (low != 1.0f || high != 1.0f) {
#pragma unroll
                for (int n = 0; n < 2 * kSteps; ++n) {
                    sum[n][0] *= low, sum[n][1] *= low, sum[n][2] *= high, sum[n][3] *= high;
                }
            }
            unsigned weight[4];
            load_fragments(weight, shared.weights + at.line * kWeightPitch + at.column);
            const T* corner = block + at.line * kPitch + at.warp * kSlice + at.column;
#pragma unroll
            for (int slice = 0; slice < kSteps; ++slice) {
                unsigned loaded[4];
                load_transposed(loaded, corner + slice * 16);
                multiply(T{}, sum[2 * slice], weight, loaded[0], loaded[1]);
                multiply(T{}, sum[2 * slice + 1], weight, loaded[2], loaded[3]);
            }
        }
    }

    __syncthreads();  // the counts in shared memory are complete
    const Place at = Place::of_this_thread();
    if (at.thread < kTile * kTile) {
        const int b = at.thread / kTile;
        float mass = shared.masses[at.thread];
        for (int distance = 1; distance < kTile; distance *= 2) mass += xor_lanes(mass, distance);
        if (at.thread % kTile == 0 && b < s.queries) {
            if (s.peak) {
                s.peak[blockIdx.x * s.queries + b] = shared.peaks[b];
                s.mass[blockIdx.x * s.queries + b] = mass;
            }
            if (s.greater) atomicAdd(s.greater + b, shared.greater[b]);
        }
    }
    if (s.partial) {
        for (int half = 0; half < 2; ++half) {
            const int b = at.lane / 4 + half * 8;
            if (b >= s.queries) continue;
            float* out = s.partial + (static_cast<Id>(blockIdx.x) * s.queries + b) * kDim + at.warp * kSlice + at.lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < 2 * kSteps; ++n) {
                *reinterpret_cast<float2*>(out + n * 8) = make_float2(sum[n][half * 2], sum[n][half * 2 + 1]);
            }
        }
    }
}

}  // namespace vsr1
