#include "bind.h"

#include <algorithm>
#include <type_traits>
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

bool lies_as(const TensorView& tensor, const TensorView& order) {
  return tensor.numel == 0 || same_strides(order.sizes, tensor.strides, order.strides);
}

TensorView view_gradient(size_t i, const TensorView& param, const Tensor& grad) {
  const TensorView result = view_metadata("grads", i, grad);
  check_device("grads", i, result.device, param.device);
  check_dtype("grads", i, result.dtype, param.dtype);
  check_sizes("grads", i, result.sizes, param.sizes);
  return result;
}

namespace {

// The dtype that a parameter's update is computed in, and its state has unless it has low
// precision.
int32_t update_dtype(ParamDtype dtype) {
  return dtype == ParamDtype::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// How a tensor of state is stored.
StoredDtype stored_dtype(const char* role, size_t i, int32_t dtype, ParamDtype param_dtype) {
  const int32_t unchanged = update_dtype(param_dtype);
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

// Whether an operator looks at a row that is there.
bool is_used(const StateRowInfo& row, const ParamData& data) {
  if (row.shape == StateShape::kScales || row.shape == StateShape::kSlotScales) {
    const bool of_slots = row.shape == StateShape::kSlotScales;
    return has_scales(of_slots ? data.slot_dtype : data.moment_dtype);
  }
  return row.dtype != StateDtype::kHalf || is_half(data.dtype);
}

// The number of elements that a row's tensor must have.
int64_t numel_of(StateShape shape, const ParamData& data) {
  switch (shape) {
    case StateShape::kParam:
      return data.numel;
    case StateShape::kSlots:
      return data.capacity * data.numel;
    case StateShape::kScales:
      return num_scales(data.numel);
    case StateShape::kSlotScales:
      return data.capacity * num_scales(data.numel);
    case StateShape::kKeys:
      return data.capacity;
    case StateShape::kOne:
      break;
  }
  return 1;
}

int32_t dtype_of(StateDtype dtype, const TensorView& order, const ParamData& data) {
  switch (dtype) {
    case StateDtype::kUpdate:
      return update_dtype(data.dtype);
    case StateDtype::kHalf:
      return data.dtype == ParamDtype::kBFloat16 ? aoti_torch_dtype_bfloat16()
                                                 : aoti_torch_dtype_float16();
    case StateDtype::kFloat32:
      return aoti_torch_dtype_float32();
    case StateDtype::kInt64:
      return aoti_torch_dtype_int64();
    case StateDtype::kMoment:
    case StateDtype::kSlot:
      break;
  }
  return order.dtype;
}

// Takes the capacity.
void check_slots(
    const char* role, size_t i, const TensorView& slots, const TensorView& order, ParamData& data) {
  STD_TORCH_CHECK(slots.sizes.size() == order.sizes.size() + 1 && slots.sizes[0] >= 1 &&
                      std::equal(order.sizes.begin(), order.sizes.end(), slots.sizes.begin() + 1),
      role, "[", i, "] must have shape (capacity, *", to_string(order.sizes), "), got ",
      to_string(slots.sizes));
  data.capacity = slots.sizes[0];
  if (order.numel > 0) {
    const IntHeaderOnlyArrayRef slot_strides(slots.strides.data() + 1, order.strides.size());
    check_strides(role, i, order.sizes, slot_strides, order.strides);
    STD_TORCH_CHECK(data.capacity == 1 || slots.strides[0] == order.numel, role, "[", i,
        "] must hold its slots one after the other, ", order.numel, " elements apart, got ",
        slots.strides[0]);
  }
}

void check_dense(const char* role, size_t i, const TensorView& tensor) {
  STD_TORCH_CHECK(tensor.numel == 0 || is_dense(tensor.sizes, tensor.strides), role, "[", i,
      "] must fill its memory without gaps or overlaps, got shape ", to_string(tensor.sizes),
      " and strides ", to_string(tensor.strides));
}

// Checks the tensor of a row and returns its address.
void* bind_row(
    StateRow row, size_t i, const StateTensors& state, const TensorView& order, ParamData& data) {
  const auto& [key, role, shape, dtype] = kStateRows[row];
  const TensorView tensor = view(role, i, state.at(row, i));
  check_device(role, i, tensor.device, order.device);
  if (dtype == StateDtype::kSlot) {
    data.slot_dtype = stored_dtype(role, i, tensor.dtype, data.dtype);
  } else {
    check_dtype(role, i, tensor.dtype, dtype_of(dtype, order, data));
  }
  if (shape == StateShape::kSlots) {
    check_slots(role, i, tensor, order, data);
  } else if (shape == StateShape::kParam) {
    check_sizes(role, i, tensor.sizes, order.sizes);
    check_strides(role, i, order.sizes, tensor.strides, order.strides);
  } else {
    check_flat(role, i, tensor, numel_of(shape, data));
  }
  if (row == kExpAvg) {
    check_dense(role, i, tensor);
  }
  return tensor.data;
}

// Whether a state tensor of parameter i lies elsewhere, or has another number of elements, than
// when it was bound; or none was. A tensor resized in place may keep its address.
bool has_moved(
    size_t i, const StateTensors& state, const TensorView& order, const ParamData& data) {
  bool moved = !data.is_bound || order.data != data.exp_avg || order.numel != data.numel;
  visit_state(data, [&](StateRow row, const void* address) {
    if (!moved && row != kExpAvg && address != nullptr) {
      const Tensor& tensor = state.at(row, i);
      moved =
          tensor.data_ptr() != address || tensor.numel() != numel_of(kStateRows[row].shape, data);
    }
  });
  return moved;
}

// Checks the memory of a parameter or its gradient, unless it is what was bound before.
template <typename Address>
bool bind_memory(const char* role, size_t i, const Tensor& tensor, const TensorView& view,
    Address& address, int64_t& extent) {
  const int64_t new_extent = view.extent();
  if (view.data == address && new_extent == extent) {
    return false;
  }
  check_memory(role, i, tensor, view);
  address = view.data;
  extent = new_extent;
  return true;
}

}  // namespace

StoredDtype moment_dtype(size_t i, int32_t dtype, ParamDtype param_dtype) {
  const StoredDtype stored = stored_dtype("exp_avgs", i, dtype, param_dtype);
  STD_TORCH_CHECK(stored != StoredDtype::kFloat16 && stored != StoredDtype::kFloat8, "exp_avgs[", i,
      "] must be float32, bfloat16 or int8, got ", dtype_name(dtype));
  return stored;
}

void bind_state(
    size_t i, const StateTensors& state, StateRows rows, const TensorView& order, ParamData& data) {
  visit_state(data, [&](StateRow row, auto*& address) {
    const StateRowInfo& info = kStateRows[row];
    address = nullptr;
    if ((rows >> row & 1) == 0 || !is_used(info, data)) {
      return;
    }
    const bool has_scales =
        info.shape == StateShape::kScales || info.shape == StateShape::kSlotScales;
    STD_TORCH_CHECK(!has_scales || state.has(row), info.role,
        " must be given: the state has a dtype with scales");
    if (state.has(row)) {
      address = static_cast<std::remove_reference_t<decltype(address)>>(
          bind_row(row, i, state, order, data));
    }
  });
}

void check_step(
    const StateTensors& state, std::span<const Tensor> params, std::span<const Tensor> grads) {
  check_length("exp_avgs", state.count(), params.size());
  check_length("grads", grads.size(), params.size());
  state.require(rows_of({kExpAvg, kExpAvgSq, kCriticalBuffer, kPriorities, kStep}));
}

ParamViews bind_param(
    size_t i, const StateTensors& state, const Tensor& param, const Tensor& grad, ParamData& data) {
  const TensorView param_view = view_metadata("params", i, param);
  const TensorView order = view_metadata("exp_avgs", i, state.at(kExpAvg, i));
  check_device("exp_avgs", i, order.device, param_view.device);
  check_sizes("exp_avgs", i, order.sizes, param_view.sizes);
  const TensorView grad_view = view_gradient(i, param_view, grad);
  const ParamDtype dtype = param_dtype("params", i, param_view.dtype);
  const StoredDtype stored = moment_dtype(i, order.dtype, dtype);
  if (data.dtype != dtype || data.moment_dtype != stored) {
    data = {};  // what all was checked against has changed
  }
  data.dtype = dtype;
  data.moment_dtype = stored;
  data.param_moved |= bind_memory("params", i, param, param_view, data.param, data.param_extent);
  bind_memory("grads", i, grad, grad_view, data.grad, data.grad_extent);
  STD_TORCH_CHECK(
      lies_as(param_view, order) || has_no_overlap(param_view.sizes, param_view.strides), "params[",
      i, "] must not hold two elements in one place (an expanded tensor?), got shape ",
      to_string(param_view.sizes), " and strides ", to_string(param_view.strides));
  if (has_moved(i, state, order, data)) {
    data.is_bound = false;  // until the checks below have passed
    data.numel = order.numel;
    bind_state(i, state, kAllStateRows, order, data);
    data.param_index = state.param_index(i);
    data.shard_layout = state.shard_layout(i);
    data.is_bound = true;
  }
  return {param_view, grad_view, order};
}

}  // namespace cm_fused
