// The six operations of AMX's matrix registers, and the permission to use them. Registers 0 to 5 hold sums, 6 rows, 7 queries.
// Written as assembly because compilers' intrinsics neither take a register number from a loop nor promise to be ordered with
// ordinary writes to the memory that they read.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace vsr1::amx {

#define VSR1_SUMS(t, instruction, ...)                                                              \
    switch (t) {                                                                                    \
        case 0: asm volatile(instruction "%%tmm0" __VA_ARGS__); break;                              \
        case 1: asm volatile(instruction "%%tmm1" __VA_ARGS__); break;                              \
        case 2: asm volatile(instruction "%%tmm2" __VA_ARGS__); break;                              \
        case 3: asm volatile(instruction "%%tmm3" __VA_ARGS__); break;                              \
        case 4: asm volatile(instruction "%%tmm4" __VA_ARGS__); break;                              \
        default: asm volatile(instruction "%%tmm5" __VA_ARGS__);                                    \
    }

class Tiles {
   public:
    // All registers with 16 rows of 64 bytes. They belong to the thread while this lives.
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        static_assert(sizeof shape == 64);
        asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    inline __attribute__((always_inline)) void zero(int t) { VSR1_SUMS(t, "tilezero ", ::) }
    inline __attribute__((always_inline)) void load_rows(const void* data, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(data), "r"(stride) : "memory");
    }
    inline __attribute__((always_inline)) void load_queries(const void* data) {
        asm volatile("tileloadd (%0,%1,1), %%tmm7" ::"r"(data), "r"(int64_t{64}) : "memory");
    }

    // sums[t] (row, query) += products of bfloat16, in float32.
    inline __attribute__((always_inline)) void add_pairs(int t) { VSR1_SUMS(t, "tdpbf16ps %%tmm7, %%tmm6, ", ::) }
    // sums[t] (row, query) += products of int8, in int32.
    inline __attribute__((always_inline)) void add_bytes(int t) { VSR1_SUMS(t, "tdpbssd %%tmm7, %%tmm6, ", ::) }

    inline __attribute__((always_inline)) void store(int t, void* out) {
        VSR1_SUMS(t, "tilestored ", ", (%0,%1,1)" ::"r"(out), "r"(int64_t{64}) : "memory")
    }
};

#undef VSR1_SUMS

// Whether the processor has AMX for bfloat16 and int8, and the kernel lets this process use its registers.
inline bool granted() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace vsr1::amx
