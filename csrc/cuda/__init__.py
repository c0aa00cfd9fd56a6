"""The CUDA C++ sources, installed as `vsr1._cuda_source` so that NVRTC can compile them where no nvcc was found."""
