// The state of a bucket, as register_state was given it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "param_data.h"

namespace cm_fused {

using Tensors = std::vector<torch::stable::Tensor>;

// The tensors that a step changes, besides the parameters.
class StateTensors {
 public:
  // `tensors` has those of row after row, in each one for each parameter.
  StateTensors(Tensors tensors, StateRows rows, std::vector<int64_t> param_indices,
      std::vector<int64_t> shard_layouts);

  // Of parameters.
  [[nodiscard]] size_t count() const {
    return count_;
  }

  [[nodiscard]] bool has(StateRow row) const {
    return (rows_ & bit(row)) != 0;
  }

  [[nodiscard]] const torch::stable::Tensor& at(StateRow row, size_t i) const {
    return tensors_[first_[row] + i];
  }

  [[nodiscard]] int64_t param_index(size_t i) const {
    return param_indices_.empty() ? static_cast<int64_t>(i) : param_indices_[i];
  }

  [[nodiscard]] ShardLayout shard_layout(size_t i) const;

  // Checks that these rows are there.
  void require(StateRows rows) const;

 private:
  Tensors tensors_;
  StateRows rows_;
  size_t count_ = 0;
  size_t first_[kNumStateRows] = {};  // of a row's tensors
  std::vector<int64_t> param_indices_;
  std::vector<int64_t> shard_layouts_;
};

class RegisteredState {
 public:
  explicit RegisteredState(StateTensors state) : tensors(std::move(state)) {}

  // What an operator caches for its next call, in a type of its own. Needs the lock.
  template <typename Cache>
  Cache& cache() {
    static const char key = 0;
    auto& cached = caches_[&key];
    if (cached == nullptr) {
      cached = std::make_shared<Cache>();
    }
    return *static_cast<Cache*>(cached.get());
  }

  const StateTensors tensors;

 private:
  friend class LockedStates;

  std::mutex mutex_;
  std::unordered_map<const char*, std::shared_ptr<void>> caches_;
};

// The states that an operator works on, in the order of their ids, locked for as long as this
// lives: torch calls operators without Python's lock, and threads that step one state take turns.
class LockedStates {
 public:
  explicit LockedStates(const std::vector<int64_t>& ids);

  RegisteredState& operator[](size_t k) const {
    return *states_[k];
  }

 private:
  std::vector<std::shared_ptr<RegisteredState>> states_;
  std::vector<std::unique_lock<std::mutex>> locks_;
};

}  // namespace cm_fused
