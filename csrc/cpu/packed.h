// What rows are multiplied with, laid out as the kernels read it: queries of a sweep, hidden states before a matrix.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "instruction_sets.h"

namespace vsr1 {

// How vectors are laid out, and thereby which kernel multiplies them. Vectors of one layout have bitwise equal products with a row,
// however many of them are packed together.
class Layout {
   public:
    // For vectors of `dim` components and rows of `bfloat16` or float32. `rounded`: the vectors may be taken as bfloat16 too;
    // `together`: how many of them are multiplied at a time.
    Layout(const Kernels& kernels, int64_t dim, bool bfloat16, bool rounded, int64_t together)
        : kernels(kernels),
          stride(round_up(dim, 64)),
          pairs(kernels.score_pairs && bfloat16 && rounded),
          many(!pairs && together >= kernels.many_queries) {
        for (int64_t d = 0; d < dim; ++d) position.push_back(kernels.position(d, bfloat16));
    }

    const Kernels& kernels;
    const int64_t stride;
    const bool pairs;               // bfloat16 numbers, multiplied two by two as they lie
    const bool many;                // for score_many
    std::vector<int64_t> position;  // of a component, except in pairs
};

class Packed {
   public:
    Packed(const Layout& layout, int64_t count) : layout_(layout), count_(count), lanes_(layout.many ? layout.kernels.lanes : 1) {
        const int64_t size = round_up(count, kQueryGroup) * layout.stride;
        if (layout.pairs)
            pairs_.resize(size);
        else
            floats_.resize(size);
    }

    int64_t count() const { return count_; }

    void set(int64_t vector, int64_t d, float value) {
        if (layout_.pairs)
            pairs_[vector * layout_.stride + d] = narrow(value);
        else
            floats_[(vector - vector % lanes_) * layout_.stride + layout_.position[d] * lanes_ + vector % lanes_] = value;
    }

    // To be called once all numbers are set, where `needs_arranging`.
    bool needs_arranging() const { return layout_.pairs && layout_.kernels.arrange_pairs; }
    void arrange() { layout_.kernels.arrange_pairs(pairs_.data(), count_, layout_.stride); }

    // out (vectors, kBlockRows) = the products with the block's rows.
    void multiply(const Block& block, float* out) const {
        const Queries<float> floats{floats_.data(), count_, layout_.stride};
        if (layout_.pairs)
            layout_.kernels.score_pairs({pairs_.data(), count_, layout_.stride}, block, out);
        else if (layout_.many)
            layout_.kernels.score_many(floats, block, out);
        else
            layout_.kernels.score_block(floats, block, out);
    }

   private:
    const Layout& layout_;
    const int64_t count_, lanes_;
    Aligned<float> floats_;
    Aligned<BFloat16> pairs_;
};

}  // namespace vsr1
