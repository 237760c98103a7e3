// The step for AVX-512, chosen at run time.
#if defined(__x86_64__)
#define CM_FUSED_ISA avx512
#define CM_FUSED_VECTOR_BYTES 64
#define CM_FUSED_TARGET "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#define CM_FUSED_ISA_NAME "avx512"
#define CM_FUSED_KERNELS kAvx512Kernels
#include "step_kernel.h"
#endif
