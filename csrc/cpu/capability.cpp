// The kernels() that step.h declares: which instruction set is used.
#include <cstdlib>
#include <string_view>

#include <torch/headeronly/util/Exception.h>

#include "step.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cm_fused {
namespace {

#if defined(__x86_64__)
// Which not every compiler's __builtin_cpu_supports knows.
bool supports_f16c() {
  unsigned int eax = 0;
  unsigned int ebx = 0;
  unsigned int ecx = 0;
  unsigned int edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

const Kernels& choose() {
  // From the best to the one every machine has.
  const std::pair<const Kernels*, bool> capabilities[] = {
#if defined(__x86_64__)
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl")},
      {&kAvx2Kernels,
          __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c()},
#endif
      {&kDefaultKernels, true}};
  const char* requested = std::getenv("CM_FUSED_CPU_CAPABILITY");
  for (const auto& [kernels, supported] : capabilities) {
    if (supported && (requested == nullptr || std::string_view(requested) == kernels->name)) {
      return *kernels;
    }
  }
  STD_TORCH_CHECK(false,
      "CM_FUSED_CPU_CAPABILITY must name an instruction set of this machine (default, avx2 or "
      "avx512), got ",
      requested);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace cm_fused
