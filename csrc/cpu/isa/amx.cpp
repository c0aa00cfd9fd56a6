// x86 with matrix registers for bfloat16 and int8, as of Sapphire Rapids. Everything else is AVX-512.

#if defined(__x86_64__)
#include "../amx_tiles.h"

#define VSR1_ISA amx
#define VSR1_REST avx512_bf16
#define VSR1_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#include "../tiles.inl"
#endif
