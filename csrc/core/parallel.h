// Loops over the tensors of a bucket, in parallel: with many small ones the time goes into cache
// misses on their metadata.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

#include <torch/csrc/stable/ops.h>

namespace cm_fused {

// Below this many tensors a thread's start costs more than it saves.
inline constexpr int64_t kTensorGrainSize = 256;

// Calls visit(i) for every tensor, then throws what the lowest index threw.
template <typename Visit>
void for_each_tensor(size_t count, Visit visit) {
  std::mutex mutex;
  std::exception_ptr error;
  int64_t failed = 0;
  torch::stable::parallel_for(
      0, static_cast<int64_t>(count), kTensorGrainSize, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          try {
            visit(static_cast<size_t>(i));
          } catch (...) {
            const std::lock_guard lock(mutex);
            if (error == nullptr || i < failed) {
              failed = i;
              error = std::current_exception();
            }
          }
        }
      });
  if (error != nullptr) {
    std::rethrow_exception(error);
  }
}

}  // namespace cm_fused
