// The code for matrix registers on an emulation of them, so that it can be tested anywhere. Everything else is portable.

#include "../emulated_tiles.h"

#define VSR1_ISA emulated
#define VSR1_REST portable
#define VSR1_TARGET
#include "../tiles.inl"
