// The inner loops compiled for every instruction set, and which of them this processor has.

#include "instruction_sets.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vsr1/corpus_scan.h"

// Keeps the compiler from reading a value again and again from memory, where the loads of a tile would outnumber its products.
#if defined(__x86_64__)
#define VSR1_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define VSR1_IN_REGISTER(v)
#endif

#define VSR1_ISA portable
#define VSR1_TARGET
#define VSR1_LANES 4
#define VSR1_REGISTERS 16
#include "kernels.inl"
#undef VSR1_ISA
#undef VSR1_TARGET
#undef VSR1_LANES
#undef VSR1_REGISTERS

#if defined(__x86_64__)
#define VSR1_ISA avx2
#define VSR1_TARGET __attribute__((target("avx2,fma")))
#define VSR1_LANES 8
#define VSR1_REGISTERS 16
#include "kernels.inl"
#undef VSR1_ISA
#undef VSR1_TARGET
#undef VSR1_LANES
#undef VSR1_REGISTERS

#define VSR1_ISA avx512
#define VSR1_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define VSR1_LANES 16
#define VSR1_REGISTERS 32
#include "kernels.inl"
#endif

namespace vsr1 {
namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
    bool present;
};

// The table of instruction sets, best first.
const std::vector<Isa>& isa_table() {
    static const std::vector<Isa> table = {
#if defined(__x86_64__)
        {"avx512", &avx512::kKernels, __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
        {"avx2", &avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {"portable", &portable::kKernels, true},
    };
    return table;
}

std::atomic<const Isa*> chosen_isa{nullptr};

const Isa& current_isa() {
    if (const Isa* isa = chosen_isa.load()) return *isa;
    return *std::find_if(isa_table().begin(), isa_table().end(), [](const Isa& isa) { return isa.present; });
}

}  // namespace

const Kernels& current_kernels() { return *current_isa().kernels; }

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isa_table())
        if (isa.present) names.push_back(isa.name);
    return names;
}

std::string isa() { return current_isa().name; }

void use_isa(const std::string& name) {
    for (const Isa& isa : isa_table()) {
        if (isa.present && isa.name == name) {
            chosen_isa = &isa;
            return;
        }
    }
    throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

}  // namespace vsr1
