#include "state.h"

#include <algorithm>
#include <bit>
#include <utility>

#include <torch/csrc/stable/library.h>

namespace cm_fused {

StateTensors::StateTensors(Tensors tensors, StateRows rows, std::vector<int64_t> param_indices,
    std::vector<int64_t> shard_layouts)
    : tensors_(std::move(tensors)),
      rows_(rows),
      param_indices_(std::move(param_indices)),
      shard_layouts_(std::move(shard_layouts)) {
  STD_TORCH_CHECK((rows & ~kAllStateRows) == 0, "mask must have no bits but those of the ",
      static_cast<size_t>(kNumStateRows), " rows of state_keys(), got ", rows);
  const auto num_rows = static_cast<size_t>(std::popcount(static_cast<uint64_t>(rows)));
  count_ = num_rows == 0 ? 0 : tensors_.size() / num_rows;
  STD_TORCH_CHECK(tensors_.size() == count_ * num_rows,
      "state must have one tensor for each parameter and each of the ", num_rows,
      " rows in mask, got ", tensors_.size());
  STD_TORCH_CHECK(param_indices_.empty() || param_indices_.size() == count_,
      "param_indices must have one number for each of the ", count_, " params, got ",
      param_indices_.size());
  STD_TORCH_CHECK(shard_layouts_.empty() || shard_layouts_.size() == kShardLayoutNumbers * count_,
      "shard_layouts must have three numbers for each of the ", count_, " params, got ",
      shard_layouts_.size());
  size_t first = 0;
  for (size_t row = 0; row < kNumStateRows; ++row) {
    first_[row] = first;
    first += has(static_cast<StateRow>(row)) ? count_ : 0;
  }
}

ShardLayout StateTensors::shard_layout(size_t i) const {
  if (shard_layouts_.empty()) {
    return {};
  }
  const int64_t* numbers = shard_layouts_.data() + kShardLayoutNumbers * i;
  const ShardLayout layout{numbers[0], numbers[1], numbers[2]};
  STD_TORCH_CHECK(layout.offset >= 0 && layout.length >= 1 && layout.stride >= layout.length,
      "shard_layouts of params[", i,
      "] must be an offset >= 0, a length >= 1 and a stride >= that, got (", layout.offset, ", ",
      layout.length, ", ", layout.stride, ")");
  return layout;
}

void StateTensors::require(StateRows rows) const {
  for (size_t row = 0; row < kNumStateRows && count_ > 0; ++row) {
    if ((rows & bit(row)) != 0 && !has(static_cast<StateRow>(row))) {
      check_length(kStateRows[row].role, 0, count_);
    }
  }
}

namespace {

// Never destroyed: tensors must not be released after torch's own statics are gone.
struct Registry {
  static Registry& instance() {
    static auto* const registry = new Registry;
    return *registry;
  }

  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<RegisteredState>> states;
  int64_t last_id = 0;
};

int64_t register_state(Tensors state, int64_t mask, std::vector<int64_t> param_indices,
    std::vector<int64_t> shard_layouts) {
  auto registered = std::make_shared<RegisteredState>(
      StateTensors(std::move(state), mask, std::move(param_indices), std::move(shard_layouts)));
  Registry& registry = Registry::instance();
  const std::lock_guard lock(registry.mutex);
  registry.states.emplace(++registry.last_id, std::move(registered));
  return registry.last_id;
}

// The values of a negated view or of a tensor of implied zeros lie nowhere. Left to torch, a
// temporary copy would be registered, and a step would change that.
int64_t refuse_implied(Tensors, int64_t, std::vector<int64_t>, std::vector<int64_t>) {
  STD_TORCH_CHECK(false,
      "a state to be registered must lie in memory: it has a negated view or a tensor of implied "
      "zeros; clone it");
}

void release_state(int64_t id) {
  Registry& registry = Registry::instance();
  decltype(registry.states)::node_type released;  // outlives the lock
  const std::lock_guard lock(registry.mutex);
  released = registry.states.extract(id);
}

std::string state_keys() {
#define CM_FUSED_ROW_KEY(Name, key, ...) "," #key
  return &CM_FUSED_STATE(CM_FUSED_ROW_KEY)[1];
}

}  // namespace

LockedStates::LockedStates(const std::vector<int64_t>& ids) {
  {
    Registry& registry = Registry::instance();
    const std::lock_guard lock(registry.mutex);
    for (const int64_t id : ids) {
      const auto found = registry.states.find(id);
      STD_TORCH_CHECK(found != registry.states.end(), "ids must be of registered states, got ", id);
      states_.push_back(found->second);
    }
  }
  for (const auto& state : states_) {
    locks_.emplace_back(state->mutex_, std::defer_lock);
  }
  // All callers lock in one order, so that no two wait for each other.
  const auto mutex_of = [](const auto& lock) { return lock.mutex(); };
  std::ranges::sort(locks_, {}, mutex_of);
  STD_TORCH_CHECK(std::ranges::adjacent_find(locks_, {}, mutex_of) == locks_.end(),
      "ids must name each state once, got ", to_string({ids.data(), ids.size()}));
  for (auto& lock : locks_) {
    lock.lock();
  }
}

// Registering looks at no tensor: any device will do.
STABLE_TORCH_LIBRARY_IMPL(cm_fused, CompositeExplicitAutograd, m) {
  m.impl("register_state", TORCH_BOX(&register_state));
  m.impl("release_state", TORCH_BOX(&release_state));
  m.impl("state_keys", TORCH_BOX(&state_keys));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, Negative, m) {
  m.impl("register_state", TORCH_BOX(&refuse_implied));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, ZeroTensor, m) {
  m.impl("register_state", TORCH_BOX(&refuse_implied));
}

}  // namespace cm_fused
