#include <cstdlib>
#include <string_view>

#include <torch/headeronly/util/Exception.h>

#include "step.h"

namespace cm_fused {

namespace {

struct Capability {
  const Kernels* kernels;
  bool supported;
};

const Kernels& choose() {
  // From the best to the one every machine has.
  const Capability capabilities[] = {
#if defined(__x86_64__)
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl")},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") != 0},
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
