// x86 with AVX2 and FMA.

#if defined(__x86_64__)
#define VSR1_ISA avx2
#define VSR1_TARGET __attribute__((target("avx2,fma")))
#define VSR1_LANES 8
#define VSR1_REGISTERS 16
#include "../kernels.inl"
#endif
