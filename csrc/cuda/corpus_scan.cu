// The kernels compiled ahead of time, and the one call that starts any of them. Where there is no nvcc the same headers are compiled
// at run time (vsr1/ops/_cuda_code.py), under the same names.

#include <cuda_runtime.h>

#include <cstring>

#include "corpus_scan.cuh"
#include "projection.cuh"
#include "soft_query.cuh"

namespace {

struct Entry {
    const char* name;
    const void* kernel;
    bool cooperative;  // all its blocks run at the same time
};

#define SWEEP(T, slice, stages) \
    {"vsr1::sweep_kernel<vsr1::" #T ", " #slice ", " #stages ">", reinterpret_cast<const void*>(&vsr1::sweep_kernel<vsr1::T, slice, stages>), \
     false}
#define SWEEPS(T) SWEEP(T, 64, 2), SWEEP(T, 64, 3), SWEEP(T, 96, 2), SWEEP(T, 96, 3), SWEEP(T, 128, 2), SWEEP(T, 128, 3)
#define PROJECTION(T) {"vsr1::projection_kernel<vsr1::" #T ">", reinterpret_cast<const void*>(&vsr1::projection_kernel<vsr1::T>), false}
#define SOFT_STEP(T) {"vsr1::soft_step_kernel<vsr1::" #T ">", reinterpret_cast<const void*>(&vsr1::soft_step_kernel<vsr1::T>), true}

const Entry kEntries[] = {SWEEPS(Half), SWEEPS(Bfloat16), PROJECTION(Half), PROJECTION(Bfloat16),
                          SOFT_STEP(Half), SOFT_STEP(Bfloat16)};

cudaError_t start(const Entry& entry, void* arguments, int blocks, int threads, int shared_bytes, cudaStream_t stream) {
    const cudaError_t error = cudaFuncSetAttribute(entry.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    void* parameters[] = {arguments};
    if (entry.cooperative) return cudaLaunchCooperativeKernel(entry.kernel, blocks, threads, parameters, shared_bytes, stream);
    return cudaLaunchKernel(entry.kernel, blocks, threads, parameters, shared_bytes, stream);
}

}  // namespace

// Starts the named kernel, whose one argument is the struct at `arguments`, on `stream`; null, or what is wrong in words.
extern "C" const char* vsr1_launch(const char* name, void* arguments, int blocks, int threads, int shared_bytes, void* stream) {
    for (const Entry& entry : kEntries) {
        if (std::strcmp(entry.name, name) != 0) continue;
        const auto error = start(entry, arguments, blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream));
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    }
    return "the compiled library has no kernel of this name";
}
