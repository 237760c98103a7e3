#include "describe.h"

#include <algorithm>
#include <utility>

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

namespace {

// How a tensor of state is stored.
StoredDtype stored_dtype(const char* role, size_t i, int32_t dtype, ParamDtype param_dtype) {
  const int32_t unchanged = state_dtype(param_dtype);
  if (dtype == unchanged) {
    return StoredDtype::kUnchanged;
  }
  if (param_dtype != ParamDtype::kFloat64) {
    const std::pair<int32_t, StoredDtype> rounded[] = {
        {aoti_torch_dtype_bfloat16(), StoredDtype::kBFloat16},
        {aoti_torch_dtype_float16(), StoredDtype::kFloat16},
        {aoti_torch_dtype_float8_e4m3fn(), StoredDtype::kFloat8},
        {aoti_torch_dtype_int8(), StoredDtype::kInt8}};
    for (const auto& [stored, value] : rounded) {
      if (dtype == stored) {
        return value;
      }
    }
  }
  check_dtype(role, i, dtype, unchanged);  // says so
  return StoredDtype::kUnchanged;
}

}  // namespace

StoredDtype moment_dtype(size_t i, int32_t dtype, ParamDtype param_dtype) {
  const StoredDtype stored = stored_dtype("exp_avgs", i, dtype, param_dtype);
  STD_TORCH_CHECK(stored != StoredDtype::kFloat16 && stored != StoredDtype::kFloat8, "exp_avgs[", i,
      "] must be float32, bfloat16 or int8, got ", dtype_name(dtype));
  return stored;
}

void* state_data(
    const char* role, size_t i, const Tensor& tensor, const TensorView& order, int32_t dtype) {
  const TensorView state = view(role, i, tensor);
  check_device(role, i, state.device, order.device);
  check_dtype(role, i, state.dtype, dtype);
  check_sizes(role, i, state.sizes, order.sizes);
  check_strides(role, i, order.sizes, state.strides, order.strides);
  return state.data;
}

void describe_buffer(
    size_t i, const Tensor& critical_buffer, const TensorView& order, ParamData& data) {
  const TensorView buffer = view("critical_buffers", i, critical_buffer);
  check_device("critical_buffers", i, buffer.device, order.device);
  data.slot_dtype = stored_dtype("critical_buffers", i, buffer.dtype, data.dtype);
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

void check_lengths(
    const StateTensors& state, std::span<const Tensor> params, std::span<const Tensor> grads) {
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
  check_length(
      "critical_scales", state.critical_scales.size(), optional_length(state.critical_scales));
  check_length(
      "exp_avg_scales", state.exp_avg_scales.size(), optional_length(state.exp_avg_scales));
  check_length("exp_avg_sq_scales", state.exp_avg_sq_scales.size(),
      optional_length(state.exp_avg_sq_scales));
  check_length("compensations", state.compensations.size(), optional_length(state.compensations));
  STD_TORCH_CHECK(state.param_indices.empty() || state.param_indices.size() == count,
      "param_indices must have one number for each of the ", count, " params, got ",
      state.param_indices.size());
  STD_TORCH_CHECK(
      state.element_places.empty() || state.element_places.size() == kNumbersOfPlaces * count,
      "element_places must have three numbers for each of the ", count, " params, got ",
      state.element_places.size());
}

float* scales_data(const char* role, size_t i, const Tensors& list, StoredDtype dtype,
    int64_t slots, const TensorView& order) {
  if (!has_scales(dtype)) {
    return nullptr;
  }
  STD_TORCH_CHECK(!list.empty(), role, " must be given: the state has a dtype with scales");
  const TensorView scales = view(role, i, list[i]);
  check_device(role, i, scales.device, order.device);
  check_dtype(role, i, scales.dtype, aoti_torch_dtype_float32());
  const int64_t numel = slots * num_scales(order.numel);
  STD_TORCH_CHECK(scales.numel == numel && list[i].is_contiguous(), role, "[", i,
      "] must be contiguous with ", numel, " elements, got shape ", to_string(scales.sizes),
      " and strides ", to_string(scales.strides));
  return static_cast<float*>(scales.data);
}

namespace {

// Where the elements of parameter i lie in the whole parameter.
Places places_of(size_t i, const StateTensors& state) {
  if (state.element_places.empty()) {
    return {};
  }
  const int64_t* numbers = state.element_places.data() + kNumbersOfPlaces * i;
  const Places places{numbers[0], numbers[1], numbers[2]};
  STD_TORCH_CHECK(places.offset >= 0 && places.length >= 1 && places.stride >= places.length,
      "element_places of params[", i,
      "] must be an offset >= 0, a length >= 1 and a stride >= that, got (", places.offset, ", ",
      places.length, ", ", places.stride, ")");
  return places;
}

// What rounding takes from parameter i, or nullptr: parameters of the update's dtype lose nothing.
void* compensation_data(
    size_t i, const StateTensors& state, const TensorView& order, ParamDtype dtype) {
  if (state.compensations.empty() || dtype == ParamDtype::kFloat32 ||
      dtype == ParamDtype::kFloat64) {
    return nullptr;
  }
  const int32_t half =
      dtype == ParamDtype::kBFloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float16();
  return state_data("compensations", i, state.compensations[i], order, half);
}

// Checks the state of parameter i and takes its addresses.
void describe_state(size_t i, const StateTensors& state, const TensorView& order, ParamData& data) {
  data.step_count = nullptr;  // until the checks below have passed
  check_dense(i, order);
  data.exp_avg = order.data;
  data.exp_avg_sq = state_data("exp_avg_sqs", i, state.exp_avg_sqs[i], order, order.dtype);
  const int32_t unchanged = state_dtype(data.dtype);
  if (!state.max_exp_avg_sqs.empty()) {
    data.max_exp_avg_sq =
        state_data("max_exp_avg_sqs", i, state.max_exp_avg_sqs[i], order, unchanged);
  }
  if (!state.critical_sums.empty()) {
    data.critical_sum = state_data("critical_sums", i, state.critical_sums[i], order, unchanged);
  }
  describe_buffer(i, state.critical_buffers[i], order, data);
  data.critical_scales = scales_data(
      "critical_scales", i, state.critical_scales, data.slot_dtype, data.capacity, order);
  data.exp_avg_scales =
      scales_data("exp_avg_scales", i, state.exp_avg_scales, data.moment_dtype, 1, order);
  data.exp_avg_sq_scales =
      scales_data("exp_avg_sq_scales", i, state.exp_avg_sq_scales, data.moment_dtype, 1, order);
  data.compensation = compensation_data(i, state, order, data.dtype);
  data.param_index = state.param_indices.empty() ? static_cast<int64_t>(i) : state.param_indices[i];
  data.places = places_of(i, state);
  data.priorities = bookkeeping<float>("priorities", i, state.priorities[i], data.capacity,
      aoti_torch_dtype_float32(), order.device);
  if (!state.pending_slots.empty()) {
    data.pending_slot = pending_slot_data(i, state.pending_slots[i], order.device);
  }
  data.step_count =
      bookkeeping<float>("steps", i, state.steps[i], 1, aoti_torch_dtype_float32(), order.device);
}

// Whether a state tensor of parameter i lies elsewhere, or has another number of elements, than
// when its addresses were taken; or none were. A tensor resized in place may keep its address.
bool state_moved(
    size_t i, const StateTensors& state, const TensorView& order, const ParamData& data) {
  const auto moved = [i](const Tensors& list, const void* address, int64_t numel) {
    return !list.empty() && (list[i].data_ptr() != address || list[i].numel() != numel);
  };
  const auto scales_moved = [&](const Tensors& list, const void* address, int64_t slots) {
    return address != nullptr && moved(list, address, slots * num_scales(order.numel));
  };
  return data.step_count == nullptr || order.data != data.exp_avg ||
         moved(state.exp_avg_sqs, data.exp_avg_sq, order.numel) ||
         moved(state.max_exp_avg_sqs, data.max_exp_avg_sq, order.numel) ||
         moved(state.critical_buffers, data.critical_buffer, data.capacity * order.numel) ||
         moved(state.critical_sums, data.critical_sum, order.numel) ||
         moved(state.priorities, data.priorities, data.capacity) ||
         moved(state.pending_slots, data.pending_slot, 1) ||
         moved(state.steps, data.step_count, 1) ||
         scales_moved(state.critical_scales, data.critical_scales, data.capacity) ||
         scales_moved(state.exp_avg_scales, data.exp_avg_scales, 1) ||
         scales_moved(state.exp_avg_sq_scales, data.exp_avg_sq_scales, 1) ||
         (data.compensation != nullptr &&
             moved(state.compensations, data.compensation, order.numel));
}

}  // namespace

ParamViews describe_param(
    size_t i, const StateTensors& state, const Tensor& param, const Tensor& grad, ParamData& data) {
  const TensorView param_view = view("params", i, param);
  const TensorView order = view("exp_avgs", i, state.exp_avgs[i]);
  check_device("exp_avgs", i, order.device, param_view.device);
  check_sizes("exp_avgs", i, order.sizes, param_view.sizes);
  const TensorView grad_view = view_gradient(i, param_view, grad);
  const ParamDtype dtype = param_dtype("params", i, param_view.dtype);
  const StoredDtype stored = moment_dtype(i, order.dtype, dtype);
  if (data.dtype != dtype || data.moment_dtype != stored) {
    data.step_count = nullptr;  // what the state is checked against has changed
  }
  data.dtype = dtype;
  data.moment_dtype = stored;
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
