#include "steps.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <mutex>
#include <utility>

#include <torch/csrc/stable/ops.h>

namespace cm_fused {
namespace {

// Where a tensor's elements lie in the order of `order`, or nullptr: as there.
std::unique_ptr<const StridedLayout> strided_layout(
    const TensorView& tensor, const TensorView& order) {
  if (lies_as(tensor, order)) {
    return nullptr;
  }
  auto layout = std::make_unique<StridedLayout>();
  for (const size_t d : memory_order(order.sizes, order.strides)) {
    const int64_t size = order.sizes[d];
    const int64_t stride = tensor.strides[d];
    if (!layout->sizes.empty() && layout->strides.back() == stride * size) {
      layout->sizes.back() *= size;
      layout->strides.back() = stride;
    } else {
      layout->sizes.push_back(size);
      layout->strides.push_back(stride);
    }
  }
  return layout;
}

// More than any float32 counts to, and few enough for an int64 to go on from.
constexpr float kMaxSteps = 0x1p62F;

void read_step(size_t i, TensorStep& tensor) {
  const float count = *tensor.step;
  STD_TORCH_CHECK(
      count >= 0.0F && std::isfinite(count), "steps[", i, "] must be finite and >= 0, got ", count);
  STD_TORCH_CHECK(count < kMaxSteps, "steps[", i, "] must be below 2^62, got ", count);
  tensor.step_number = static_cast<int64_t>(count) + 1;
}

// base^exponent, with the multiplications of the Triton kernel's _power in their order: the same
// bits.
double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) {
      result *= base;
    }
    base *= base;
  }
  return result;
}

// Binds parameter i to this step.
void bind_tensor(size_t i, const StateTensors& state, const Tensor& param, const Tensor& grad,
    const StepOptions& options, TensorStep& tensor) {
  const ParamViews views = bind_param(i, state, param, grad, tensor);
  check_device("params", i, views.param.device, cpu_device());
  bind_layouts(views, tensor);
  tensor.slot = kNoSlot;
  if (tensor.pending_slot != nullptr) {
    read_pending_slot(i, tensor);
  }
  read_step(i, tensor);
  // An empty buffer's sum is 0 whatever divides it.
  tensor.mean_divisor = std::max<int64_t>(options.mean_over_capacity
                                              ? tensor.capacity
                                              : count_filled(tensor.priorities, tensor.capacity),
      1);
}

// Below this many tensors a thread's start costs more than it saves.
constexpr int64_t kTensorGrainSize = 256;

// Calls visit(i) for every tensor, then throws what the lowest index threw. In parallel: with many
// small ones the time goes into cache misses on their metadata.
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

// Checks everything; a step of what it binds cannot fail. What `bucket` was bound to before stays
// where it holds.
void bind_bucket(const StateTensors& state, std::span<const Tensor> params,
    std::span<const Tensor> grads, const StepOptions& options, BucketStep& bucket) {
  check_step(state, params, grads);
  STD_TORCH_CHECK(!state.has_buffer() || state.has(kPendingSlot) != options.critical_gradients,
      "pending_slots must be given for the buffers of critical momenta, and for no others");
  bucket.resize(params.size());
  for_each_tensor(bucket.size(),
      [&](size_t i) { bind_tensor(i, state, params[i], grads[i], options, bucket[i]); });
  // Tensors of a group mostly share their t, and so 1 - beta^t.
  const TensorStep* last = nullptr;
  for (auto& tensor : bucket) {
    if (last != nullptr && last->step_number == tensor.step_number) {
      tensor.bias_correction1 = last->bias_correction1;
      tensor.bias_correction2 = last->bias_correction2;
    } else {
      tensor.bias_correction1 = 1.0 - power(options.beta1, tensor.step_number);
      tensor.bias_correction2 = 1.0 - power(options.beta2, tensor.step_number);
    }
    last = &tensor;
  }
}

// The square of the sum of the tensors' norms.
double square_of_sum(std::span<const double> sq_norms) {
  double sum = 0.0;
  for (const double sq_norm : sq_norms) {
    sum += std::sqrt(sq_norm);
  }
  return sum * sum;
}

int64_t param_bytes(ParamDtype dtype) {
  return dtype == ParamDtype::kFloat64 ? sizeof(double) : is_half(dtype) ? 2 : sizeof(float);
}

}  // namespace

void bind_layouts(const ParamViews& views, TensorStep& tensor) {
  tensor.param_layout = strided_layout(views.param, views.order);
  tensor.grad_layout = strided_layout(views.grad, views.order);
}

void read_pending_slot(size_t i, TensorStep& tensor) {
  tensor.slot = *tensor.pending_slot;
  STD_TORCH_CHECK(tensor.slot >= kNoSlot && tensor.slot < tensor.capacity, "pending_slots[", i,
      "] must be in [-1, ", tensor.capacity, "), got ", tensor.slot);
}

void Steps::add(RegisteredState& state, std::span<const Tensor> params,
    std::span<const Tensor> grads, StepScalars scalars) {
  auto& bucket = state.cache<BucketStep>();
  bind_bucket(state.tensors, params, grads, scalars.options, bucket);
  const bool has_sq_norms = !scalars.sq_norms.empty();
  scalars.sq_norms.resize(params.size());
  // Critical gradients need their norms for their keys alone.
  const bool adds_up =
      !scalars.options.critical_gradients || (state.tensors.has_buffer() && !has_sq_norms);
  parts_.push_back(
      {&bucket, has_sq_norms, adds_up, std::move(scalars), nullptr, 0, &state.sq_norm});
}

int64_t Steps::num_moves() const {
  int64_t moves = 0;
  for (const auto& part : parts_) {
    for (const auto& tensor : *part.bucket) {
      moves += tensor.num_moves;
    }
  }
  return moves;
}

int64_t Steps::numel() const {
  int64_t numel = 0;
  for (const auto& part : parts_) {
    for (const auto& tensor : *part.bucket) {
      numel += tensor.numel;
    }
  }
  return numel;
}

bool Steps::find_overlap() const {
  std::vector<std::pair<const char*, const char*>> extents;
  for (const auto& part : parts_) {
    for (const auto& tensor : *part.bucket) {
      if (tensor.numel > 0) {
        const auto* const begin = static_cast<const char*>(tensor.param);
        extents.emplace_back(begin, begin + tensor.param_extent * param_bytes(tensor.dtype));
      }
    }
  }
  std::sort(extents.begin(), extents.end());
  return std::adjacent_find(extents.begin(), extents.end(),
             [](const auto& a, const auto& b) { return b.first < a.second; }) != extents.end();
}

void Steps::take_(double* local_sq_norms, bool one_by_one) {
  const Kernels& chosen = kernels();
  const bool past_cache = numel() >= kNumelPastCache;
  Pass momenta;
  Pass norms;  // the gradient is gone by the next step: to be stored now, its norm comes first
  Pass gradients;
  for (auto& part : parts_) {
    if (local_sq_norms != nullptr) {
      part.local_sq_norms = local_sq_norms;
      local_sq_norms += part.bucket->size();
    }
    if (part.scalars.is_skipped) {
      continue;
    }
    part.scalars.options.past_cache = past_cache;
    if (!part.scalars.options.critical_gradients) {
      part.first_chunk = momenta.add(*part.bucket, part.scalars.options);
      continue;
    }
    if (part.adds_up) {
      part.first_chunk = norms.add(*part.bucket, part.scalars.options);
    }
    gradients.add(*part.bucket, part.scalars.options);
  }
  // From here on nothing fails.
  norms.run(chosen.sq_norm);
  momenta.run(chosen.adam_cm, one_by_one);
  for (auto& part : parts_) {
    *part.sq_norm = std::numeric_limits<double>::quiet_NaN();
    if (!part.scalars.is_skipped) {
      finish_(part, part.scalars.options.critical_gradients ? norms : momenta);
    }
  }
  gradients.run(chosen.adam_cg, one_by_one);
}

void Steps::finish_(Part& part, const Pass& pass) {
  BucketStep& bucket = *part.bucket;
  const StepOptions& options = part.scalars.options;
  auto& sq_norms = part.scalars.sq_norms;
  if (part.adds_up) {
    double* const sums = part.local_sq_norms != nullptr ? part.local_sq_norms
                         : part.has_sq_norms            ? nullptr
                                                        : sq_norms.data();
    *part.sq_norm = pass.add_up(bucket, part.first_chunk, sums);
  }
  if (part.local_sq_norms != nullptr) {
    return;
  }
  if (!part.has_sq_norms && options.group_scope) {
    std::fill(sq_norms.begin(), sq_norms.end(),
        options.sum_of_norms ? square_of_sum(sq_norms) : *part.sq_norm);
  }
  for (size_t i = 0; i < bucket.size(); ++i) {
    auto* const slot = options.critical_gradients ? &bucket[i].slot : bucket[i].pending_slot;
    update_priorities({bucket[i].priorities, slot, bucket[i].step, nullptr}, bucket[i].capacity,
        static_cast<float>(options.priority_decay), priority_key(sq_norms[i]));
  }
}

}  // namespace cm_fused
