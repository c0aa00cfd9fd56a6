// What the tests of the soft-token step's CUDA kernel call through ctypes; compiled behind arithmetic.cuh, cuda_emulation.h, noise.cuh
// and soft_query.cuh.

extern "C" {

// One phase of the step; 0, or 3 for threads that wait for each other for ever.
int run_phase(const void* arguments, int bfloat16, int blocks, int threads, int phase, unsigned seed) {
    vsr1::SoftStep step = *static_cast<const vsr1::SoftStep*>(arguments);
    step.begin = phase, step.end = phase + 1;
    const auto kernel = [&] { bfloat16 ? vsr1::soft_step_kernel<vsr1::Bfloat16>(step) : vsr1::soft_step_kernel<vsr1::Half>(step); };
    return emulation::run_grid(kernel, blocks, threads, seed) ? 0 : 3;
}

void layout(int64_t* sizes) {
    const int64_t found[] = {sizeof(vsr1::SoftStep), offsetof(vsr1::SoftStep, gate), offsetof(vsr1::SoftStep, meetings),
                             offsetof(vsr1::SoftStep, offset), offsetof(vsr1::SoftStep, log_density), offsetof(vsr1::SoftStep, end)};
    memcpy(sizes, found, sizeof(found));
}

// Where a block's memory ends for these widths.
int64_t shared_end(int width, int query_width) {
    vsr1::SoftStep step{};
    step.width = width, step.query_width = query_width;
    const vsr1::SoftBlock<vsr1::Half> block(step, vsr1::memory);
    return reinterpret_cast<unsigned char*>(block.sums + vsr1::kSoftWarps) - vsr1::memory;
}

void pairs(const uint32_t* radius_words, const uint32_t* angle_words, int64_t count, float* first, float* second) {
    for (int64_t i = 0; i < count; ++i) vsr1::box_muller(radius_words[i], angle_words[i], first[i], second[i]);
}

void stream(uint64_t seed, int64_t offset, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = vsr1::normals(seed, offset + i / 4).at[i % 4];
}
}
