// The state of a bucket: its tensors, and those that were handed over with hold_state.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <typeindex>
#include <unordered_map>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace cm_fused {

using Tensors = std::vector<torch::stable::Tensor>;

// The state that a step changes. Item i of every list belongs to parameter i.
struct StateTensors {
  Tensors exp_avgs;
  Tensors exp_avg_sqs;
  Tensors max_exp_avg_sqs;
  Tensors critical_buffers;
  Tensors critical_sums;
  Tensors priorities;
  Tensors pending_slots;  // critical momenta only
  Tensors steps;
  Tensors critical_scales;
  Tensors exp_avg_scales;
  Tensors exp_avg_sq_scales;
  Tensors compensations;
  std::vector<int64_t> param_indices;
  std::vector<int64_t> element_places;
};

class HeldState {
 public:
  explicit HeldState(StateTensors state) : tensors(std::move(state)) {}

  // What an op knows of the tensors from its last call, in a type of its own. Needs the lock.
  template <typename Knowledge>
  Knowledge& knowledge() {
    auto& known = knowledge_[typeid(Knowledge)];
    if (known == nullptr) {
      known = std::make_shared<Knowledge>();
    }
    return *static_cast<Knowledge*>(known.get());
  }

  // For as long as an op uses the state: torch calls ops without Python's lock, and two threads
  // that step one state must take turns with what is known of it.
  [[nodiscard]] std::unique_lock<std::mutex> lock() {
    return std::unique_lock(mutex_);
  }

  const StateTensors tensors;

 private:
  std::mutex mutex_;
  std::unordered_map<std::type_index, std::shared_ptr<void>> knowledge_;
};

// The state handed over with hold_state. Never destroyed: tensors must not be released after
// torch's own statics are gone.
class HeldStates {
 public:
  static HeldStates& instance();

  int64_t add(StateTensors tensors);
  std::shared_ptr<HeldState> get(int64_t id);
  void remove(int64_t id);

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<HeldState>> states_;
  int64_t last_id_ = 0;
};

}  // namespace cm_fused
