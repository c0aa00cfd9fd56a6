// AVX-512 with sums of int16 and of bfloat16 products: Cooper Lake, Sapphire Rapids, Zen 4.

#if defined(__x86_64__)
#define VSR1_ISA avx512_bf16
#define VSR1_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512,avx512vnni,avx512bf16")))
#define VSR1_LANES 16
#define VSR1_REGISTERS 32
#define VSR1_VNNI
#define VSR1_BF16
#include "../kernels.inl"
#endif
