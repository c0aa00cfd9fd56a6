// The instructions that C++ has no words for: half types, matrix fragments, and copies into shared memory that do not wait.
//
// Copies come in two makes behind one `Ring` of tiles. On compute capability 9.0 and newer the bulk copy engine brings whole rows
// at one lane's request and reports to a barrier in shared memory. Before, every thread of the block copies its 16-byte pieces with
// cp.async and waits for its own, so a barrier of the block must follow: there a tile is asked for right behind it.

#pragma once

#include "arithmetic.cuh"

namespace vsr1 {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kPad = 8;  // elements between rows: 16 bytes put the 8 rows of a fragment on different banks

struct Half {
    unsigned short bits;
    static constexpr unsigned short kExponent = 0x7C00;
};

struct Bfloat16 {
    unsigned short bits;
    static constexpr unsigned short kExponent = 0x7F80;
};

// What one thread reads or writes at once.
template <typename T>
struct alignas(16) Eight {
    T at[8];
};

__device__ inline float widen(Half value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

__device__ inline float widen(Bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

__device__ inline void narrow(float value, Half& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value)); }

__device__ inline void narrow(float value, Bfloat16& to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value)); }

// threadIdx.x, asked of the hardware again: what is derived from it inside a loop is then not kept in registers across the loop.
__device__ inline int fresh_thread() {
    int number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
}

__device__ inline unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }

__device__ inline float xor_lanes(float value, int distance) { return __shfl_xor_sync(~0u, value, distance); }
__device__ inline int xor_lanes(int value, int distance) { return __shfl_xor_sync(~0u, value, distance); }

// sum (16 x 8) += a (16 x 16) x b (16 x 8)
__device__ inline void multiply(Bfloat16, float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply(Half, float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of half types; lane l names row l % 8 of matrix l / 8.
__device__ inline void load_fragments(unsigned (&out)[4], const void* line) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(line))
                 : "memory");
}

__device__ inline void load_transposed(unsigned (&out)[4], const void* line) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(line))
                 : "memory");
}

struct alignas(16) Four {
    unsigned at[4];
};

__device__ inline Four load_four(const void* from) { return *static_cast<const Four*>(from); }

// 16 bytes into shared memory, without waiting; a thread's copies form groups.
__device__ inline void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All threads' copies but those of the last kLater groups have arrived.
template <int kLater>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
    __syncthreads();
}

// No block goes on before all have come, and each then sees what the others wrote. They must run at the same time, and `met` must
// be a multiple of their number before the first meeting; it counts up for ever, in 64 bits.
__device__ inline void meet_grid(unsigned long long* met) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        const unsigned long long blocks = gridDim.x, goal = (atomicAdd(met, 1ull) / blocks + 1) * blocks;
        unsigned long long seen;
        do {
            asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(met) : "memory");
        } while (seen < goal);
        __threadfence();
    }
    __syncthreads();
}

// kStages tiles of 16 rows; step s lies in stage s % kStages. Every thread calls every function, ask() for one step after the other.
template <typename T, int kDim, int kStages>
struct Ring {
    static constexpr int kPitch = kDim + kPad;

    T* stages;
    unsigned long long* full;  // one barrier a stage

    __device__ T* stage(int step) const { return stages + step % kStages * kTile * kPitch; }

#if __CUDA_ARCH__ >= 900
    static constexpr bool kAsksBehindWait = false;

    __device__ void open() const {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + stage)) : "memory");
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        hand_over();
        __syncthreads();
    }

    // What this thread wrote into a stage comes before what the copy engine will write there, once a barrier of the block follows.
    __device__ void hand_over() const { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

    // The last warp asks: it has no score to look after.
    template <typename Address>
    __device__ void ask(int step, bool wanted, const Address& row) const {
        const int thread = fresh_thread(), lane = thread % 32;
        if (thread / 32 != kWarps - 1 || !wanted) return;
        const unsigned barrier = shared_address(full + step % kStages);
        if (lane == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kTile * kDim * 2) : "memory");
        }
        __syncwarp();
        if (lane < kTile) {
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                         ::"r"(shared_address(stage(step) + lane * kPitch)), "l"(row(step, lane)), "r"(kDim * 2), "r"(barrier)
                         : "memory");
        }
    }

    __device__ void wait(int step) const {
        asm volatile(
            "{\n .reg .pred done;\n again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra again;\n}"
            ::"r"(shared_address(full + step % kStages)), "r"(step / kStages % 2)
            : "memory");
    }
#else
    static constexpr bool kAsksBehindWait = true;

    __device__ void open() const {}
    __device__ void hand_over() const {}

    template <typename Address>
    __device__ void ask(int step, bool wanted, const Address& row) const {
        constexpr int kPieces = kDim / 8;
        if (wanted) {
#pragma unroll 2
            for (int piece = fresh_thread(); piece < kTile * kPieces; piece += kThreads) {
                const int line = piece / kPieces, component = piece % kPieces * 8;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                             ::"r"(shared_address(stage(step) + line * kPitch + component)), "l"(row(step, line) + component)
                             : "memory");
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    __device__ void wait(int) const {
        asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
        __syncthreads();
    }
#endif
};

}  // namespace vsr1
