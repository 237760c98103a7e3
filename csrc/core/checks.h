// Checks of tensor lists. Every message names the list, the index, what it must be and what it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace cm_fused {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string to_string(IntHeaderOnlyArrayRef values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text + ")";
}

// The index of a tensor that is an argument by itself.
inline constexpr size_t kNoIndex = std::numeric_limits<size_t>::max();

inline std::string item(const char* role, size_t index) {
  return index == kNoIndex ? role : std::string(role) + "[" + std::to_string(index) + "]";
}

inline void check_length(const char* role, size_t length, size_t expected) {
  STD_TORCH_CHECK(length == expected, role, " must have one tensor for each of the ", expected,
      " params, got ", length);
}

struct Device {
  int32_t type;   // as aoti_torch_device_type_*()
  int32_t index;  // 0 on the CPU

  bool operator==(const Device&) const = default;
};

inline Device cpu_device() {
  return {aoti_torch_device_type_cpu(), 0};
}

inline std::string to_string(Device device) {
  if (device == cpu_device()) {
    return "cpu";
  }
  if (device.type == aoti_torch_device_type_cuda()) {
    return "cuda:" + std::to_string(device.index);
  }
  return "device " + std::to_string(device.index) + " of type " + std::to_string(device.type);
}

// What a step reads of a tensor, fetched with as few calls as will do: for a small tensor this is
// most of its step.
struct TensorView {
  void* data;
  int64_t numel;
  IntHeaderOnlyArrayRef sizes;
  IntHeaderOnlyArrayRef strides;
  int32_t dtype;  // as aoti_torch_dtype_*()
  Device device;
};

// A storage may have been resized under its tensor, or be none at all: reading it would crash.
inline void check_memory(
    const char* role, size_t index, AtenTensorHandle handle, const TensorView& tensor) {
  if (tensor.numel == 0 || tensor.device.type == aoti_torch_device_type_meta()) {
    return;
  }
  int64_t storage_bytes = 0;
  int64_t offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &storage_bytes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
  const auto element_bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(tensor.dtype));
  int64_t end = offset + 1;
  for (size_t d = 0; d < tensor.sizes.size(); ++d) {
    end += (tensor.sizes[d] - 1) * tensor.strides[d];
  }
  const auto address = reinterpret_cast<uintptr_t>(tensor.data);
  const bool has_memory = address != static_cast<uintptr_t>(offset * element_bytes);
  STD_TORCH_CHECK(has_memory && end * element_bytes <= storage_bytes, item(role, index),
      " must have its memory: its elements end at byte ", end * element_bytes, " of a storage of ",
      has_memory ? storage_bytes : 0, " bytes");
}

// Views a dense tensor on any device, whose memory it does not touch.
inline TensorView view(const char* role, size_t index, const Tensor& tensor) {
  const AtenTensorHandle handle = tensor.get();
  void* data = nullptr;
  int64_t numel = 0;
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0;
  Device device{};
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), item(role, index),
      " must be a strided tensor, not a sparse one");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device.type));
  if (device.type != aoti_torch_device_type_cpu()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device.index));
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &numel));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  const auto length = static_cast<size_t>(dim);
  const TensorView result{data, numel, {sizes, length}, {strides, length}, dtype, device};
  check_memory(role, index, handle, result);
  return result;
}

inline void check_device(const char* role, size_t index, Device device, Device expected) {
  STD_TORCH_CHECK(device == expected, item(role, index), " must be on ", to_string(expected),
      ", got ", to_string(device));
}

inline const char* dtype_name(int32_t dtype) {
  return torch::headeronly::toString(
      torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype)));
}

inline void check_dtype(const char* role, size_t index, int32_t dtype, int32_t expected) {
  STD_TORCH_CHECK(dtype == expected, item(role, index), " must have dtype ", dtype_name(expected),
      ", got ", dtype_name(dtype));
}

inline void check_sizes(
    const char* role, size_t index, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef expected) {
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()),
      item(role, index), " must have shape ", to_string(expected), ", got ", to_string(sizes));
}

// Whether strides a and b put the elements of a tensor of these sizes in the same places.
inline bool same_strides(
    IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef a, IntHeaderOnlyArrayRef b) {
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && a[d] != b[d]) {
      return false;
    }
  }
  return true;
}

inline void check_strides(const char* role, size_t index, IntHeaderOnlyArrayRef sizes,
    IntHeaderOnlyArrayRef strides, IntHeaderOnlyArrayRef expected) {
  STD_TORCH_CHECK(same_strides(sizes, strides, expected), item(role, index),
      " must have the strides ", to_string(expected), " of exp_avgs[", index, "], got ",
      to_string(strides));
}

// The data of a small tensor of bookkeeping: `numel` consecutive values of one dtype.
template <typename value_t>
inline value_t* bookkeeping(const char* role, size_t index, const Tensor& tensor, int64_t numel,
    int32_t dtype, Device device) {
  const TensorView values = view(role, index, tensor);
  check_device(role, index, values.device, device);
  check_dtype(role, index, values.dtype, dtype);
  STD_TORCH_CHECK(
      values.numel == numel && (numel == 1 || (values.sizes.size() == 1 && values.strides[0] == 1)),
      item(role, index), " must be contiguous with ", numel, " elements, got shape ",
      to_string(values.sizes), " and strides ", to_string(values.strides));
  return static_cast<value_t*>(values.data);
}

// Dimensions of more than one element, from the largest stride to the smallest.
inline std::vector<size_t> memory_order(
    IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1) {
      order.push_back(d);
    }
  }
  std::stable_sort(
      order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

// Whether the elements fill a range of memory, each its own place.
inline bool is_dense(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  const auto order = memory_order(sizes, strides);
  int64_t expected = 1;
  return std::all_of(order.rbegin(), order.rend(), [&](size_t d) {
    const bool matches = strides[d] == expected;
    expected *= sizes[d];
    return matches;
  });
}

inline std::vector<int64_t> contiguous_strides(IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return strides;
}

// Whether no two elements share a place: sufficient, and true of every slice of a dense tensor.
inline bool has_no_overlap(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  const auto order = memory_order(sizes, strides);
  int64_t extent = 0;
  return std::all_of(order.rbegin(), order.rend(), [&](size_t d) {
    const bool clears = strides[d] > extent;
    extent += (sizes[d] - 1) * strides[d];
    return clears;
  });
}

}  // namespace cm_fused
