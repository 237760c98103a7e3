// The step for AVX2, FMA and F16C, chosen at run time.
#if defined(__x86_64__)
#define CM_FUSED_ISA avx2
#define CM_FUSED_VECTOR_BYTES 32
#define CM_FUSED_TARGET "avx2,fma,f16c"
#define CM_FUSED_ISA_NAME "avx2"
#define CM_FUSED_KERNELS kAvx2Kernels
#include "step_kernel.h"
#endif
