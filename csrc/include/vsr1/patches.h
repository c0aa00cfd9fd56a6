// Frames of bytes resized, normalised and written in the order of a vision tower's patches. Contract: vsr1/ops/patches.py.
#pragma once

#include <array>
#include <cstdint>

namespace vsr1 {

// How lines of `source` pixels become lines of `target`: pixel i is sum_j weights[i taps + j] line[begin[i] + j] / 2^bits, rounded and
// clamped to a byte. Weights are 0 where begin + j is past the end of the line. `begin` null: the line stays as it is.
struct Filter {
    int64_t source;
    int64_t target;
    const int32_t* begin;
    const int16_t* weights;
    int64_t taps;  // even
    int bits;
};

struct PatchTask {
    const uint8_t* pixels;  // (videos, frames, down.source, across.source, 3)
    int64_t videos;
    int64_t frames;
    std::array<int64_t, 5> strides;  // in bytes
    Filter down;
    Filter across;
    int64_t patch;
    int64_t merge;
    int64_t temporal;
    const void* values;   // (3, 256) what a byte of a channel becomes
    int64_t value_bytes;  // 1, 2, 4 or 8
    int threads;
};

// rows (patches, 3 temporal patch patch) of values, each of value_bytes. The same bits for any number of threads.
void frames_to_patches(const PatchTask& task, void* rows);

}  // namespace vsr1
