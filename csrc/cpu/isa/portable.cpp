// Any processor: vectors of four floats, which the compiler makes what it can of.

#define VSR1_ISA portable
#define VSR1_TARGET
#define VSR1_LANES 4
#define VSR1_REGISTERS 16
#include "../kernels.inl"
