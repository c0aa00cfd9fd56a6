// Which of the instruction sets this processor has, and which one is in use.

#include "instruction_sets.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "vsr1/corpus_scan.h"

#if defined(__x86_64__)
#include "amx_tiles.h"
#endif

namespace vsr1 {
namespace {

struct Isa {
    const char* name;
    Kernels kernels;
    bool present;
};

// The table of instruction sets, best first; the last one is never chosen unasked.
const std::vector<Isa>& isa_table() {
    static const std::vector<Isa> table = [] {
        std::vector<Isa> sets;
#if defined(__x86_64__)
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
        const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
        sets.push_back({"amx", amx::kernels(), bf16 && amx::granted()});
        sets.push_back({"avx512_bf16", avx512_bf16::kKernels, bf16});
        sets.push_back({"avx512_vnni", avx512_vnni::kKernels, vnni});
        sets.push_back({"avx512", avx512::kKernels, avx512});
        sets.push_back({"avx2", avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
        sets.push_back({"portable", portable::kKernels, true});
        sets.push_back({"emulated", emulated::kernels(), false});
        return sets;
    }();
    return table;
}

std::atomic<const Isa*> chosen_isa{nullptr};

const Isa& current_isa() {
    if (const Isa* isa = chosen_isa.load()) return *isa;
    return *std::find_if(isa_table().begin(), isa_table().end(), [](const Isa& isa) { return isa.present; });
}

}  // namespace

const Kernels& current_kernels() { return current_isa().kernels; }

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isa_table())
        if (isa.present) names.push_back(isa.name);
    return names;
}

std::string isa() { return current_isa().name; }

void use_isa(const std::string& name) {
    for (const Isa& isa : isa_table()) {
        if (isa.name == name && (isa.present || &isa == &isa_table().back())) {
            chosen_isa = &isa;
            return;
        }
    }
    throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

}  // namespace vsr1
