// The CPU implementations of the operators.
#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "describe.h"
#include "pass.h"
#include "steps.h"

namespace cm_fused {

namespace {

// nullptr where it is not given.
double* local_sq_norms_data(const std::optional<Tensor>& local_sq_norms, size_t count) {
  return local_sq_norms.has_value()
             ? bookkeeping<double>("local_sq_norms", kNoIndex, *local_sq_norms,
                   static_cast<int64_t>(count), aoti_torch_dtype_float64(), cpu_device())
             : nullptr;
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
    bool stochastic_update, int64_t seed, bool l2_in_aggregate, bool sum_of_norms) {
  const StateTensors state{std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
      std::move(critical_buffers), std::move(critical_sums), std::move(priorities),
      std::move(pending_slots), std::move(steps), std::move(critical_scales),
      std::move(exp_avg_scales), std::move(exp_avg_sq_scales), std::move(compensations),
      std::move(param_indices), std::move(element_places)};
  BucketStep bucket;
  Steps step;
  step.add(Critical::kMomenta, state, params, grads, {sq_norm, lr_tensor, grad_factor, found_inf},
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
          eps_inside_sqrt, maximize, decoupled_weight_decay, stochastic_update, seed,
          l2_in_aggregate, sum_of_norms},
      bucket);
  step.take_(local_sq_norms_data(local_sq_norms, params.size()), step.find_overlap());
}

void adam_cg_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
    Tensors max_exp_avg_sqs, Tensors critical_buffers, Tensors critical_sums, Tensors priorities,
    Tensors steps, Tensors critical_scales, Tensors exp_avg_scales, Tensors exp_avg_sq_scales,
    Tensors compensations, std::vector<int64_t> param_indices, std::vector<int64_t> element_places,
    std::optional<Tensor> sq_norm, std::optional<Tensor> lr_tensor,
    std::optional<Tensor> grad_factor, std::optional<Tensor> found_inf, double lr, double beta1,
    double beta2, double eps, double weight_decay, double priority_decay, bool group_scope,
    bool mean_over_capacity, bool eps_inside_sqrt, bool maximize, bool decoupled_weight_decay,
    bool stochastic_update, int64_t seed, bool l2_in_aggregate, bool sum_of_norms) {
  const StateTensors state{std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
      std::move(critical_buffers), std::move(critical_sums), std::move(priorities), {},
      std::move(steps), std::move(critical_scales), std::move(exp_avg_scales),
      std::move(exp_avg_sq_scales), std::move(compensations), std::move(param_indices),
      std::move(element_places)};
  BucketStep bucket;
  Steps step;
  step.add(Critical::kGradients, state, params, grads, {sq_norm, lr_tensor, grad_factor, found_inf},
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
          eps_inside_sqrt, maximize, decoupled_weight_decay, stochastic_update, seed,
          l2_in_aggregate, sum_of_norms},
      bucket);
  step.take_(nullptr, step.find_overlap());
}

// The states that an operator works on, in the order given, for as long as this lives.
class LockedStates {
 public:
  explicit LockedStates(const std::vector<int64_t>& held) {
    for (const int64_t id : held) {
      states_.push_back(HeldStates::instance().get(id));
    }
    // All callers lock in one order, so that no two wait for each other.
    auto order = held;
    std::sort(order.begin(), order.end());
    STD_TORCH_CHECK(std::adjacent_find(order.begin(), order.end()) == order.end(),
        "held must name each state once, got ", to_string({held.data(), held.size()}));
    for (const int64_t id : order) {
      locks_.push_back(HeldStates::instance().get(id)->lock());
    }
  }

  [[nodiscard]] const std::vector<std::shared_ptr<HeldState>>& states() const {
    return states_;
  }

 private:
  std::vector<std::shared_ptr<HeldState>> states_;
  std::vector<std::unique_lock<std::mutex>> locks_;
};

// Of a list with something for each held state, or with nothing.
std::optional<Tensor> scalar_of(const char* role, const Tensors& list, size_t k, size_t count) {
  STD_TORCH_CHECK(list.empty() || list.size() == count, role,
      " must be empty or have one tensor for each of the ", count, " states held, got ",
      list.size());
  return list.empty() ? std::nullopt : std::optional(list[k]);
}

// Numbers of a held state's step, in the order of StepOptions but for the seed.
constexpr size_t kNumHyperparameters = 14;

StepOptions step_options(const double* numbers, int64_t seed) {
  const auto is_set = [numbers](size_t i) { return numbers[i] != 0.0; };
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], is_set(6),
      is_set(7), is_set(8), is_set(9), is_set(10), is_set(11), seed, is_set(12), is_set(13)};
}

// What was found of the parameters of these held states, in the order they were stepped.
struct KnownOverlap {
  std::vector<int64_t> held;
  bool has_overlap;
};

void step_held_(std::vector<int64_t> held, Tensors params, Tensors grads, Tensors sq_norms,
    Tensors lr_tensors, Tensors grad_factors, Tensors found_infs,
    std::optional<Tensor> local_sq_norms, std::vector<double> hyperparameters,
    std::vector<int64_t> seeds) {
  const size_t count = held.size();
  STD_TORCH_CHECK(hyperparameters.size() == kNumHyperparameters * count && seeds.size() == count,
      "hyperparameters and seeds must have ", kNumHyperparameters,
      " numbers and one for each of the ", count, " states held, got ", hyperparameters.size(),
      " and ", seeds.size());
  const LockedStates locked(held);
  size_t total = 0;
  for (const auto& state : locked.states()) {
    total += state->tensors.exp_avgs.size();
  }
  STD_TORCH_CHECK(params.size() == total, "params must have one tensor for each of the ", total,
      " that the states have, got ", params.size());
  check_length("grads", grads.size(), total);
  Steps steps;
  size_t first = 0;
  for (size_t k = 0; k < count; ++k) {
    HeldState& state = *locked.states()[k];
    const size_t length = state.tensors.exp_avgs.size();
    const auto critical =
        state.tensors.pending_slots.empty() ? Critical::kGradients : Critical::kMomenta;
    STD_TORCH_CHECK(critical == Critical::kMomenta || !local_sq_norms.has_value(),
        "local_sq_norms is for critical momenta; critical gradients need the norm before the step");
    steps.add(critical, state.tensors, std::span(params).subspan(first, length),
        std::span(grads).subspan(first, length),
        {scalar_of("sq_norms", sq_norms, k, count), scalar_of("lr_tensors", lr_tensors, k, count),
            scalar_of("grad_factors", grad_factors, k, count),
            scalar_of("found_infs", found_infs, k, count)},
        step_options(&hyperparameters[k * kNumHyperparameters], seeds[k]),
        state.knowledge<BucketStep>());
    first += length;
  }
  double* const sq_norms_data = local_sq_norms_data(local_sq_norms, params.size());
  if (count == 0) {
    return;
  }
  auto& known = locked.states()[0]->knowledge<KnownOverlap>();
  if (steps.has_moved() || known.held != held) {
    known.has_overlap = steps.find_overlap();
    known.held = held;
  }
  steps.take_(sq_norms_data, known.has_overlap);
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
  Pass pass;
  pass.add(bucket, options);
  pass.run(kernels().sq_norm);
  pass.add_up(bucket, 0, static_cast<double*>(result.data_ptr()));
  return result;
}

// The books of some buckets: all are checked before the first are kept.
class Books {
 public:
  void add(const Tensors& priorities, const Tensors& pending_slots, const Tensors& steps,
      const Tensor& sq_norm, const std::optional<Tensor>& found_inf, double priority_decay) {
    check_length("pending_slots", pending_slots.size(), priorities.size());
    check_length("steps", steps.size(), priorities.size());
    const auto scope = read_sq_norm(sq_norm, priorities.size());
    const bool skipped = is_skipped(found_inf);
    for (size_t i = 0; i < priorities.size(); ++i) {
      TensorStep tensor{};
      tensor.capacity = priorities[i].numel();
      tensor.priorities = bookkeeping<float>("priorities", i, priorities[i], tensor.capacity,
          aoti_torch_dtype_float32(), cpu_device());
      tensor.pending_slot = pending_slot_data(i, pending_slots[i], cpu_device());
      tensor.step_count =
          bookkeeping<float>("steps", i, steps[i], 1, aoti_torch_dtype_float32(), cpu_device());
      STD_TORCH_CHECK(tensor.capacity >= 1, "priorities[", i, "] must have a slot, got none");
      if (!skipped) {
        books_.push_back({std::move(tensor), scope[i], priority_decay});
      }
    }
  }

  void keep_() {
    for (const auto& [tensor, sq_norm, priority_decay] : books_) {
      keep_books(tensor, sq_norm, priority_decay, tensor.pending_slot);
    }
  }

 private:
  struct Book {
    TensorStep tensor;
    double sq_norm;
    double priority_decay;
  };

  std::vector<Book> books_;
};

void keep_books_(Tensors priorities, Tensors pending_slots, Tensors steps, Tensor sq_norm,
    std::optional<Tensor> found_inf, double priority_decay) {
  Books books;
  books.add(priorities, pending_slots, steps, sq_norm, found_inf, priority_decay);
  books.keep_();
}

void keep_books_held_(std::vector<int64_t> held, Tensors sq_norms, Tensors found_infs,
    std::vector<double> priority_decays) {
  const size_t count = held.size();
  STD_TORCH_CHECK(sq_norms.size() == count && priority_decays.size() == count,
      "sq_norms and priority_decays must have one for each of the ", count, " states held, got ",
      sq_norms.size(), " and ", priority_decays.size());
  const LockedStates locked(held);
  Books books;
  for (size_t k = 0; k < count; ++k) {
    const auto& tensors = locked.states()[k]->tensors;
    books.add(tensors.priorities, tensors.pending_slots, tensors.steps, sq_norms[k],
        scalar_of("found_infs", found_infs, k, count), priority_decays[k]);
  }
  books.keep_();
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
  const StepOptions options{};
  Pass pass;
  pass.add(bucket, options);
  pass.run(kernels().commit);
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
