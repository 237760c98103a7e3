// What one call of a CPU step works on, as plain data: the ops fill it from tensors, the kernels
// read it. Everything a kernel needs from other headers is included here and not in
// step_kernel.h, so that inline functions of the standard library are compiled for the baseline
// and never, through the linker's choice of one copy, for an instruction set the machine lacks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../core/param_data.h"
#include "../priority/priority.h"
#include "compensated_sum.h"

namespace cm_fused {

// Elements per chunk: the unit of work a thread takes, of a partial norm, and of a running sum's
// rebuilding. Part of the definition of the norms' bits; a multiple of kBlockSize.
inline constexpr int64_t kChunkSize = 16384;

// Elements of a partial norm of float64 gradients: the Triton step's CHUNK_SIZE. Its sum is rounded
// once, so that both passes clip by the same norm.
inline constexpr int64_t kNormSize = 4096;

// Elements that are asked for ahead at a time, a cache line of the narrowest stream, and those that
// the norms' pass takes at a time.
inline constexpr int64_t kBlockSize = 64;

// A block of what is scaled or rounded stochastically: as many elements as share a scale, or as
// random bits are made at a time.
inline constexpr int64_t kLargestBlock = kScaleBlock;
static_assert(kLargestBlock % kBlockSize == 0 && kNormSize % kLargestBlock == 0);
static_assert(kChunkSize % kNormSize == 0);

// Elements ahead of which a step asks for its streams, into the second-level cache: 384, 512, 640,
// 1024, 1536 took 1.83, 1.52, 1.63, 1.54, 1.69; without asking 1.76; into the first level, where
// the streams share sets, 1.99.
inline constexpr int64_t kPrefetchDistance = 512;

// Elements of a step from which on it stores momenta past the caches (`Buffer`): their state is
// larger than most of them. On two cores of an Intel Xeon with AMX, at C = 5, bfloat16 slots took
// 0.99 of the time at 1 M elements, 0.97 at 4 M and 10 M, 0.95 at 30 M.
inline constexpr int64_t kNumelPastCache = int64_t{1} << 23;

// Where element i of a tensor lies when i counts in the state's memory order: dimensions from the
// outermost to the innermost, merged where they can be.
struct StridedLayout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};

// One parameter tensor's part in a step.
struct TensorStep : ParamData {
  // nullptr where the tensor lies in memory as the state does.
  std::unique_ptr<const StridedLayout> param_layout;
  std::unique_ptr<const StridedLayout> grad_layout;

  // Critical momenta: the slot last step's exp_avg goes to. Critical gradients: the slot this
  // step's gradient goes to. Or kNoSlot.
  int64_t slot;
  // Divisor of the buffer's mean.
  int64_t mean_divisor;
  int64_t step_number;  // counts from 1
  double bias_correction1;
  double bias_correction2;
};

using BucketStep = std::vector<TensorStep>;

// The numbers that step_registered_ takes for each state, in their order; flags are 0 or not.
// stochastic_update is of half-precision parameters. l2_in_aggregate is of critical gradients: the
// L2 term is not in the gradient, its norm and slots. With sum_of_norms a group's key is the sum of
// its tensors' norms, not the norm of all. critical_gradients tells the kinds apart where there is
// no buffer.
#define CM_FUSED_HYPERPARAMETERS(X) \
  X(double, lr)                     \
  X(double, beta1)                  \
  X(double, beta2)                  \
  X(double, eps)                    \
  X(double, weight_decay)           \
  X(double, priority_decay)         \
  X(bool, group_scope)              \
  X(bool, mean_over_capacity)       \
  X(bool, eps_inside_sqrt)          \
  X(bool, maximize)                 \
  X(bool, decoupled_weight_decay)   \
  X(bool, stochastic_update)        \
  X(bool, l2_in_aggregate)          \
  X(bool, sum_of_norms)             \
  X(bool, critical_gradients)

// The hyperparameters of one param group.
struct StepOptions {
#define CM_FUSED_MEMBER(type, name) type name = {};
  CM_FUSED_HYPERPARAMETERS(CM_FUSED_MEMBER)
  int64_t seed = 0;
  double grad_factor = 1.0;  // of every gradient, before all else
  bool past_cache = false;   // whether slots may be stored past the caches
};

// Works on chunk `chunk` of one tensor. Returns the chunk's sum of g^2 where it reads g for that,
// else 0.
using ChunkKernel = CompensatedSum<double> (*)(
    const TensorStep&, const StepOptions&, int64_t chunk);

// The functions compiled once per instruction set.
struct Kernels {
  const char* name;
  ChunkKernel adam_cm;  // critical momenta; gives the sum of g^2
  ChunkKernel adam_cg;  // critical gradients
  ChunkKernel sq_norm;  // only the sum of g^2
  ChunkKernel commit;   // only the deferred commit of critical momenta
};

extern const Kernels kDefaultKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The best of this machine's instruction sets, or the one CM_FUSED_CPU_CAPABILITY names
// ("default", "avx2", "avx512").
const Kernels& kernels();

}  // namespace cm_fused
