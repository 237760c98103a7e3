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

// The error of the lowest index, of those that threads met.
class FirstError {
 public:
  template <typename Function>
  void run(int64_t index, Function function) {
    try {
      function();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (error_ == nullptr || index < index_) {
        index_ = index;
        error_ = std::current_exception();
      }
    }
  }

  void rethrow() const {
    if (error_ != nullptr) {
      std::rethrow_exception(error_);
    }
  }

 private:
  std::mutex mutex_;
  int64_t index_ = 0;
  std::exception_ptr error_;
};

// Calls visit(i) for every tensor, then throws what the lowest index threw.
template <typename Visit>
void for_each_tensor(size_t count, Visit visit) {
  FirstError error;
  torch::stable::parallel_for(
      0, static_cast<int64_t>(count), kTensorGrainSize, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          error.run(i, [&] { visit(static_cast<size_t>(i)); });
        }
      });
  error.rethrow();
}

}  // namespace cm_fused
