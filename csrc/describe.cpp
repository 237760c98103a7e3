#include "describe.h"

#include <algorithm>

namespace cm_fused {

ParamDtype param_dtype(const char* role, size_t index, int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) {
    return ParamDtype::kFloat32;
  }
  if (dtype == aoti_torch_dtype_float64()) {
    return ParamDtype::kFloat64;
  }
  if (dtype == aoti_torch_dtype_bfloat16()) {
    return ParamDtype::kBFloat16;
  }
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), role, "[", index,
      "] must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  return ParamDtype::kFloat16;
}

int32_t state_dtype(ParamDtype dtype) {
  return dtype == ParamDtype::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

bool lies_as(const TensorView& tensor, const TensorView& order) {
  return tensor.numel == 0 || same_strides(order.sizes, tensor.strides, order.strides);
}

TensorView view_gradient(size_t i, const TensorView& param, const Tensor& grad) {
  const TensorView view_of_grad = view("grads", i, grad);
  check_device("grads", i, view_of_grad.device, param.device);
  check_dtype("grads", i, view_of_grad.dtype, param.dtype);
  check_sizes("grads", i, view_of_grad.sizes, param.sizes);
  return view_of_grad;
}

void check_dense(size_t i, const TensorView& exp_avg) {
  STD_TORCH_CHECK(exp_avg.numel == 0 || is_dense(exp_avg.sizes, exp_avg.strides), "exp_avgs[", i,
      "] must fill its memory without gaps or overlaps, got shape ", to_string(exp_avg.sizes),
      " and strides ", to_string(exp_avg.strides));
}

void* state_data(const char* role, size_t i, const Tensor& tensor, const TensorView& order) {
  const TensorView state = view(role, i, tensor);
  check_device(role, i, state.device, order.device);
  check_dtype(role, i, state.dtype, order.dtype);
  check_sizes(role, i, state.sizes, order.sizes);
  check_strides(role, i, order.sizes, state.strides, order.strides);
  return state.data;
}

void describe_buffer(
    size_t i, const Tensor& critical_buffer, const TensorView& order, ParamData& data) {
  const TensorView buffer = view("critical_buffers", i, critical_buffer);
  check_device("critical_buffers", i, buffer.device, order.device);
  check_dtype("critical_buffers", i, buffer.dtype, order.dtype);
  STD_TORCH_CHECK(buffer.sizes.size() == order.sizes.size() + 1 && buffer.sizes[0] >= 1 &&
                      std::equal(order.sizes.begin(), order.sizes.end(), buffer.sizes.begin() + 1),
      "critical_buffers[", i, "] must have shape (capacity, *", to_string(order.sizes), "), got ",
      to_string(buffer.sizes));
  data.capacity = buffer.sizes[0];
  const IntHeaderOnlyArrayRef slot_strides(buffer.strides.data() + 1, order.strides.size());
  if (order.numel > 0) {
    check_strides("critical_buffers", i, order.sizes, slot_strides, order.strides);
    STD_TORCH_CHECK(data.capacity == 1 || buffer.strides[0] == order.numel, "critical_buffers[", i,
        "] must hold its slots one after the other, ", order.numel, " elements apart, got ",
        buffer.strides[0]);
  }
  data.critical_buffer = buffer.data;
}

int64_t* pending_slot_data(size_t i, const Tensor& pending_slot, Device device) {
  return bookkeeping<int64_t>(
      "pending_slots", i, pending_slot, 1, aoti_torch_dtype_int64(), device);
}

void check_lengths(const StateTensors& state, const Tensors& params, const Tensors& grads) {
  const size_t count = params.size();
  const auto optional_length = [&](const Tensors& list) { return list.empty() ? 0 : count; };
  check_length("grads", grads.size(), count);
  check_length("exp_avgs", state.exp_avgs.size(), count);
  check_length("exp_avg_sqs", state.exp_avg_sqs.size(), count);
  check_length(
      "max_exp_avg_sqs", state.max_exp_avg_sqs.size(), optional_length(state.max_exp_avg_sqs));
  check_length("critical_buffers", state.critical_buffers.size(), count);
  check_length("critical_sums", state.critical_sums.size(), optional_length(state.critical_sums));
  check_length("priorities", state.priorities.size(), count);
  check_length("pending_slots", state.pending_slots.size(), optional_length(state.pending_slots));
  check_length("steps", state.steps.size(), count);
}

namespace {

// Checks the state of parameter i and takes its addresses.
void describe_state(size_t i, const StateTensors& state, const TensorView& order, ParamData& data) {
  data.step_count = nullptr;  // until the checks below have passed
  check_dense(i, order);
  data.exp_avg = order.data;
  data.exp_avg_sq = state_data("exp_avg_sqs", i, state.exp_avg_sqs[i], order);
  if (!state.max_exp_avg_sqs.empty()) {
    data.max_exp_avg_sq = state_data("max_exp_avg_sqs", i, state.max_exp_avg_sqs[i], order);
  }
  if (!state.critical_sums.empty()) {
    data.critical_sum = state_data("critical_sums", i, state.critical_sums[i], order);
  }
  describe_buffer(i, state.critical_buffers[i], order, data);
  data.priorities = bookkeeping<float>("priorities", i, state.priorities[i], data.capacity,
      aoti_torch_dtype_float32(), order.device);
  if (!state.pending_slots.empty()) {
    data.pending_slot = pending_slot_data(i, state.pending_slots[i], order.device);
  }
  data.step_count =
      bookkeeping<float>("steps", i, state.steps[i], 1, aoti_torch_dtype_float32(), order.device);
}

// Whether a state tensor of parameter i lies elsewhere than when its addresses were taken, or none
// were.
bool state_moved(
    size_t i, const StateTensors& state, const TensorView& order, const ParamData& data) {
  const auto moved = [i](const Tensors& list, const void* address) {
    return !list.empty() && list[i].data_ptr() != address;
  };
  return data.step_count == nullptr || order.data != data.exp_avg ||
         moved(state.exp_avg_sqs, data.exp_avg_sq) ||
         moved(state.max_exp_avg_sqs, data.max_exp_avg_sq) ||
         moved(state.critical_buffers, data.critical_buffer) ||
         moved(state.critical_sums, data.critical_sum) ||
         moved(state.priorities, data.priorities) ||
         moved(state.pending_slots, data.pending_slot) || moved(state.steps, data.step_count);
}

}  // namespace

ParamViews describe_param(
    size_t i, const StateTensors& state, const Tensor& param, const Tensor& grad, ParamData& data) {
  const TensorView param_view = view("params", i, param);
  const TensorView order = view("exp_avgs", i, state.exp_avgs[i]);
  check_device("exp_avgs", i, order.device, param_view.device);
  check_sizes("exp_avgs", i, order.sizes, param_view.sizes);
  const TensorView grad_view = view_gradient(i, param_view, grad);
  data.dtype = param_dtype("params", i, param_view.dtype);
  check_dtype("exp_avgs", i, order.dtype, state_dtype(data.dtype));
  STD_TORCH_CHECK(
      lies_as(param_view, order) || has_no_overlap(param_view.sizes, param_view.strides), "params[",
      i, "] must not hold two elements in one place (an expanded tensor?), got shape ",
      to_string(param_view.sizes), " and strides ", to_string(param_view.strides));
  data.numel = param_view.numel;
  data.param = param_view.data;
  data.grad = grad_view.data;
  if (state_moved(i, state, order, data)) {
    describe_state(i, state, order, data);
  }
  return {param_view, grad_view, order};
}

}  // namespace cm_fused
