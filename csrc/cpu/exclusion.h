// The rows that each query leaves out, sorted once for all parts of a sweep.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vsr1 {

class Exclusion {
   public:
    // ids (queries, width), -1 where there is none; null: nothing is left out.
    Exclusion(const int64_t* ids, int64_t queries, int64_t width) : sorted_(queries) {
        if (!ids) return;
        for (int64_t q = 0; q < queries; ++q) {
            sorted_[q].assign(ids + q * width, ids + (q + 1) * width);
            std::sort(sorted_[q].begin(), sorted_[q].end());
        }
    }

    bool holds(int64_t q, int64_t id) const { return std::binary_search(sorted_[q].begin(), sorted_[q].end(), id); }

    // Calls leave_out(i) for each of the query's rows first + i with 0 <= i < count.
    template <typename LeaveOut>
    void each(int64_t q, int64_t first, int64_t count, const LeaveOut& leave_out) const {
        auto id = std::lower_bound(sorted_[q].begin(), sorted_[q].end(), first);
        for (; id != sorted_[q].end() && *id < first + count; ++id) leave_out(*id - first);
    }

   private:
    std::vector<std::vector<int64_t>> sorted_;
};

}  // namespace vsr1
