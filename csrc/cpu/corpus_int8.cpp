// Exact top-k from int8 rows. The sweep reads the codes alone and brackets every score: |score - approximation| is at most
//     |query's integers| x row's residual + 127 x row's scale x (what the integers leave of the query, summed),
// by Cauchy-Schwarz and Hoelder. Of each part of the corpus it keeps the k highest lower bounds, and every row whose upper bound
// passes the worst of them. The k-th highest lower bound of all parts is then reached by k rows, so what stays below it cannot be
// among the best k; the rest, a few rows for every one that is wanted, are scored in float64 from the exact rows. A row whose
// scale is NaN (it holds a NaN or an infinity) has no bounds and is always looked at. Where more rows pass than a part may keep,
// as among thousands of copies, that query is answered by scoring every row in float64.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "aligned.h"
#include "best.h"
#include "exclusion.h"
#include "instruction_sets.h"
#include "vsr1/corpus_scan.h"
#include "vsr1/parallel.h"

namespace vsr1 {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
    float upper;
    int64_t id;
};

// What one query has kept of one part.
struct Shortlist {
    std::vector<Entry<float>> lower;  // the k highest lower bounds
    std::vector<Candidate> rows;      // whose upper bound passed the worst of them
    bool overflowed = false;
};

using Part = std::vector<Shortlist>;  // (queries)

class Int8Sweep {
   public:
    Int8Sweep(const Int8Task& task, const Int8Output& output)
        : task_(task),
          output_(output),
          kernels_(current_kernels()),
          stride_(round_up(task.rows.dim, 64)),
          many_(kernels_.multiply_many && task.queries >= kernels_.many_queries),
          exclusion_(task.exclude, task.queries, task.exclude_width) {}

    void run() {
        quantize_queries();
        // A part is never so small that its k best say nothing; what all parts keep stays within 64 MiB, or that of 16 queries.
        const int64_t blocks = (task_.rows.count + kBlockRows - 1) / kBlockRows;
        const int64_t count = std::clamp<int64_t>(task_.rows.count / (64 * std::max<int64_t>(task_.k, 16)), 1, 64);
        const int64_t bytes = count * task_.k * int64_t(sizeof(Entry<float>));
        const int64_t group = round_up(std::max<int64_t>(1, (int64_t{64} << 20) / std::max<int64_t>(bytes, 1)), kQueryGroup);
        for (int64_t first = 0; first < task_.queries; first += group) {
            const int64_t queries = std::min(group, task_.queries - first);
            // A block of each part comes first: what its best k reach together is a bar that spares most rows of every part.
            floor_.assign(queries, -kInfinity);
            std::vector<Part> parts(count);
            const auto sweep_parts = [&](int64_t most) {
                parallel_for(count, task_.threads, [&](int64_t p) {
                    const int64_t begin = blocks * p / count, end = blocks * (p + 1) / count;
                    parts[p] = sweep(first, queries, begin * kBlockRows, std::min(end, begin + most) * kBlockRows);
                });
            };
            sweep_parts(1);
            for (int64_t q = 0; q < queries; ++q)
                if (task_.k) floor_[q] = std::nextafter(reached(parts, q), -kInfinity);
            sweep_parts(blocks);
            parallel_for(queries, task_.threads, [&](int64_t q) { merge(parts, q, first + q); });
            for (int64_t q = first; q < first + queries; ++q)
                if (output_.fallbacks[q]) score_all(q);
        }
    }

   private:
    const float* query(int64_t q) const { return task_.query + q * task_.rows.dim; }

    double exact(int64_t q, int64_t id) const {
        return kernels_.score_exactly(query(q), task_.rows.row(id), task_.rows.dim, task_.rows.bfloat16);
    }

    // Where component d of query q lies among the packed ones.
    int64_t place(int64_t q, int64_t d) const {
        if (!many_) return q * stride_ + d;
        const int64_t lanes = kernels_.lanes;
        return q / lanes * lanes * stride_ + d / 2 * 2 * lanes + q % lanes * 2 + d % 2;
    }

    // Queries as integers that fit 14 bits, fewer where the sum of dim products with int8 would not fit 32.
    void quantize_queries() {
        const int64_t dim = task_.rows.dim;
        const double limit = std::min<int64_t>(8191, std::numeric_limits<int32_t>::max() / (127 * dim));
        packed_.assign(round_up(task_.queries, kQueryGroup) * stride_, 0);
        bounds_.resize(task_.queries);
        for (int64_t q = 0; q < task_.queries; ++q) {
            float highest = 0.0f;
            bool finite = true;
            for (int64_t d = 0; d < dim; ++d) {
                finite = finite && std::isfinite(query(q)[d]);
                highest = std::max(highest, std::abs(query(q)[d]));
            }
            const float scale = highest == 0.0f ? 0.0f : std::max(float(highest / limit), std::numeric_limits<float>::min());
            double length = 0.0, left = 0.0;
            for (int64_t d = 0; d < dim && finite; ++d) {
                const double value = query(q)[d];
                const double integer = scale == 0.0f ? 0.0 : std::clamp(std::nearbyint(value / scale), -limit, limit);
                packed_[place(q, d)] = int16_t(integer);
                length += integer * integer;
                left += std::abs(value - double(scale) * integer);
            }
            // Rounded up a little, being bounds.
            bounds_[q] = {scale, float(double(scale) * std::sqrt(length) * (1 + 1e-6)), float(127.0 * left * (1 + 1e-6))};
            if (!finite) bounds_[q].per_scale = std::numeric_limits<float>::quiet_NaN();
        }
        if (kernels_.arrange_integers && !many_) kernels_.arrange_integers(packed_.data(), task_.queries, stride_);
    }

    Part sweep(int64_t first, int64_t queries, int64_t begin, int64_t end) const {
        Part part(queries);
        std::vector<Best<float>> best;
        for (int64_t q = 0; q < queries; ++q) {
            part[q].lower.resize(task_.k);
            best.emplace_back(part[q].lower.data(), task_.k);
        }
        const Queries<int16_t> integers{packed_.data() + first * stride_, queries, stride_};
        Aligned<int32_t> products(round_up(queries, kTileQueries) * kBlockRows);
        Block block;
        block.dim = task_.rows.dim;
        block.stride = task_.code_stride;
        block.bfloat16 = false;
        for (int64_t row = begin; row < std::min(end, task_.rows.count); row += kBlockRows) {
            block.count = int(std::min<int64_t>(kBlockRows, task_.rows.count - row));
            float scales[kBlockRows] = {}, residuals[kBlockRows] = {}, lower[kBlockRows], upper[kBlockRows];
            std::copy_n(task_.scales + row, block.count, scales);
            std::copy_n(task_.residuals + row, block.count, residuals);
            for (int i = 0; i < block.count; ++i) block.rows[i] = task_.codes + (row + i) * task_.code_stride;
            (many_ ? kernels_.multiply_many : kernels_.multiply_block)(integers, block, products.data());
            for (int64_t q = 0; q < queries; ++q) {
                float bar = std::max(floor_[q], best[q].threshold());
                if (part[q].overflowed || !kernels_.bound_block(
                        products.data() + q * kBlockRows, scales, residuals, bounds_[first + q], bar, lower, upper))
                    continue;
                exclusion_.each(first + q, row, block.count, [&](int64_t i) { lower[i] = upper[i] = -kInfinity; });
                for (int i = 0; i < block.count; ++i) {
                    if (upper[i] <= bar) continue;
                    part[q].rows.push_back({upper[i], row + i});
                    if (lower[i] > bar) {
                        best[q].add(lower[i], row + i);
                        bar = std::max(floor_[q], best[q].threshold());
                    }
                }
                keep_few(part[q], bar);
            }
        }
        for (int64_t q = 0; q < queries; ++q) part[q].lower.resize(best[q].size());
        return part;
    }

    // Forgets rows that have fallen behind; where too many have not, the query is given up.
    void keep_few(Shortlist& list, float bar) const {
        const size_t most = 512 + 16 * task_.k;
        if (list.rows.size() <= most) return;
        std::erase_if(list.rows, [&](const Candidate& row) { return row.upper < bar; });
        if (list.rows.size() > most / 2) {
            list.overflowed = true;
            list.rows = {};
        }
    }

    // The k-th highest lower bound of all parts, which k rows reach; -inf if there are not so many.
    float reached(const std::vector<Part>& parts, int64_t q) const {
        std::vector<float> lower;
        for (const Part& part : parts)
            for (const Entry<float>& entry : part[q].lower) lower.push_back(entry.score);
        if (int64_t(lower.size()) < task_.k) return -kInfinity;
        std::nth_element(lower.begin(), lower.begin() + task_.k - 1, lower.end(), std::greater<>());
        return lower[task_.k - 1];
    }

    void merge(const std::vector<Part>& parts, int64_t q, int64_t target) const {
        output_.fallbacks[target] = std::any_of(parts.begin(), parts.end(), [&](const Part& part) { return part[q].overflowed; });
        if (output_.fallbacks[target]) return;
        const float bar = task_.k ? std::max(floor_[q], reached(parts, q)) : kInfinity;
        std::vector<Entry<double>> entries;
        int64_t rescored = 0, nan_count = 0;
        for (const Part& part : parts) {
            for (const Candidate& row : part[q].rows) {
                if (row.upper < bar) continue;
                const double score = exact(target, row.id);
                ++rescored;
                if (std::isnan(score))
                    ++nan_count;
                else if (score > -std::numeric_limits<double>::infinity())
                    entries.push_back({score, row.id});
            }
        }
        write(entries, rescored, nan_count, target);
    }

    // Every row in float64, for one query.
    void score_all(int64_t q) const {
        const int64_t count = std::clamp<int64_t>(task_.rows.count / 1024, 1, 64);
        std::vector<std::vector<Entry<double>>> kept(count);
        std::vector<int64_t> nan_counts(count), scored(count);
        parallel_for(count, task_.threads, [&](int64_t p) {
            kept[p].resize(task_.k);
            Best<double> best(kept[p].data(), task_.k);
            for (int64_t id = task_.rows.count * p / count; id < task_.rows.count * (p + 1) / count; ++id) {
                if (exclusion_.holds(q, id)) continue;
                const double score = exact(q, id);
                ++scored[p];
                nan_counts[p] += std::isnan(score);
                if (score > best.threshold()) best.add(score, id);
            }
            kept[p].resize(best.size());
        });
        std::vector<Entry<double>> entries;
        int64_t nan_count = 0, rescored = 0;
        for (int64_t p = 0; p < count; ++p) {
            entries.insert(entries.end(), kept[p].begin(), kept[p].end());
            nan_count += nan_counts[p];
            rescored += scored[p];
        }
        write(entries, rescored, nan_count, q);
    }

    void write(std::vector<Entry<double>>& entries, int64_t rescored, int64_t nan_count, int64_t q) const {
        write_best(entries, task_.k, output_.scores + q * task_.k, output_.ids + q * task_.k);
        output_.nan_count[q] = nan_count;
        output_.rescored[q] = rescored;
    }

    const Int8Task& task_;
    const Int8Output& output_;
    const Kernels& kernels_;
    const int64_t stride_;
    const bool many_;
    const Exclusion exclusion_;
    Aligned<int16_t> packed_;    // (padded queries, stride)
    std::vector<Bound> bounds_;  // (queries)
    std::vector<float> floor_;   // (queries of a group): upper bounds up to it are of no interest
};

}  // namespace

void corpus_scan_int8(const Int8Task& task, const Int8Output& output) { Int8Sweep(task, output).run(); }

}  // namespace vsr1
