// The CPU implementations of the operators.
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../priority/table.h"
#include "steps.h"

namespace cm_fused {
namespace {

#define CM_FUSED_COUNT(type, name) +1
constexpr size_t kNumHyperparameters = CM_FUSED_HYPERPARAMETERS(CM_FUSED_COUNT);

std::string hyperparameter_names() {
#define CM_FUSED_NAME(type, name) "," #name
  return &CM_FUSED_HYPERPARAMETERS(CM_FUSED_NAME)[1];
}

StepOptions step_options(const double* numbers, int64_t seed) {
  StepOptions options;
#define CM_FUSED_READ(type, name) options.name = static_cast<type>(*numbers++);
  CM_FUSED_HYPERPARAMETERS(CM_FUSED_READ)
  options.seed = seed;
  return options;
}

// State k's float64 in a list that has a tensor of one or more for each state, or none; nullptr.
const double* scalar_of(
    const char* role, const Tensors& list, size_t k, size_t num_states, int64_t numel = 1) {
  STD_TORCH_CHECK(list.empty() || list.size() == num_states, role,
      " must be empty or have one tensor for each of the ", num_states, " states, got ",
      list.size());
  return list.empty() ? nullptr : float64_data(role, k, list[k], numel, cpu_device());
}

double read_scalar(
    const char* role, const Tensors& list, size_t k, size_t num_states, double otherwise) {
  const double* const value = scalar_of(role, list, k, num_states);
  return value == nullptr ? otherwise : *value;
}

// State k's sums of squares over the priority scope, one for each of `count` tensors, or empty.
std::vector<double> read_sq_norms(const Tensors& list, size_t k, size_t num_states, size_t count) {
  const bool is_one = k < list.size() && list[k].numel() == 1;
  const auto numel = is_one ? 1 : static_cast<int64_t>(count);
  const double* const values = scalar_of("sq_norms", list, k, num_states, numel);
  if (values == nullptr) {
    return {};
  }
  return is_one ? std::vector<double>(count, *values) : std::vector<double>(values, values + count);
}

constexpr StateRows kPriorityRows = bit(kPriorities) | bit(kPendingSlot) | bit(kStep);

// What updating the priorities of a state needs: without a buffer the count of steps.
StateRows priority_rows(const StateTensors& state) {
  return state.has_buffer() ? kPriorityRows : bit(kStep);
}

constexpr StateRows kFlushRows = bit(kExpAvg) | bit(kCriticalBuffer) | bit(kCriticalSum) |
                                 bit(kCriticalScales) | bit(kExpAvgScales) | bit(kPendingSlot);

// What is known of these states' parameters, in the order they were stepped.
struct OverlapCache {
  std::vector<int64_t> ids;
  int64_t num_moves;
  bool has_overlap;
};

void step_registered_(std::vector<int64_t> ids, Tensors params, Tensors grads, Tensors sq_norms,
    Tensors lrs, Tensors grad_factors, Tensors found_infs, std::optional<Tensor> local_sq_norms,
    std::vector<double> hyperparameters, std::vector<int64_t> seeds) {
  const size_t count = ids.size();
  STD_TORCH_CHECK(hyperparameters.size() == kNumHyperparameters * count && seeds.size() == count,
      "hyperparameters and seeds must have ", kNumHyperparameters,
      " numbers and one for each of the ", count, " states, got ", hyperparameters.size(), " and ",
      seeds.size());
  const LockedStates states(ids);
  size_t total = 0;
  for (size_t k = 0; k < count; ++k) {
    total += states[k].tensors.count();
  }
  STD_TORCH_CHECK(params.size() == total, "params must have one tensor for each of the ", total,
      " that the states have, got ", params.size());
  check_length("grads", grads.size(), total);
  Steps steps;
  size_t first = 0;
  for (size_t k = 0; k < count; ++k) {
    const StateTensors& state = states[k].tensors;
    const size_t length = state.count();
    StepOptions options = step_options(&hyperparameters[k * kNumHyperparameters], seeds[k]);
    STD_TORCH_CHECK(!options.critical_gradients || !local_sq_norms.has_value(),
        "local_sq_norms is for critical momenta; critical gradients need the norm before the step");
    options.lr = read_scalar("lrs", lrs, k, count, options.lr);
    options.grad_factor = read_scalar("grad_factors", grad_factors, k, count, 1.0);
    steps.add(states[k], std::span(params).subspan(first, length),
        std::span(grads).subspan(first, length),
        {options, read_scalar("found_infs", found_infs, k, count, 0.0) != 0.0,
            read_sq_norms(sq_norms, k, count, length)});
    first += length;
  }
  double* const local = local_sq_norms.has_value()
                            ? float64_data("local_sq_norms", kNoIndex, *local_sq_norms,
                                  static_cast<int64_t>(total), cpu_device())
                            : nullptr;
  if (count == 0) {
    return;
  }
  auto& cache = states[0].cache<OverlapCache>();
  const int64_t num_moves = steps.num_moves();
  if (cache.num_moves != num_moves || cache.ids != ids) {
    cache = {ids, num_moves, steps.find_overlap()};
  }
  steps.take_(local, cache.has_overlap);
}

Tensor sq_norms(Tensors params, Tensors grads, std::optional<Tensor> grad_factor,
    double weight_decay, bool maximize, bool decoupled_weight_decay) {
  StepOptions options{};
  options.weight_decay = weight_decay;
  options.maximize = maximize;
  options.decoupled_weight_decay = decoupled_weight_decay;
  options.grad_factor = grad_factor.has_value()
                            ? *float64_data("grad_factor", kNoIndex, *grad_factor, 1, cpu_device())
                            : 1.0;
  check_length("grads", grads.size(), params.size());
  BucketStep bucket;
  for (size_t i = 0; i < params.size(); ++i) {
    const TensorView param = view("params", i, params[i]);
    const TensorView grad = view_gradient(i, param, grads[i]);
    check_memory("grads", i, grads[i], grad);
    // Any order without gaps will do.
    const auto contiguous = contiguous_strides(param.sizes);
    TensorView order = param;
    if (extent_without_overlap(param.sizes, param.strides) != param.numel) {
      order.strides = {contiguous.data(), contiguous.size()};
    }
    auto& tensor = bucket.emplace_back();
    tensor.dtype = param_dtype("params", i, param.dtype);
    tensor.grad_dtype = param_dtype("grads", i, grad.dtype);
    tensor.numel = param.numel;
    tensor.param = param.data;
    tensor.grad = grad.data;
    bind_layouts({param, grad, order}, tensor);
  }
  const auto count = static_cast<int64_t>(params.size());
  auto result = torch::stable::empty({count}, ScalarType::Double);
  Pass pass;
  pass.add(bucket, options);
  pass.run(kernels().sq_norm);
  pass.add_up(bucket, 0, static_cast<double*>(result.data_ptr()));
  return result;
}

Tensor last_sq_norms(std::vector<int64_t> ids) {
  const LockedStates states(ids);
  auto result = torch::stable::empty({static_cast<int64_t>(ids.size())}, ScalarType::Double);
  auto* const values = static_cast<double*>(result.data_ptr());
  for (size_t k = 0; k < ids.size(); ++k) {
    values[k] = states[k].sq_norm;
  }
  return result;
}

// Binds what updating the priorities of parameter i needs.
TensorStep bind_priorities(size_t i, const StateTensors& state) {
  TensorStep tensor{};
  TensorView order{};
  order.device = cpu_device();
  if (state.has_buffer()) {
    tensor.capacity = state.at(kPriorities, i).numel();
    STD_TORCH_CHECK(tensor.capacity >= 1, "priorities[", i, "] must have a slot, got none");
  }
  bind_state(i, state, priority_rows(state), order, tensor);
  return tensor;
}

void update_registered_priorities_(std::vector<int64_t> ids, Tensors sq_norms, Tensors found_infs,
    std::vector<double> priority_decays) {
  const size_t count = ids.size();
  STD_TORCH_CHECK(sq_norms.size() == count && priority_decays.size() == count,
      "sq_norms and priority_decays must have one for each of the ", count, " states, got ",
      sq_norms.size(), " and ", priority_decays.size());
  const LockedStates states(ids);
  struct Update {
    TensorStep tensor;
    double sq_norm;
    double priority_decay;
  };
  // All are checked before the first is changed.
  std::vector<Update> updates;
  for (size_t k = 0; k < count; ++k) {
    const StateTensors& state = states[k].tensors;
    state.require(priority_rows(state));
    const auto scope = read_sq_norms(sq_norms, k, count, state.count());
    const bool is_skipped = read_scalar("found_infs", found_infs, k, count, 0.0) != 0.0;
    for (size_t i = 0; i < state.count(); ++i) {
      TensorStep tensor = bind_priorities(i, state);
      if (!is_skipped) {
        updates.push_back({std::move(tensor), scope[i], priority_decays[k]});
      }
    }
  }
  for (const auto& [tensor, sum, priority_decay] : updates) {
    update_priorities({tensor.priorities, tensor.pending_slot, tensor.step, nullptr},
        tensor.capacity, static_cast<float>(priority_decay), priority_key(sum));
  }
}

// Binds what copying a momentum to its pending slot needs.
TensorStep bind_flush(size_t i, const StateTensors& state) {
  const TensorView order = view("exp_avgs", i, state.at(kExpAvg, i));
  check_device("exp_avgs", i, order.device, cpu_device());
  TensorStep tensor{};
  // Of the parameter only what it is updated in counts.
  tensor.dtype =
      order.dtype == aoti_torch_dtype_float64() ? ParamDtype::kFloat64 : ParamDtype::kFloat32;
  tensor.moment_dtype = moment_dtype(i, order.dtype, tensor.dtype);
  tensor.numel = order.numel;
  bind_state(i, state, kFlushRows, order, tensor);
  read_pending_slot(i, tensor);
  return tensor;
}

void flush_registered_(std::vector<int64_t> ids) {
  const LockedStates states(ids);
  BucketStep bucket;
  for (size_t k = 0; k < ids.size(); ++k) {
    const StateTensors& state = states[k].tensors;
    state.require(bit(kExpAvg) | bit(kCriticalBuffer) | bit(kPendingSlot));
    for (size_t i = 0; i < state.count(); ++i) {
      TensorStep tensor = bind_flush(i, state);
      if (tensor.slot != kNoSlot) {
        bucket.push_back(std::move(tensor));
      }
    }
  }
  const StepOptions options;
  Pass pass;
  pass.add(bucket, options);
  pass.run(kernels().commit);
  for (const auto& tensor : bucket) {
    *tensor.pending_slot = kNoSlot;
  }
}

// The chunks and the priorities of every row must be there before the first row is changed.
void check_rows(const PriorityUpdate& update) {
  for (int64_t i = 0; i < update.num_rows; ++i) {
    const int64_t* row = row_of(update.table, i);
    const int64_t first = row[kFirstChunkColumn];
    const int64_t count = row[kNumChunksColumn];
    STD_TORCH_CHECK(first >= 0 && count >= 0 && first <= update.num_chunks - count, "table[", i,
        "] must name chunks of the ", update.num_chunks, " in chunk_sq_norms, got ", count,
        " from ", first);
    for (const int64_t column : {kPrioritiesColumn, kPendingSlotColumn, kStepColumn}) {
      STD_TORCH_CHECK(row[column] != 0 || (update.capacity == 0 && column != kStepColumn), "table[",
          i, "] must have an address in column ", column, ", got 0: refresh_table_ sets it");
    }
  }
}

double sum(const double* values, int64_t count) {
  return std::accumulate(values, values + count, 0.0);
}

// What the CUDA kernel does, a row after the other.
void update_priorities_(Tensor table, Tensor chunk_sq_norms, std::optional<Tensor> sq_norm,
    std::optional<Tensor> found_inf, int64_t capacity, double priority_decay, bool group_scope) {
  const PriorityUpdate update =
      check_priority_update(table, chunk_sq_norms, sq_norm, found_inf, capacity, priority_decay);
  check_rows(update);
  if (update.is_skipped()) {
    return;
  }
  // Given norms, nobody may have taken those of the chunks.
  const double group =
      update.adds_up_chunks() ? sum(update.chunk_sq_norms, update.num_chunks) : 0.0;
  for (int64_t i = 0; i < update.num_rows; ++i) {
    const int64_t* row = row_of(update.table, i);
    double sq_norm_of_row = group;
    if (update.sq_norm != nullptr) {
      sq_norm_of_row = update.sq_norm[i * update.sq_norm_stride];
    } else if (!group_scope) {
      sq_norm_of_row = sum(update.chunk_sq_norms + row[kFirstChunkColumn], row[kNumChunksColumn]);
    }
    update_priorities(
        priorities_of(row), update.capacity, update.priority_decay, priority_key(sq_norm_of_row));
  }
}

std::string cpu_capability() {
  return kernels().name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CPU, m) {
  m.impl("sq_norms", TORCH_BOX(&sq_norms));
  m.impl("step_registered_", TORCH_BOX(&step_registered_));
  m.impl("update_priorities_", TORCH_BOX(&update_priorities_));
  m.impl("update_registered_priorities_", TORCH_BOX(&update_registered_priorities_));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("flush_registered_", TORCH_BOX(&flush_registered_));
  m.impl("hyperparameter_names", TORCH_BOX(&hyperparameter_names));
  m.impl("last_sq_norms", TORCH_BOX(&last_sq_norms));
}

}  // namespace cm_fused
