// The sweep on the CPU. The corpus is cut into parts and the parts into blocks of rows; a block is scored against all queries
// while it is near, and its scores go into each query's heap, counts and running softmax, so the corpus is read once for all
// queries. Parts are what threads share out. Where they begin depends on the problem alone and they are merged in order, so the
// number of threads cannot be seen in the result.

#include "vsr1/corpus_scan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "aligned.h"
#include "best.h"
#include "exclusion.h"
#include "instruction_sets.h"
#include "packed.h"
#include "vsr1/parallel.h"

namespace vsr1 {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What one query has seen of one part.
struct Seen {
    int64_t kept = 0;
    int64_t nan_count = 0;
    int64_t greater = 0;
    float peak = -kInfinity;  // the highest score; mass and direction are relative to it
    double mass = 0.0;
};

// What a part's sweep leaves behind.
struct Part {
    std::vector<Seen> seen;                   // (queries)
    std::unique_ptr<Entry<float>[]> entries;  // (queries, k)
    Aligned<float> direction;                 // (columns, queries, column); empty if not asked
};

class Sweep {
   public:
    Sweep(const ScanTask& task, const ScanOutput& output)
        : task_(task),
          output_(output),
          kernels_(current_kernels()),
          layout_(
              current_kernels(), task.rows.dim, task.rows.bfloat16, task.query_bfloat16,
              task.candidates_width < 0 ? task.queries : 1),
          stride_(layout_.stride),
          exclusion_(task.exclude, task.queries, task.exclude_width),
          packed_(pack(0, task.candidates_width < 0 ? task.queries : 0)) {}

    void run() {
        if (task_.queries == 0) return;
        // Below this much arithmetic, starting a thread costs more than it brings.
        constexpr double kThreadWork = 1 << 22;
        const bool listed = task_.candidates_width >= 0;
        const int64_t scored = listed ? task_.candidates_width : task_.rows.count;
        const double work = double(scored) * task_.rows.dim * task_.queries;
        const int threads = std::max(1, int(std::min<double>(task_.threads, work / kThreadWork)));
        bar_.assign(task_.queries, kInfinity);
        if (task_.positive) parallel_for(task_.queries, threads, [&](int64_t q) { score_positive(q); });
        if (listed) {
            parallel_for(task_.queries, threads, [&](int64_t q) {
                std::vector<Part> parts(1);
                parts[0] = sweep_candidates(q);
                merge(parts, 0, q);
            });
        } else {
            const int64_t blocks = (task_.rows.count + kBlockRows - 1) / kBlockRows;
            std::vector<Part> parts(part_count(blocks));
            const int64_t count = parts.size();
            parallel_for(count, threads, [&](int64_t p) {
                parts[p] = sweep_rows(blocks * p / count * kBlockRows, blocks * (p + 1) / count * kBlockRows);
            });
            parallel_for(task_.queries, threads, [&](int64_t q) { merge(parts, q, q); });
        }
    }

   private:
    Packed pack(int64_t first, int64_t count) const {
        Packed packed(layout_, count);
        const float* query = task_.query + first * task_.rows.dim;
        for (int64_t q = 0; q < count; ++q)
            for (int64_t d = 0; d < task_.rows.dim; ++d) packed.set(q, d, query[q * task_.rows.dim + d]);
        if (packed.needs_arranging()) packed.arrange();
        return packed;
    }

    // One part in the making: the queries it serves, from `first` on, its result so far, and scratch.
    struct Work {
        Work(const Sweep& sweep, const Packed& packed, int64_t first)
            : queries(packed), bar(sweep.bar_.data() + first), scores(round_up(packed.count(), kTileQueries) * kBlockRows) {
            const ScanTask& task = sweep.task_;
            const int64_t count = packed.count();
            scales.resize(count);
            part.seen.resize(count);
            part.entries = std::make_unique_for_overwrite<Entry<float>[]>(count * task.k);
            if (task.expected) part.direction.assign(count * sweep.stride_, 0.0f);
            for (int64_t q = 0; q < count; ++q) best.emplace_back(part.entries.get() + q * task.k, task.k);
            block.dim = task.rows.dim;
            block.bfloat16 = task.rows.bfloat16;
            block.stride = task.candidates_width < 0 ? task.rows.row_stride : 0;
            block.count = 0;
        }

        const Packed& queries;
        const float* bar;
        Aligned<float> scores;
        std::vector<float> scales;  // of the directions, before a block is added
        std::vector<Best<float>> best;
        Block block;
        Part part;
    };

    void add_row(Work& work, int64_t id) const {
        work.block.rows[work.block.count] = task_.rows.row(id);
        work.block.ids[work.block.count] = id;
        if (++work.block.count == kBlockRows) take_block(work);
    }

    Part finish(Work& work) const {
        if (work.block.count) take_block(work);
        for (size_t q = 0; q < work.best.size(); ++q) work.part.seen[q].kept = work.best[q].size();
        return std::move(work.part);
    }

    Part sweep_rows(int64_t begin, int64_t end) const {
        Work work(*this, packed_, 0);
        for (int64_t id = begin; id < std::min(end, task_.rows.count); ++id) add_row(work, id);
        return finish(work);
    }

    Part sweep_candidates(int64_t q) const {
        const Packed packed = pack(q, 1);
        Work work(*this, packed, q);
        const int64_t* ids = task_.candidates + q * task_.candidates_width;
        for (int64_t c = 0; c < task_.candidates_width; ++c)
            if (ids[c] >= 0) add_row(work, ids[c]);
        return finish(work);
    }

    // The positive's score, and the bar a score must pass to count as above it; without a positive nothing passes.
    void score_positive(int64_t q) {
        float score = std::numeric_limits<float>::quiet_NaN();
        if (task_.positive[q] >= 0) {
            Block block;
            block.rows[0] = task_.rows.row(task_.positive[q]);
            block.count = 1;
            block.dim = task_.rows.dim;
            block.stride = 0;
            block.bfloat16 = task_.rows.bfloat16;
            std::vector<float> scores(kTileQueries * kBlockRows);
            pack(q, 1).multiply(block, scores.data());
            score = scores[0];
        }
        output_.positive_score[q] = score;
        bar_[q] = std::isnan(score) ? -kInfinity : score;
    }

    void take_block(Work& work) const {
        Block& block = work.block;
        work.queries.multiply(block, work.scores.data());
        if (task_.expected) skip_unusable(block, work.scores.data());
        for (int64_t q = 0; q < work.queries.count(); ++q) {
            float* score = work.scores.data() + q * kBlockRows;
            Seen& seen = work.part.seen[q];
            std::fill(score + block.count, score + kBlockRows, -kInfinity);
            // Only whole sweeps exclude, and there a block's rows follow each other.
            if (task_.exclude) exclusion_.each(q, block.ids[0], block.count, [&](int64_t i) { score[i] = -kInfinity; });
            const BlockSummary summary = kernels_.summarise(score, work.bar[q]);
            seen.nan_count += summary.nan_count;
            seen.greater += summary.greater;
            Best<float>& best = work.best[q];
            if (summary.highest > best.threshold())
                for (int i = 0; i < block.count; ++i)
                    if (score[i] > best.threshold()) best.add(score[i], block.ids[i]);
            if (task_.temperature > 0)
                take_mass(summary.highest, score, work, q);
        }
        if (task_.expected)
            kernels_.add_block(work.queries.count(), work.scales.data(), work.scores.data(), block, work.part.direction.data());
        block.count = 0;
    }

    // A row with a NaN or an infinity has such a score with every query, and weight 0 or NaN in the softmax. Zeros take its
    // place in the weighted sum, where 0 x NaN would spoil the other rows.
    void skip_unusable(Block& block, const float* scores) const {
        const auto infinite_half = [](uint16_t bits) { return (bits & 0x7F80) == 0x7F80; };
        const auto infinite = [](float value) { return !std::isfinite(value); };
        for (int i = 0; i < block.count; ++i) {
            if (std::isfinite(scores[i])) continue;
            const auto* halves = static_cast<const uint16_t*>(block.rows[i]);
            const auto* floats = static_cast<const float*>(block.rows[i]);
            if (block.bfloat16 ? std::any_of(halves, halves + block.dim, infinite_half)
                               : std::any_of(floats, floats + block.dim, infinite))
                block.rows[i] = zeros_.data();
        }
    }

    // Turns a block's scores into weights relative to the query's peak, which may rise, and adds them to its mass.
    void take_mass(float highest, float* score, Work& work, int64_t q) const {
        Seen& seen = work.part.seen[q];
        work.scales[q] = 1.0f;
        if (highest == -kInfinity) {
            std::fill(score, score + kBlockRows, 0.0f);
            return;
        }
        if (highest > seen.peak) {
            const double shrink = std::exp((double(seen.peak) - highest) / task_.temperature);
            seen.mass *= shrink;
            work.scales[q] = float(shrink);
            seen.peak = highest;
        }
        seen.mass += kernels_.soften(score, seen.peak, task_.temperature);
    }

    // Enough parts for many threads, fewer where what a part keeps is large: 64 MiB together, unless 16 parts are more.
    int64_t part_count(int64_t blocks) const {
        constexpr int64_t kBytes = 64 << 20, kFewest = 16, kMost = 256, kBlocksInPart = 16;
        const int64_t direction = task_.expected ? task_.queries * stride_ * sizeof(float) : 0;
        const int64_t bytes = task_.queries * (task_.k * sizeof(Entry<float>) + sizeof(Seen)) + direction;
        const int64_t affordable = std::clamp(kBytes / std::max<int64_t>(bytes, 1), kFewest, kMost);
        return std::clamp<int64_t>(blocks / kBlocksInPart, 1, affordable);
    }

    // Writes query `target` of the output from query `q` of the parts, in their order.
    void merge(const std::vector<Part>& parts, int64_t q, int64_t target) const {
        Seen total;
        std::vector<Entry<float>> entries;
        for (const Part& part : parts) {
            const Seen& seen = part.seen[q];
            const Entry<float>* kept = part.entries.get() + q * task_.k;
            entries.insert(entries.end(), kept, kept + seen.kept);
            total.nan_count += seen.nan_count;
            total.greater += seen.greater;
            total.peak = std::max(total.peak, seen.peak);
        }
        write_best(entries, task_.k, output_.scores + target * task_.k, output_.ids + target * task_.k);
        output_.nan_count[target] = total.nan_count;
        if (task_.positive) output_.rank[target] = task_.positive[target] < 0 ? -1 : total.greater + 1;
        if (task_.temperature > 0) merge_mass(parts, q, target, total);
    }

    void merge_mass(const std::vector<Part>& parts, int64_t q, int64_t target, Seen total) const {
        std::vector<double> weight;
        for (const Part& part : parts) {
            const Seen& seen = part.seen[q];
            weight.push_back(seen.mass == 0 ? 0 : std::exp((double(seen.peak) - total.peak) / task_.temperature));
            total.mass += seen.mass * weight.back();
        }
        output_.lse[target] =
            total.mass == 0 ? -kInfinity : float(double(total.peak) / task_.temperature + std::log(total.mass));
        if (!task_.expected) return;
        Aligned<float> sum(stride_);
        for (size_t p = 0; p < parts.size(); ++p) {
            if (weight[p] == 0) continue;
            const float share = float(weight[p] / total.mass);
            for (int64_t begin = 0; begin < stride_; begin += column_) {
                const float* column = parts[p].direction.data() + begin * parts[p].seen.size() + q * column_;
                for (int64_t d = 0; d < column_; ++d) sum[begin + d] += share * column[d];
            }
        }
        float* out = output_.expected + target * task_.rows.dim;
        for (int64_t d = 0; d < task_.rows.dim; ++d) out[d] = sum[layout_.position[d]];
    }

    const ScanTask& task_;
    const ScanOutput& output_;
    const Kernels& kernels_;
    const Layout layout_;
    const int64_t stride_;
    const int64_t column_ = 2 * kernels_.lanes;  // components that lie together in a direction
    const Exclusion exclusion_;
    const std::vector<float> zeros_ = std::vector<float>(stride_);
    const Packed packed_;      // all queries, for a sweep that they share
    std::vector<float> bar_;   // (queries)
};

}  // namespace

void corpus_scan(const ScanTask& task, const ScanOutput& output) { Sweep(task, output).run(); }

}  // namespace vsr1
