// vsr1._C: the compiled ops for Python. Arrays come as addresses, checked by the Python side of each op; the GIL is released.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "vsr1/corpus_scan.h"
#include "vsr1/linear_logp.h"
#include "vsr1/patches.h"
#include "vsr1/prefix.h"
#include "vsr1/soft_query.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void corpus_scan(
    uintptr_t query, bool query_bfloat16, int64_t queries, uintptr_t rows, int64_t row_count, int64_t dim, int64_t row_stride,
    bool bfloat16, int64_t k, uintptr_t positive, uintptr_t exclude, int64_t exclude_width, uintptr_t candidates, int64_t candidates_width,
    float temperature, bool expected, int threads, std::array<uintptr_t, 7> outputs) {
    const vsr1::ScanTask task{
        {pointer<const void>(rows), row_count, dim, row_stride, bfloat16},
        pointer<const float>(query),
        query_bfloat16,
        queries,
        k,
        pointer<const int64_t>(positive),
        pointer<const int64_t>(exclude),
        exclude_width,
        pointer<const int64_t>(candidates),
        candidates_width,
        temperature,
        expected,
        threads,
    };
    const vsr1::ScanOutput output{
        pointer<float>(outputs[0]),   pointer<int64_t>(outputs[1]), pointer<int64_t>(outputs[2]), pointer<float>(outputs[3]),
        pointer<int64_t>(outputs[4]), pointer<float>(outputs[5]),   pointer<float>(outputs[6]),
    };
    const py::gil_scoped_release release;
    vsr1::corpus_scan(task, output);
}

void corpus_scan_int8(
    uintptr_t query, int64_t queries, uintptr_t rows, int64_t row_count, int64_t dim, int64_t row_stride, bool bfloat16,
    uintptr_t codes, int64_t code_stride, uintptr_t scales, uintptr_t residuals, int64_t k, uintptr_t exclude,
    int64_t exclude_width, int threads, std::array<uintptr_t, 5> outputs) {
    const vsr1::Int8Task task{
        {pointer<const void>(rows), row_count, dim, row_stride, bfloat16},
        pointer<const int8_t>(codes),
        code_stride,
        pointer<const float>(scales),
        pointer<const float>(residuals),
        pointer<const float>(query),
        queries,
        k,
        pointer<const int64_t>(exclude),
        exclude_width,
        threads,
    };
    const vsr1::Int8Output output{
        pointer<float>(outputs[0]), pointer<int64_t>(outputs[1]), pointer<int64_t>(outputs[2]), pointer<int64_t>(outputs[3]),
        pointer<int64_t>(outputs[4]),
    };
    const py::gil_scoped_release release;
    vsr1::corpus_scan_int8(task, output);
}

// weights: of the head, in the order of SoftTask; outputs in that of SoftOutput.
void soft_token_step(
    uintptr_t hidden, std::array<uintptr_t, 12> weights, bool bfloat16, int64_t rows, int64_t width, int64_t query_width,
    std::array<double, 2> epsilons, float sigma, uint64_t seed, int64_t offset, int threads, std::array<uintptr_t, 4> outputs) {
    const auto weight = [&](int i) { return pointer<const void>(weights[i]); };
    const vsr1::SoftTask task{
        bfloat16,  rows,      width,     query_width, pointer<const void>(hidden), weight(0), weight(1), weight(2), weight(3),
        weight(4), weight(5), weight(6), weight(7),   weight(8), weight(9), weight(10), weight(11), epsilons[0], epsilons[1], sigma,
        seed,      offset,    threads,
    };
    const vsr1::SoftOutput output{
        pointer<float>(outputs[0]), pointer<float>(outputs[1]), pointer<float>(outputs[2]), pointer<void>(outputs[3])};
    const py::gil_scoped_release release;
    vsr1::soft_token_step(task, output);
}

void noise_normals(uint64_t seed, int64_t offset, int64_t count, uintptr_t out) {
    const py::gil_scoped_release release;
    vsr1::noise_normals(seed, offset, count, pointer<float>(out));
}

void noise_pairs(uintptr_t radius_words, uintptr_t angle_words, int64_t count, uintptr_t first, uintptr_t second) {
    const py::gil_scoped_release release;
    vsr1::noise_pairs(
        pointer<const uint32_t>(radius_words), pointer<const uint32_t>(angle_words), count, pointer<float>(first),
        pointer<float>(second));
}

vsr1::LogitTile logit_tile(
    uintptr_t products, int64_t rows, int64_t columns, int64_t stride, bool bfloat16, int64_t first, uintptr_t target,
    uintptr_t bias, float scale, int threads) {
    return {pointer<void>(products), rows,  columns, stride, bfloat16, first, pointer<const int64_t>(target),
            pointer<const float>(bias), scale, threads};
}

void add_logits(const vsr1::LogitTile& tile, uintptr_t peak, uintptr_t total, uintptr_t weighted, uintptr_t picked) {
    const vsr1::RowSums sums{pointer<float>(peak), pointer<float>(total), pointer<float>(weighted), pointer<float>(picked)};
    const py::gil_scoped_release release;
    vsr1::add_logits(tile, sums);
}

void logits_to_gradient(
    const vsr1::LogitTile& tile, uintptr_t lse, uintptr_t upstream, uintptr_t slope, uintptr_t entropy) {
    const vsr1::RowGradient gradient{
        pointer<const float>(lse), pointer<const float>(upstream), pointer<const float>(slope), pointer<const float>(entropy)};
    const py::gil_scoped_release release;
    vsr1::logits_to_gradient(tile, gradient);
}

// Sizes in the order of PrefixTask, behind them the keys of prefix and suffix; arrays: q, both keys and values, owner, both masks;
// strides: of the same but the owner, which is dense as the last dimension of the others is.
void prefix_attention(
    bool bfloat16, std::array<int64_t, 8> sizes, std::array<uintptr_t, 8> arrays,
    std::array<std::array<int64_t, 4>, 7> strides, float scale, int threads, uintptr_t out, uintptr_t lse) {
    const auto [rows, query_heads, key_heads, queries, width, prefixes, prefix, suffix] = sizes;
    const auto array = [&](int i) { return pointer<const void>(arrays[i]); };
    const auto mask = [&](int i) { return pointer<const bool>(arrays[i]); };
    const auto stride = [&](int i) { return std::array{strides[i][0], strides[i][1], strides[i][2]}; };
    const vsr1::PrefixTask task{
        bfloat16, rows, query_heads, key_heads, queries, width, prefixes, array(0), stride(0), pointer<const int64_t>(arrays[5]),
        {array(1), array(2), stride(1), stride(2), prefix, mask(6), stride(5)},
        {array(3), array(4), stride(3), stride(4), suffix, mask(7), stride(6)},
        scale, threads,
    };
    const py::gil_scoped_release release;
    vsr1::prefix_attention(task, {pointer<void>(out), pointer<float>(lse)});
}

// Filters down and across as (source, target, address of begin or 0, address of weights, taps, bits); geometry: patch, merge, temporal.
void frames_to_patches(
    uintptr_t pixels, std::array<int64_t, 2> counts, std::array<int64_t, 5> strides,
    std::array<std::array<uintptr_t, 6>, 2> filters, std::array<int64_t, 3> geometry, uintptr_t values, int64_t value_bytes,
    int threads, uintptr_t rows) {
    const auto filter = [&](int i) {
        const auto [source, target, begin, weights, taps, bits] = filters[i];
        return vsr1::Filter{int64_t(source), int64_t(target), pointer<const int32_t>(begin), pointer<const int16_t>(weights), int64_t(taps), int(bits)};
    };
    const auto [patch, merge, temporal] = geometry;
    const vsr1::PatchTask task{
        pointer<const uint8_t>(pixels), counts[0], counts[1], strides, filter(0), filter(1), patch, merge, temporal,
        pointer<const void>(values), value_bytes, threads,
    };
    const py::gil_scoped_release release;
    vsr1::frames_to_patches(task, pointer<void>(rows));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled ops of vsr1";
    module.def(
        "corpus_scan", &corpus_scan, py::kw_only(), py::arg("query"), py::arg("query_bfloat16"), py::arg("queries"),
        py::arg("rows"), py::arg("row_count"), py::arg("dim"), py::arg("row_stride"), py::arg("bfloat16"), py::arg("k"), py::arg("positive"), py::arg("exclude"),
        py::arg("exclude_width"), py::arg("candidates"), py::arg("candidates_width"), py::arg("temperature"),
        py::arg("expected"), py::arg("threads"), py::arg("outputs"));
    module.def(
        "corpus_scan_int8", &corpus_scan_int8, py::kw_only(), py::arg("query"), py::arg("queries"), py::arg("rows"),
        py::arg("row_count"), py::arg("dim"), py::arg("row_stride"), py::arg("bfloat16"), py::arg("codes"),
        py::arg("code_stride"), py::arg("scales"), py::arg("residuals"), py::arg("k"), py::arg("exclude"),
        py::arg("exclude_width"), py::arg("threads"), py::arg("outputs"));
    module.def(
        "soft_token_step", &soft_token_step, py::kw_only(), py::arg("hidden"), py::arg("weights"), py::arg("bfloat16"),
        py::arg("rows"), py::arg("width"), py::arg("query_width"), py::arg("epsilons"), py::arg("sigma"), py::arg("seed"),
        py::arg("offset"), py::arg("threads"), py::arg("outputs"));
    module.def("noise_normals", &noise_normals, py::arg("seed"), py::arg("offset"), py::arg("count"), py::arg("out"));
    module.def(
        "noise_pairs", &noise_pairs, py::arg("radius_words"), py::arg("angle_words"), py::arg("count"), py::arg("first"),
        py::arg("second"));
    py::class_<vsr1::LogitTile>(module, "LogitTile", "Products of hidden states with a part of the vocabulary")
        .def(
            py::init(&logit_tile), py::kw_only(), py::arg("products"), py::arg("rows"), py::arg("columns"), py::arg("stride"),
            py::arg("bfloat16"), py::arg("first"), py::arg("target"), py::arg("bias"), py::arg("scale"), py::arg("threads"));
    module.def(
        "add_logits", &add_logits, py::arg("tile"), py::kw_only(), py::arg("peak"), py::arg("total"), py::arg("weighted"),
        py::arg("picked"));
    module.def(
        "logits_to_gradient", &logits_to_gradient, py::arg("tile"), py::kw_only(), py::arg("lse"), py::arg("upstream"),
        py::arg("slope"), py::arg("entropy"));
    module.def(
        "prefix_attention", &prefix_attention, py::arg("bfloat16"), py::arg("sizes"), py::arg("arrays"), py::arg("strides"),
        py::arg("scale"), py::arg("threads"), py::arg("out"), py::arg("lse"));
    module.def(
        "frames_to_patches", &frames_to_patches, py::kw_only(), py::arg("pixels"), py::arg("counts"), py::arg("strides"),
        py::arg("filters"), py::arg("geometry"), py::arg("values"), py::arg("value_bytes"), py::arg("threads"), py::arg("rows"));
    module.def("isas", &vsr1::isas, "Instruction sets this processor has, best first");
    module.def("isa", &vsr1::isa, "The instruction set in use");
    module.def("use_isa", &vsr1::use_isa, py::arg("name"), "Use another one of isas()");
}
