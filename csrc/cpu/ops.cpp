// The CPU implementations of the steps: run the kernels over chunks in parallel, keep the priority
// buffers' books.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../bookkeeping.h"
#include "describe.h"

namespace cm_fused {

namespace {

// Below this many elements a thread's start costs more than it saves (as at::internal::GRAIN_SIZE).
constexpr int64_t kGrainSize = 32768;

struct Chunk {
  const TensorStep* tensor;
  int64_t index;
};

int64_t count_chunks(const TensorStep& tensor) {
  return (tensor.numel + kChunkSize - 1) / kChunkSize;
}

// Runs a kernel over all chunks and returns its result for each. The order in which threads take
// chunks does not matter: each chunk's result is its own.
std::vector<double> run(ChunkKernel kernel, const BucketStep& bucket, const StepOptions& options) {
  std::vector<Chunk> chunks;
  int64_t numel = 0;
  for (const auto& tensor : bucket) {
    for (int64_t index = 0; index < count_chunks(tensor); ++index) {
      chunks.push_back({&tensor, index});
    }
    numel += tensor.numel;
  }
  std::vector<double> results(chunks.size());
  const auto count = static_cast<int64_t>(chunks.size());
  const int64_t grain = std::max<int64_t>(1, kGrainSize * count / std::max<int64_t>(numel, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      results[c] = kernel(*chunks[c].tensor, options, chunks[c].index);
    }
  });
  return results;
}

// Adds up each tensor's chunks in order.
std::vector<double> add_chunks(
    const BucketStep& bucket, const std::vector<double>& chunk_sq_norms) {
  std::vector<double> result;
  result.reserve(bucket.size());
  auto next = chunk_sq_norms.begin();
  for (const auto& tensor : bucket) {
    const auto end = next + count_chunks(tensor);
    result.push_back(std::accumulate(next, end, 0.0));
    next = end;
  }
  return result;
}

double total(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

// Scalars that may come in tensors: see library.cpp.
struct ScalarTensors {
  std::optional<Tensor> sq_norm;
  std::optional<Tensor> lr;
  std::optional<Tensor> grad_factor;
  std::optional<Tensor> found_inf;
};

double read_scalar(const char* role, const std::optional<Tensor>& tensor, double otherwise) {
  if (!tensor.has_value()) {
    return otherwise;
  }
  return *bookkeeping<double>(role, kNoIndex, *tensor, 1, aoti_torch_dtype_float64(), cpu_device());
}

bool is_skipped(const std::optional<Tensor>& found_inf) {
  return read_scalar("found_inf", found_inf, 0.0) != 0.0;
}

StepOptions with_scalars(StepOptions options, const ScalarTensors& scalars) {
  options.lr = read_scalar("lr_tensor", scalars.lr, options.lr);
  options.grad_factor = read_scalar("grad_factor", scalars.grad_factor, options.grad_factor);
  return options;
}

// The sums of squares over the priority scope, one for each of `count` tensors.
std::vector<double> read_sq_norm(const Tensor& sq_norm, size_t count) {
  const int64_t numel = sq_norm.numel() == 1 ? 1 : static_cast<int64_t>(count);
  const double* values = bookkeeping<double>(
      "sq_norm", kNoIndex, sq_norm, numel, aoti_torch_dtype_float64(), cpu_device());
  return numel == 1 ? std::vector<double>(count, *values)
                    : std::vector<double>(values, values + count);
}

// The same of what this process has by itself.
std::vector<double> over_scope(std::vector<double> tensor_sq_norms, const StepOptions& options) {
  if (options.group_scope) {
    const double group = total(tensor_sq_norms);
    std::fill(tensor_sq_norms.begin(), tensor_sq_norms.end(), group);
  }
  return tensor_sq_norms;
}

void keep_books(const TensorStep& tensor, double sq_norm, double priority_decay, int64_t* slot) {
  update_bookkeeping({tensor.priorities, slot, tensor.step_count, nullptr}, tensor.capacity,
      static_cast<float>(priority_decay), priority_key(sq_norm));
}

double* local_sq_norms_data(const Tensor& local_sq_norms, size_t count) {
  return bookkeeping<double>("local_sq_norms", kNoIndex, local_sq_norms,
      static_cast<int64_t>(count), aoti_torch_dtype_float64(), cpu_device());
}

void step_critical_momenta(const StateTensors& state, const Tensors& params, const Tensors& grads,
    const ScalarTensors& scalars, const std::optional<Tensor>& local_sq_norms,
    const StepOptions& hyperparameters, BucketStep& bucket) {
  const StepOptions options = with_scalars(hyperparameters, scalars);
  check_length("pending_slots", state.pending_slots.size(), params.size());
  describe_bucket(state, params, grads, options, bucket);
  double* const local =
      local_sq_norms.has_value() ? local_sq_norms_data(*local_sq_norms, params.size()) : nullptr;
  const auto given = scalars.sq_norm.has_value() ? read_sq_norm(*scalars.sq_norm, params.size())
                                                 : std::vector<double>();
  if (is_skipped(scalars.found_inf)) {
    return;
  }
  const auto tensor_sq_norms = add_chunks(bucket, run(kernels().adam_cm, bucket, options));
  if (local != nullptr) {
    std::copy(tensor_sq_norms.begin(), tensor_sq_norms.end(), local);
    return;
  }
  const auto scope = scalars.sq_norm.has_value() ? given : over_scope(tensor_sq_norms, options);
  for (size_t i = 0; i < bucket.size(); ++i) {
    keep_books(bucket[i], scope[i], options.priority_decay, bucket[i].pending_slot);
  }
}

void step_critical_gradients(const StateTensors& state, const Tensors& params, const Tensors& grads,
    const ScalarTensors& scalars, const StepOptions& hyperparameters, BucketStep& bucket) {
  const StepOptions options = with_scalars(hyperparameters, scalars);
  describe_bucket(state, params, grads, options, bucket);
  const auto given = scalars.sq_norm.has_value() ? read_sq_norm(*scalars.sq_norm, params.size())
                                                 : std::vector<double>();
  const Kernels& chosen = kernels();  // may throw: nothing is changed yet
  if (is_skipped(scalars.found_inf)) {
    return;
  }
  // The gradient is gone by the next step: its norm comes first, so that it can be stored at once.
  const auto scope =
      scalars.sq_norm.has_value()
          ? given
          : over_scope(add_chunks(bucket, run(chosen.sq_norm, bucket, options)), options);
  for (size_t i = 0; i < bucket.size(); ++i) {
    keep_books(bucket[i], scope[i], options.priority_decay, &bucket[i].slot);
  }
  run(chosen.adam_cg, bucket, options);
}

void adam_cm_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
    Tensors max_exp_avg_sqs, Tensors critical_buffers, Tensors critical_sums, Tensors priorities,
    Tensors pending_slots, Tensors steps, Tensors critical_scales, Tensors exp_avg_scales,
    Tensors exp_avg_sq_scales, Tensors compensations, std::vector<int64_t> param_indices,
    std::vector<int64_t> element_places, std::optional<Tensor> sq_norm,
    std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_factor,
    std::optional<Tensor> found_inf, std::optional<Tensor> local_sq_norms, double lr, double beta1,
    double beta2, double eps, double weight_decay, double priority_decay, bool group_scope,
    bool mean_over_capacity, bool eps_inside_sqrt, bool maximize, bool decoupled_weight_decay,
    bool stochastic_update, int64_t seed, bool l2_in_aggregate) {
  BucketStep bucket;
  step_critical_momenta(
      {std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
          std::move(critical_buffers), std::move(critical_sums), std::move(priorities),
          std::move(pending_slots), std::move(steps), std::move(critical_scales),
          std::move(exp_avg_scales), std::move(exp_avg_sq_scales), std::move(compensations),
          std::move(param_indices), std::move(element_places)},
      params, grads, {sq_norm, lr_tensor, grad_factor, found_inf}, local_sq_norms,
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
          eps_inside_sqrt, maximize, decoupled_weight_decay, stochastic_update, seed,
          l2_in_aggregate},
      bucket);
}

void adam_cg_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
    Tensors max_exp_avg_sqs, Tensors critical_buffers, Tensors critical_sums, Tensors priorities,
    Tensors steps, Tensors critical_scales, Tensors exp_avg_scales, Tensors exp_avg_sq_scales,
    Tensors compensations, std::vector<int64_t> param_indices, std::vector<int64_t> element_places,
    std::optional<Tensor> sq_norm, std::optional<Tensor> lr_tensor,
    std::optional<Tensor> grad_factor, std::optional<Tensor> found_inf, double lr, double beta1,
    double beta2, double eps, double weight_decay, double priority_decay, bool group_scope,
    bool mean_over_capacity, bool eps_inside_sqrt, bool maximize, bool decoupled_weight_decay,
    bool stochastic_update, int64_t seed, bool l2_in_aggregate) {
  BucketStep bucket;
  step_critical_gradients(
      {std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
          std::move(critical_buffers), std::move(critical_sums), std::move(priorities), {},
          std::move(steps), std::move(critical_scales), std::move(exp_avg_scales),
          std::move(exp_avg_sq_scales), std::move(compensations), std::move(param_indices),
          std::move(element_places)},
      params, grads, {sq_norm, lr_tensor, grad_factor, found_inf},
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
          eps_inside_sqrt, maximize, decoupled_weight_decay, stochastic_update, seed,
          l2_in_aggregate},
      bucket);
}

void step_held_(int64_t held, Tensors params, Tensors grads, std::optional<Tensor> sq_norm,
    std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_factor,
    std::optional<Tensor> found_inf, std::optional<Tensor> local_sq_norms, bool critical_gradients,
    double lr, double beta1, double beta2, double eps, double weight_decay, double priority_decay,
    bool group_scope, bool mean_over_capacity, bool eps_inside_sqrt, bool maximize,
    bool decoupled_weight_decay, bool stochastic_update, int64_t seed, bool l2_in_aggregate) {
  const auto state = HeldStates::instance().get(held);
  const auto lock = state->lock();
  const ScalarTensors scalars{sq_norm, lr_tensor, grad_factor, found_inf};
  const StepOptions options{lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope,
      mean_over_capacity, eps_inside_sqrt, maximize, decoupled_weight_decay, stochastic_update,
      seed, l2_in_aggregate};
  auto& bucket = state->knowledge<BucketStep>();
  if (critical_gradients) {
    STD_TORCH_CHECK(!local_sq_norms.has_value(),
        "local_sq_norms is for critical momenta; critical gradients need the norm before the step");
    step_critical_gradients(state->tensors, params, grads, scalars, options, bucket);
  } else {
    step_critical_momenta(state->tensors, params, grads, scalars, local_sq_norms, options, bucket);
  }
}

Tensor sq_norms(Tensors params, Tensors grads, std::optional<Tensor> grad_factor,
    double weight_decay, bool maximize, bool decoupled_weight_decay) {
  StepOptions options{};
  options.weight_decay = weight_decay;
  options.maximize = maximize;
  options.decoupled_weight_decay = decoupled_weight_decay;
  options.grad_factor = read_scalar("grad_factor", grad_factor, 1.0);
  check_length("grads", grads.size(), params.size());
  BucketStep bucket;
  for (size_t i = 0; i < params.size(); ++i) {
    const TensorView param = view("params", i, params[i]);
    const TensorView grad = view_gradient(i, param, grads[i]);
    // Any order without gaps will do.
    const auto contiguous = contiguous_strides(param.sizes);
    TensorView order = param;
    if (!is_dense(param.sizes, param.strides)) {
      order.strides = {contiguous.data(), contiguous.size()};
    }
    auto& tensor = bucket.emplace_back();
    tensor.dtype = param_dtype("params", i, param.dtype);
    tensor.numel = param.numel;
    tensor.param = param.data;
    tensor.grad = grad.data;
    describe_layouts({param, grad, order}, tensor);
  }
  const auto count = static_cast<int64_t>(params.size());
  auto result = torch::stable::empty({count}, ScalarType::Double);
  const auto values = add_chunks(bucket, run(kernels().sq_norm, bucket, options));
  std::copy(values.begin(), values.end(), static_cast<double*>(result.data_ptr()));
  return result;
}

void keep_all_books(const Tensors& priorities, const Tensors& pending_slots, const Tensors& steps,
    const Tensor& sq_norm, const std::optional<Tensor>& found_inf, double priority_decay) {
  check_length("pending_slots", pending_slots.size(), priorities.size());
  check_length("steps", steps.size(), priorities.size());
  const auto scope = read_sq_norm(sq_norm, priorities.size());
  BucketStep bucket(priorities.size());
  for (size_t i = 0; i < bucket.size(); ++i) {
    auto& tensor = bucket[i];
    tensor.capacity = priorities[i].numel();
    tensor.priorities = bookkeeping<float>(
        "priorities", i, priorities[i], tensor.capacity, aoti_torch_dtype_float32(), cpu_device());
    tensor.pending_slot = pending_slot_data(i, pending_slots[i], cpu_device());
    tensor.step_count =
        bookkeeping<float>("steps", i, steps[i], 1, aoti_torch_dtype_float32(), cpu_device());
    STD_TORCH_CHECK(tensor.capacity >= 1, "priorities[", i, "] must have a slot, got none");
  }
  if (is_skipped(found_inf)) {
    return;
  }
  for (size_t i = 0; i < bucket.size(); ++i) {
    keep_books(bucket[i], scope[i], priority_decay, bucket[i].pending_slot);
  }
}

void keep_books_(Tensors priorities, Tensors pending_slots, Tensors steps, Tensor sq_norm,
    std::optional<Tensor> found_inf, double priority_decay) {
  keep_all_books(priorities, pending_slots, steps, sq_norm, found_inf, priority_decay);
}

void keep_books_held_(
    int64_t held, Tensor sq_norm, std::optional<Tensor> found_inf, double priority_decay) {
  const auto state = HeldStates::instance().get(held);
  const auto& tensors = state->tensors;
  keep_all_books(
      tensors.priorities, tensors.pending_slots, tensors.steps, sq_norm, found_inf, priority_decay);
}

void commit_(Tensors exp_avgs, Tensors critical_buffers, Tensors critical_sums,
    Tensors pending_slots, Tensors critical_scales, Tensors exp_avg_scales) {
  check_length("critical_buffers", critical_buffers.size(), exp_avgs.size());
  check_length("critical_sums", critical_sums.size(), critical_sums.empty() ? 0 : exp_avgs.size());
  check_length("pending_slots", pending_slots.size(), exp_avgs.size());
  check_length(
      "critical_scales", critical_scales.size(), critical_scales.empty() ? 0 : exp_avgs.size());
  check_length(
      "exp_avg_scales", exp_avg_scales.size(), exp_avg_scales.empty() ? 0 : exp_avgs.size());
  BucketStep bucket;
  for (size_t i = 0; i < exp_avgs.size(); ++i) {
    const TensorView order = view("exp_avgs", i, exp_avgs[i]);
    check_dense(i, order);
    TensorStep tensor{};
    // Of the parameter only what it is updated in counts.
    tensor.dtype =
        order.dtype == aoti_torch_dtype_float64() ? ParamDtype::kFloat64 : ParamDtype::kFloat32;
    tensor.moment_dtype = moment_dtype(i, order.dtype, tensor.dtype);
    tensor.numel = order.numel;
    tensor.exp_avg = order.data;
    describe_buffer(i, critical_buffers[i], order, tensor);
    if (!critical_sums.empty()) {
      tensor.critical_sum =
          state_data("critical_sums", i, critical_sums[i], order, state_dtype(tensor.dtype));
    }
    tensor.critical_scales = scales_data(
        "critical_scales", i, critical_scales, tensor.slot_dtype, tensor.capacity, order);
    tensor.exp_avg_scales =
        scales_data("exp_avg_scales", i, exp_avg_scales, tensor.moment_dtype, 1, order);
    tensor.pending_slot = pending_slot_data(i, pending_slots[i], order.device);
    read_pending_slot(i, tensor);
    if (tensor.slot != kNoSlot) {
      bucket.push_back(std::move(tensor));
    }
  }
  run(kernels().commit, bucket, {});
  for (const auto& tensor : bucket) {
    *tensor.pending_slot = kNoSlot;
  }
}

std::string cpu_capability() {
  return kernels().name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CPU, m) {
  m.impl("adam_cm_", TORCH_BOX(&adam_cm_));
  m.impl("adam_cg_", TORCH_BOX(&adam_cg_));
  m.impl("sq_norms", TORCH_BOX(&sq_norms));
  m.impl("keep_books_", TORCH_BOX(&keep_books_));
  m.impl("commit_", TORCH_BOX(&commit_));
  m.impl("step_held_", TORCH_BOX(&step_held_));
  m.impl("keep_books_held_", TORCH_BOX(&keep_books_held_));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace cm_fused
