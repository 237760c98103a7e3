// The step for the compiler's baseline: SSE2 on x86-64, NEON on arm64.
#define CM_FUSED_ISA baseline
#define CM_FUSED_VECTOR_BYTES 16
#define CM_FUSED_ISA_NAME "default"
#define CM_FUSED_KERNELS kDefaultKernels
#include "step_kernel.h"
