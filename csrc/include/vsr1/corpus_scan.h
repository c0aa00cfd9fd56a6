// The sweep of the corpus: what goes in, what comes out. Contract: vsr1/ops/corpus_scan.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vsr1 {

// Rows of a corpus where they lie: element (i, j) at data[i * row_stride + j], float32 or bfloat16.
struct RowsView {
    const void* data;
    int64_t count;
    int64_t dim;
    int64_t row_stride;  // in elements
    bool bfloat16;

    const void* row(int64_t i) const { return static_cast<const char*>(data) + i * row_stride * (bfloat16 ? 2 : 4); }
};

struct ScanTask {
    RowsView rows;
    const float* query;   // (queries, dim)
    bool query_bfloat16;  // its numbers fit bfloat16
    int64_t queries;
    int64_t k;
    const int64_t* positive;    // (queries) rows or -1; null: not asked
    const int64_t* exclude;     // (queries, exclude_width) rows or -1; null: none
    int64_t exclude_width;
    const int64_t* candidates;  // (queries, candidates_width), ascending but for -1
    int64_t candidates_width;   // -1: all rows are scored
    float temperature;          // 0: lse not asked
    bool expected;              // needs a temperature
    int threads;
};

// Every array is written whole; those not asked for are not touched.
struct ScanOutput {
    float* scores;       // (queries, k)
    int64_t* ids;        // (queries, k)
    int64_t* nan_count;  // (queries)
    float* positive_score;
    int64_t* rank;
    float* lse;
    float* expected;  // (queries, dim)
};

// Results are bitwise the same for any number of threads, and a score does not depend on the other queries or rows.
void corpus_scan(const ScanTask& task, const ScanOutput& output);

// The same corpus with int8 codes beside its rows (CorpusMatrix.quantize); k, exclude and threads as in ScanTask.
struct Int8Task {
    RowsView rows;
    const int8_t* codes;  // (rows.count, rows.dim), code_stride apart
    int64_t code_stride;
    const float* scales;     // (rows.count)
    const float* residuals;  // (rows.count)
    const float* query;      // (queries, rows.dim)
    int64_t queries;
    int64_t k;
    const int64_t* exclude;
    int64_t exclude_width;
    int threads;
};

// Contract: vsr1/ops/_corpus_int8.py.
struct Int8Output {
    float* scores;       // (queries, k)
    int64_t* ids;        // (queries, k)
    int64_t* nan_count;  // (queries), as the two below
    int64_t* rescored;
    int64_t* fallbacks;
};

// The best k rows in the order of their float64 scores, whatever the codes are worth.
void corpus_scan_int8(const Int8Task& task, const Int8Output& output);

// The instruction sets this processor has, best first; the sweeps use the first. `use_isa` picks another (tests): one of them, or
// "emulated", which computes what matrix registers would.
std::vector<std::string> isas();
std::string isa();
void use_isa(const std::string& name);

}  // namespace vsr1
