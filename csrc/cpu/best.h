// The best k of a stream of scored rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace vsr1 {

template <typename Score>
struct Entry {
    Score score;
    int64_t id;
};

// Higher scores first, then lower ids.
template <typename Score>
bool better(const Entry<Score>& a, const Entry<Score>& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// Writes the best k of the entries, best first; -infinity and -1 where they are fewer.
template <typename Score>
void write_best(std::vector<Entry<Score>>& entries, int64_t k, float* scores, int64_t* ids) {
    const int64_t found = std::min<int64_t>(k, entries.size());
    std::partial_sort(entries.begin(), entries.begin() + found, entries.end(), better<Score>);
    for (int64_t i = 0; i < k; ++i) {
        scores[i] = i < found ? float(entries[i].score) : -std::numeric_limits<float>::infinity();
        ids[i] = i < found ? entries[i].id : -1;
    }
}

// A heap in `storage`, which has room for k entries, with the worst kept in front.
template <typename Score>
class Best {
   public:
    Best(Entry<Score>* storage, int64_t k) : entries_(storage), k_(k) {}

    // What a score must pass to be kept.
    Score threshold() const {
        constexpr Score kInfinity = std::numeric_limits<Score>::infinity();
        return size_ < k_ ? -kInfinity : k_ ? entries_[0].score : kInfinity;
    }

    // Only for a score above the threshold. Ids come in ascending order, so an equal score never replaces what is kept.
    void add(Score score, int64_t id) {
        if (size_ == k_) std::pop_heap(entries_, entries_ + size_--, better<Score>);
        entries_[size_++] = {score, id};
        std::push_heap(entries_, entries_ + size_, better<Score>);
    }

    int64_t size() const { return size_; }

   private:
    Entry<Score>* entries_;
    int64_t k_;
    int64_t size_ = 0;
};

}  // namespace vsr1
