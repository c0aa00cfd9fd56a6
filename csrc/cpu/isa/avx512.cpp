// x86 with AVX-512 as of Skylake servers.

#if defined(__x86_64__)
#define VSR1_ISA avx512
#define VSR1_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define VSR1_LANES 16
#define VSR1_REGISTERS 32
#include "../kernels.inl"
#endif
