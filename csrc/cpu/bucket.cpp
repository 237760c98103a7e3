#include "bucket.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "../core/parallel.h"

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

// 1 - beta^t in float64. Tensors of a group mostly share their t, so the last result is cached.
class BiasCorrections {
 public:
  explicit BiasCorrections(const StepOptions& options) : options_(options) {}

  void set(TensorStep& tensor) {
    if (tensor.step_number != step_number_) {
      step_number_ = tensor.step_number;
      bias_correction1_ = 1.0 - power(options_.beta1, step_number_);
      bias_correction2_ = 1.0 - power(options_.beta2, step_number_);
    }
    tensor.bias_correction1 = bias_correction1_;
    tensor.bias_correction2 = bias_correction2_;
  }

 private:
  const StepOptions& options_;
  int64_t step_number_ = 0;
  double bias_correction1_ = 0.0;
  double bias_correction2_ = 0.0;
};

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
  tensor.mean_divisor =
      options.mean_over_capacity
          ? tensor.capacity
          : std::max<int64_t>(count_filled(tensor.priorities, tensor.capacity), 1);
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

void bind_bucket(const StateTensors& state, std::span<const Tensor> params,
    std::span<const Tensor> grads, const StepOptions& options, BucketStep& bucket) {
  check_step(state, params, grads);
  bucket.resize(params.size());
  for_each_tensor(bucket.size(),
      [&](size_t i) { bind_tensor(i, state, params[i], grads[i], options, bucket[i]); });
  BiasCorrections bias_corrections(options);
  for (auto& tensor : bucket) {
    bias_corrections.set(tensor);
  }
}

}  // namespace cm_fused
