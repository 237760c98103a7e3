// The step for AVX-512, chosen at run time.
#include "../step.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                              \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#define CM_FUSED_ISA avx512
#define CM_FUSED_VECTOR_BYTES 64
#define CM_FUSED_ISA_NAME "avx512"
#define CM_FUSED_KERNELS kAvx512Kernels
#include "step_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
