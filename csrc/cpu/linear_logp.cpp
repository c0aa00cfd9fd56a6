// linear_logp on the CPU: what happens to a tile of logits between its matrix products. Rows are shared out among threads; none
// depends on another, so the bits do not depend on the number of threads.

#include "vsr1/linear_logp.h"

#include <algorithm>

#include "instruction_sets.h"
#include "vsr1/parallel.h"

namespace vsr1 {
namespace {

constexpr int64_t kPiece = 1 << 15;  // logits a thread takes at a time: some ten microseconds

template <typename Body>
void for_each_row(const LogitTile& tile, const Body& body) {
    const int64_t rows = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, tile.columns));
    parallel_for((tile.rows + rows - 1) / rows, tile.threads, [&](int64_t piece) {
        for (int64_t i = piece * rows; i < std::min(tile.rows, (piece + 1) * rows); ++i) body(i);
    });
}

}  // namespace

void add_logits(const LogitTile& tile, const RowSums& sums) {
    const Kernels& kernels = current_kernels();
    for_each_row(tile, [&](int64_t i) { kernels.add_logits(tile, sums, i); });
}

void logits_to_gradient(const LogitTile& tile, const RowGradient& gradient) {
    const Kernels& kernels = current_kernels();
    for_each_row(tile, [&](int64_t i) { kernels.differentiate_logits(tile, gradient, i); });
}

}  // namespace vsr1
