// What state.h declares of binding: bind_state and bind_param, with their checks.
#include <algorithm>
#include <array>
#include <iterator>
#include <type_traits>

#include "state.h"

namespace cm_fused {
namespace {

// In the order of ParamDtype.
const auto& param_dtypes() {
  static const std::array dtypes{aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
      aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return dtypes;
}

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
    // In the order of StoredDtype, from kBFloat16 on.
    const int32_t rounded[] = {aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
        aoti_torch_dtype_float8_e4m3fn(), aoti_torch_dtype_int8(), aoti_torch_dtype_uint8()};
    if (const auto* const found = std::ranges::find(rounded, dtype); found != std::end(rounded)) {
      return static_cast<StoredDtype>(found - rounded + 1);
    }
  }
  check_dtype(role, i, dtype, unchanged);  // says so
  return StoredDtype::kUnchanged;
}

// Whether an operator looks at a row that is there.
bool is_used(const StateRowInfo& row, const ParamData& data) {
  return (row.unit != StateUnit::kBlock ||
             has_scales(row.each_slot ? data.slot_dtype : data.moment_dtype)) &&
         (row.dtype != StateDtype::kHalf || is_half(data.dtype)) &&
         (row.dtype != StateDtype::kInt16 || data.dtype == ParamDtype::kBFloat16);
}

// The number of elements that a row's tensor must have.
int64_t numel_of(const StateRowInfo& row, const ParamData& data) {
  const int64_t each =
      row.unit == StateUnit::kElement
          ? (row.each_slot ? stored_numel(data.numel, data.slot_dtype) : data.numel)
      : row.unit == StateUnit::kBlock ? num_scales(data.numel)
                                      : 1;
  return row.each_slot ? data.capacity * each : each;
}

int32_t dtype_of(StateDtype dtype, const TensorView& order, const ParamData& data) {
  switch (dtype) {
    case StateDtype::kUpdate:
      return update_dtype(data.dtype);
    case StateDtype::kHalf:
      return param_dtypes()[static_cast<size_t>(data.dtype)];
    case StateDtype::kInt16:
      return aoti_torch_dtype_int16();
    case StateDtype::kFloat32:
      return aoti_torch_dtype_float32();
    case StateDtype::kInt64:
      return aoti_torch_dtype_int64();
    default:
      return order.dtype;
  }
}

// Takes the capacity.
void check_packed_slots(const char* role, size_t i, const TensorView& slots, ParamData& data) {
  const int64_t size = stored_numel(data.numel, data.slot_dtype);
  STD_TORCH_CHECK(slots.sizes.size() == 2 && slots.sizes[0] >= 1 && slots.sizes[1] == size, role,
      "[", i, "] must have shape (capacity, ", size, "), got ", to_string(slots.sizes));
  data.capacity = slots.sizes[0];
  check_flat(role, i, slots, data.capacity * size);
}

// Takes the capacity.
void check_slots(
    const char* role, size_t i, const TensorView& slots, const TensorView& order, ParamData& data) {
  if (data.slot_dtype == StoredDtype::kInt4) {
    check_packed_slots(role, i, slots, data);
    return;
  }
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

// Checks the tensor of a row and returns its address.
void* bind_row(
    StateRow row, size_t i, const StateTensors& state, const TensorView& order, ParamData& data) {
  const StateRowInfo& info = kStateRows[row];
  const char* const role = info.role;
  const TensorView tensor = view(role, i, state.at(row, i));
  check_device(role, i, tensor.device, order.device);
  if (info.dtype == StateDtype::kSlot) {
    data.slot_dtype = stored_dtype(role, i, tensor.dtype, data.dtype);
  } else {
    check_dtype(role, i, tensor.dtype, dtype_of(info.dtype, order, data));
  }
  if (info.unit != StateUnit::kElement) {
    check_flat(role, i, tensor, numel_of(info, data));
  } else if (info.each_slot) {
    check_slots(role, i, tensor, order, data);
  } else {
    check_sizes(role, i, tensor.sizes, order.sizes);
    check_strides(role, i, order.sizes, tensor.strides, order.strides);
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
      moved = tensor.data_ptr() != address || tensor.numel() != numel_of(kStateRows[row], data);
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

ParamDtype param_dtype(const char* role, size_t index, int32_t dtype) {
  const auto found = std::ranges::find(param_dtypes(), dtype);
  STD_TORCH_CHECK(found != param_dtypes().end(), role, "[", index,
      "] must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  return static_cast<ParamDtype>(found - param_dtypes().begin());
}

bool lies_as(const TensorView& tensor, const TensorView& order) {
  return tensor.numel == 0 || same_strides(order.sizes, tensor.strides, order.strides);
}

TensorView view_gradient(size_t i, const TensorView& param, const Tensor& grad) {
  const TensorView result = view_metadata("grads", i, grad);
  check_device("grads", i, result.device, param.device);
  if (param.dtype != aoti_torch_dtype_float32() ||
      (result.dtype != aoti_torch_dtype_bfloat16() && result.dtype != aoti_torch_dtype_float16())) {
    check_dtype("grads", i, result.dtype, param.dtype);
  }
  check_sizes("grads", i, result.sizes, param.sizes);
  return result;
}

StoredDtype moment_dtype(size_t i, int32_t dtype, ParamDtype param_dtype) {
  const StoredDtype stored = stored_dtype("exp_avgs", i, dtype, param_dtype);
  STD_TORCH_CHECK(stored == StoredDtype::kUnchanged || stored == StoredDtype::kBFloat16 ||
                      stored == StoredDtype::kInt8,
      "exp_avgs[", i, "] must be float32, bfloat16 or int8, got ", dtype_name(dtype));
  return stored;
}

void bind_state(
    size_t i, const StateTensors& state, StateRows rows, const TensorView& order, ParamData& data) {
  STD_TORCH_CHECK((rows & bit(kExpAvg)) == 0 || order.numel == 0 ||
                      extent_without_overlap(order.sizes, order.strides) == order.numel,
      "exp_avgs[", i, "] must fill its memory without gaps or overlaps, got shape ",
      to_string(order.sizes), " and strides ", to_string(order.strides));
  visit_state(data, [&](StateRow row, auto*& address) {
    const StateRowInfo& info = kStateRows[row];
    address = nullptr;
    if ((rows & bit(row)) == 0 || !is_used(info, data)) {
      return;
    }
    STD_TORCH_CHECK(info.unit != StateUnit::kBlock || state.has(row), info.role,
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
  state.require(bit(kExpAvg) | bit(kExpAvgSq) | bit(kStep));
  if (state.has_buffer()) {
    state.require(bit(kCriticalBuffer) | bit(kPriorities));
  }
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
    // What all was checked against has changed.
    data.is_bound = false;
    data.param = nullptr;
    data.grad = nullptr;
  }
  const ParamDtype grad_dtype = param_dtype("grads", i, grad_view.dtype);
  if (data.grad_dtype != grad_dtype) {
    data.grad = nullptr;  // whose elements had another size
  }
  data.dtype = dtype;
  data.grad_dtype = grad_dtype;
  data.moment_dtype = stored;
  data.num_moves += bind_memory("params", i, param, param_view, data.param, data.param_extent);
  bind_memory("grads", i, grad, grad_view, data.grad, data.grad_extent);
  STD_TORCH_CHECK(lies_as(param_view, order) ||
                      extent_without_overlap(param_view.sizes, param_view.strides) > 0,
      "params[", i, "] must not hold two elements in one place (an expanded tensor?), got shape ",
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
