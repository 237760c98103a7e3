// The step for AVX2 and F16C, chosen at run time.
#include "../step.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#define CM_FUSED_ISA avx2
#define CM_FUSED_VECTOR_BYTES 32
#define CM_FUSED_ISA_NAME "avx2"
#define CM_FUSED_KERNELS kAvx2Kernels
#include "step_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
