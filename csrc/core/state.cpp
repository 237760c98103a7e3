#include "state.h"

#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

namespace cm_fused {

HeldStates& HeldStates::instance() {
  static auto* const states = new HeldStates;
  return *states;
}

int64_t HeldStates::add(StateTensors tensors) {
  const std::lock_guard lock(mutex_);
  states_.emplace(++last_id_, std::make_shared<HeldState>(std::move(tensors)));
  return last_id_;
}

std::shared_ptr<HeldState> HeldStates::get(int64_t id) {
  const std::lock_guard lock(mutex_);
  const auto found = states_.find(id);
  STD_TORCH_CHECK(found != states_.end(), "held must name a state that is held, got ", id);
  return found->second;
}

void HeldStates::remove(int64_t id) {
  std::shared_ptr<HeldState> released;  // outlives the lock
  const std::lock_guard lock(mutex_);
  if (const auto found = states_.find(id); found != states_.end()) {
    released = std::move(found->second);
    states_.erase(found);
  }
}

namespace {

int64_t hold_state(Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
    Tensors critical_buffers, Tensors critical_sums, Tensors priorities, Tensors pending_slots,
    Tensors steps, Tensors critical_scales, Tensors exp_avg_scales, Tensors exp_avg_sq_scales,
    Tensors compensations, std::vector<int64_t> param_indices,
    std::vector<int64_t> element_places) {
  return HeldStates::instance().add({std::move(exp_avgs), std::move(exp_avg_sqs),
      std::move(max_exp_avg_sqs), std::move(critical_buffers), std::move(critical_sums),
      std::move(priorities), std::move(pending_slots), std::move(steps), std::move(critical_scales),
      std::move(exp_avg_scales), std::move(exp_avg_sq_scales), std::move(compensations),
      std::move(param_indices), std::move(element_places)});
}

// The values of a negated view or of a tensor of implied zeros lie nowhere. Left to torch, what is
// held would be a temporary copy, and a step would change that.
int64_t refuse_implied(Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors,
    Tensors, Tensors, Tensors, Tensors, std::vector<int64_t>, std::vector<int64_t>) {
  STD_TORCH_CHECK(false,
      "a state to be held must lie in memory: it has a negated view or a tensor of implied zeros; "
      "clone it");
}

void release_state(int64_t held) {
  HeldStates::instance().remove(held);
}

}  // namespace

// Holding looks at no tensor: any device will do.
STABLE_TORCH_LIBRARY_IMPL(cm_fused, CompositeExplicitAutograd, m) {
  m.impl("hold_state", TORCH_BOX(&hold_state));
  m.impl("release_state", TORCH_BOX(&release_state));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, Negative, m) {
  m.impl("hold_state", TORCH_BOX(&refuse_implied));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, ZeroTensor, m) {
  m.impl("hold_state", TORCH_BOX(&refuse_implied));
}

}  // namespace cm_fused
