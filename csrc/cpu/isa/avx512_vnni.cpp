// AVX-512 with sums of int16 products, as of Cascade Lake.

#if defined(__x86_64__)
#define VSR1_ISA avx512_vnni
#define VSR1_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512,avx512vnni")))
#define VSR1_LANES 16
#define VSR1_REGISTERS 32
#define VSR1_VNNI
#include "../kernels.inl"
#endif
