// What tests/ops/test_corpus_scan_cuda_host.py calls through ctypes: the functions of arithmetic.cuh one by one, and whole kernels.
// It is compiled behind arithmetic.cuh, cuda_emulation.h and the kernels.

namespace {

struct Entry {
    const char* name;
    std::function<void(const void*)> kernel;
    size_t shared;
};

#define SWEEP(T, slice, stages)                                                                                      \
    Entry{"vsr1::sweep_kernel<vsr1::" #T ", " #slice ", " #stages ">",                                               \
          [](const void* s) { vsr1::sweep_kernel<vsr1::T, slice, stages>(*static_cast<const vsr1::Sweep*>(s)); },     \
          sizeof(vsr1::SharedMemory<vsr1::T, 16 * slice, stages>)}
#define PROJECTION(T)                                                                                                 \
    Entry{"vsr1::projection_kernel<vsr1::" #T ">",                                                                    \
          [](const void* p) { vsr1::projection_kernel<vsr1::T>(*static_cast<const vsr1::Projection*>(p)); }, 0}

const Entry kEntries[] = {SWEEP(Half, 64, 3), SWEEP(Half, 128, 2), SWEEP(Bfloat16, 64, 3), PROJECTION(Half)};

const Entry* entry(const char* name) {
    for (const Entry& candidate : kEntries) {
        if (strcmp(candidate.name, name) == 0) return &candidate;
    }
    return nullptr;
}

}  // namespace

extern "C" {

// 0, or 1 for an unknown kernel, 2 for too little shared memory, 3 for threads that wait for each other for ever.
int run_kernel(const char* name, const void* arguments, int blocks, int threads, int shared, bool bulk, unsigned seed) {
    const Entry* found = entry(name);
    if (!found) return 1;
    if (shared < static_cast<int>(found->shared)) return 2;
    emulation::threads_copy = !bulk;
    return emulation::run_grid([=] { found->kernel(arguments); }, blocks, threads, seed) ? 0 : 3;
}

int shared_bytes(const char* name) { return static_cast<int>(entry(name)->shared); }

void layout(int64_t* sizes) {
    const int64_t found[] = {sizeof(vsr1::Sweep), offsetof(vsr1::Sweep, partial), offsetof(vsr1::Sweep, query_stride),
                             offsetof(vsr1::Sweep, slope), offsetof(vsr1::Sweep, queries), sizeof(vsr1::Projection),
                             offsetof(vsr1::Projection, hidden_stride), offsetof(vsr1::Projection, queries)};
    memcpy(sizes, found, sizeof(found));
}

// Joins `count` scores, each alone with its row, in a tree that `order` gives: entry i joins pair (a, b) into a.
int join_all(const float* scores, const int* rows, int count, const int* order, float* score, float* second, int* row) {
    std::vector<vsr1::Best> sets;
    for (int i = 0; i < count; ++i) sets.push_back({scores[i], rows[i], -INFINITY});
    for (int i = 0; i + 1 < count; ++i) sets[order[2 * i]].join(sets[order[2 * i + 1]]);
    const vsr1::Best& best = sets[count > 1 ? order[2 * count - 4] : 0];
    *score = best.score, *second = best.second, *row = best.row;
    return best.packed();
}

int64_t walk(int64_t row_count, int block, int blocks, int64_t* rows, int64_t* readable, int most) {
    const vsr1::Walk walk{row_count, block, blocks};
    int64_t written = 0;
    for (int tile = 0; tile < walk.tiles(); ++tile) {
        for (int line = 0; line < vsr1::kTile && written < most; ++line, ++written) {
            rows[written] = walk.row(tile, line), readable[written] = walk.readable_row(tile, line);
        }
    }
    return int64_t{walk.tiles()} * vsr1::kTile;
}

int64_t row_at(int64_t row_count, int block, int blocks, int tile, int line) {
    return vsr1::Walk{row_count, block, blocks}.row(tile, line);
}

// One thread's running softmax over tiles of `width` scores that share a peak; weights relative to the last peak.
void softmax(const float* scores, int tiles, int width, float slope, float* peak, float* mass, float* weights) {
    std::vector<vsr1::Softmax> lanes(width, {-INFINITY, 0.0f});
    for (int tile = 0; tile < tiles; ++tile) {
        const float* line = scores + tile * width;
        const float highest = *std::max_element(line, line + width);
        for (int i = 0; i < width; ++i) {
            float scale;
            const float weight = lanes[i].add(line[i], highest, slope, scale);
            for (int before = 0; before < tile; ++before) weights[before * width + i] *= scale;
            weights[tile * width + i] = weight;
        }
    }
    *peak = lanes[0].peak, *mass = 0.0f;
    for (const auto& lane : lanes) *mass += lane.mass;
}

// 1 where the kernel leaves out `row`, met in the walk of `block`.
int excluded(const int64_t* list, int64_t width, int64_t row_count, int block, int blocks, int64_t row) {
    const vsr1::Walk walk{row_count, block, blocks};
    unsigned words[vsr1::Exclusions::kWords] = {};
    std::vector<long long> wide(list, list + width);
    for (const long long entry : wide) {
        const int turn = vsr1::Exclusions::turn(walk, entry);
        if (turn >= 0) words[vsr1::Exclusions::bit(turn) / 32] |= 1u << vsr1::Exclusions::bit(turn) % 32;
    }
    const int turn = vsr1::Exclusions::turn(walk, row);
    return turn >= 0 && vsr1::Exclusions::marked(words, turn) && vsr1::Exclusions::listed(wide.data(), width, row);
}

float share_of(float gate, int count) { return vsr1::share(gate, count); }
float length_of(float squares) { return vsr1::length(squares); }
int finite_value(float value) { return vsr1::is_finite(value); }
}
