// Frames to patch rows on the CPU, band by band: a band is the lines of pixels that make one row of patches. The lines of the source
// that it needs are resized across into a ring just long enough for the filter, the ring is resized down into the band, and the
// band's bytes are looked up and written in their order. Ring and band stay in the nearest caches, so memory sees the frames read
// once and the rows written once. Everything up to the table is integers: no bit depends on who does which band.
//
// What is left is bound by memory where rows are many, so these go past the caches, a patch's channel at a time, and into
// large pages. Fewer are left in the caches for whoever reads them next.

#include "vsr1/patches.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "aligned.h"
#include "instruction_sets.h"
#include "vsr1/parallel.h"

namespace vsr1 {
namespace {

// A line of pixels with the bytes behind it that kernels may read and write, as long as nobody looks at them.
int64_t line_bytes(int64_t pixels) { return round_up(3 * pixels + 128, 64); }

constexpr int64_t kManyBytes = 8 << 20;  // of rows: more than a core's share of the last cache

// New memory comes 4 KiB at a time, which takes longer than filling it. Where it is old, or large pages are not to be had, nothing
// changes.
void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 1 << 21;
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// Copies past the caches, which then need not read first what is overwritten.
void stream(const void* from, int64_t bytes, void* to) {
#if defined(__x86_64__)
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
        const __m128i* source = static_cast<const __m128i*>(from);
        for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(source + i));
        return;
    }
#endif
    std::memcpy(to, from, bytes);
}

// To be called by who has streamed, before others may read.
void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// The lines of one frame at the width of the patches, made as they are asked for, from top to bottom.
class Lines {
   public:
    // `kept`: how many lines are used together; the first one asked for is `first` or below it.
    Lines(const PatchTask& task, const Kernels& kernels, const uint8_t* frame, int64_t first, int64_t kept)
        : task_(task),
          kernels_(kernels),
          frame_(frame),
          group_(kernels.lanes / 4),
          made_(first / group_ * group_),
          ring_lines_(round_up(kept, group_) + group_),
          stride_(line_bytes(task.across.target)),
          source_stride_(line_bytes(task.across.source + task.across.taps)),
          ring_(ring_lines_ * stride_) {
        if (!task.across.begin) return;
        source_.resize(group_ * source_stride_);
        room_.resize((task.across.source + task.across.taps + 4) * kernels.lanes);
    }

    // Line y, which stays there until one `kept` lines further down is asked for; past the end of the frame, the last one.
    uint8_t* at(int64_t y) {
        y = std::min(y, task_.down.source - 1);
        for (; made_ <= y; made_ += group_) make();
        return ring_.data() + y % ring_lines_ * stride_;
    }

   private:
    void make() {
        uint8_t* out = ring_.data() + made_ % ring_lines_ * stride_;
        const bool same = !task_.across.begin;
        uint8_t* lines = same ? out : source_.data();
        const int64_t stride = same ? stride_ : source_stride_;
        for (int64_t i = 0; i < group_; ++i) copy(std::min(made_ + i, task_.down.source - 1), lines + i * stride);
        if (!same) kernels_.resize_across(lines, stride, task_.across, room_.data(), out, stride_);
    }

    // Line y of the source, whatever its strides, as three bytes a pixel.
    void copy(int64_t y, uint8_t* out) const {
        const auto [video, frame, down, across, channel] = task_.strides;
        const int64_t width = task_.across.source;
        const uint8_t* line = frame_ + y * down;
        if (across == 3 && channel == 1) {
            std::memcpy(out, line, 3 * width);
            return;
        }
        for (int64_t x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c) out[3 * x + c] = line[x * across + c * channel];
    }

    const PatchTask& task_;
    const Kernels& kernels_;
    const uint8_t* frame_;
    const int64_t group_;
    int64_t made_;
    const int64_t ring_lines_, stride_, source_stride_;
    Aligned<uint8_t> ring_, source_;
    Aligned<int32_t> room_;
};

class Conversion {
   public:
    Conversion(const PatchTask& task, void* rows)
        : task_(task),
          rows_(static_cast<char*>(rows)),
          kernels_(current_kernels()),
          times_((task.frames + task.temporal - 1) / task.temporal),
          bands_(task.down.target / task.patch),
          columns_(task.across.target / task.patch),
          bytes_(task.videos * times_ * task.temporal * 3 * task.down.target * task.across.target * task.value_bytes) {}

    void run() const {
        // Below this much, starting a thread costs more than it brings.
        constexpr int64_t kThreadBytes = 1 << 18;
        const int64_t frames = task_.videos * task_.frames;
        const int64_t read = 3 * frames * task_.down.source * task_.across.source;
        const int64_t threads = std::clamp<int64_t>((read + bytes_) / kThreadBytes, 1, task_.threads);
        if (bytes_ >= kManyBytes) ask_for_large_pages(rows_, bytes_);
        // A frame cut into parts makes the lines around each cut twice; so only where there are few frames for the threads.
        const int64_t parts = std::clamp<int64_t>(frames && threads > 1 ? 4 * threads / frames : 1, 1, bands_);
        parallel_for(frames * parts, threads, [&](int64_t i) {
            const int64_t part = i % parts;
            convert(i / parts, part * bands_ / parts, (part + 1) * bands_ / parts);
        });
    }

   private:
    // Bands [first, last) of a frame.
    void convert(int64_t frame, int64_t first, int64_t last) const {
        const Filter& down = task_.down;
        const int64_t patch = task_.patch, line = first * patch, width = 3 * task_.across.target;
        const uint8_t* pixels =
            task_.pixels + frame / task_.frames * task_.strides[0] + frame % task_.frames * task_.strides[1];
        Lines lines(task_, kernels_, pixels, down.begin ? down.begin[line] : line, down.begin ? down.taps : patch);
        Aligned<uint8_t> resized(down.begin ? patch * line_bytes(task_.across.target) : 0);
        Aligned<uint8_t> values(patch * patch * task_.value_bytes);
        std::vector<const uint8_t*> band(patch), together(down.taps);
        for (int64_t i = first; i < last; ++i) {
            for (int64_t y = 0; y < patch; ++y) {
                const int64_t at = i * patch + y;
                if (!down.begin) {
                    band[y] = lines.at(at);
                    continue;
                }
                uint8_t* out = resized.data() + y * line_bytes(task_.across.target);
                for (int64_t j = 0; j < down.taps; ++j) together[j] = lines.at(down.begin[at] + j);
                kernels_.resize_down(together.data(), down.weights + at * down.taps, down.taps, down.bits, width, out);
                band[y] = out;
            }
            switch (task_.value_bytes) {
                case 1: write<uint8_t>(frame, i, band.data(), values.data()); break;
                case 2: write<uint16_t>(frame, i, band.data(), values.data()); break;
                case 4: write<uint32_t>(frame, i, band.data(), values.data()); break;
                default: write<uint64_t>(frame, i, band.data(), values.data());
            }
        }
        finish_streams();
    }

    // The band's values into the patches of a frame; the last frame of a video fills what its group of frames lacks.
    template <typename Value>
    void write(int64_t frame, int64_t band, const uint8_t* const* lines, void* room) const {
        const int64_t patch = task_.patch, merge = task_.merge, temporal = task_.temporal;
        const int64_t video = frame / task_.frames, time = frame % task_.frames;
        const int64_t end = time + 1 == task_.frames ? times_ * temporal : time + 1;
        const int64_t above = (video * times_ + time / temporal) * bands_ + band / merge * merge;  // rows of patches
        const int64_t plane = patch * patch, bytes = plane * sizeof(Value);
        const Value* values = static_cast<const Value*>(task_.values);
        Value* found = static_cast<Value*>(room);
        for (int64_t column = 0; column < columns_; ++column) {
            const int64_t within = (column / merge * merge + band % merge) * merge + column % merge;
            Value* row = reinterpret_cast<Value*>(rows_) + (above * columns_ + within) * 3 * temporal * plane;
            for (int64_t c = 0; c < 3; ++c) {
                const auto look_up_side = patch == 16 ? look_up<16, Value> : look_up<0, Value>;
                look_up_side(values + 256 * c, lines, 3 * column * patch + c, patch, found);
                for (int64_t t = time; t < end; ++t) {
                    Value* out = row + (c * temporal + t % temporal) * plane;
                    if (bytes_ >= kManyBytes)
                        stream(found, bytes, out);
                    else
                        std::memcpy(out, found, bytes);
                }
            }
        }
    }

    // out (side, side) = the values of one channel of a patch, which begins at that byte of the lines.
    template <int kSide, typename Value>
    static void look_up(const Value* values, const uint8_t* const* lines, int64_t begin, int64_t patch, Value* out) {
        const int64_t side = kSide ? kSide : patch;
        for (int64_t y = 0; y < side; ++y) {
            const uint8_t* byte = lines[y] + begin;
            for (int64_t x = 0; x < side; ++x) out[y * side + x] = values[byte[3 * x]];
        }
    }

    const PatchTask& task_;
    char* const rows_;
    const Kernels& kernels_;
    const int64_t times_, bands_, columns_, bytes_;
};

}  // namespace

void frames_to_patches(const PatchTask& task, void* rows) { Conversion(task, rows).run(); }

}  // namespace vsr1
