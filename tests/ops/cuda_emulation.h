// Runs csrc/cuda/*.cuh on a CPU, in place of instructions.cuh: every thread of a block is a fiber, collectives of a warp and of the
// block meet where the hardware's do, and products and fragments follow the layouts of the PTX manual.
//
// A copy into shared memory spoils its target when it is asked for and delivers only when it is waited for: the earliest and the
// latest moment that the hardware may choose. Fibers take turns in an order given by a seed. A block in which nobody can go on is
// an error.

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __noinline__
#define __grid_constant__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Index {
    int x;
};
struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

constexpr int kMost = 512;

struct Meeting {
    int arrived = 0;
    int64_t turn = 0;
    bool any[2] = {};
};

inline ucontext_t scheduler, fibers[kMost];
inline std::vector<char> stacks;
inline bool done[kMost];
inline int64_t progress;
inline Meeting block, warps[kMost / 32];
inline uint32_t posted[2][kMost][8];
inline int threads;
inline bool threads_copy;  // as before compute capability 9.0; otherwise the bulk copy engine does
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[threadIdx.x], &scheduler); }

inline bool meet(Meeting& meeting, int members, bool vote = false) {
    const int64_t turn = meeting.turn;
    meeting.any[turn % 2] |= vote;
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        meeting.any[(turn + 1) % 2] = false;
        ++meeting.turn;
        ++progress;
    } else {
        while (meeting.turn == turn) yield();
    }
    return meeting.any[turn % 2];
}

// What every lane of the warp posted, once all have; a lane is at most one meeting ahead of another.
inline uint32_t (*post(const uint32_t* words, int count))[8] {
    const int lane = threadIdx.x, first = lane / 32 * 32;
    Meeting& warp = warps[lane / 32];
    auto& page = posted[warp.turn % 2];
    std::copy(words, words + count, page[lane]);
    meet(warp, 32);
    return page + first;
}

inline void enter() {
    body();
    done[threadIdx.x] = true;
    ++progress;
    yield();
}

// Runs one block; false if its threads wait for each other for ever.
inline bool run_block(unsigned seed) {
    constexpr size_t kStack = 1 << 16;
    stacks.resize(kStack * kMost);
    block = {};
    std::vector<int> order(threads);
    for (int thread = 0; thread < threads; ++thread) {
        order[thread] = thread;
        done[thread] = false;
        warps[thread / 32] = {};
        getcontext(&fibers[thread]);
        fibers[thread].uc_stack.ss_sp = stacks.data() + thread * kStack;
        fibers[thread].uc_stack.ss_size = kStack;
        fibers[thread].uc_link = &scheduler;
        makecontext(&fibers[thread], enter, 0);
    }
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    for (int left = threads; left > 0;) {
        const int64_t before = progress;
        for (const int thread : order) {
            if (done[thread]) continue;
            threadIdx.x = thread;
            swapcontext(&scheduler, &fibers[thread]);
            left -= done[thread];
        }
        if (progress == before) return false;
    }
    return true;
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::block, emulation::threads); }
inline bool __syncthreads_or(bool vote) { return emulation::meet(emulation::block, emulation::threads, vote); }
inline void __syncwarp() { emulation::meet(emulation::warps[threadIdx.x / 32], 32); }
inline void atomicAdd(int* target, int value) { *target += value; }
inline void atomicOr(unsigned* target, unsigned value) { *target |= value; }

namespace vsr1 {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kPad = 8;

alignas(128) inline unsigned char memory[232448];

struct Half {
    unsigned short bits;
    static constexpr unsigned short kExponent = 0x7C00;
};

struct Bfloat16 {
    unsigned short bits;
    static constexpr unsigned short kExponent = 0x7F80;
};

template <typename T>
struct alignas(16) Eight {
    T at[8];
};

inline float widen(Half value) {
    _Float16 half;
    memcpy(&half, &value, 2);
    return static_cast<float>(half);
}

inline float widen(Bfloat16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

inline void narrow(float value, Half& to) {
    const _Float16 half = static_cast<_Float16>(value);
    memcpy(&to, &half, 2);
}

inline void narrow(float value, Bfloat16& to) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    to.bits = value != value ? 0x7FFF : static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline int fresh_thread() { return threadIdx.x; }

template <typename T>
T xor_lanes(T value, int distance) {
    uint32_t word;
    memcpy(&word, &value, 4);
    const uint32_t other = emulation::post(&word, 1)[threadIdx.x % 32 ^ distance][0];
    memcpy(&value, &other, 4);
    return value;
}

template <typename T>
float half_of(uint32_t word, int which) {
    return widen(T{static_cast<unsigned short>(word >> 16 * which)});
}

template <typename T>
void multiply(T, float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const uint32_t words[] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto page = emulation::post(words, 6);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const float left = half_of<T>(page[row * 4 + k % 8 / 2][i / 2 + k / 8 * 2], k % 2);
            sum[i] += left * half_of<T>(page[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
        }
    }
}

inline void load_matrices(unsigned (&out)[4], const void* line, bool transposed) {
    uint32_t words[2];
    if (reinterpret_cast<uintptr_t>(line) % 16) abort();
    memcpy(words, &line, 8);
    const auto page = emulation::post(words, 2);
    const int lane = threadIdx.x % 32;
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned short pair[2];
        for (int i = 0; i < 2; ++i) {
            const int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
            const unsigned short* start;
            memcpy(&start, page[matrix * 8 + row], 8);
            pair[i] = start[column];
        }
        memcpy(&out[matrix], pair, 4);
    }
    __syncwarp();  // the hardware's lanes have read before any goes on
}

inline void load_fragments(unsigned (&out)[4], const void* line) { load_matrices(out, line, false); }
inline void load_transposed(unsigned (&out)[4], const void* line) { load_matrices(out, line, true); }

struct alignas(16) Four {
    unsigned at[4];
};

inline Four load_four(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) abort();
    return *static_cast<const Four*>(from);
}

struct Copy {
    void* to;
    const void* from;
};
inline std::vector<std::vector<Copy>> copies[emulation::kMost];  // groups of each thread, the last one open

inline void copy_16(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) abort();
    memset(to, 0xFF, 16);
    auto& groups = copies[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, from});
}

inline void close_copies() {
    auto& groups = copies[threadIdx.x];
    groups.resize(groups.size() + (groups.empty() ? 2 : 1));
}

template <int kLater>
void wait_for_copies() {
    auto& groups = copies[threadIdx.x];
    for (int i = 0; i + kLater + 1 < static_cast<int>(groups.size()); ++i) {
        for (const Copy& copy : groups[i]) memcpy(copy.to, copy.from, 16);
        groups[i].clear();
    }
    if (kLater == 0) groups.clear();
    __syncthreads();
}

inline void meet_grid(unsigned long long*) { abort(); }  // blocks run one after the other: a launch has one phase

template <typename T, int kDim, int kStages>
struct Ring {
    static constexpr int kPitch = kDim + kPad;
    static inline bool& kAsksBehindWait = emulation::threads_copy;

    T* stages;
    unsigned long long* full;

    T* stage(int step) const { return stages + step % kStages * kTile * kPitch; }
    void open() const {
        asked() = 0;
        copies().assign(kStages, {});
        __syncthreads();
    }
    void hand_over() const {}

    template <typename Address>
    void ask(int step, bool wanted, const Address& row) const {
        constexpr int kPieces = kDim / 8;
        if (!wanted) return;
        if (!kAsksBehindWait) {
            if (threadIdx.x != kThreads - 32) return;
            for (int line = 0; line < kTile; ++line) start(step, stage(step) + line * kPitch, row(step, line), kDim);
            asked() = step + 1;
            ++emulation::progress;
            return;
        }
        for (int piece = threadIdx.x; piece < kTile * kPieces; piece += kThreads) {
            const int line = piece / kPieces, component = piece % kPieces * 8;
            start(step, stage(step) + line * kPitch + component, row(step, line) + component, 8);
        }
    }

    void wait(int step) const {
        if (!kAsksBehindWait) {
            while (asked() <= step) emulation::yield();
            deliver(step, -1);
        } else {
            deliver(step, threadIdx.x);
            __syncthreads();
        }
    }

private:
    struct Ordered {
        int step, thread;
        T* to;
        const T* from;
        int count;
    };
    static int& asked() {
        static int steps;
        return steps;
    }
    static std::vector<std::vector<Ordered>>& copies() {
        static std::vector<std::vector<Ordered>> waiting;
        return waiting;
    }
    void start(int step, T* to, const T* from, int count) const {
        if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) abort();
        memset(static_cast<void*>(to), 0xFF, count * sizeof(T));
        copies()[step % kStages].push_back({step, static_cast<int>(threadIdx.x), to, from, count});
    }
    static void deliver(int step, int thread) {
        auto& waiting = copies()[step % kStages];
        const auto rest = std::stable_partition(waiting.begin(), waiting.end(), [&](const Ordered& copy) {
            return copy.step != step || (thread >= 0 && copy.thread != thread);
        });
        for (auto copy = rest; copy != waiting.end(); ++copy) memcpy(static_cast<void*>(copy->to), copy->from, copy->count * sizeof(T));
        waiting.erase(rest, waiting.end());
    }
};

}  // namespace vsr1

namespace emulation {

// Runs `kernel` for blocks of so many threads, one after the other, in an order that the seed says, each in spoilt memory; false
// where threads wait for each other for ever.
inline bool run_grid(std::function<void()> kernel, int blocks, int block_threads, unsigned seed) {
    body = std::move(kernel);
    threads = block_threads;
    gridDim.x = blocks;
    std::vector<int> order(blocks);
    for (int one = 0; one < blocks; ++one) order[one] = one;
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    for (const int one : order) {
        blockIdx.x = one;
        memset(vsr1::memory, 0xFF, sizeof(vsr1::memory));
        if (!run_block(seed + one)) return false;
    }
    return true;
}

}  // namespace emulation
