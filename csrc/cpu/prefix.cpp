// Shared-prefix attention on the CPU. The queries that read one key head of one prefix are taken together, as many as two registers
// have lanes: they meet the prefix at once, then each its own suffix, and the running softmax goes on from the one to the other, so
// that nothing is merged. Such pieces are what threads share out; where they begin depends on the problem alone.

#include "vsr1/prefix.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "vsr1/parallel.h"

namespace vsr1 {
namespace {

constexpr int kMostLanes = 16;
constexpr int64_t kWidest = round_up(kWidestHead, kMostLanes);

// Some queries of one key head of one prefix, counted row by row.
struct Piece {
    int64_t prefix, head, first, count;
};

class Attention {
   public:
    Attention(const PrefixTask& task, const PrefixOutput& output)
        : task_(task),
          output_(output),
          kernels_(current_kernels()),
          per_row_(task.query_heads / task.key_heads * task.queries),
          begins_(task.prefixes + 1, 0),
          order_(task.rows) {
        sort_rows();
        const int64_t most = 2 * kernels_.lanes;
        for (int64_t n = 0; n < task.prefixes; ++n) {
            const int64_t queries = (begins_[n + 1] - begins_[n]) * per_row_;
            for (int64_t h = 0; h < task.key_heads; ++h)
                for (int64_t i = 0; i < queries; i += most) pieces_.push_back({n, h, i, std::min(most, queries - i)});
        }
    }

    void run() const {
        // Below this much arithmetic, starting a thread costs more than it brings.
        constexpr double kThreadWork = 1 << 21;
        const double queries = double(task_.rows) * task_.query_heads * task_.queries;
        const double work = queries * (task_.prefix.keys + task_.suffix.keys) * task_.width;
        const int threads = std::max(1, int(std::min<double>(task_.threads, work / kThreadWork)));
        parallel_for(pieces_.size(), threads, [&](int64_t i) { attend(pieces_[i]); });
    }

   private:
    // The rows of each prefix beside each other, in their order.
    void sort_rows() {
        const auto owner = [&](int64_t row) { return task_.owner ? task_.owner[row] : row * task_.prefixes / task_.rows; };
        for (int64_t row = 0; row < task_.rows; ++row) {
            const int64_t n = owner(row);
            if (n < 0 || n >= task_.prefixes)
                throw std::invalid_argument(
                    "group must name prefixes 0 to " + std::to_string(task_.prefixes - 1) + "; it has " + std::to_string(n) +
                    " for row " + std::to_string(row));
            ++begins_[n + 1];
        }
        for (int64_t n = 0; n < task_.prefixes; ++n) begins_[n + 1] += begins_[n];
        std::vector<int64_t> next(begins_.begin(), begins_.end() - 1);
        for (int64_t row = 0; row < task_.rows; ++row) order_[next[owner(row)]++] = row;
    }

    // A query by its number among those of its piece's prefix and head.
    struct Place {
        int64_t row, head, query;
    };

    Place place(const Piece& piece, int64_t i) const {
        const int64_t heads = task_.query_heads / task_.key_heads, within = i % per_row_;
        return {
            order_[begins_[piece.prefix] + i / per_row_], piece.head * heads + within / task_.queries, within % task_.queries};
    }

    KeyRun keys(const KeySets& sets, int64_t set, int64_t head, int64_t query) const {
        const auto at = [&](const void* data, const std::array<int64_t, 3>& strides) {
            return static_cast<const char*>(data) + (set * strides[0] + head * strides[1]) * (task_.bfloat16 ? 2 : 4);
        };
        const bool* mask = sets.mask ? sets.mask + set * sets.mask_strides[0] + query * sets.mask_strides[1] : nullptr;
        return {at(sets.k, sets.k_strides), at(sets.v, sets.v_strides), sets.k_strides[2], sets.v_strides[2], sets.keys,
                task_.width, task_.bfloat16, mask, sets.mask_strides[2]};
    }

    // out[d step] = component d of a query, times the scale.
    void read_query(const Place& place, float* out, int64_t step) const {
        const int64_t begin =
            place.row * task_.q_strides[0] + place.head * task_.q_strides[1] + place.query * task_.q_strides[2];
        if (task_.bfloat16) {
            const BFloat16* query = static_cast<const BFloat16*>(task_.q) + begin;
            for (int64_t d = 0; d < task_.width; ++d) out[d * step] = widen(query[d]) * task_.scale;
        } else {
            const float* query = static_cast<const float*>(task_.q) + begin;
            for (int64_t d = 0; d < task_.width; ++d) out[d * step] = query[d] * task_.scale;
        }
    }

    void write(const Place& place, float peak, float total, const float* sum) const {
        const int64_t i = (place.row * task_.query_heads + place.head) * task_.queries + place.query;
        const float share = total > 0.0f ? 1.0f / total : total == total ? 0.0f : total;  // NaN stays NaN
        for (int64_t d = 0; d < task_.width; ++d) {
            if (task_.bfloat16)
                static_cast<BFloat16*>(output_.out)[i * task_.width + d] = narrow(sum[d] * share);
            else
                static_cast<float*>(output_.out)[i * task_.width + d] = sum[d] * share;
        }
        if (output_.lse) output_.lse[i] = total == 0.0f ? 0.0f : peak + std::log(total);
    }

    void attend(const Piece& piece) const {
        alignas(64) float peak[2 * kMostLanes], total[2 * kMostLanes] = {};
        alignas(64) float sums[kWidest * 2 * kMostLanes];
        std::fill(std::begin(peak), std::end(peak), -std::numeric_limits<float>::infinity());
        const KeyRun shared = keys(task_.prefix, piece.prefix, piece.head, 0);
        // What copying into all lanes costs is shared by the queries; a few are better off alone.
        const bool together = piece.count > kernels_.lanes / 4 && shared.count;
        const int64_t registers = piece.count > kernels_.lanes ? 2 : 1, across = registers * kernels_.lanes;
        if (together) {
            alignas(64) float queries[kWidest * 2 * kMostLanes];
            std::fill_n(queries, task_.width * across, 0.0f);
            std::fill_n(sums, task_.width * across, 0.0f);
            for (int64_t i = 0; i < piece.count; ++i) read_query(place(piece, piece.first + i), queries + i, across);
            kernels_.meet_many(registers, queries, shared, peak, total, sums);
        }
        for (int64_t i = 0; i < piece.count; ++i) {
            alignas(64) float query[kWidest] = {};
            alignas(64) float sum[kWidest] = {};
            const Place where = place(piece, piece.first + i);
            read_query(where, query, 1);
            if (together)
                for (int64_t d = 0; d < task_.width; ++d) sum[d] = sums[d * across + i];
            else
                kernels_.meet_alone(query, shared, peak[i], total[i], sum);
            kernels_.meet_alone(query, keys(task_.suffix, where.row, piece.head, where.query), peak[i], total[i], sum);
            write(where, peak[i], total[i], sum);
        }
    }

    const PrefixTask& task_;
    const PrefixOutput& output_;
    const Kernels& kernels_;
    const int64_t per_row_;  // queries of a row that read one key head
    std::vector<int64_t> begins_;
    std::vector<int64_t> order_;
    std::vector<Piece> pieces_;
};

}  // namespace

void prefix_attention(const PrefixTask& task, const PrefixOutput& output) { Attention(task, output).run(); }

}  // namespace vsr1
