// linear_logp on the CPU: what happens to a tile of logits between its matrix products. Rows are shared out among threads; none
// depends on another, so the bits do not depend on the number of threads.

#include "vsr1/linear_logp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "vsr1/corpus_scan.h"
#include "vsr1/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vsr1 {
namespace {

struct RowKernels {
    void (*add_float)(const LogitTile&, const RowSums&, int64_t);
    void (*add_bfloat16)(const LogitTile&, const RowSums&, int64_t);
    void (*differentiate_float)(const LogitTile&, const RowGradient&, int64_t);
    void (*differentiate_bfloat16)(const LogitTile&, const RowGradient&, int64_t);
};

}  // namespace
}  // namespace vsr1

#define VSR1_ISA logp_portable
#define VSR1_TARGET
#define VSR1_LANES 4
#include "linear_logp.inl"

#if defined(__x86_64__)
#define VSR1_ISA logp_avx2
#define VSR1_TARGET __attribute__((target("avx2,fma")))
#define VSR1_LANES 8
#include "linear_logp.inl"

#define VSR1_ISA logp_avx512
#define VSR1_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define VSR1_LANES 16
#include "linear_logp.inl"
#endif

namespace vsr1 {
namespace {

constexpr int64_t kPiece = 1 << 15;  // logits a thread takes at a time: some ten microseconds

// For the instruction set in use; those with matrix registers have AVX-512 too.
const RowKernels& row_kernels() {
#if defined(__x86_64__)
    const std::string set = isa();
    if (set == "amx" || set.starts_with("avx512")) return logp_avx512::kKernels;
    if (set == "avx2") return logp_avx2::kKernels;
#endif
    return logp_portable::kKernels;
}

template <typename Body>
void for_each_row(const LogitTile& tile, const Body& body) {
    const int64_t rows = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, tile.columns));
    parallel_for((tile.rows + rows - 1) / rows, tile.threads, [&](int64_t piece) {
        for (int64_t i = piece * rows; i < std::min(tile.rows, (piece + 1) * rows); ++i) body(i);
    });
}

}  // namespace

void add_logits(const LogitTile& tile, const RowSums& sums) {
    const RowKernels& kernels = row_kernels();
    const auto add = tile.bfloat16 ? kernels.add_bfloat16 : kernels.add_float;
    for_each_row(tile, [&](int64_t i) { add(tile, sums, i); });
}

void logits_to_gradient(const LogitTile& tile, const RowGradient& gradient) {
    const RowKernels& kernels = row_kernels();
    const auto differentiate = tile.bfloat16 ? kernels.differentiate_bfloat16 : kernels.differentiate_float;
    for_each_row(tile, [&](int64_t i) { differentiate(tile, gradient, i); });
}

}  // namespace vsr1
