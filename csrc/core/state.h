// The state of a bucket, as register_state was given it, and binding its parameters to a step, on
// any device: check their tensors, take their addresses.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "checks.h"
#include "param_data.h"

namespace cm_fused {

using Tensors = std::vector<Tensor>;

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

  // Rows of the buffer are there all or none, where a step is taken.
  [[nodiscard]] bool has_buffer() const {
    return (rows_ & kBufferRows) != 0;
  }

  [[nodiscard]] const Tensor& at(StateRow row, size_t i) const {
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
  // The sum of g^2 that the last step has found, NaN where it had no need to. Needs the lock.
  double sq_norm = std::numeric_limits<double>::quiet_NaN();

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

// The views that binding a parameter took. `order` is exp_avg's: the state's memory order.
struct ParamViews {
  TensorView param;
  TensorView grad;
  TensorView order;
};

ParamDtype param_dtype(const char* role, size_t index, int32_t dtype);

// How a tensor of exp_avgs is stored; `dtype` is its own, as aoti_torch_dtype_*().
StoredDtype moment_dtype(size_t i, int32_t dtype, ParamDtype param_dtype);

// Whether a tensor's elements lie in memory in the order of `order`.
bool lies_as(const TensorView& tensor, const TensorView& order);

// Its memory is not looked at. Of a float32 parameter it may be in half precision.
TensorView view_gradient(size_t i, const TensorView& param, const Tensor& grad);

// Checks these rows of parameter i's state and takes their addresses. A row that is not there, or
// of no use for these dtypes, is nullptr.
void bind_state(
    size_t i, const StateTensors& state, StateRows rows, const TensorView& order, ParamData& data);

// Checks that the state has what a step needs, and that the lists have its length.
void check_step(
    const StateTensors& state, std::span<const Tensor> params, std::span<const Tensor> grads);

// Binds parameter i to a step. What was bound before stays where it holds: only metadata is looked
// at, and the state is checked again only when it moved.
ParamViews bind_param(
    size_t i, const StateTensors& state, const Tensor& param, const Tensor& grad, ParamData& data);

}  // namespace cm_fused
