// The soft-token step on the CPU. What it costs is reading three weight matrices once, so their rows are what threads share out,
// in blocks that are multiplied with all hidden states while they are near (the inner loops are the corpus sweep's). All threads
// go through the step together, from barrier to barrier, and are started once. Which thread takes a block changes no result.

#include "vsr1/soft_query.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <thread>
#include <vector>

#include "../cuda/noise.cuh"
#include "aligned.h"
#include "instruction_sets.h"
#include "packed.h"
#include "vsr1/parallel.h"

namespace vsr1 {
namespace {

constexpr int64_t kColumns = 512;      // columns of a row that are normalised in one piece of work
constexpr int64_t kNoiseBlocks = 256;  // blocks of four numbers that are drawn in one piece

// Where threads wait for each other. Waits here are microseconds, and being woken from a sleep takes tens of them.
class Meeting {
   public:
    explicit Meeting(int members) : members_(members) {}

    void arrive_and_wait() {
        constexpr int kSpins = 4096;
        const int64_t turn = turn_.load();
        if (++arrived_ == members_) {
            arrived_ = 0;
            ++turn_;
            return;
        }
        for (int spins = 0; turn_.load() == turn; ++spins)
            if (spins >= kSpins) std::this_thread::yield();  // the others may be waiting for this processor
    }

   private:
    const int members_;
    std::atomic<int> arrived_{0};
    std::atomic<int64_t> turn_{0};
};

// A vector or matrix of the head.
struct Weights {
    const void* data;
    bool bfloat16;

    float operator[](int64_t i) const {
        return bfloat16 ? widen(static_cast<const BFloat16*>(data)[i]) : static_cast<const float*>(data)[i];
    }
    const void* at(int64_t i) const { return static_cast<const char*>(data) + i * (bfloat16 ? 2 : 4); }
};

struct Moments {
    double mean, scale;  // scale: 1 / standard deviation
};

// The sum of f(row[d]) in eight parts, which the compiler can add side by side.
template <typename Function>
double sum_of(const float* row, int64_t width, const Function& f) {
    double parts[8] = {};
    int64_t d = 0;
    for (; d + 8 <= width; d += 8)
        for (int i = 0; i < 8; ++i) parts[i] += f(row[d + i]);
    for (; d < width; ++d) parts[0] += f(row[d]);
    return ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
}

Moments moments(const float* row, int64_t width, double epsilon) {
    const double mean = sum_of(row, width, [](float x) { return double(x); }) / width;
    const double squares = sum_of(row, width, [&](float x) { return (x - mean) * (x - mean); });
    return {mean, 1 / std::sqrt(squares / width + epsilon)};
}

float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }

class Step {
   public:
    Step(const SoftTask& task, const SoftOutput& output)
        : task_(task),
          output_(output),
          threads_(useful_threads(task)),
          noise_count_(task.sigma > 0 ? task.rows * task.query_width : 0),
          width_(current_kernels(), task.width, task.bfloat16, true, task.rows),
          query_width_(current_kernels(), task.query_width, task.bfloat16, true, task.rows),
          hidden_(width_, task.rows),
          inner_(query_width_, task.rows),
          soft_(query_width_, task.rows),
          first_(task.rows * task.query_width),
          gate_(task.rows, 1.0f),
          noise_((noise_count_ + 3) / 4 * 4),
          meeting_(threads_) {
        for (int thread = 0; thread < threads_; ++thread)
            scores_.emplace_back(round_up(task.rows, kTileQueries) * kBlockRows);
    }

    void run() {
        for (int64_t b = 0; b < task_.rows; ++b) widen_hidden(b);
        if (hidden_.needs_arranging()) hidden_.arrange();
        parallel_for(threads_, threads_, [&](int64_t thread) { work(scores_[thread].data()); });
    }

   private:
    // Below this much arithmetic, starting a thread costs more than it brings.
    static int useful_threads(const SoftTask& task) {
        constexpr double kThreadWork = 1 << 22;
        const double work = double(task.rows) * task.query_width * (2.0 * task.width + task.query_width);
        return std::max(1, int(std::min<double>(task.threads, work / kThreadWork)));
    }

    // One thread's way through the step.
    void work(float* scores) {
        const int64_t B = task_.rows, D = task_.query_width, pieces = (D + kColumns - 1) / kColumns;
        const int64_t blocks = count_blocks(D), gates = task_.gate ? 1 : 0;
        const int64_t draws = (int64_t(noise_.size()) / 4 + kNoiseBlocks - 1) / kNoiseBlocks;
        int stage = 0;
        share(stage++, blocks + gates + draws, [&](int64_t piece) {
            if (piece < blocks)
                make_first(piece, scores);
            else if (piece < blocks + gates)
                open_gate(scores);
            else
                draw(piece - blocks - gates);
        });
        share(stage++, B * pieces, [&](int64_t piece) { normalise_first(piece / pieces, piece % pieces * kColumns); });
        if (inner_.needs_arranging()) share(stage++, 1, [&](int64_t) { inner_.arrange(); });
        share(stage++, blocks, [&](int64_t piece) { make_action(piece, scores); });
        share(stage++, B * pieces, [&](int64_t piece) { normalise_action(piece / pieces, piece % pieces * kColumns); });
        if (soft_.needs_arranging()) share(stage++, 1, [&](int64_t) { soft_.arrange(); });
        share(stage++, count_blocks(task_.width), [&](int64_t piece) { make_input(piece, scores); });
    }

    // Takes pieces of a stage until none is left, then waits for the others.
    template <typename Body>
    void share(int stage, int64_t count, const Body& body) {
        for (int64_t piece = next_[stage]++; piece < count; piece = next_[stage]++) body(piece);
        meeting_.arrive_and_wait();
    }

    static int64_t count_blocks(int64_t outputs) { return (outputs + kBlockRows - 1) / kBlockRows; }
    Weights weights(const void* data) const { return {data, task_.bfloat16}; }

    // Multiplies with block number `piece` of a matrix (outputs, width) and calls take(row, output, product).
    template <typename Take>
    void multiply(
        const Packed& left, const void* matrix, int64_t outputs, int64_t width, int64_t piece, float* scores,
        const Take& take) const {
        Block block;
        const int64_t begin = piece * kBlockRows;
        block.count = int(std::min<int64_t>(kBlockRows, outputs - begin));
        block.dim = block.stride = width;
        block.bfloat16 = task_.bfloat16;
        for (int i = 0; i < block.count; ++i) block.rows[i] = weights(matrix).at((begin + i) * width);
        left.multiply(block, scores);
        for (int64_t b = 0; b < task_.rows; ++b)
            for (int i = 0; i < block.count; ++i) take(b, begin + i, scores[b * kBlockRows + i]);
    }

    void widen_hidden(int64_t b) {
        const Weights hidden = weights(task_.hidden);
        for (int64_t h = 0; h < task_.width; ++h) hidden_.set(b, h, hidden[b * task_.width + h]);
    }

    void make_first(int64_t piece, float* scores) {
        const Weights bias = weights(task_.first_bias);
        multiply(hidden_, task_.first, task_.query_width, task_.width, piece, scores, [&](int64_t b, int64_t d, float product) {
            first_[b * task_.query_width + d] = product + bias[d];
        });
    }

    void open_gate(float* scores) {
        const float bias = weights(task_.gate_bias)[0];
        multiply(hidden_, task_.gate, 1, task_.width, 0, scores, [&](int64_t b, int64_t, float product) {
            gate_[b] = 1.0f / (1.0f + std::exp(-(product + bias)));
        });
    }

    void draw(int64_t piece) {
        const int64_t end = std::min<int64_t>(noise_.size() / 4, (piece + 1) * kNoiseBlocks);
        for (int64_t block = piece * kNoiseBlocks; block < end; ++block) {
            const Normals four = normals(task_.seed, task_.offset + block);
            std::copy_n(four.at, 4, noise_.data() + 4 * block);
        }
    }

    void normalise_first(int64_t b, int64_t begin) {
        const float* row = first_.data() + b * task_.query_width;
        const Moments of = moments(row, task_.query_width, task_.norm_epsilon);
        const Weights scale = weights(task_.norm), shift = weights(task_.norm_bias);
        for (int64_t d = begin; d < std::min(begin + kColumns, task_.query_width); ++d)
            inner_.set(b, d, gelu(float((row[d] - of.mean) * of.scale) * scale[d] + shift[d]));
    }

    void make_action(int64_t piece, float* scores) {
        const Weights bias = weights(task_.second_bias);
        const int64_t D = task_.query_width;
        multiply(inner_, task_.second, D, D, piece, scores, [&](int64_t b, int64_t d, float product) {
            const float mean = (product + bias[d]) * gate_[b];
            output_.mean[b * D + d] = mean;
            output_.action[b * D + d] = noise_count_ ? mean + task_.sigma * noise_[b * D + d] : mean;
        });
    }

    void normalise_action(int64_t b, int64_t begin) {
        const int64_t D = task_.query_width;
        const float *mean = output_.mean + b * D, *action = output_.action + b * D;
        if (begin == 0) {
            double squares = 0;
            for (int64_t d = 0; noise_count_ && d < D; ++d) {
                const double deviation = (double(action[d]) - mean[d]) / task_.sigma;
                squares += deviation * deviation;
            }
            constexpr double kHalfLogTwoPi = 0.91893853320467274;
            output_.logp[b] = noise_count_ ? float(-squares / (2 * D) - std::log(double(task_.sigma)) - kHalfLogTwoPi) : 0.0f;
        }
        const Moments of = moments(action, D, task_.input_norm_epsilon);
        const Weights scale = weights(task_.input_norm), shift = weights(task_.input_norm_bias);
        for (int64_t d = begin; d < std::min(begin + kColumns, D); ++d)
            soft_.set(b, d, float((action[d] - of.mean) * of.scale) * scale[d] + shift[d]);
    }

    void make_input(int64_t piece, float* scores) {
        const Weights bias = weights(task_.input_bias);
        const int64_t H = task_.width;
        multiply(soft_, task_.input, H, task_.query_width, piece, scores, [&](int64_t b, int64_t h, float product) {
            const float value = product + bias[h];
            if (task_.bfloat16)
                static_cast<BFloat16*>(output_.policy_input)[b * H + h] = narrow(value);
            else
                static_cast<float*>(output_.policy_input)[b * H + h] = value;
        });
    }

    static constexpr int kStages = 7;

    const SoftTask& task_;
    const SoftOutput& output_;
    const int threads_;
    const int64_t noise_count_;
    const Layout width_, query_width_;
    Packed hidden_, inner_, soft_;      // what the three matrices are multiplied with
    std::vector<float> first_;          // (B, D): the first layer's output
    std::vector<float> gate_;           // (B)
    std::vector<float> noise_;          // (B, D), whole blocks of four
    std::vector<Aligned<float>> scores_;  // a block's products, of each thread
    std::atomic<int64_t> next_[kStages] = {};
    Meeting meeting_;
};

}  // namespace

void soft_token_step(const SoftTask& task, const SoftOutput& output) {
    if (task.rows) Step(task, output).run();
}

void noise_normals(uint64_t seed, int64_t offset, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += 4) {
        const Normals four = normals(seed, offset + i / 4);
        std::copy_n(four.at, std::min<int64_t>(4, count - i), out + i);
    }
}

void noise_pairs(const uint32_t* radius_words, const uint32_t* angle_words, int64_t count, float* first, float* second) {
    for (int64_t i = 0; i < count; ++i) box_muller(radius_words[i], angle_words[i], first[i], second[i]);
}

}  // namespace vsr1
